# SPDX-License-Identifier: Apache-2.0
"""Build dlmkernels._C by driving CMake; sources, flags and architectures are listed in CMakeLists.txt alone."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
import backend  # noqa: E402

BUILDS = {"build_ext", "bdist_wheel", "dist_info", "editable_wheel", "install", "develop"}


def build_jobs() -> int:
    """As many compilers as there are cores and gigabytes of memory to feed them."""
    if jobs := os.environ.get("MAX_JOBS"):
        return int(jobs)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return max(1, min(os.cpu_count() or 1, gigabytes // 3))


class CMakeBuild(build_ext):
    """Configure, build and install the one CMake target."""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        args = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DDLMKERNELS_VERSION={self.distribution.get_version()}",
            # Said every time: the build folder would remember another answer.
            f"-DDLMKERNELS_CUDA={os.environ.get('DLMKERNELS_CUDA') or 'auto'}",
        ]
        if ninja := backend.tool("ninja"):
            args += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        cmake = backend.tool("cmake") or "cmake"
        subprocess.run([cmake, "-S", ROOT, "-B", build, *args], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", str(build_jobs())], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", out], check=True)


if BUILDS & set(sys.argv):
    # For those who call it directly; pip has asked the backend before.
    backend.check()

setup(ext_modules=[Extension("dlmkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
