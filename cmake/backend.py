# SPDX-License-Identifier: Apache-2.0
"""Build backend: that of setuptools, after a check that everything the build needs is present.

pip calls `get_requires_for_build_…` (or, without build isolation, asks for the metadata: `setup.py dist_info`) before
it resolves `torch>=2.11` by itself and downloads gigabytes. Missing requirements are reported in one sentence, where
pip would show a traceback of the first tool that fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import find_torch

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> str | None:
    """Return the path of a build tool, also if it is installed in an environment that is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def version_of(module: str) -> tuple[int, ...]:
    """Return the version of an installed package, or () if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(module)))
    except PackageNotFoundError:
        return ()


def missing() -> list[str]:
    """Return the entries of `[build-system] requires` that this interpreter lacks."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requires,) = re.findall(r"^requires = .*$", text, re.M)
    lacking = []
    for name, least in re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', requires):
        if name == "ninja":
            continue  # optional: make works as well
        if name == "cmake":
            found = tool(name) is not None  # any installation will do
        else:
            found = importlib.util.find_spec(name) is not None and version_of(name) >= tuple(map(int, least.split(".")))
        if not found:
            lacking.append(f"{name}>={least}" if least else name)
    return lacking


# The C++17 language and library features that the sources need.
PROBE = """#include <optional>
int main() { if constexpr (std::optional<int>(1).has_value() || true) return 0; }
"""
GET_COMPILER = """Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda install gxx)
or set CXX to one."""


def compiler_problem() -> str | None:
    """Return what is wrong with the C++ compiler that CMake would use, or None."""
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
    else:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        what = f"CXX={asked} is not a program" if asked else "no C++ compiler (c++, g++, clang++) is on PATH"
        return f"dlmkernels cannot be built: {what}.\n{GET_COMPILER}"
    arguments = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run([*command, *arguments], input=PROBE, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no error message"])[0]
        return (
            f"dlmkernels cannot be built: {' '.join(command)} does not compile C++17 ({said}); "
            f"GCC 9 or Clang 9 or newer is needed.\n{GET_COMPILER}"
        )
    return None


def check() -> None:
    """Exit with one sentence if something is missing."""
    if find_torch.find_torch() is None:
        sys.exit(find_torch.message())
    if lacking := missing():
        packages = " ".join(f'"{name}"' for name in lacking)
        sys.exit(f"dlmkernels cannot be built yet: first run pip install {packages}")
    if problem := compiler_problem():
        sys.exit(problem)


if importlib.util.find_spec("setuptools") is None:  # as in a new environment with Python 3.12 or later

    def build_wheel(*args, **kwargs):
        check()

    build_editable = prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = build_wheel
else:
    from setuptools import build_meta as _setuptools

    build_wheel = _setuptools.build_wheel
    build_sdist = _setuptools.build_sdist
    build_editable = _setuptools.build_editable
    get_requires_for_build_sdist = _setuptools.get_requires_for_build_sdist
    prepare_metadata_for_build_wheel = _setuptools.prepare_metadata_for_build_wheel
    prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable

    def get_requires_for_build_wheel(config_settings=None):
        check()
        return _setuptools.get_requires_for_build_wheel(config_settings)

    def get_requires_for_build_editable(config_settings=None):
        check()
        return _setuptools.get_requires_for_build_editable(config_settings)
