# SPDX-License-Identifier: Apache-2.0
"""Report which kernels are in use, for callers that choose between two equivalent methods."""

from . import _C


def cpu_kernel(op: str) -> str:
    """Return the kernel that an op uses on this processor: "generic" or an instruction set, such as "avx512"."""
    return _C.cpu_kernels()[op][_C.cpu_isa()]
