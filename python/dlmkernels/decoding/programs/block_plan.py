# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a decoding are that goes block after block: tensors, written when rows come into a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_forward import Place
from ..schedule import Block, Grid
from ..standing import Standing, Tables
from ..state import State

# lines of the plan
START, LENGTH, NUM_STEPS, PLAN, BEHIND, MAX_STEPS, LIMIT, OUTER, OUTER_LENGTH = range(9)


class BlockPlan:
    """The blocks as a table, and each row's line of it.

    Attributes
    ----------
    standing : Standing
        What rules see of it.
    place : Place
        What forwards need of it.
    max_steps, limit : Tensor
        int32 `[S]`: steps that a rule has in the row's block, and after how many the block ends in any case.
    frontier : Tensor
        int32 `[1]`: the last block that rows may come into.
    """

    def __init__(self, state: State, grid: Grid, blocks: list[Block], most_steps: list[int], listing: Tensor):
        rows, width, device = *state.tokens.shape, state.tokens.device
        self.state, self.grid, self.count = state, grid, len(blocks)
        plans = sorted({b.num_steps for b in blocks})
        self._table = torch.tensor([
            [b.start, b.length, b.num_steps, plans.index(b.num_steps), b.behind, b.max_steps, most, b.outer,
             b.outer_length] for b, most in zip(blocks, most_steps)
        ], dtype=torch.int32, device="cpu").to(device)  # fmt: skip
        # number of the block in which every column stands, [S, T], -1 left of all
        column = torch.arange(width, dtype=torch.int32, device=device) - grid.first[:, None]
        self.owner = torch.searchsorted(self._table[:, START].contiguous(), column, right=True, out_int32=True) - 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._plan = zeros(self._table.shape[1], rows)
        self.max_steps, self.limit, self._line = (self._plan[i] for i in (MAX_STEPS, LIMIT, PLAN))
        self.standing = Standing(
            step=state.step, entered=state.entered, block_start=zeros(rows), block_length=self._plan[LENGTH],
            num_steps=self._plan[NUM_STEPS], behind=self._plan[BEHIND], open_at_start=zeros(rows),
            width=max(b.length for b in blocks), tables=Tables(plans, max(most_steps), zeros(rows)),
            planned=sum(b.num_steps for b in blocks if b.outer < grid.planned * grid.length),
        )  # fmt: skip
        self.place = Place(zeros(rows), zeros(rows), zeros(rows), listing)
        self.frontier = zeros(1)

    def enter(self, works: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """Rows that do not work, bool `[S]`, come into the next block with something open, as far as the frontier.

        Which did, and which had something open in a later block, bool `[S]` each. `together`: forwards take the block
        at the frontier in all rows, also in those that have nothing to decide there.
        """
        state = self.state
        later = state.is_open & (self.owner > state.block[:, None])
        has_later = later.any(1)
        following = self.owner.gather(1, later.int().argmax(1, keepdim=True))[:, 0]
        enters = ~works & has_later & (following <= self.frontier)
        state.block.copy_(torch.where(enters, following, state.block))
        self._plan.copy_(self._table.index_select(0, state.block.clamp(min=0)).T)
        self.count_from_here(enters)
        forwarded = self._plan
        if together:
            forwarded = self._table.index_select(0, self.frontier.clamp(max=self.count - 1)).T
        torch.add(self.grid.first, self._plan[START], out=self.standing.block_start)
        torch.add(self.grid.first, forwarded[START], out=self.place.start)
        torch.add(self.grid.first, forwarded[OUTER], out=self.place.outer)
        self.place.outer_length.copy_(forwarded[OUTER_LENGTH])
        return enters, has_later

    def count_from_here(self, rows: Tensor) -> None:
        """Let the next step be the first in its block, in rows bool `[S]`."""
        state, tables = self.state, self.standing.tables
        state.entered.copy_(torch.where(rows, state.step, state.entered))
        tables.first.copy_(tables.line(self._line) - state.entered)

    def has_steps(self) -> Tensor:
        """Which rows have a step left in their block, bool `[S]`."""
        return self.standing.index < self.limit
