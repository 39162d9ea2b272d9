# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a decoding whose rows are requests: the interface of `slots.SlotLane` and `gang.GangLane`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..decoding.capture import Steps
from ..decoding.constrained_rows import ConstraintOfEachRow
from ..decoding.finality import finished_columns
from ..decoding.poll import OpenCount
from ..decoding.processing import RequestProposer
from ..decoding.programs import Program
from ..decoding.state import FROZEN, OPEN
from .request import Answer, Request

#: makes what runs the steps of a program (see `decoding.capture`)
StepsOf = Callable[[Program], Steps]


class Lane(ABC):
    """One program, and which of its rows belongs to which request.

    Attributes
    ----------
    owner : list of Request or None
        Of each row.
    forwards, width, working : int
        How many forwards there have been; how many rows the last of them took, and how many of these were in a block.
    seconds : float
        How long the host took to make the last step.
    is_over : bool
        Whether all that there is in the program is done.
    """

    def __init__(self, rows: int):
        self.owner: list[Request | None] = [None] * rows
        self.forwards = 0
        self.working, self.width = 0, rows
        self.seconds = 0.0
        self.is_over = False
        self.processed: RequestProposer | None = None
        self.constraints: ConstraintOfEachRow | None = None
        self.program: Program
        self.steps: Steps
        self.counts: OpenCount

    @property
    def busy(self) -> int:
        """How many rows have a request."""
        return sum(request is not None for request in self.owner)

    @property
    @abstractmethod
    def room(self) -> int:
        """How many requests can be admitted now."""

    @abstractmethod
    def admit(self, requests: Sequence[Request]) -> None:
        """Take requests in, no more than there is room for."""

    @abstractmethod
    def release(self, row: int, is_done: bool) -> None:
        """The request of a row has left; `is_done`: since `poll` has named the row."""

    @abstractmethod
    def poll(self) -> Iterable[int]:
        """Read the newest report that may be read; rows whose requests are known to be done by it."""

    @abstractmethod
    def advance(self) -> bool:
        """Make one step, by the report that is known; whether there was one to make."""

    def make(self, form: Any, is_forward: bool) -> None:
        """Make a step of that form, which forwards the model or not."""
        started = time.perf_counter()
        self.counts.submit(self.steps(form))
        self.seconds = time.perf_counter() - started
        self.forwards += is_forward

    @abstractmethod
    def start(self, row: int) -> int:
        """Column at which the answer of the row's request begins."""

    def length(self, row: int) -> int | None:
        """How long the answer of the row's request has become, where the program says so."""
        return None

    def errors(self) -> dict[int, Exception]:
        """What the processors or the constraint of a row's request have raised."""
        of_processors = {} if self.processed is None else self.processed.errors
        return dict(of_processors) if self.constraints is None else of_processors | self.constraints.errors

    def read(self, rows: Sequence[int]) -> list[Answer]:
        """What stands in some rows, which all have a request; waits for the device."""
        state, top = self.program.state, self.processed
        index = torch.tensor(rows, dtype=torch.int64, device="cpu").to(state.tokens.device)
        bits = state.state[index]
        is_open = (bits & OPEN) != 0
        final = [is_open.shape[1]] * len(rows)
        if not self.is_over:
            final = finished_columns(self.program, is_open, index).tolist()
        values = (state.tokens[index], state.commit_step[index], state.confidence[index], bits)
        tokens, steps, confidence, bits = (value.cpu() for value in values)
        forwards = state.step[index].tolist()
        best = None
        if top is not None and top.top_ids.shape[2]:
            best = [list(zip(*pair)) for pair in zip(top.top_ids[index].tolist(), top.top_logprobs[index].tolist())]
        answers = []
        for k, row in enumerate(rows):
            request, first = self.owner[row], self.start(row)
            assert request is not None
            length = len(request.answer) - request.suffix_length
            part = slice(first, first + length)
            found = None
            if best is not None and request.wishes.top_logprobs:
                most = request.wishes.top_logprobs
                found = [list(zip(ids[:most], logprobs[:most])) for ids, logprobs in best[k][part]]
            answers.append(Answer(
                tokens[k, part].tolist(), steps[k, part].tolist(), confidence[k, part].tolist(),
                ((bits[k, part] & OPEN) != 0).tolist(), ((bits[k, part] & FROZEN) != 0).tolist(), forwards[k],
                min(max(final[k] - first, 0), length), self.length(row), found,
            ))  # fmt: skip
        return answers
