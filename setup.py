# SPDX-License-Identifier: Apache-2.0
"""Build dlmkernels by running CMake. Sources, flags and architectures are listed only in CMakeLists.txt.

Environment variables: `DLMKERNELS_CUDA` (auto, 0, 1), `DLMKERNELS_PYTHONS` (interpreters to build the bindings for,
separated like the entries of PATH; by default the running one), `DLMKERNELS_LOCAL_VERSION` (`cu13` turns 0.1.0 into
0.1.0+cu13), `MAX_JOBS`, `CMAKE_ARGS`.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
import backend  # noqa: E402

BUILDS = {"build_ext", "bdist_wheel", "dist_info", "editable_wheel", "install", "develop"}
if BUILDS & set(sys.argv):
    # For direct calls of setup.py; pip has already called the backend. The imports below fail with an old setuptools.
    backend.check()

from setuptools import Distribution, Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

PYTHONS = [python for python in os.environ.get("DLMKERNELS_PYTHONS", "").split(os.pathsep) if python]


def build_jobs() -> int:
    """Return the number of parallel compilers: one per core, but at most one per three gigabytes of memory."""
    if jobs := os.environ.get("MAX_JOBS"):
        return int(jobs)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return max(1, min(os.cpu_count() or 1, gigabytes // 3))


def run(*command: object) -> None:
    """Run a build step, and exit without a traceback if it fails.

    The failed step has printed its own error, which a traceback of this file would hide.
    """
    if code := subprocess.run([str(part) for part in command]).returncode:
        sys.exit(f"dlmkernels was not built: `{Path(str(command[0])).name} {command[1]}` failed ({code}), see above.")


class CMakeBuild(build_ext):
    """Configure, build and install the CMake targets: the library, and _C for each interpreter."""

    def build_extension(self, ext):
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        args = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DDLMKERNELS_VERSION={self.distribution.get_version()}",
            # Always passed, since CMake's cache would otherwise keep an earlier value.
            f"-DDLMKERNELS_CUDA={os.environ.get('DLMKERNELS_CUDA') or 'auto'}",
            f"-DDLMKERNELS_PYTHONS={';'.join(PYTHONS)}",
        ]
        if ninja := backend.tool("ninja"):
            args += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        args += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self.cmake = backend.tool("cmake") or "cmake"
        self.build_folder = build
        run(self.cmake, "-S", ROOT, "-B", build, *args)
        run(self.cmake, "--build", build, "--parallel", build_jobs())
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for old in out.glob("_C.*.so"):  # from an earlier build for other interpreters
            old.unlink()
        run(self.cmake, "--install", build, "--prefix", out)

    def copy_extensions_to_source(self):
        """Install into the source tree, for editable installs: setuptools would copy _C but not the library."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("dlmkernels")).resolve()
        run(self.cmake, "--install", self.build_folder, "--prefix", package)


class Wheel(bdist_wheel):
    """A platform wheel for all interpreters that it contains a _C for."""

    def get_tag(self):
        find_python = [str(ROOT / "cmake" / "find_python.py")]
        tags = [
            subprocess.run([python, *find_python], check=True, capture_output=True, text=True).stdout.split(";")[0]
            for python in PYTHONS or [sys.executable]
        ]
        return ".".join(dict.fromkeys(tags)), "none", super().get_tag()[2]


class WithLocalVersion(Distribution):
    """A distribution with the version of pyproject.toml plus a local suffix that tells its builds apart."""

    def parse_config_files(self, *args, **kwargs):
        super().parse_config_files(*args, **kwargs)
        if local := os.environ.get("DLMKERNELS_LOCAL_VERSION"):
            self.metadata.version = f"{self.metadata.version}+{local}"


setup(
    ext_modules=[Extension("dlmkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    distclass=WithLocalVersion,
)
