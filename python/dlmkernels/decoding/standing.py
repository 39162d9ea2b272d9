# SPDX-License-Identifier: Apache-2.0
"""Progress of each batch row through its plan: tensors that a program updates in place and rules read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Tables:
    """Values that depend only on the number of a step, computed once on the host and looked up on the device.

    Parameters
    ----------
    plans : sequence of int
        The distinct numbers of planned steps that blocks have.
    steps : int
        Maximum number of steps of a block.
    first : Tensor
        int32 `[S]`: index in the tables of the first step of each row's block, minus the number of steps that the row
        had taken before it. Each plan has `steps` + 1 entries, the last one for rows that are done with their block.
    """

    def __init__(self, plans: Sequence[int], steps: int, first: Tensor):
        self.plans, self.steps, self.first = tuple(plans), steps, first
        self._made: dict[str, Tensor] = {}

    def line(self, plan: Tensor | int) -> Tensor | int:
        """Return the table index of the first step of plan number `plan`."""
        return plan * (self.steps + 1)

    def made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the result of `make` on the device of the rows, created once under this name and then cached."""
        if name not in self._made:
            self._made[name] = make().to(self.first.device)
        return self._made[name]

    def look_up(self, name: str, of: Callable[[int, int], Any], step: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `of(index, num_steps)` for the current step of each row.

        `step` int32 `[S]` is the number of forward passes of each row. The result is `[S]`, or `[S, n]` if `of` returns
        n numbers. Tables are cached by `name`.
        """

        def make() -> Tensor:
            values = [of(i, n) for n in self.plans for i in range(self.steps + 1)]
            return torch.tensor(values, dtype=dtype, device="cpu")

        return self.made(name, make).index_select(0, self.first + step)


@dataclass(frozen=True)
class Standing:
    """Progress of S rows through their plans. All tensors are int32 `[S]`.

    Attributes
    ----------
    step, entered : Tensor
        Number of forward passes that the row has taken part in, now and when it entered its current block.
    block_start, block_length : Tensor
        First column of the row's current block, and its number of columns.
    num_steps : Tensor
        Number of steps planned for this block.
    behind : Tensor
        Number of steps planned for all preceding blocks.
    open_at_start : Tensor
        Number of open positions of the block when the row entered it.
    width : int
        Number of columns of the longest block.
    planned : Tensor
        Number of steps planned for all blocks of the row.
    tables : Tables
        Lookup tables for values that depend only on the number of a step.
    """

    step: Tensor
    entered: Tensor
    block_start: Tensor
    block_length: Tensor
    num_steps: Tensor
    behind: Tensor
    open_at_start: Tensor
    width: int
    planned: Tensor
    tables: Tables

    @classmethod
    def in_one_block(cls, start: Tensor, width: int, step: Tensor, entered: Tensor | None = None) -> Standing:
        """Treat everything as one block with a single planned step, for programs without a schedule.

        The block has `width` columns from `start` int32 `[S]`. If `entered` is None, every step counts as the first.
        """
        nothing, one = torch.zeros_like(start), torch.ones_like(start)
        return cls(
            step, step if entered is None else entered, start, one * width, one, nothing, nothing, width, one,
            Tables((1,), 1, -step),
        )  # fmt: skip

    @property
    def index(self) -> Tensor:
        """Number of the step within the row's block, from 0, int32 `[S]`."""
        return self.step - self.entered

    @property
    def progress_before(self) -> Tensor:
        """Share of all planned steps done before this step, at most 1, float64 `[S]`."""
        return self._share(self.behind + self.index)

    @property
    def progress(self) -> Tensor:
        """Share of all planned steps done including this step, at most 1, float64 `[S]`."""
        return self._share(self.behind + self.index + 1)

    def _share(self, steps: Tensor) -> Tensor:
        return (steps.double() / self.planned).clamp(max=1)


@dataclass(frozen=True)
class Place:
    """Columns that the rows of a forward pass work on. All tensors are int32, and `[S]` except for `window`.

    Attributes
    ----------
    start, length : Tensor
        First column of each row's block, or part of a block, and its number of columns.
    outer, outer_length : Tensor
        First column and number of columns of the block of the grid that it is part of.
    window : Tensor
        `[S, W]`: the columns that steps in the block need predictions for; -1 for unused slots.
    """

    start: Tensor
    length: Tensor
    outer: Tensor
    outer_length: Tensor
    window: Tensor
