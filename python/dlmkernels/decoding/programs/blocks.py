# SPDX-License-Identifier: Apache-2.0
"""The program of most rules: decode block after block, from left to right, each until the rule is done with it.

Every row has its own block, step and end. Without a cache, or if rows may be assigned new requests along the way, a row
enters its next block as soon as it has finished one. In other batches with a cache, rows that enter a block need a
different forward pass than rows that continue, so all rows enter their blocks together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ... import ops
from ...window import Rows, TokenWindow
from ..block_forward import BlockForward
from ..feature_forwards import FORWARDS
from ..features import features_of
from ..rules import Action
from ..schedule import plan_blocks
from ..shadow_forward import ShadowForward
from ..standing import Standing
from ..state import listed
from .base import Program, Task
from .block_forms import BlockForms, Form
from .block_plan import BlockPlan
from .row_forms import RowForms

#: Number of multiplications in the language-model head that cost as much as compacting its input to the used slots.
COMPACTING = 500_000


class BlockAfterBlock(Program):
    """Block-after-block decoding. Reports are described in `BlockForms` and `RowForms`."""

    def __init__(self, task: Task):
        super().__init__(task)
        config, state, rule = self.config, self.state, self.rule
        rows, device = len(state.tokens), state.tokens.device
        what = self.model, state, config, self.special, self.grid, task.prompt_embeds
        features = features_of(config.cache)
        kind: Callable[..., BlockForward] = ShadowForward if rule.shadow else BlockForward
        if features is not None:
            kind = partial(FORWARDS[type(features)], features)
        self.forward = kind(*what, rows_change=task.rows_change, prompt_limit=task.prompt_limit)
        self.reads_open = rule.slots == "open"
        #: whether rows enter their blocks together, in which case the host knows the block that they are in
        self.together = not task.rows_change and features is None and (
            rows == 1 or config.cache != "none" or self.forward.commits_apart
        )  # fmt: skip
        # A rule that can remask tokens can remask an end token too, so an end token counts once its block is finished.
        self.fills_at_once = config.eos_policy == "fill" and self.reads_open
        self.fills_at_end = config.eos_policy != "none" and not self.fills_at_once
        blocks = plan_blocks(config, self.grid)
        # positions that a constraint kept open get extra steps after those of the rule, as long as they make progress
        extra = int(self.constrained.may_leave_open)

        def limits(length: int, num_steps: int) -> tuple[int, int]:
            most = rule.max_steps(length, num_steps)
            return most, most + extra * length

        most_steps = [limits(b.length, b.num_steps)[1] for b in blocks]
        longest = max(b.length for b in blocks)
        shortest = min([(n - 1) % longest + 1 for n in self.grid.last_lengths], default=longest)
        least_steps = min([*most_steps, limits(shortest, shortest)[1]])
        slots = self._most_slots([b.start for b in blocks], longest)
        self.forms = BlockForms(config, blocks, most_steps, self.forward, self.fills_at_end)
        self.row_forms = RowForms(
            config, least_steps, self.forward, slots, task.may_be_few and not self.model.is_compiled
        )  # fmt: skip
        #: positions that windows may hold until the row enters another block, -1 for none, int32 [S, W]; the same,
        #: clamped for indexing; and which of them are valid in rows that are working, uint8
        self._listing = torch.zeros(rows, slots, dtype=torch.int32, device=device)
        self._index = torch.zeros(rows, slots, dtype=torch.int64, device=device)
        self._valid = torch.zeros(rows, slots, dtype=torch.uint8, device=device)
        self._works = torch.zeros(rows, dtype=torch.bool, device=device)  # rows that are in a block
        self._is_over = torch.zeros_like(self._works)  # rows that have nothing left to do
        #: the last report, if rows advance independently
        self._open, self._phase, self._pending = (torch.zeros_like(state.origin) for _ in range(3))
        self._nothing = torch.full((), -1, dtype=torch.int32, device=device)
        self.plan = BlockPlan(state, self.grid, blocks, limits, self._listing)
        self.standing = self.plan.standing
        self._columns = torch.arange(self.standing.width, dtype=torch.int32, device=device)
        self._row_map = torch.zeros(rows * slots + 1, dtype=torch.int32, device=device)
        self._numbers = torch.arange(rows * slots + 1, dtype=torch.int32, device=device)
        self._row_cost = 0  # multiplications in the head per row
        self._how = {
            "step": state.step, "seed": state.seed, "origin": state.origin, "mask_token_id": self.special.mask,
            "vocab_size": self.model.vocab_size or 0, "eos_token_ids": self.special.eos,
            "eos_policy": "fill" if self.fills_at_once else "none", "fill_token_id": self.special.pad,
        }  # fmt: skip

    def _most_slots(self, starts: list[int], longest: int) -> int:
        """Return the number of slots of a window: the largest number of positions that a step can decide in any row."""
        if self.rule.slots == "canvas":
            return self.state.tokens.shape[1] - self.start
        if not self.reads_open or self.forward.rows_change:
            return longest
        is_open = self.state.is_open
        column = torch.arange(is_open.shape[1], device=is_open.device) - self.grid.first[:, None]
        bounds = torch.tensor(starts, device="cpu").to(is_open.device)
        block = (torch.searchsorted(bounds, column, right=True) - 1).clamp(min=0)
        counts = torch.zeros(len(is_open), len(starts), dtype=torch.int64, device=is_open.device)
        return max(int(counts.scatter_add(1, block, is_open.long()).max()), 1)

    # --- host side ----------------------------------------------------------------------------------------------------

    def form(self, report: tuple[int, ...], behind: int) -> Form | None:
        slots = self._listing.numel()
        form = self.forms.next(report, behind, slots) if self.together else self.row_forms.next(report, behind)
        if form is None:
            return None
        if self.reads_own_ends:
            form = replace(form, own_ends=True)
        if self.reads_open and not self.model.self_conditions:
            return form
        return replace(form, head=slots)

    def may_leave(self, form: Form) -> bool:
        return not self.reads_open or form.kind == "enter" or form.is_limited

    def widest(self, form: Form) -> Form:
        is_any = form.part in self.forward.counted and not (self.together and form.part == "append")
        pending = self.forward.most_columns if is_any else form.pending
        rows = form.rows  # rounded up to a power of two, to keep the number of forms small
        if rows is not None:
            rows = min(1 << (rows - 1).bit_length(), len(self._works))
        return replace(form, pending=pending, head=self._listing.numel(), is_limited=True, rows=rows, width=None)

    # --- device side --------------------------------------------------------------------------------------------------

    def begin(self) -> Tensor:
        self._renoise(None)
        self.forward.begin()
        if self.forward.rows_change and self.row_forms.has_phases and not self.forward.takes_rows:
            raise ValueError(
                f"cache='{self.config.cache}' with attention='{self.config.attention}' is not supported when rows "
                "receive new requests during decoding and the model's rotary embedding depends on the request's "
                "length; use cache='none' and attention='full'"
            )
        self.forms.begin()
        self.row_forms.begin(self.grid.ends.tolist())
        self.plan.begin()
        self.constrained.enter(torch.ones_like(self._works))
        self._works.fill_(False)
        self._valid.fill_(0)
        self.plan.frontier.fill_(-1 if self.together else self.plan.count)
        return self.enter()

    def _renoise(self, rows: Tensor | None) -> None:
        """Fill open positions with random tokens, in rows bool `[S]` (None: all), if that is the rule's noise."""
        if self.rule.noise != "uniform":
            return
        if self.model.vocab_size is None:
            name = type(self.rule).__name__
            raise ValueError(f"rule {name} draws from the vocabulary, but the model's vocab_size is unknown")
        self.state.renoise(self.model.vocab_size, rows)

    def renew(self, rows: Tensor) -> None:
        """Start the new requests in `rows` int64 `[n]`, which had nothing left to do.

        Only for tasks with `rows_change`. Call it after `Grid.place` and `State.admit`. The new requests then wait for
        their first block, and the report shows 0 for their rows.
        """
        if not self.forward.rows_change:
            raise ValueError("rows can be given new requests only if the task has rows_change=True; got False")
        is_new = torch.zeros_like(self._works).index_fill_(0, rows, True)
        self._renoise(is_new)
        self._works.masked_fill_(is_new, False)
        self._is_over.masked_fill_(is_new, False)
        self._open.masked_fill_(is_new, 0)
        self._valid.masked_fill_(is_new[:, None], 0)
        self.constrained.enter(is_new)
        self.plan.begin()
        self.forward.renew(is_new)
        self.row_forms.renew(rows.tolist(), self.grid.ends[rows].tolist())

    def step(self, form: Form) -> Tensor:
        if form.kind == "look":
            return self._reported(self._open, None)
        if form.kind == "enter":
            return self.enter()
        return self.append(form) if form.kind == "append" else self.denoise(form)

    def enter(self) -> Tensor:
        """Move rows that are done with their block into their next one, up to the frontier."""
        state, plan = self.state, self.plan
        if self.together:
            plan.frontier.add_(1)
        works = self._window(True).used.any(1) if self.reads_open else self._works & plan.has_steps()
        if self.constrained.may_leave_open:
            works = works & ~self.constrained.is_stuck
        if self.fills_at_end:
            state.fill_after_eos(~works, self.special.eos, self.special.pad, self.ends)
        enters, has_later = plan.enter(works, self.together)
        self._works.copy_(works | enters)
        count = self._list_positions()
        self.standing.open_at_start.copy_(torch.where(enters, count, self.standing.open_at_start))
        self.forward.enter(plan.place, self.forms.block if self.together else None)
        self.forward.forget(enters)
        self.constrained.enter(enters)
        self._is_over.copy_(~self._works & ~has_later)
        return self._reported(torch.where(self._works, count.clamp(min=1), torch.where(has_later, 0, -1)), None)

    def _open_in_block(self) -> Tensor:
        """Return the open positions of each row's block, bool `[S, columns]`."""
        columns = self.state.columns(self.standing.block_start, len(self._columns))
        return self.state.open_in(columns) & (self._columns < self.standing.block_length[:, None])

    def _list_positions(self) -> Tensor:
        """List the positions that windows may hold until rows enter another block.

        Returns the number of open positions in each row's block, int32 `[S]`.
        """
        state, is_open = self.state, self._open_in_block()
        columns = state.columns(self.standing.block_start, len(self._columns))
        if self.reads_open:
            listing = listed(columns, is_open, self._listing.shape[1], state.tokens.shape[1])
        elif self.rule.slots == "block":
            free = state.free_in(columns) & (self._columns < self.standing.block_length[:, None])
            listing = torch.where(free, columns.number, -1)
        else:
            whole = state.columns(torch.full_like(state.origin, self.start), self._listing.shape[1])
            listing = torch.where(state.free_in(whole), whole.number, -1)
        self._listing.copy_(listing)
        self._index.copy_(listing.clamp(min=0))
        self._valid.copy_((listing >= 0) & self._works[:, None])
        return is_open.sum(1, dtype=torch.int32)

    def _taking(self, form: Form) -> Rows | None:
        """Return the rows that this step takes, or None for all.

        Leaves out rows whose phase has changed since the host's report, and rows that do not fit the form's shapes.
        """
        if form.rows is None:
            return None
        takes = (self._open > 0) & (self._phase == form.phase)
        if form.part in self.forward.counted:
            takes = takes & (self._pending <= form.pending)
        if form.width is not None:
            takes = takes & (self.grid.ends <= form.width)
        return Rows.chosen(takes, form.rows)

    def _window(self, is_limited: bool, rows: Rows | None = None) -> TokenWindow:
        """Return the window of positions that this step may decide."""
        if self.reads_open:
            used = (self.state.state.gather(1, self._index) & self._valid).bool()
            if is_limited:
                used = used & self.plan.has_steps()[:, None]
        else:
            used = self._valid.bool() & self._works[:, None]
        if self.constrained.may_leave_open:
            used = used & ~self.constrained.is_stuck[:, None]
        if self.forward.readable is not None:
            used = used & self.forward.readable.gather(1, self._index)
        if rows is not None:
            used = used & rows.taken[:, None]
        return TokenWindow.of(torch.where(used, self._listing, self._nothing), self.state.origin, used)

    def _compacted(self, used: Tensor, head: int) -> tuple[Tensor | None, Tensor | None]:
        """Compact the slots of all rows to those that need logits.

        Returns the indices of these slots, int64 `[head]`, and for each of the N slots the row of its logits, int32
        `[N]` (-1 for none); or None and None if all slots get logits.
        """
        total = used.numel()
        if (total - head) * self._row_cost < COMPACTING:
            return None, None
        pick = torch.nonzero_static(used.flatten(), size=head, fill_value=total)[:, 0]
        row_map = self._row_map.fill_(-1).index_copy_(0, pick, self._numbers[:head])[:total]
        return pick.clamp_(max=total - 1), row_map

    def append(self, form: Form) -> Tensor:
        """Forward the decided context left of the block; with `seeded`, also decide the block's first token from it."""
        state, rows = self.state, self._taking(form)
        in_block = state.columns(self.plan.place.outer, form.columns[0])
        took_part = self.forward.append_context(form.pending, rows) & state.open_in(in_block).any(1)
        if self.config.seeded:
            first = torch.where(took_part, self.plan.place.outer, state.tokens.shape[1])
            window = state.window(state.columns(first, 1), 1)
            logits = self.propose.head(self.forward.last_of_context())
            step = self.propose.step(
                logits, window, Standing.in_one_block(first, 1, state.step),
                allowed=self.constrained.allowed(window, logits.shape[1]),
            )  # fmt: skip
            step, action = self.constrained.act(step, None, lambda step: Action(step.used))
            assert action.commit is not None
            self.commit(window.positions, step.token, action.commit, step.confidence, self.fills_at_once)
            took_part = took_part & (window.positions[:, 0] < 0)  # the commit has counted the step of the others
        state.step.add_(took_part)
        taken = self._works if rows is None else self._works & rows.taken
        self.plan.count_from_here(taken)
        open_now = self._open_in_block().sum(1, dtype=torch.int32).masked_fill(~self._works, 0)
        self.standing.open_at_start.copy_(torch.where(taken, open_now, self.standing.open_at_start))
        self._works.copy_(self._works & ((open_now > 0) | ~taken))
        return self._reported(open_now, rows)

    def denoise(self, form: Form) -> Tensor:
        """Run one step of the rule."""
        state, constrained, rows = self.state, self.constrained, self._taking(form)
        window = self._window(form.is_limited, rows)
        pick, row_map = self._compacted(window.used, form.head)
        hidden = self.forward(form.part, window, self.standing, pick, form.pending, form.width, rows)
        window = self.forward.spoken_of(window)
        logits = self.propose.head(hidden)
        self._row_cost = 0 if logits is hidden else hidden.shape[1] * logits.shape[1]
        step = self.propose.step(
            logits, window, self.standing, row_map, self.memory, constrained.allowed(window, logits.shape[1])
        )
        is_extra = step.index >= self.plan.max_steps if constrained.may_leave_open else None
        taken = None if rows is None else rows.taken
        step, action = constrained.act(step, is_extra, taken=taken)
        self.remember(step, taken)
        self.unfinished.see(step)
        info = state.write(
            window.positions, _or(action.token, step.token), self.ends, commit=action.commit, edit=action.edit,
            remask=action.remask, renoise=action.renoise, confidence=_or(action.confidence, step.confidence),
            **self._how,
        )  # fmt: skip
        if action.insert is not None:
            block_end = (self.standing.block_start + self.standing.block_length).clamp(max=state.tokens.shape[1])
            takes_part = self._works if taken is None else self._works & taken
            moved = ops.splice_(
                state.tokens, torch.where(takes_part, self.standing.block_start, -1), insert=action.insert,
                remove=action.remove, end=block_end, state=state.state, commit_step=state.commit_step,
                commit_confidence=state.confidence, fill_token_id=self.special.mask,
            )  # fmt: skip
            if self.on_move is not None:
                self.on_move(moved.source)
        if action.embeds is not None and action.embedded is not None:
            self.forward.embed_next(window, action.embeds, action.embedded, taken)
        self.forward.learn(step, rows)
        if self.model.self_conditions:
            self.forward.condition_next(window, logits, step.sampling_temperature, taken)
        return self._advance(info, action, rows)

    def _advance(self, info: Tensor, action: Action, rows: Rows | None) -> Tensor:
        """Determine which rows are done with their block, and return the report."""
        if self.reads_open:
            if self.together and self.forms.is_delayed:
                return info[:, :2].flatten()
            open_now = info[:, 0] if self.forward.readable is None else info[:, 1]
            if self.forward.narrows:
                works = self._works & self.plan.has_steps()
                open_now = self._open_in_block().sum(1, dtype=torch.int32).masked_fill(~works, 0)
            if self.constrained.may_leave_open:
                open_now = open_now.masked_fill(self.constrained.is_stuck, 0)
            return open_now if self.together else self._reported(open_now, rows)
        has_open = self._open_in_block().any(1)
        wanted = has_open if action.working is None else action.working
        if self.constrained.may_leave_open:
            wanted = has_open | (wanted & (self.standing.index < self.plan.max_steps))
            wanted = wanted & ~self.constrained.is_stuck
        goes_on = wanted & self.plan.has_steps()
        works = self._works & (goes_on if rows is None else goes_on | ~rows.taken)
        self._works.copy_(works)
        return works.int() if self.together else self._reported(works.int(), rows)

    def _reported(self, open_now: Tensor, rows: Rows | None) -> Tensor:
        """Build the report from the numbers of open positions, int32 `[S]`, which are new in `rows` (None: in all)."""
        if not self.together:
            if rows is not None:
                open_now = torch.where(rows.taken, open_now, self._open)
            open_now = open_now.masked_fill(self._is_over, -1)
            phase, pending = self.forward.phases(self.standing.index)
            for own, value in ((self._open, open_now), (self._phase, phase), (self._pending, pending)):
                own.copy_(value)
            return torch.cat((open_now, phase, pending))
        if not self.forms.is_delayed:
            return open_now
        return torch.stack((open_now, self.state.is_open.sum(1, dtype=torch.int32)), 1).flatten()

    # --- output -------------------------------------------------------------------------------------------------------

    def denoises(self, form: Form) -> bool:
        return form.kind == "denoise"

    def finished_columns(self) -> int:
        return int(self.standing.block_start[0]) if bool(self._works[0]) else self.start

    def finished(self) -> Tensor:
        """Return the column up to which each row is final, int32 `[S]`.

        A block becomes final when the row leaves it: until then, an end token in it may still cut it short.
        """
        standing = self.standing
        reached = standing.block_start + torch.where(self._is_over, standing.block_length, 0)
        return torch.where(self.state.block < 0, self.grid.begun, reached)


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value
