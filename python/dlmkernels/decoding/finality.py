# SPDX-License-Identifier: Apache-2.0
"""How much of each request is final, that is, will not change anymore."""

from __future__ import annotations

import torch
from torch import Tensor

from .programs import Program
from .programs.blocks import BlockAfterBlock


def finished_columns(program: Program, is_open: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the column up to which each of the rows int64 `[n]` (None: all) is final, int64 `[n]`.

    `is_open` bool `[n, T]`: the open columns of these rows. Tokens that a rule may still revise are final once their
    block is finished; in a program without such blocks, only when it ends.
    """
    columns = torch.arange(is_open.shape[1], device=is_open.device)
    final = torch.where(is_open, columns, is_open.shape[1]).amin(1)
    if program.rule.slots == "open" and program.config.eos_policy != "block":
        return final
    if not isinstance(program, BlockAfterBlock):
        return torch.zeros_like(final)
    finished = program.finished().long()
    return torch.minimum(final, finished if rows is None else finished[rows])
