# SPDX-License-Identifier: Apache-2.0
"""Requests that start and end together, for decodings whose rows cannot be replaced (see `slots.goes_by_itself`).

A gang is decoded as `generate` decodes a batch. Its requests can be cancelled on the way, but no other request can take
their place before the whole gang has ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ..decoding.ends import ENDS, end_table
from ..decoding.parameters import lengths_of, parameters_of
from ..decoding.poll import OpenCount
from ..decoding.processing import RequestProposer
from ..decoding.programs import Task, program_of
from ..decoding.schedule import Grid
from ..decoding.state import State
from ..models.adapt import DiffusionModel
from .alike import together
from .lane import Lane, StepsOf
from .request import Request


class GangLane(Lane):
    """A lane that decodes one batch after another, each of requests that can share forward passes."""

    def __init__(self, model: DiffusionModel, rows: int, steps_of: StepsOf):
        super().__init__(rows)
        self.model, self._steps_of = model, steps_of
        self._most = rows
        self.is_over = True
        self._prompt_length = 0
        self._lengths: list[int] = []

    @property
    def room(self) -> int:
        return self._most if self.busy == 0 else 0

    def admit(self, requests: Sequence[Request]) -> None:
        task = task_of(self.model, requests)
        self._prompt_length = task.start
        self.program = program_of(task.config.rule)(task)
        wishes = [request.wishes for request in requests]
        self.processed = RequestProposer.install(self.program, wishes) if any(wishes) else None
        self.steps = self._steps_of(self.program)
        self.owner = list(requests)
        self.is_over, self._lengths = False, []
        self.program.unfinished.begin()
        self.counts = OpenCount(*self.program.begin().tolist())

    def release(self, row: int, is_done: bool) -> None:
        self.owner[row] = None

    def start(self, row: int) -> int:
        return self._prompt_length

    def length(self, row: int) -> int | None:
        return self._lengths[row] if self._lengths else None

    def poll(self) -> list[int]:
        if not self.is_over:
            self.counts.latest()
        return [row for row, owner in enumerate(self.owner) if owner is not None] if self.is_over else []

    def advance(self) -> bool:
        self.seconds = 0.0
        if self.is_over:
            return False
        program = self.program
        form = program.form(self.counts.known, self.counts.behind) if self.busy else None
        if form is None:
            self.is_over = True
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remaining masks are reported in the outputs of the requests
                self._lengths = (program.output().length - self._prompt_length).tolist()
            return False
        if program.may_leave(form):
            program.unfinished.settle()
        self.working, self.width = self.busy, len(self.owner)
        self.make(form, program.denoises(form) or getattr(form, "kind", "") == "append")
        return True


def check_program(model: DiffusionModel, request: Request) -> None:
    """Raise, as `generate` would, if no program can be built for the request."""
    task = task_of(model, [request])
    program_of(task.config.rule)(task)


def task_of(model: DiffusionModel, requests: Sequence[Request]) -> Task:
    """Build the decoding task for requests that start together; their prompts are left-padded to end at one column."""
    rows, lengths = len(requests), [len(request.answer) for request in requests]
    config = together([request.config for request in requests], lengths)
    start, device, special = max(len(request.prompt) for request in requests), model.device, requests[0].special
    origin = torch.tensor([start - len(request.prompt) for request in requests], dtype=torch.int32, device="cpu")
    grows = config.block_grid == "absolute" or model.family.whole_blocks
    grid = Grid.of(config, origin.to(device), start, start + lengths_of(config, rows, device), grows)
    tokens = torch.full((rows, grid.width), special.pad, dtype=torch.int64, device="cpu")
    columns = torch.arange(grid.width, device="cpu")
    is_open = (columns >= start) & (columns < grid.ends.cpu()[:, None])
    tokens[is_open] = max(special.mask, 0)
    for k, (request, length) in enumerate(zip(requests, lengths)):
        answer = torch.tensor(request.answer, dtype=torch.int64, device="cpu")
        tokens[k, int(origin[k]) : start] = torch.tensor(request.prompt, dtype=torch.int64, device="cpu")
        tokens[k, start : start + length] = torch.where(answer < 0, max(special.mask, 0), answer)
        is_open[k, start : start + length] &= answer < 0
    seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device="cpu")
    parameters, ends = parameters_of(config, rows, device), [request.special.eos for request in requests]
    if any(own != ends[0] for own in ends):
        parameters[ENDS] = end_table(ends, device)
    state = State.of(
        tokens.to(device), is_open.to(device), origin.to(device), grid.ends, seed=seeds.to(device),
        parameters=parameters,
    )  # fmt: skip
    return Task(model, state, config, special, grid, start, start + max(lengths))
