# SPDX-License-Identifier: Apache-2.0
"""How the C library treats memory that a forward on the CPU has given back.

A forward allocates and frees activations of some megabytes again and again. By default glibc hands such memory back to
the system as soon as it is free, and the system gives out fresh pages the next time, each zeroed at its first touch: a
page fault for every four kilobytes. Where a forward of one step takes many rows, that is up to a third of its time.
Told to, glibc keeps what is free (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
"""

from __future__ import annotations

import ctypes
import os
import sys

from .wait_policy import is_command_line

#: of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: blocks up to this size come out of memory that is kept: the largest that glibc accepts
MMAP_THRESHOLD = 32 * 2**20
#: so much free memory is kept
TRIM_THRESHOLD = 512 * 2**20
#: where one of these is set, the user has chosen
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep() -> bool:
    """Let the C library keep memory that has become free, up to half a gigabyte, for the whole process.

    Returns
    -------
    bool
        Whether it does so now. False where it is not glibc, or refuses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD))


def choose() -> None:
    """Keep memory in a process of our own; in any other, and where the user has chosen, change nothing."""
    if is_command_line(sys.orig_argv) and not any(name in os.environ for name in VARIABLES):
        keep()
