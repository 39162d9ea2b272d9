# SPDX-License-Identifier: Apache-2.0
"""Requests that begin and end together: for decodings whose rows cannot come and go (see `slots.goes_by_itself`).

A gang is decoded as `generate` decodes a batch; while it is, its requests can be cancelled, but no other request takes
their place.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch

from ..decoding.config import SpecialTokens
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
    """One batch after the other, each of requests that are decoded alike."""

    def __init__(
        self, model: DiffusionModel, special: SpecialTokens, rows: int, steps_of: StepsOf
    ):  # fmt: skip
        super().__init__(rows)
        self.model, self.special, self._steps_of = model, special, steps_of
        self._most = rows
        self.is_over = True
        self._prompt_length = 0
        self._lengths: list[int] = []

    @property
    def room(self) -> int:
        return self._most if self.busy == 0 else 0

    def admit(self, requests: Sequence[Request]) -> None:
        rows, lengths = len(requests), [len(request.answer) for request in requests]
        config = together([request.config for request in requests], lengths)
        start = self._prompt_length = max(len(request.prompt) for request in requests)
        device = self.model.device
        origin = torch.tensor([start - len(request.prompt) for request in requests], dtype=torch.int32, device="cpu")
        grows = config.block_grid == "absolute" or self.model.family.whole_blocks
        grid = Grid.of(config, origin.to(device), start, start + lengths_of(config, rows, device), grows)
        tokens = torch.full((rows, grid.width), self.special.pad, dtype=torch.int64, device="cpu")
        columns = torch.arange(grid.width, device="cpu")
        is_open = (columns >= start) & (columns < grid.ends.cpu()[:, None])
        tokens[is_open] = max(self.special.mask, 0)
        for k, (request, length) in enumerate(zip(requests, lengths)):
            answer = torch.tensor(request.answer, dtype=torch.int64, device="cpu")
            tokens[k, int(origin[k]) : start] = torch.tensor(request.prompt, dtype=torch.int64, device="cpu")
            tokens[k, start : start + length] = torch.where(answer < 0, max(self.special.mask, 0), answer)
            is_open[k, start : start + length] &= answer < 0
        seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device="cpu")
        parameters, ends = parameters_of(config, rows, device), [request.special.eos for request in requests]
        if any(own != ends[0] for own in ends):
            parameters[ENDS] = end_table(ends, device)
        state = State.of(
            tokens.to(device), is_open.to(device), origin.to(device), grid.ends, seed=seeds.to(device),
            parameters=parameters,
        )  # fmt: skip
        special = dataclasses.replace(self.special, eos=ends[0])
        task = Task(self.model, state, config, special, grid, start, start + max(lengths))
        self.program = program_of(config.rule)(task)
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
                warnings.simplefilter("ignore")  # of masks that are left the requests' outputs speak
                self._lengths = (program.output().length - self._prompt_length).tolist()
            return False
        if program.may_leave(form):
            program.unfinished.settle()
        self.working, self.width = self.busy, len(self.owner)
        self.make(form, program.denoises(form) or getattr(form, "kind", "") == "append")
        return True
