# SPDX-License-Identifier: Apache-2.0
"""Where each row of a batch stands in its plan: tensors that a program writes in place and rules read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Tables:
    """What a plan says of each of its steps, computed on the host once and looked up on the device.

    Parameters
    ----------
    plans : sequence of int
        Numbers of planned steps that blocks have, each once.
    steps : int
        How many steps a block takes at most.
    first : Tensor
        int32 `[S]`: line of a table for the first step of each row's block, less the number of steps that the row took
        before it. There are `steps` + 1 lines for each plan, the last for rows that are done with their block.
    """

    def __init__(self, plans: Sequence[int], steps: int, first: Tensor):
        self.plans, self.steps, self.first = tuple(plans), steps, first
        self._made: dict[str, Tensor] = {}

    def line(self, plan: Tensor | int) -> Tensor | int:
        """Line of a plan's first step; `plan` is its number."""
        return plan * (self.steps + 1)

    def made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is the same for the whole decoding: what `make` returned, on the rows' device."""
        if name not in self._made:
            self._made[name] = make().to(self.first.device)
        return self._made[name]

    def look_up(self, name: str, of: Callable[[int, int], Any], step: Tensor, dtype: torch.dtype) -> Tensor:
        """`of(index, num_steps)` for each row's `step`, `[S]`, or `[S, n]` of n numbers; `name` tells tables apart."""

        def make() -> Tensor:
            values = [of(i, n) for n in self.plans for i in range(self.steps + 1)]
            return torch.tensor(values, dtype=dtype, device="cpu")

        return self.made(name, make).index_select(0, self.first + step)


@dataclass(frozen=True)
class Standing:
    """Where the S rows stand. All tensors are int32 `[S]`.

    Attributes
    ----------
    step, entered : Tensor
        Forwards a row has taken part in, now and when it came into its block.
    block_start, block_length : Tensor
        First column of the row's block, and how many it has.
    num_steps : Tensor
        Steps planned for it.
    behind : Tensor
        Steps planned for all the blocks before it.
    open_at_start : Tensor
        Open positions of the block when the row came into it.
    width : int
        How many columns the longest block has.
    planned : Tensor
        Steps planned for all of a row's blocks.
    tables : Tables
        What depends on the number of a step alone.
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
        """All of what is decoded as one block of a single planned step, for programs that have no schedule.

        `entered`: see above; None: as though every step were the first.
        """
        nothing, one = torch.zeros_like(start), torch.ones_like(start)
        return cls(
            step, step if entered is None else entered, start, one * width, one, nothing, nothing, width, one,
            Tables((1,), 1, -step),
        )  # fmt: skip

    @property
    def index(self) -> Tensor:
        """Number of the step within the row's block, from 0."""
        return self.step - self.entered

    @property
    def progress_before(self) -> Tensor:
        """Share of all planned steps that lie behind, up to 1, float64 `[S]`."""
        return self._share(self.behind + self.index)

    @property
    def progress(self) -> Tensor:
        """The same with this step."""
        return self._share(self.behind + self.index + 1)

    def _share(self, steps: Tensor) -> Tensor:
        return (steps.double() / self.planned).clamp(max=1)


@dataclass(frozen=True)
class Place:
    """Where the rows of a forward stand: int32 tensors, `[S]` but for `window`.

    Attributes
    ----------
    start, length : Tensor
        First column of each row's block, or part of one, and how many it has.
    outer, outer_length : Tensor
        The same of the block of the grid that it is a part of; and how many columns that has.
    window : Tensor
        `[S, W]`: the columns that steps in the block ask for, -1 for none.
    """

    start: Tensor
    length: Tensor
    outer: Tensor
    outer_length: Tensor
    window: Tensor
