# SPDX-License-Identifier: Apache-2.0
"""Find the torch to build against without importing it; print ROOT;VERSION;CUDA for CMake.

Importing torch would take seconds. pip's build isolation hides it from `sys.path`, but `sysconfig` still names the
folder that contains it.
"""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

LEAST = (2, 11)  # TORCH_TARGET_VERSION in CMakeLists.txt
MESSAGE = """dlmkernels compiles against the headers of the torch it will run with, and found none.
  1. install torch >= 2.11 (a CPU or a CUDA build),
  2. then run: pip install --no-build-isolation .
Or set DLMKERNELS_TORCH_ROOT to the folder that contains torch's `include`."""
TOO_OLD = """dlmkernels needs torch >= 2.11; {root} is torch {version}.
  1. run: pip install -U "torch>=2.11"
  2. then: pip install --no-build-isolation ."""


def candidates():
    """Yield the folders that may contain torch, explicitly chosen ones first."""
    if root := os.environ.get("DLMKERNELS_TORCH_ROOT"):
        yield Path(root)
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    for kind in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(kind)) / "torch"


def described(root):
    """Return (version, cuda version or '') of the torch in a folder, or None if there is none."""
    if not (root / "version.py").exists():
        return None
    text = (root / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__\s*=\s*'([^']+)'", text)
    cuda = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.M)
    return version.group(1) if version else "unknown", cuda.group(1) if cuda else ""


def recent_enough(version):
    """Return whether a version is new enough; a version without numbers is accepted."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return not numbers or numbers >= LEAST


def find_torch():
    """Return (root, version, cuda version or ''), or None when there is no torch with stable-ABI headers."""
    for root in candidates():
        found = described(root)
        if found and recent_enough(found[0]) and (root / "include/torch/csrc/stable/library.h").exists():
            return (root, *found)
    return None


def message():
    """Return what to do if `find_torch` finds nothing."""
    for root in candidates():
        if (found := described(root)) and not recent_enough(found[0]):
            return TOO_OLD.format(root=root, version=found[0])
    return MESSAGE


if __name__ == "__main__":
    hit = find_torch()
    if hit is None:
        sys.exit(message())
    print(*hit, sep=";", end="")
