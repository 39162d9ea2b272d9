# SPDX-License-Identifier: Apache-2.0
"""Progress of the rows in block-after-block decoding, as tensors that are written when rows enter a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from ..schedule import Block, Grid
from ..standing import Place, Standing, Tables
from ..state import State

# rows of the plan tensor
START, LENGTH, OUTER, OUTER_LENGTH, BEHIND, NUM_STEPS, PLAN, MAX_STEPS, LIMIT = range(9)


#: maps a block's length and planned steps to the number of steps the rule has in it, and its maximum number of steps
Limits: TypeAlias = Callable[[int, int], tuple[int, int]]


class BlockPlan:
    """Table of all blocks, and for each row the entry of its current block.

    Attributes
    ----------
    standing : Standing
        The part of the plan that rules see.
    place : Place
        The part of the plan that forward passes need.
    max_steps, limit : Tensor
        int32 `[S]`: number of steps that the rule has in the row's block; and the number of steps after which the block
        ends in any case, which includes extra steps for positions that a constraint has kept open.
    frontier : Tensor
        int32 `[1]`: number of the last block that rows may enter.
    """

    def __init__(self, state: State, grid: Grid, blocks: list[Block], limits: Limits, listing: Tensor):
        rows, device = len(state.tokens), state.tokens.device
        self.state, self.grid, self.count = state, grid, len(blocks)
        width = max(b.length for b in blocks)
        #: whether a fixed number of steps is divided among the blocks, which requires equally long requests
        self._is_shared = any(b.num_steps != b.length for b in blocks)
        # possible lengths of blocks, or sub-blocks, that are cut short by the end of their request
        last = set() if self._is_shared else {(n - 1) % width + 1 for n in grid.last_lengths}
        plans = sorted({b.num_steps for b in blocks} | last)

        def table(lines: Iterable[list[int]]) -> Tensor:
            return torch.tensor(list(lines), dtype=torch.int32, device="cpu").to(device)

        def steps(length: int, num_steps: int) -> list[int]:
            return [num_steps, plans.index(num_steps), *limits(length, num_steps)]

        self._table = table(
            [b.start, b.length, b.outer, b.outer_length, b.behind, *steps(b.length, b.num_steps)] for b in blocks
        )
        #: the length-dependent entries for each length of such a block; None if all blocks have their full length
        self._short = None
        if last - {width}:
            self._short = table(steps(n, n) if n in last else [0] * 4 for n in range(width + 1))
        most_steps = max(limits(b.length, b.num_steps)[1] for b in blocks)
        self._starts = self._table[:, START].contiguous()
        self._column = torch.arange(state.tokens.shape[1], dtype=torch.int32, device=device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._plan = zeros(self._table.shape[1], rows)
        self.max_steps, self.limit, self._line = (self._plan[i] for i in (MAX_STEPS, LIMIT, PLAN))
        self.standing = Standing(
            step=state.step, entered=state.entered, block_start=zeros(rows), block_length=self._plan[LENGTH],
            num_steps=self._plan[NUM_STEPS], behind=self._plan[BEHIND], open_at_start=zeros(rows),
            width=width, tables=Tables(plans, most_steps, zeros(rows)), planned=zeros(rows),
        )  # fmt: skip
        self.place = Place(zeros(rows), zeros(rows), zeros(rows), zeros(rows), listing)
        self.frontier = zeros(1)
        #: number of the block that each column belongs to, int32 `[S, T]`; -1 left of the first block
        self.owner = zeros(rows, len(self._column))

    def begin(self) -> None:
        """Compute the block layout of the requests that the state currently holds."""
        grid, column = self.grid, self._column - self.grid.first[:, None]
        self.owner.copy_(torch.searchsorted(self._starts, column, right=True, out_int32=True) - 1)
        if self._is_shared:
            behind = self._table[:, BEHIND] + self._table[:, NUM_STEPS]
            last = torch.searchsorted(self._table[:, OUTER].contiguous(), grid.planned * grid.length) - 1
            self.standing.planned.copy_(behind[last])
        else:
            self.standing.planned.copy_(torch.minimum(grid.planned * grid.length, grid.ends - grid.first))

    def enter(self, works: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """Move rows that are not working into their next block with open positions, up to the frontier.

        Parameters
        ----------
        works : Tensor
            bool `[S]`: rows that are still working on a block.
        together : bool
            Whether forward passes take the block at the frontier in all rows, even where there is nothing to decide.

        Returns
        -------
        tuple of Tensor
            bool `[S]` each: rows that entered a block; and rows that had open positions in a later block.
        """
        state = self.state
        later = state.is_open & (self.owner > state.block[:, None])
        has_later = later.any(1)
        following = self.owner.gather(1, later.int().argmax(1, keepdim=True))[:, 0]
        enters = ~works & has_later & (following <= self.frontier)
        state.block.copy_(torch.where(enters, following, state.block))
        self._look_up()
        self.count_from_here(enters)
        forwarded = self._plan
        if together:
            forwarded = self._table.index_select(0, self.frontier.clamp(max=self.count - 1)).T
        torch.add(self.grid.first, self._plan[START], out=self.standing.block_start)
        torch.add(self.grid.first, forwarded[START], out=self.place.start)
        torch.add(self.grid.first, forwarded[OUTER], out=self.place.outer)
        self.place.length.copy_(forwarded[LENGTH])
        self.place.outer_length.copy_(forwarded[OUTER_LENGTH])
        return enters, has_later

    def _look_up(self) -> None:
        """Copy each row's entry from the table."""
        plan, left = self._plan, self.grid.ends - self.grid.first
        plan.copy_(self._table.index_select(0, self.state.block.clamp(min=0)).T)
        if self._short is None:
            return
        # the last block of a row ends where the row ends
        length, outer = (left - plan[START]).clamp(min=0), (left - plan[OUTER]).clamp(min=0)
        steps = self._short.index_select(0, torch.minimum(plan[LENGTH], length)).T
        plan[NUM_STEPS:].copy_(torch.where(length < plan[LENGTH], steps, plan[NUM_STEPS:]))
        plan[LENGTH].clamp_(max=length)
        plan[OUTER_LENGTH].clamp_(max=outer)

    def count_from_here(self, rows: Tensor) -> None:
        """Make the next step count as the first of its block, in rows bool `[S]`."""
        state, tables = self.state, self.standing.tables
        state.entered.copy_(torch.where(rows, state.step, state.entered))
        tables.first.copy_(tables.line(self._line) - state.entered)

    def has_steps(self) -> Tensor:
        """Return which rows have steps left in their block, bool `[S]`."""
        return self.standing.index < self.limit
