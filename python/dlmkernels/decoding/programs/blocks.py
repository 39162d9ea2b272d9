# SPDX-License-Identifier: Apache-2.0
"""The program of most rules: block after block, from left to right, each until the rule is done with it.

Every row has its own block, step and end. Without a cache a row enters its next block as soon as it is done with one.
With a cache, what enters needs another form of forward than what goes on, and the rows of a batch enter together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import ops
from ...window import TokenWindow
from ..block_forward import BlockForward, Place
from ..constrained import Constrained
from ..outcome import Unfinished
from ..rules import Action
from ..schedule import Block, plan_blocks
from ..standing import Standing, Tables
from ..state import listed
from .base import Program, Task


@dataclass(frozen=True)
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
        How many columns the parts of the block have that are forwarded with a cache.
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


#: Multiplications of a language-model head that take as long as finding out for which slots it need not run.
COMPACTING = 500_000


class BlockAfterBlock(Program):
    """A report holds a number for each row: how many positions of its block are open, at least 1 while it is in one;
    0 if it waits to enter another; -1 if nothing is left. With cache="delayed" twice as many, the others being the
    numbers of all open positions.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        config, state, rule = self.config, self.state, self.rule
        rows, width, device = *state.tokens.shape, state.tokens.device
        self.forward = BlockForward(self.model, state, config, self.special, self.grid, task.prompt_embeds)
        self.constrained = Constrained(config.constraint, rule, state, self.start, self.end, self.special.mask)
        self.unfinished = Unfinished(state, rule, self.constrained)
        self.blocks = plan_blocks(config, self.grid)
        self.reads_open = rule.slots == "open"
        self.is_delayed = config.cache == "delayed"
        #: whether the host knows which block the rows are in
        self.together = rows == 1 or config.cache != "none" or self.forward.commits_apart
        # A rule that takes tokens back may also take back an end token: that counts once its block is finished.
        self.fills_at_once = config.eos_policy == "fill" and self.reads_open
        self.fills_at_end = config.eos_policy != "none" and not self.fills_at_once

        # the plan: what is the same for all rows, and the number of the block of every column
        extra = self.constrained.may_leave_open
        plans = sorted({b.num_steps for b in self.blocks})
        self._table = torch.tensor([
            [b.start, b.length, b.num_steps, plans.index(b.num_steps), b.behind, b.max_steps,
             b.max_steps + extra * b.length, b.outer, b.outer_length] for b in self.blocks
        ], dtype=torch.int32, device="cpu").to(device)  # fmt: skip
        self._most_steps = [b.max_steps + extra * b.length for b in self.blocks]
        self._owner = self._blocks_of_columns(width)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # where the rows are: a line a column of the table, and what follows from it
        self._plan = zeros(self._table.shape[1], rows)
        _, length, num_steps, plan, behind, self._max_steps, self._limit, _, _ = self._plan
        longest = max(b.length for b in self.blocks)
        self.standing = Standing(
            step=state.step, entered=state.entered, block_start=zeros(rows), block_length=length, num_steps=num_steps,
            behind=behind, open_at_start=zeros(rows), width=longest, planned=self._planned(),
            tables=Tables(plans, max(self._most_steps), zeros(rows)),
        )  # fmt: skip
        self._line = plan
        self._works = zeros(rows, dtype=torch.bool)
        #: the last block that rows may enter, int32 [1]
        self._frontier = zeros(1)
        slots = self._most_slots(longest)
        self._listing, self._index = zeros(rows, slots) - 1, zeros(rows, slots, dtype=torch.int64)
        self._place = Place(zeros(rows), zeros(rows), zeros(rows), self._listing)
        self._valid = zeros(rows, slots, dtype=torch.uint8)
        self._row_map = zeros(rows * slots + 1)
        self._numbers = torch.arange(rows * slots + 1, dtype=torch.int32, device=device)
        self._columns = torch.arange(longest, dtype=torch.int32, device=device)
        self._how = {
            "step": state.step, "seed": state.seed, "origin": state.origin, "mask_token_id": self.special.mask,
            "vocab_size": self.model.vocab_size or 0, "eos_token_ids": self.special.eos,
            "eos_policy": "fill" if self.fills_at_once else "none", "fill_token_id": self.special.pad,
        }  # fmt: skip

        self._row_cost = 0  # multiplications that a row of the head takes

        self._forget()

    def _forget(self) -> None:
        """What the host knows before the first step."""
        #: how many reports there have been, and which of them was of rows that entered
        self._reports, self._entered = 0, 0
        self._block, self._index_in_block, self._done_rows = 0, 0, 0
        #: positions that were open in each row, and how many steps it has taken in its block, or more
        rows, width = self.state.tokens.shape
        self._were_open, self._taken = (0,) * rows, [0] * rows
        self._open_before, self._most, self._least = width, self._most_steps[0], min(self._most_steps)

    def _planned(self) -> int:
        """Steps planned for the columns to decode."""
        return sum(b.num_steps for b in self.blocks if b.outer < self.grid.planned * self.grid.length)

    def _blocks_of_columns(self, width: int) -> Tensor:
        """Number of the block in which every column stands, int32 `[S, T]`; -1 left of all."""
        starts = self._table[:, 0].contiguous()
        column = torch.arange(width, dtype=torch.int32, device=starts.device) - self.grid.first[:, None]
        return torch.searchsorted(starts, column.contiguous(), right=True, out_int32=True) - 1

    def _most_slots(self, longest: int) -> int:
        """How many slots a window has: as many as positions that a step can decide at once, in the row that has most."""
        if self.rule.slots == "canvas":
            return self.state.tokens.shape[1] - self.start
        if not self.reads_open:
            return longest
        owner = self._owner.clamp(min=0).long()
        counts = torch.zeros(len(owner), len(self.blocks), dtype=torch.int64, device=owner.device)
        return max(int(counts.scatter_add(1, owner, self.state.is_open.long()).max()), 1)

    # --- the host's part ----------------------------------------------------------------------------------------------

    @property
    def block(self) -> Block | None:
        """The block that all rows are in, or wait for; None where each has its own."""
        return self.blocks[min(self._block, len(self.blocks) - 1)] if self.together else None

    def form(self, report: tuple[int, ...], behind: int) -> Form | None:
        rows, total = len(self._listing), self._listing.numel()
        open_now, open_in_all = (report[::2], max(report[1::2])) if self.is_delayed else (report, 0)
        head = total
        if self._reports - behind >= self._entered:  # the rows have not entered other blocks since
            if self._reports - behind == self._entered:
                self._done_rows = open_now.count(-1)
                self._taken = [0 if was <= 0 else n for was, n in zip(self._were_open, self._taken)]
            self._were_open = open_now
            idle = sum(n <= 0 for n in open_now)
            is_over = self.together and self._index_in_block >= self._most
            if is_over:
                idle = rows
            if idle > self._done_rows and (idle == rows or not self.together):
                return self._entering()
            if idle == rows:
                return None
            if self.reads_open and not self.model.self_conditions:
                head = min(sum(n for n in open_now if n > 0), total)
        elif self.together and self._index_in_block >= self._most:
            return self._entering()
        return self._denoising(head, open_in_all)

    def may_leave(self, form: Form) -> bool:
        return not self.reads_open or form.kind == "enter" or form.is_limited

    def widest(self, form: Form) -> Form:
        pending = self.forward.length if form.part == "open" else form.pending
        return replace(form, pending=pending, head=self._listing.numel(), is_limited=True)

    def _entering(self) -> Form | None:
        if self.together and self._block + 1 == len(self.blocks) + self.fills_at_end:
            return None
        self._reports += 1
        self._entered, self._index_in_block = self._reports, 0
        self._block += self.together
        self._most = self._most_steps[min(self._block, len(self.blocks) - 1)]
        return Form("enter", columns=self.forward.columns_of(self.block))

    def _denoising(self, head: int, open_in_all: int) -> Form:
        self._reports += 1
        index, block, cache = self._index_in_block, self.block, self.config.cache
        lacks = block is not None and block.outer > self.forward.done
        pending = 0
        if lacks and (self.forward.commits_apart or cache == "block"):
            assert block is not None
            pending = block.outer - self.forward.done
            self.forward.done = block.outer
            if self.forward.commits_apart:
                return Form("append", pending=pending, columns=self.forward.columns_of(block))
        interval = self.config.refresh_interval
        whole = index < self.config.warmup or (interval is not None and index % interval == 0)
        part = "whole"
        if cache == "block":
            part = "append" if pending else "block" if whole or not self.config.sub_block_cache else "inner"
        elif not whole and cache in ("prefix", "dual"):
            part = "part"
        elif not whole and self.is_delayed:
            part, pending = "open", self._open_before
        self._index_in_block += 1
        self._open_before = open_in_all or self._open_before
        is_limited = False
        if not self.together:
            is_limited = any(n > 0 and taken >= self._least for n, taken in zip(self._were_open, self._taken))
            self._taken = [taken + 1 for taken in self._taken]
        return Form("denoise", part, pending, self.forward.columns_of(block), head, is_limited)

    # --- the device's part --------------------------------------------------------------------------------------------

    def begin(self) -> Tensor:
        if self.rule.noise == "uniform":
            if self.model.vocab_size is None:
                name = type(self.rule).__name__
                raise ValueError(f"{name} draws from the vocabulary, whose size the model does not say")
            self.state.renoise(self.model.vocab_size)
        self._forget()
        self.forward.begin()
        self.constrained.enter(torch.ones_like(self._works))
        self._works.fill_(False)
        self._valid.fill_(0)
        self._frontier.fill_(-1 if self.together else len(self.blocks))
        return self.enter()

    def step(self, form: Form) -> Tensor:
        if form.kind == "enter":
            return self.enter()
        return self.append(form) if form.kind == "append" else self.denoise(form)

    def enter(self) -> Tensor:
        """Rows that are done with their block come into their next one, as far as the frontier."""
        state, plan, place = self.state, self.standing, self._place
        if self.together:
            self._frontier.add_(1)
        works = self._window(True).used.any(1) if self.reads_open else self._works & self._has_steps()
        if self.constrained.may_leave_open:
            works = works & ~self.constrained.is_stuck
        if self.fills_at_end:
            state.fill_after_eos(~works, self.special.eos, self.special.pad)
        later = state.is_open & (self._owner > state.block[:, None])
        has_later = later.any(1)
        following = self._owner.gather(1, later.int().argmax(1, keepdim=True))[:, 0]
        enters = ~works & has_later & (following <= self._frontier)
        state.block.copy_(torch.where(enters, following, state.block))
        self._works.copy_(works | enters)

        self._plan.copy_(self._table.index_select(0, state.block.clamp(min=0)).T)
        torch.add(self.grid.first, self._plan[0], out=plan.block_start)
        # With a cache all rows are forwarded where the frontier is, also those that have nothing to decide there.
        forwarded = self._plan
        if self.together:
            forwarded = self._table.index_select(0, self._frontier.clamp(max=len(self.blocks) - 1)).T
        torch.add(self.grid.first, forwarded[7], out=place.outer)
        place.outer_length.copy_(forwarded[8].expand_as(place.outer_length))
        self._count_from_here(enters)
        count = self._list_positions()
        plan.open_at_start.copy_(torch.where(enters, count, plan.open_at_start))
        torch.add(self.grid.first, forwarded[0], out=place.start)
        self.forward.enter(place, self.block)
        self.forward.forget(enters)
        self.constrained.enter(enters)
        report = torch.where(self._works, count.clamp(min=1), torch.where(has_later, 0, -1))
        return self._reported(report)

    def _count_from_here(self, rows: Tensor) -> None:
        """Let the next step be the first in its block, in rows bool `[S]`."""
        state, tables = self.state, self.standing.tables
        state.entered.copy_(torch.where(rows, state.step, state.entered))
        tables.first.copy_(tables.line(self._line) - state.entered)

    def _list_positions(self) -> Tensor:
        """List what the window of each row may hold until it enters another block; open positions of the block `[S]`."""
        state, plan = self.state, self.standing
        columns = state.columns(plan.block_start, len(self._columns))
        is_open = state.open_in(columns) & (self._columns < plan.block_length[:, None])
        if self.reads_open:
            listing = listed(columns, is_open, self._listing.shape[1], state.tokens.shape[1])
        elif self.rule.slots == "block":
            free = state.free_in(columns) & (self._columns < plan.block_length[:, None])
            listing = torch.where(free, columns.number, -1)
        else:
            whole = state.columns(torch.full_like(state.origin, self.start), self._listing.shape[1])
            listing = torch.where(state.free_in(whole), whole.number, -1)
        self._listing.copy_(listing)
        self._index.copy_(listing.clamp(min=0))
        self._valid.copy_((listing >= 0) & self._works[:, None])
        return is_open.sum(1, dtype=torch.int32)

    def _has_steps(self) -> Tensor:
        """Which rows have a step left in their block, bool `[S]`."""
        return self.standing.index < self._limit

    def _window(self, is_limited: bool) -> TokenWindow:
        """The positions that this step may decide."""
        if self.reads_open:
            used = (self.state.state.gather(1, self._index) & self._valid).bool()
            if is_limited:
                used = used & self._has_steps()[:, None]
        else:
            used = self._valid.bool() & self._works[:, None]
        if self.constrained.may_leave_open:
            used = used & ~self.constrained.is_stuck[:, None]
        return TokenWindow.of(torch.where(used, self._listing, -1), self.state.origin, used)

    def _compacted(self, used: Tensor, head: int) -> tuple[Tensor | None, Tensor | None]:
        """Which slots, of all rows together, have logits, int64 `[head]`; and which row of these each has, int32 `[N]`.

        None and None where all have.
        """
        total = used.numel()
        if (total - head) * self._row_cost < COMPACTING:
            return None, None
        pick = torch.nonzero_static(used.flatten(), size=head, fill_value=total)[:, 0]
        row_map = self._row_map.fill_(-1).index_copy_(0, pick, self._numbers[:head])[:total]
        return pick.clamp_(max=total - 1), row_map

    def append(self, form: Form) -> Tensor:
        """Forward what is decided left of the block, and decide its first token by it if the model's family does so."""
        state = self.state
        took_part = self.forward.append_context(form.pending) & self._works
        if self.config.seeded:
            first = torch.where(took_part, self._place.outer, state.tokens.shape[1])
            window = state.window(state.columns(first, 1), 1)
            logits = self.model.logits(self.forward.last_of_context())
            step = self.propose.step(
                logits, window, Standing.in_one_block(first, 1, state.step),
                allowed=self.constrained.allowed(window, logits.shape[1]),
            )  # fmt: skip
            step, action = self.constrained.act(step, ~self._works, lambda step: Action(step.used))
            assert action.commit is not None
            self.commit(window.positions, step.token, action.commit, step.confidence, self.fills_at_once)
            took_part = took_part & (window.positions[:, 0] < 0)  # the others have been counted
        state.step.add_(took_part)
        self._count_from_here(self._works)
        open_now = self._window(False).used.sum(1, dtype=torch.int32) if self.reads_open else self._works.int()
        return self._reported(open_now)

    def denoise(self, form: Form) -> Tensor:
        """A step of the rule."""
        state, constrained = self.state, self.constrained
        window = self._window(form.is_limited)
        pick, row_map = self._compacted(window.used, form.head)
        hidden = self.forward(form.part, window, self.standing, pick, form.pending)
        logits = self.model.logits(hidden)
        self._row_cost = 0 if logits is hidden else hidden.shape[1] * logits.shape[1]
        step = self.propose.step(
            logits, window, self.standing, row_map, self.memory, constrained.allowed(window, logits.shape[1])
        )
        is_extra = step.index >= self._max_steps if constrained.may_leave_open else self._works
        step, action = constrained.act(step, is_extra)
        self.remember(step)
        self.unfinished.see(step)
        info = state.write(
            window.positions, _or(action.token, step.token), commit=action.commit, edit=action.edit,
            remask=action.remask, renoise=action.renoise, confidence=_or(action.confidence, step.confidence),
            **self._how,
        )  # fmt: skip
        if action.insert is not None:
            block_end = (self.standing.block_start + self.standing.block_length).clamp(max=state.tokens.shape[1])
            ops.splice_(
                state.tokens, torch.where(self._works, self.standing.block_start, -1), insert=action.insert,
                remove=action.remove, end=block_end, state=state.state, commit_step=state.commit_step,
                commit_confidence=state.confidence, fill_token_id=self.special.mask,
            )  # fmt: skip
        if action.embeds is not None and action.embedded is not None:
            self.forward.embed_next(window, action.embeds, action.embedded)
        if self.model.self_conditions:
            self.forward.condition_next(window, logits, step.sampling_temperature)
        return self._advance(info, action)

    def _advance(self, info: Tensor, action: Action) -> Tensor:
        """Find out which rows are done with their block; what there is to report."""
        if self.reads_open:
            if self.is_delayed:
                return info[:, :2].flatten()
            open_now = info[:, 0]
            return open_now.masked_fill(self.constrained.is_stuck, 0) if self.constrained.may_leave_open else open_now
        state, plan = self.state, self.standing
        columns = state.columns(plan.block_start, len(self._columns))
        has_open = (state.open_in(columns) & (self._columns < plan.block_length[:, None])).any(1)
        wanted = has_open if action.working is None else action.working
        if self.constrained.may_leave_open:
            wanted = has_open | (wanted & (plan.index < self._max_steps))
            wanted = wanted & ~self.constrained.is_stuck
        works = self._works & wanted & self._has_steps()
        self._works.copy_(works)
        return works.int()

    def _reported(self, open_now: Tensor) -> Tensor:
        """The report with these numbers int32 `[S]`."""
        if not self.is_delayed:
            return open_now
        return torch.stack((open_now, self.state.is_open.sum(1, dtype=torch.int32)), 1).flatten()

    # --- what is shown ------------------------------------------------------------------------------------------------

    def denoises(self, form: Form) -> bool:
        return form.kind == "denoise"

    def finished_columns(self) -> int:
        return int(self.standing.block_start[0]) if bool(self._works[0]) else self.start


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value
