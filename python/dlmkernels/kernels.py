# SPDX-License-Identifier: Apache-2.0
"""What is known of the kernels in use, for those who choose between two ways to the same result."""

from . import _C


def cpu_kernel(op: str) -> str:
    """Whose kernel an op has on this processor: "generic" or the name of an instruction set, such as "avx512"."""
    return _C.cpu_kernels()[op][_C.cpu_isa()]
