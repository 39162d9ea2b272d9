# SPDX-License-Identifier: Apache-2.0
"""How much of each request will not change any more."""

from __future__ import annotations

import torch
from torch import Tensor

from .programs import Program
from .programs.blocks import BlockAfterBlock


def finished_columns(program: Program, is_open: Tensor, rows: Tensor | None = None) -> Tensor:
    """Up to which column each of the rows int64 `[n]` (None: all) is final while a program runs, int64 `[n]`.

    `is_open` bool `[n, T]`: which of their columns are open. What a rule may still take back is final when its block
    is; where a program has no such blocks, nothing is before its end.
    """
    columns = torch.arange(is_open.shape[1], device=is_open.device)
    final = torch.where(is_open, columns, is_open.shape[1]).amin(1)
    if program.rule.slots == "open" and program.config.eos_policy != "block":
        return final
    if not isinstance(program, BlockAfterBlock):
        return torch.zeros_like(final)
    finished = program.finished().long()
    return torch.minimum(final, finished if rows is None else finished[rows])
