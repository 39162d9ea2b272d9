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
    """

    kind: str
    part: str = "whole"
    pending: int = 0
    columns: tuple[int, ...] = ()
    head: int = 0
    is_limited: bool = False


class BlockForms:
    """Finds the form of the next step from reports of earlier ones (see `BlockAfterBlock`).

    Parameters
    ----------
    blocks, most_steps : list
        The blocks of a row, and after how many steps each ends.
    forward : BlockForward
    together : bool
        Whether rows enter a block together, so that the host knows which one they are in.
    has_last_entry : bool
        Whether rows that are done with their last block have something left to do where others would enter the next.
    """

    def __init__(
        self, config: DecodingConfig, blocks: list[Block], most_steps: list[int], forward: BlockForward,
        together: bool, has_last_entry: bool,
    ):  # fmt: skip
        self.config, self.blocks, self.most_steps, self.forward = config, blocks, most_steps, forward
        self.together, self.has_last_entry = together, has_last_entry
        self.is_delayed = config.cache == "delayed"

    def begin(self, rows: int) -> None:
        """Of a decoding of so many rows the host knows nothing yet, but that all have come into the first block."""
        #: how many reports there have been, and which of them was of rows that entered
        self.reports, self.entered = 0, 0
        #: number of the block, and of the step within it; how far what is final and forwarded reaches
        self.number, self.index, self.done = 0, 0, -self.forward.depth
        self.num_done = 0  # rows that have nothing left to do
        #: positions that were open in each row, and how many steps it has taken in its block, or more
        self.open, self.taken = (0,) * rows, [0] * rows
        self.open_before = self.forward.length
        self.columns = self.forward.columns_of(self.block)

    @property
    def block(self) -> Block | None:
        """The block that all rows are in, or wait for; None where each has its own."""
        return self.blocks[min(self.number, len(self.blocks) - 1)] if self.together else None

    def next(self, report: tuple[int, ...], behind: int, slots: int) -> Form | None:
        """The form of the next step, None if there is nothing left to do; `slots` are all that windows have."""
        open_now, open_in_all = (report[::2], max(report[1::2])) if self.is_delayed else (report, 0)
        known = self.reports - behind
        if known == self.entered:
            self.num_done = open_now.count(-1)
            self.taken = [0 if was <= 0 else n for was, n in zip(self.open, self.taken)]
        is_over = self.together and self.index >= self._most_steps()
        head = slots
        if known >= self.entered:  # the rows have not entered other blocks since
            self.open = open_now
            idle = len(open_now) if is_over else sum(n <= 0 for n in open_now)
            if idle > self.num_done and (idle == len(open_now) or not self.together):
                return self._enter()
            if idle == len(open_now):
                return None
            head = min(sum(n for n in open_now if n > 0), slots)
        elif is_over:
            return self._enter()
        return self._append() or self._denoise(head, open_in_all)

    def _most_steps(self) -> int:
        return self.most_steps[min(self.number, len(self.blocks) - 1)]

    def _enter(self) -> Form | None:
        if self.together and self.number + 1 == len(self.blocks) + self.has_last_entry:
            return None
        self.reports += 1
        self.entered, self.index = self.reports, 0
        self.number += self.together
        self.columns = self.forward.columns_of(self.block)
        return Form("enter", columns=self.columns)

    def _append(self) -> Form | None:
        """Forward the context of the block by itself, where that is called for and has not been done."""
        block = self.block
        if block is None or not self.forward.commits_apart or block.outer <= self.done:
            return None
        self.reports += 1
        pending, self.done = block.outer - self.done, block.outer
        return Form("append", pending=pending, columns=self.columns)

    def _denoise(self, head: int, open_in_all: int) -> Form:
        part, pending = self._part()
        self.open_before = open_in_all or self.open_before
        is_limited = False
        if not self.together:
            least = min(self.most_steps)
            is_limited = any(n > 0 and taken >= least for n, taken in zip(self.open, self.taken))
            self.taken = [taken + 1 for taken in self.taken]
        self.reports += 1
        self.index += 1
        return Form("denoise", part, pending, self.columns, head, is_limited)

    def _part(self) -> tuple[str, int]:
        """Which columns the next step forwards, and how many of them are not the block's own."""
        cache, block, interval = self.config.cache, self.block, self.config.refresh_interval
        whole = self.index < self.config.warmup or (interval is not None and self.index % interval == 0)
        if cache == "block":
            assert block is not None
            if block.outer > self.done:
                pending, self.done = block.outer - self.done, block.outer
                return "append", pending
            return "block" if whole or not self.config.sub_block_cache else "inner", 0
        if whole or cache == "none":
            return "whole", 0
        return ("open", self.open_before) if self.is_delayed else ("part", 0)
