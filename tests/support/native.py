# SPDX-License-Identifier: Apache-2.0
"""Functions of csrc/common, compiled on the spot and called on tensors; skips where there is no compiler."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def _library():
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="dlmkernels-tests-"))
    library = folder / "common.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, ROOT / "tests/cpp/common.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


def call(name, x, dtype, *scalars):
    """Apply the function of this name in tests/cpp/common.cpp to every element of x (a contiguous tensor)."""
    library = _library()
    if library is None:
        pytest.skip("no C++ compiler")
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    rows = len(x)
    getattr(library, name)(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(rows), *scalars
    )
    return out
