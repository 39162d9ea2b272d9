# SPDX-License-Identifier: Apache-2.0
"""The build backend: setuptools', once all that a build needs is known to be there.

pip asks for `get_requires_for_build_…` (or, without build isolation, for the metadata: `setup.py dist_info`) before it
resolves `torch>=2.11` by itself and downloads gigabytes. What is missing is said in one sentence, where pip would show
a traceback of whichever tool fails first.
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
    """A program of a build, which may have been installed beside an interpreter whose environment is not active."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def version_of(module: str) -> tuple[int, ...]:
    """The version of an installed package, () if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(module)))
    except PackageNotFoundError:
        return ()


def missing() -> list[str]:
    """What `[build-system] requires` asks for and this interpreter lacks."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requires,) = re.findall(r"^requires = .*$", text, re.M)
    lacking = []
    for name, least in re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', requires):
        if name == "ninja":
            continue  # make does as well
        if name == "cmake":
            found = tool(name) is not None  # from anywhere
        else:
            found = importlib.util.find_spec(name) is not None and version_of(name) >= tuple(map(int, least.split(".")))
        if not found:
            lacking.append(f"{name}>={least}" if least else name)
    return lacking


# What the sources need of C++17, in the language and in its library.
PROBE = """#include <optional>
int main() { if constexpr (std::optional<int>(1).has_value() || true) return 0; }
"""
GET_COMPILER = """Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda install gxx)
or set CXX to one."""


def compiler_problem() -> str | None:
    """What is wrong with the C++ compiler that CMake would take, None if nothing is."""
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
    else:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        what = f"CXX={asked} is no program" if asked else "no C++ compiler (c++, g++, clang++) is on PATH"
        return f"dlmkernels cannot be built: {what}.\n{GET_COMPILER}"
    arguments = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run([*command, *arguments], input=PROBE, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        return (
            f"dlmkernels cannot be built: {' '.join(command)} does not compile C++17 ({said}); "
            f"GCC 9 or Clang 9 and newer do.\n{GET_COMPILER}"
        )
    return None


def check() -> None:
    """Stop, with one sentence, if something is missing."""
    if find_torch.find_torch() is None:
        sys.exit(find_torch.message())
    if lacking := missing():
        packages = " ".join(f'"{name}"' for name in lacking)
        sys.exit(f"dlmkernels cannot be built yet: run first pip install {packages}")
    if problem := compiler_problem():
        sys.exit(problem)


if importlib.util.find_spec("setuptools") is None:  # as in a new environment of Python 3.12 or later

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
