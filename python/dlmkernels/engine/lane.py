# SPDX-License-Identifier: Apache-2.0
"""A decoding whose rows are requests, as the engine sees it: the interface of `slots.SlotLane` and `gang.GangLane`."""

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

#: creates the object that runs the steps of a program (see `decoding.capture`)
StepsOf = Callable[[Program], Steps]


class Lane(ABC):
    """A program, and the requests that its rows belong to.

    Attributes
    ----------
    owner : list of Request or None
        The request of each row.
    forwards, width, working : int
        Number of forward passes so far, number of rows in the last one, and how many of those rows were in a block.
    seconds : float
        Time the host took to submit the last step.
    is_over : bool
        Whether everything in the program has been decoded.
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
        """Number of rows that have a request."""
        return sum(request is not None for request in self.owner)

    @property
    @abstractmethod
    def room(self) -> int:
        """Number of requests that can be admitted now."""

    @abstractmethod
    def admit(self, requests: Sequence[Request]) -> None:
        """Put requests into free rows; at most `room` of them."""

    @abstractmethod
    def release(self, row: int, is_done: bool) -> None:
        """Free a row whose request has left; `is_done` if `poll` has reported the row as done."""

    @abstractmethod
    def poll(self) -> Iterable[int]:
        """Read the newest available report, and return the rows whose requests it shows to be done."""

    @abstractmethod
    def advance(self) -> bool:
        """Run one step, chosen from the last report read, and return whether there was a step to run."""

    def make(self, form: Any, is_forward: bool) -> None:
        """Run a step of the given form; `is_forward` says whether it includes a forward pass of the model."""
        started = time.perf_counter()
        self.counts.submit(self.steps(form))
        self.seconds = time.perf_counter() - started
        self.forwards += is_forward

    @abstractmethod
    def start(self, row: int) -> int:
        """Return the column at which the answer of the row's request begins."""

    def length(self, row: int) -> int | None:
        """Return the final length of the answer of the row's request, or None if the program does not determine it."""
        return None

    def errors(self) -> dict[int, Exception]:
        """Return the exceptions raised by the logits processors or the constraint of a request, by row."""
        of_processors = {} if self.processed is None else self.processed.errors
        return dict(of_processors) if self.constraints is None else of_processors | self.constraints.errors

    def read(self, rows: Sequence[int]) -> list[Answer]:
        """Copy the contents of some rows to the host; waits for the device. Each row must have a request."""
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
