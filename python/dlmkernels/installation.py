# SPDX-License-Identifier: Apache-2.0
"""Why an installation does not load, and what to type: for those who import the package and see an ImportError."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import platform
import sys
from pathlib import Path

OLDEST_TORCH = "2.11"


def why_not_loaded(error: ImportError, folder: Path = Path(__file__).parent) -> str:
    """What an ImportError of torch or of `_C` means.

    Parameters
    ----------
    error
        As caught.
    folder
        Of the package, where `_C` of each Python stands.

    Returns
    -------
    str
        One or two sentences: what is missing, and the command that brings it.
    """
    here = f"{platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]}"
    if error.name == "torch":
        return (
            f"dlmkernels needs torch >= {OLDEST_TORCH}, which {sys.executable} does not have: see https://pytorch.org"
        )
    if not any((folder / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        built = sorted(path.name.split(".")[1] for path in folder.glob("_C.*.so"))
        if not built:
            return (
                f"{folder} holds sources that were never built: pip install --no-build-isolation -e . in their folder"
            )
        return (
            f"this build of dlmkernels is for {', '.join(built)}; this is {here} "
            f"({importlib.machinery.EXTENSION_SUFFIXES[0][1:-3]}). Use one of those, or build it for this one: "
            "pip install --no-build-isolation --no-binary dlmkernels dlmkernels"
        )
    if "undefined symbol" in str(error):
        return (
            f"dlmkernels does not fit torch {_version('torch')}: it needs {OLDEST_TORCH} or newer, and if it was built "
            f"here, one no older than it was built with. pip install -U torch, or build dlmkernels again ({error})"
        )
    return f"dlmkernels does not load on {here}: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
