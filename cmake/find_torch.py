# SPDX-License-Identifier: Apache-2.0
"""Find the torch to build against without importing it; print ROOT;VERSION;CUDA for CMake.

Importing torch would cost seconds, and pip's build isolation hides it from `sys.path` while `sysconfig` still names
the folder it lives in.
"""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

MESSAGE = """dlmkernels compiles against the headers of the torch it will run with, and found none.
  1. install torch >= 2.11 (a CPU or a CUDA build),
  2. then run: pip install --no-build-isolation .
Or set DLMKERNELS_TORCH_ROOT to the folder that holds torch's `include`."""


def candidates():
    """Yield the folders that may hold torch, the most deliberate first."""
    if root := os.environ.get("DLMKERNELS_TORCH_ROOT"):
        yield Path(root)
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    for kind in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(kind)) / "torch"


def find_torch():
    """Return (root, version, cuda version or ''), or None when there is no torch with stable-ABI headers."""
    for root in candidates():
        if (root / "include/torch/csrc/stable/library.h").exists():
            text = (root / "version.py").read_text(encoding="utf-8")
            version = re.search(r"__version__\s*=\s*'([^']+)'", text)
            cuda = re.search(r"^cuda[^=\n]*=\s*'([^']+)'", text, re.M)
            return root, version.group(1) if version else "unknown", cuda.group(1) if cuda else ""
    return None


if __name__ == "__main__":
    hit = find_torch()
    if hit is None:
        sys.exit(MESSAGE)
    print(*hit, sep=";", end="")
