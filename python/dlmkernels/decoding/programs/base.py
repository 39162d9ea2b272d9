# SPDX-License-Identifier: Apache-2.0
"""What a decoding program is, and the one loop that runs every program.

A program is a plan and an advance. Its `step` is plan, forward, propose, select, write, advance: tensor operations
alone, whose shapes are said by a `form`, and which write into tensors that are never replaced. It reads nothing on the
host and hands back a report, a few integers. `form` is the host's part: from an old report it chooses the form of the
next step, or finds that everything is decoded. So the steps of one form are the same calls on the same memory every
time, and can be replayed as such.
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
    """What is to be decoded, and how: the arguments that all programs have in common.

    Columns `[start, end)` of the state are decoded, and those that complete the last block of the grid. Where
    `rows_change`, rows are given other requests while others are decoded (see `Grid.for_any`). `may_be_few`: whether a
    forward may take the rows alone that need it; False pins the width of its matrix products. `prompt_limit`: see
    `images.Images`; for DiffusionGemma.
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
    """Base of all programs."""

    def __init__(self, task: Task):
        self.task = task
        self.model, self.state, self.special = task.model, task.state, task.special
        self.config = with_parameters(task.config, task.state.parameters)
        self.rule, self.grid, self.start, self.end = self.config.rule, task.grid, task.start, task.end
        self.propose = Proposer(self.model, self.state, self.config, self.special)
        place = AnswerPlace.of(self.special, self.start, task.grid.asked.tolist(), self.model.vocab_size)
        self.constrained = Constrained(self.config.constraint, self.rule, self.state, place, self.end)
        #: end tokens of each row's own, int64 [S, E], and whether they are read; else all rows have the same
        self.own_ends = self.state.parameters.get(ENDS)
        self.reads_own_ends = self.own_ends is not None
        self.unfinished = Unfinished(self.state, self.rule, self.constrained)
        #: after so many forwards what is open stays so; what a constraint has kept open gets forwards of its own
        self.most_forwards = (self.end - self.start) * (2 if self.constrained.may_leave_open else 1)
        #: told of every insertion and removal where positions came from, int32 `[S, T]`, -1 for new ones
        self.on_move: Callable[[Tensor], None] | None = None
        #: what the rule keeps from step to step
        self.memory: dict[str, Tensor] = {}

    # --- the host's part ----------------------------------------------------------------------------------------------

    def form(self, report: tuple[int, ...], behind: int) -> Any:
        """The form of the next step, None if there is nothing left to do.

        `report` is that of the step before the last `behind` ones.
        """
        raise NotImplementedError

    def may_leave(self, form: Any) -> bool:
        """Whether positions that the last step saw open may be left by a step of this form, for good."""
        return self.rule.slots != "open"

    def widest(self, form: Any) -> Any:
        """The form of the same work whose shapes serve any rows, whatever is left to do in them."""
        return form

    # --- the device's part --------------------------------------------------------------------------------------------

    def begin(self) -> Tensor:
        """What there is to do before the first step; the first report, int32 `[n]`.

        Nothing is left of requests that the state held before.
        """
        raise NotImplementedError

    def step(self, form: Any) -> Tensor:
        """Plan, forward, propose, select, write, advance; what there is to report, int32 `[n]`."""
        raise NotImplementedError

    def decide(
        self, logits: Logits, window: TokenWindow, standing: Standing, act: Callable[[Step], Action],
        row_map: Tensor | None = None, first_alone: bool = False,
    ) -> tuple[Step, Action]:  # fmt: skip
        """The step that these logits `[R or 2R, V]` make, and what `act` does of it, as far as a constraint accepts it.

        `first_alone`: of what a constraint has kept open, a window's first slot alone may be decided by itself.
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
        """Open positions int32 `[S]` by the info of `ops.remask_`, 0 where a constraint accepts nothing more."""
        return info[:, 1].masked_fill(self.constrained.is_stuck, 0)

    def commit(
        self, positions: Tensor, tokens: Tensor, chosen: Tensor, confidence: Tensor, fills: bool = True
    ) -> Tensor:
        """Write the chosen ones of the tokens `[S, W]` at canvas `positions`; the info of `ops.remask_`.

        `fills`: whether an end token among them is final.
        """
        policy = "fill" if fills and self.config.eos_policy != "none" else "none"
        return self.state.write(
            positions, tokens, self.ends, commit=chosen, confidence=confidence, step=self.state.step,
            mask_token_id=self.special.mask, eos_token_ids=self.special.eos, eos_policy=policy,
            fill_token_id=self.special.pad,
        )  # fmt: skip

    @property
    def ends(self) -> Tensor | None:
        """End tokens int64 `[S, E]` of each row's own, None where all have the same."""
        return self.own_ends if self.reads_own_ends else None

    def remember(self, step: Step, taken: Tensor | None = None) -> None:
        """Write down what the rule keeps of the step, in the rows that took part, bool `[S]`; None: in all."""
        for name, value in step.kept.items():
            if name not in self.memory:
                self.memory[name] = torch.zeros_like(value, memory_format=torch.contiguous_format)
            put(self.memory[name], value, taken)

    # --- what comes out -----------------------------------------------------------------------------------------------

    def denoises(self, form: Any) -> bool:
        """Whether a step of that form forwards the model and writes what it says."""
        return True

    def last_column(self) -> int:
        """Column after the last of the first row, of what can be shown of it now."""
        return self.end

    def finished_columns(self) -> int | None:
        """Up to which column the first row is finished; None: up to its first open position."""
        return None

    def output(self) -> DecodingOutput:
        """The result, when there is nothing left to do."""
        return output_of(
            self.state, self.start, self.end, self.unfinished, asked=self.grid.asked, pad=self.special.pad
        )  # fmt: skip


@torch.no_grad()
def run(program: Program, streamer=None, steps_per_poll: int = 1) -> DecodingOutput:
    """Run a program to its end; the host looks at a report after every `steps_per_poll` steps."""
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
