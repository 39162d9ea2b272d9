# SPDX-License-Identifier: Apache-2.0
"""Base class of decoding programs, and the single loop that runs all of them.

A program's `step` plans, forwards, proposes, selects, writes and advances. It consists of tensor operations only, which
write into tensors that are never replaced. Their shapes are fixed by a `form`. A step reads nothing on the host and
returns a report, a few integers. The host's part is the method `form`: from an earlier report it chooses the form of
the next step, or finds that everything is decoded. All steps of one form therefore make the same calls on the same
memory, so they can be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...models.adapt import DiffusionModel
from ...window import TokenWindow
from ..config import DecodingConfig, SpecialTokens
from ..constrained import Constrained
from ..constraint import AnswerPlace
from ..ends import ENDS
from ..hidden_rows import Logits
from ..outcome import Unfinished, output_of
from ..output import DecodingOutput
from ..parameters import with_parameters
from ..poll import OpenCount
from ..propose import Proposer
from ..rules import Action
from ..schedule import Grid
from ..standing import Standing
from ..state import State, put
from ..step import Step
from ..streaming import Stream


@dataclass(frozen=True)
class Task:
    """A decoding task: the arguments that all programs have in common.

    Columns `[start, end)` of the state are decoded, plus any columns needed to complete the last block of the grid.

    Attributes
    ----------
    rows_change : bool
        Whether rows may be assigned new requests while other rows are being decoded (see `Grid.for_any`).
    may_be_few : bool
        Whether a forward pass may include only the rows that need it. False fixes the size of its matrix products.
    prompt_limit : Tensor, optional
        int32 `[B, P]`, for DiffusionGemma: `limit` of `images.Images`.
    """

    model: DiffusionModel
    state: State
    config: DecodingConfig
    special: SpecialTokens
    grid: Grid
    start: int
    end: int
    prompt_embeds: Tensor | None = None
    prompt_limit: Tensor | None = None
    rows_change: bool = False
    may_be_few: bool = True


class Program:
    """Base class of all decoding programs."""

    def __init__(self, task: Task):
        self.task = task
        self.model, self.state, self.special = task.model, task.state, task.special
        self.config = with_parameters(task.config, task.state.parameters)
        self.rule, self.grid, self.start, self.end = self.config.rule, task.grid, task.start, task.end
        self.propose = Proposer(self.model, self.state, self.config, self.special)
        place = AnswerPlace.of(self.special, self.start, task.grid.asked.tolist(), self.model.vocab_size)
        self.constrained = Constrained(self.config.constraint, self.rule, self.state, place, self.end)
        #: per-row end tokens, int64 [S, E], or None if all rows share the same; and whether they are read
        self.own_ends = self.state.parameters.get(ENDS)
        self.reads_own_ends = self.own_ends is not None
        self.unfinished = Unfinished(self.state, self.rule, self.constrained)
        #: upper bound on forwards, doubled for extra forwards at positions that a constraint has kept open
        self.most_forwards = (self.end - self.start) * (2 if self.constrained.may_leave_open else 1)
        #: called after every insertion or removal with each position's previous column, int32 `[S, T]`, -1 if new
        self.on_move: Callable[[Tensor], None] | None = None
        #: values that the rule keeps from step to step
        self.memory: dict[str, Tensor] = {}

    # --- host side ----------------------------------------------------------------------------------------------------

    def form(self, report: tuple[int, ...], behind: int) -> Any:
        """Return the form of the next step, or None if there is nothing left to do.

        `report` is the latest report known on the host. `behind` steps have been submitted since then.
        """
        raise NotImplementedError

    def may_leave(self, form: Any) -> bool:
        """Return whether, from this step on, positions that the last step saw open may never be looked at again."""
        return self.rule.slots != "open"

    def widest(self, form: Any) -> Any:
        """Return a form for the same kind of work, with shapes large enough for any rows in any state."""
        return form

    # --- device side --------------------------------------------------------------------------------------------------

    def begin(self) -> Tensor:
        """Do the work that comes before the first step, and return the first report, int32 `[n]`.

        Resets everything about requests that the state held before.
        """
        raise NotImplementedError

    def step(self, form: Any) -> Tensor:
        """Run one step (plan, forward, propose, select, write, advance) and return its report, int32 `[n]`."""
        raise NotImplementedError

    def decide(
        self, logits: Logits, window: TokenWindow, standing: Standing, act: Callable[[Step], Action],
        row_map: Tensor | None = None, first_alone: bool = False,
    ) -> tuple[Step, Action]:  # fmt: skip
        """Turn logits `[R or 2R, V]` into a step, and let `act` choose an action that the constraint accepts.

        With `first_alone`, only the first used slot of a window may be committed when positions that a constraint has
        kept open are decided one by one.
        """
        constrained = self.constrained
        step = self.propose.step(
            logits, window, standing, row_map, allowed=constrained.allowed(window, logits.shape[1])
        )  # fmt: skip
        if first_alone:
            step = replace(step, eligible=step.used & (step.used.cumsum(1) == 1))
        step, action = constrained.act(step, None, act)
        self.unfinished.see(step)
        return step, action

    def still_open(self, info: Tensor) -> Tensor:
        """Return the number of open positions, int32 `[S]`, from the info of `ops.remask_`.

        It is 0 in rows where a constraint accepts nothing more.
        """
        return info[:, 1].masked_fill(self.constrained.is_stuck, 0)

    def commit(
        self, positions: Tensor, tokens: Tensor, chosen: Tensor, confidence: Tensor, fills: bool = True
    ) -> Tensor:
        """Commit the `chosen` tokens `[S, W]` at canvas `positions`, and return the info of `ops.remask_`.

        `fills`: whether an end token among them ends the request, so that the rest of the row is filled with padding.
        """
        policy = "fill" if fills and self.config.eos_policy != "none" else "none"
        return self.state.write(
            positions, tokens, self.ends, commit=chosen, confidence=confidence, step=self.state.step,
            mask_token_id=self.special.mask, eos_token_ids=self.special.eos, eos_policy=policy,
            fill_token_id=self.special.pad,
        )  # fmt: skip

    @property
    def ends(self) -> Tensor | None:
        """Per-row end tokens, int64 `[S, E]`, or None if all rows have the same."""
        return self.own_ends if self.reads_own_ends else None

    def remember(self, step: Step, taken: Tensor | None = None) -> None:
        """Store the values that the rule keeps from `step`, in the rows bool `[S]` that took part (None: all rows)."""
        for name, value in step.kept.items():
            if name not in self.memory:
                self.memory[name] = torch.zeros_like(value, memory_format=torch.contiguous_format)
            put(self.memory[name], value, taken)

    # --- output -------------------------------------------------------------------------------------------------------

    def denoises(self, form: Any) -> bool:
        """Return whether a step of this form runs the model and writes its tokens."""
        return True

    def last_column(self) -> int:
        """Return the column after the last one of the first row that can be shown to a streamer now."""
        return self.end

    def finished_columns(self) -> int | None:
        """Return the column up to which the first row is finished; None means up to its first open position."""
        return None

    def output(self) -> DecodingOutput:
        """Return the result, once there is nothing left to do."""
        return output_of(
            self.state, self.start, self.end, self.unfinished, asked=self.grid.asked, pad=self.special.pad
        )  # fmt: skip


@torch.no_grad()
def run(program: Program, streamer=None, steps_per_poll: int = 1) -> DecodingOutput:
    """Run a program to its end; the host reads a report after every `steps_per_poll` steps."""
    program.unfinished.begin()
    counts = OpenCount(*program.begin().tolist())
    stream = Stream(streamer, program.state, program.start)
    made = 0
    while True:
        report = counts.latest() if made % steps_per_poll == 0 else counts.known
        form = program.form(report, counts.behind)
        if form is None:
            break
        made += 1
        if program.model.is_compiled:
            form = program.widest(form)
        if program.may_leave(form):
            program.unfinished.settle()
        counts.submit(program.step(form))
        if streamer is not None:
            stream.step(program.last_column(), program.finished_columns(), program.denoises(form))
    if streamer is not None:
        stream.finish(program.last_column())
    return program.output()
