# SPDX-License-Identifier: Apache-2.0
"""Host side of block-after-block decoding: choosing the form of the next step."""

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
    kind : {"enter", "append", "denoise", "look"}
        What the step does: rows enter a block; the context of a block is forwarded; one step of the rule; or only
        report the state of the rows.
    part : str
        Which columns are forwarded (see `BlockForward`).
    pending : int
        For part "append", the number of columns forwarded before the block; for part "open", the number of columns
        forwarded in each row.
    columns : tuple of int
        Number of columns in the parts of the block (see `BlockForward.columns_of`).
    head : int
        Number of window slots, over all rows, for which logits are computed. An upper bound.
    is_limited : bool
        Whether rows may have reached the last step of their block.
    phase : int
        Phase of the rows that take part, if rows enter their blocks independently (see `RowForms`).
    rows, width : int, optional
        Number of rows that take part, and number of columns forwarded of the whole canvas. If None, all.
    own_ends : bool
        Whether rows have their own end tokens.
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
    """Chooses the form of the next step from earlier reports, when all rows enter their blocks together.

    A report holds one number per row: the number of open positions in its block (at least 1 while the row is in a
    block); 0 if the row is waiting to enter its next block; -1 if it has nothing left to do. With cache="delayed", each
    of these numbers is followed by the number of open positions in the whole row.

    Parameters
    ----------
    config : DecodingConfig
    blocks, most_steps : list
        The blocks of a row, and the maximum number of steps in each.
    forward : BlockForward
    has_last_entry : bool
        Whether one more "enter" step is needed after the last block, to complete it.
    """

    def __init__(
        self, config: DecodingConfig, blocks: list[Block], most_steps: list[int], forward: BlockForward,
        has_last_entry: bool,
    ):  # fmt: skip
        self.config, self.blocks, self.most_steps, self.forward = config, blocks, most_steps, forward
        self.has_last_entry = has_last_entry
        self.is_delayed = config.cache == "delayed"

    def begin(self) -> None:
        """Reset the host's knowledge: all rows have just entered the first block."""
        #: number of reports so far, and the number of the report in which rows last entered a block
        self.reports, self.entered = 0, 0
        #: number of the block, number of the step within it, and the column up to which decided tokens were forwarded
        self.number, self.index, self.done = 0, 0, -self.forward.depth
        self.num_done = 0  # rows that have nothing left to do
        self.open_before = self.forward.length
        self.columns = self.forward.columns_of(self.block)

    @property
    def block(self) -> Block:
        """The block that all rows are in, or are waiting to enter."""
        return self.blocks[min(self.number, len(self.blocks) - 1)]

    def next(self, report: tuple[int, ...], behind: int, slots: int) -> Form | None:
        """Return the form of the next step, or None if nothing is left to do; windows have `slots` slots in total."""
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
        """Return a form that forwards the block's context on its own, or None if that is not needed or already done."""
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
        """Choose the part that the next step forwards, and its `pending` columns (see `Form`)."""
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
