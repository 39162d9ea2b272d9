# SPDX-License-Identifier: Apache-2.0
"""The host's part of a decoding that goes block after block: which form the next step has."""

from __future__ import annotations

from dataclasses import dataclass

from ..block_forward import BlockForward
from ..config import DecodingConfig
from ..schedule import Block


@dataclass(frozen=True, slots=True)
class Form:
    """The shapes of a step.

    Attributes
    ----------
    kind : {"enter", "append", "denoise"}
        Rows come into a block; the context of a block is forwarded; a step of the rule.
    part : str
        Which columns are forwarded (see `BlockForward`).
    pending : int
        How many columns before the block "append" takes; how many of each row "open" takes.
    columns : tuple of int
        How many columns the parts of the block have (see `BlockForward.columns_of`).
    head : int
        For how many slots of the window, of all rows together, there are logits: as many as any.
    is_limited : bool
        Whether rows may have come to the last step of their block.
    phase : int
        Where rows enter their blocks by themselves: the phase of those that take part (see `RowForms`).
    rows, width : int, optional
        How many rows take part, and how many columns of the whole canvas are forwarded. None: all.
    own_ends : bool
        Whether rows have end tokens of their own.
    """

    kind: str
    part: str = "whole"
    pending: int = 0
    columns: tuple[int, ...] = ()
    head: int = 0
    is_limited: bool = False
    phase: int = 0
    rows: int | None = None
    width: int | None = None
    own_ends: bool = False


class BlockForms:
    """Finds the form of the next step where rows enter their blocks together, from reports of earlier ones.

    A report holds a number for each row: how many positions of its block are open, at least 1 while it is in one; 0 if
    it waits to enter another; -1 if nothing is left. With cache="delayed" there are twice as many, one after each of
    these: the numbers of all open positions.

    Parameters
    ----------
    blocks, most_steps : list
        The blocks of a row, and after how many steps each ends.
    forward : BlockForward
    has_last_entry : bool
        Whether rows that are done with their last block have something left to do where others would enter the next.
    """

    def __init__(
        self, config: DecodingConfig, blocks: list[Block], most_steps: list[int], forward: BlockForward,
        has_last_entry: bool,
    ):  # fmt: skip
        self.config, self.blocks, self.most_steps, self.forward = config, blocks, most_steps, forward
        self.has_last_entry = has_last_entry
        self.is_delayed = config.cache == "delayed"

    def begin(self) -> None:
        """The host knows nothing yet, but that all rows have come into the first block."""
        #: how many reports there have been, and which of them was of rows that entered
        self.reports, self.entered = 0, 0
        #: number of the block, and of the step within it; how far what is final and forwarded reaches
        self.number, self.index, self.done = 0, 0, -self.forward.depth
        self.num_done = 0  # rows that have nothing left to do
        self.open_before = self.forward.length
        self.columns = self.forward.columns_of(self.block)

    @property
    def block(self) -> Block:
        """The block that all rows are in, or wait for."""
        return self.blocks[min(self.number, len(self.blocks) - 1)]

    def next(self, report: tuple[int, ...], behind: int, slots: int) -> Form | None:
        """The form of the next step, None if there is nothing left to do; `slots` are all that windows have."""
        open_now, open_in_all = (report[::2], max(report[1::2])) if self.is_delayed else (report, 0)
        known = self.reports - behind
        if known == self.entered:
            self.num_done = open_now.count(-1)
        is_over = self.index >= self.most_steps[min(self.number, len(self.blocks) - 1)]
        head = slots
        if known >= self.entered:  # the rows have not entered other blocks since
            if is_over or all(n <= 0 for n in open_now):
                return self._enter() if len(open_now) > self.num_done else None
            head = min(sum(n for n in open_now if n > 0), slots)
        elif is_over:
            return self._enter()
        return self._append() or self._denoise(head, open_in_all)

    def _enter(self) -> Form | None:
        if self.number + 1 == len(self.blocks) + self.has_last_entry:
            return None
        self.reports += 1
        self.entered, self.index = self.reports, 0
        self.number += 1
        self.columns = self.forward.columns_of(self.block)
        return Form("enter", columns=self.columns)

    def _append(self) -> Form | None:
        """Forward the context of the block by itself, where that is called for and has not been done."""
        block = self.block
        if not self.forward.commits_apart or block.outer <= self.done:
            return None
        self.reports += 1
        pending, self.done = block.outer - self.done, block.outer
        return Form("append", pending=pending, columns=self.columns)

    def _denoise(self, head: int, open_in_all: int) -> Form:
        part, pending = self._part()
        self.open_before = open_in_all or self.open_before
        self.reports += 1
        self.index += 1
        return Form("denoise", part, pending, self.columns, head)

    def _part(self) -> tuple[str, int]:
        """Which columns the next step forwards, and how many of them are not the block's own."""
        cache, block, interval = self.config.cache, self.block, self.config.refresh_interval
        whole = self.index < self.config.warmup or (interval is not None and self.index % interval == 0)
        if cache == "block":
            if block.outer > self.done:
                pending, self.done = block.outer - self.done, block.outer
                return "append", pending
            return "block" if whole or not self.config.sub_block_cache else "inner", 0
        if whole or cache == "none":
            return "whole", 0
        return ("open", self.open_before) if self.is_delayed else ("part", 0)
