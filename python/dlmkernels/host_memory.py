# SPDX-License-Identifier: Apache-2.0
"""Make the C library keep memory that a forward pass on the CPU has freed.

A forward pass allocates and frees activations of several megabytes again and again. By default, glibc returns such
memory to the system as soon as it is freed, and the system hands out fresh pages the next time, which it zeroes at the
first access: one page fault for every four kilobytes. In steps that process many rows, this takes up to a third of
the time of a forward pass. glibc can be configured to keep freed memory (mallopt(3), M_MMAP_THRESHOLD and
M_TRIM_THRESHOLD).
"""

from __future__ import annotations

import ctypes
import os
import sys

from .wait_policy import is_command_line

#: Constants of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Blocks up to this size are allocated from memory that is kept. This is the largest value that glibc accepts.
MMAP_THRESHOLD = 32 * 2**20
#: Amount of free memory that is kept.
TRIM_THRESHOLD = 512 * 2**20
#: If any of these environment variables is set, the user has made a choice.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep() -> bool:
    """Make the C library keep freed memory, up to half a gigabyte, for the whole process.

    Returns
    -------
    bool
        Whether it now does so. False if the C library is not glibc, or if it refuses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD))


def choose() -> None:
    """Keep freed memory if this process is the `dlmkernels` command and the user has not configured malloc."""
    if is_command_line(sys.orig_argv) and not any(name in os.environ for name in VARIABLES):
        keep()
