# SPDX-License-Identifier: Apache-2.0
"""How OpenMP's threads wait for each other, chosen before torch is loaded: afterwards it is too late.

A thread that has nothing to do spins by default, ready for the next piece of work. That is harmless while every thread
has a processor of its own. Once other programs need the processors, the threads that spin take them from those that
work, and a decoding of many small steps becomes many times slower. With ``OMP_WAIT_POLICY=PASSIVE`` a thread without
work sleeps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

VARIABLE = "OMP_WAIT_POLICY"


def is_command_line(words: Sequence[str]) -> bool:
    """Whether a process that was started with these words runs the command `dlmkernels`.

    Either as the program of that name or as `python -m dlmkernels`.
    """
    script = Path(words[1]).stem if len(words) > 1 else ""
    return script == "dlmkernels" or any(pair == ("-m", "dlmkernels") for pair in pairwise(words))


def choose() -> None:
    """Let idle threads sleep in a process of our own; in any other, and where the user has chosen, change nothing."""
    if "torch" not in sys.modules and is_command_line(sys.orig_argv):
        os.environ.setdefault(VARIABLE, "PASSIVE")
