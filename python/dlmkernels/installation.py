# SPDX-License-Identifier: Apache-2.0
"""Explain why an installation does not load, and how to fix it, for users who see an ImportError."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import platform
import sys
from pathlib import Path

OLDEST_TORCH = "2.11"


def why_not_loaded(error: ImportError, folder: Path = Path(__file__).parent) -> str:
    """Explain an ImportError of torch or of `_C`.

    Parameters
    ----------
    error
        The exception, as caught.
    folder
        The package's folder, which holds `_C` for each Python version.

    Returns
    -------
    str
        One or two sentences: what is missing, and the command that fixes it.
    """
    here = f"{platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]}"
    if error.name == "torch":
        return (
            f"dlmkernels needs torch >= {OLDEST_TORCH}, which {sys.executable} does not have: see https://pytorch.org"
        )
    if not any((folder / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        built = sorted(path.name.split(".")[1] for path in folder.glob("_C.*.so"))
        if not built:
            return f"{folder} holds sources that were never built: run pip install --no-build-isolation -e . there"
        return (
            f"this build of dlmkernels is for {', '.join(built)}, but this is {here} "
            f"({importlib.machinery.EXTENSION_SUFFIXES[0][1:-3]}). Use one of those, or build dlmkernels for "
            "this Python: pip install --no-build-isolation --no-binary dlmkernels dlmkernels"
        )
    if "undefined symbol" in str(error):
        return (
            f"dlmkernels does not work with torch {_version('torch')}: it needs {OLDEST_TORCH} or newer, and, if "
            f"built here, at least the version it was built with. Run pip install -U torch, or rebuild it ({error})"
        )
    return f"dlmkernels does not load on {here}: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
