# SPDX-License-Identifier: Apache-2.0
"""Choose how idle OpenMP threads wait. This has to happen before torch is loaded.

By default, an idle thread spins, ready for its next piece of work. That is harmless while every thread has a processor
to itself. Once other programs need the processors, the spinning threads take time from the working ones, and a
decoding with many small steps becomes many times slower. With ``OMP_WAIT_POLICY=PASSIVE``, idle threads sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

VARIABLE = "OMP_WAIT_POLICY"


def is_command_line(words: Sequence[str]) -> bool:
    """Return whether a process started with these command-line words runs the `dlmkernels` command.

    It may be started as the program of that name or as `python -m dlmkernels`.
    """
    script = Path(words[1]).stem if len(words) > 1 else ""
    return script == "dlmkernels" or any(pair == ("-m", "dlmkernels") for pair in pairwise(words))


def choose() -> None:
    """Let idle threads sleep if this process is the `dlmkernels` command and the user has not set the policy."""
    if "torch" not in sys.modules and is_command_line(sys.orig_argv):
        os.environ.setdefault(VARIABLE, "PASSIVE")
