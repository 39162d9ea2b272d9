# SPDX-License-Identifier: Apache-2.0
"""Counts and timings of an engine."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

from .request import RequestOutput, RequestStatus


@dataclass(frozen=True)
class EngineMetrics:
    """Counts and timings of an engine since it was created.

    Attributes
    ----------
    finished, failed, cancelled : int
        Number of delivered requests, by outcome.
    waiting, running : int
        Number of requests in the queue, and in slots.
    tokens : int
        Number of tokens decoded for delivered requests.
    seconds : float
        Total time spent in rounds of the engine.
    tokens_per_second : float
        `tokens` divided by `seconds`.
    forwards, rows : int
        Number of forward passes of the model, and the total number of batch rows in them.
    tokens_per_forward : float
        Decoded tokens of a request per forward pass that it took part in; mean over requests.
    occupancy : float
        Mean share of slots that held a request during a forward pass, from 0 to 1.
    idle_row_share : float
        Share of all forwarded rows that were not in a block.
    time_to_first_block, queue_seconds : float
        Mean time in seconds from adding a request to the end of its first block, and until it gets a slot.
    host_microseconds : float
        Median host time per step, apart from the step itself: reading reports, admission, delivery, streaming.
    replayed_share : float
        Share of steps that were replayed from a captured graph, from 0 to 1.
    """

    finished: int
    failed: int
    cancelled: int
    waiting: int
    running: int
    tokens: int
    seconds: float
    tokens_per_second: float
    forwards: int
    rows: int
    tokens_per_forward: float
    occupancy: float
    idle_row_share: float
    time_to_first_block: float
    queue_seconds: float
    host_microseconds: float
    replayed_share: float


class Meter:
    """Accumulates the counts for `EngineMetrics`."""

    def __init__(self) -> None:
        self.ended = dict.fromkeys((RequestStatus.FINISHED, RequestStatus.FAILED, RequestStatus.CANCELLED), 0)
        self.tokens = self.forwards = self.rows = self.slots = self.owned = self.working = self.steps = (
            self.replayed
        ) = 0
        self.seconds = self._per_forward = self._first_block = self._queued = 0.0
        self._with_forwards = self._with_block = self._with_slot = 0
        self.host: deque[float] = deque(maxlen=10_000)
        self.in_steps = 0.0  # seconds spent in the steps of the current round

    def step(
        self, slots: int, rows: int, owned: int, working: int, forwards: int, seconds: float, was_replayed: bool
    ) -> None:  # fmt: skip
        """Record a step of a lane with `slots` rows, `owned` of which have a request.

        `forwards` is 1 if the step ran the model, on `rows` rows, of which `working` were in a block.
        """
        self.in_steps += seconds
        self.steps += 1
        self.replayed += was_replayed
        self.forwards += forwards
        self.slots += slots * forwards
        self.rows += rows * forwards
        self.owned += owned * forwards
        self.working += working * forwards

    def visit(self, started: float, steps: int) -> None:
        """Record a round of the engine that began at `started`, ends now and ran `steps` steps."""
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if steps:
            self.host.append((seconds - self.in_steps) / steps)
        self.in_steps = 0.0

    def delivered(self, output: RequestOutput) -> None:
        """Record the last output of a request."""
        self.ended[output.status] += 1
        self.tokens += sum(step >= 0 for step in output.commit_step)
        if output.num_forwards:
            self._per_forward += output.tokens_per_forward
            self._with_forwards += 1
        if output.time_to_first_block is not None:
            self._first_block += output.time_to_first_block
            self._with_block += 1
        if output.lifespan[0] >= 0:
            self._queued += output.lifespan[0] - output.created_time
            self._with_slot += 1

    def metrics(self, waiting: int, running: int) -> EngineMetrics:
        """Return all counts and timings."""
        rows, seconds = max(self.rows, 1), max(self.seconds, 1e-9)
        return EngineMetrics(
            finished=self.ended[RequestStatus.FINISHED], failed=self.ended[RequestStatus.FAILED],
            cancelled=self.ended[RequestStatus.CANCELLED], waiting=waiting, running=running, tokens=self.tokens,
            seconds=self.seconds, tokens_per_second=self.tokens / seconds, forwards=self.forwards, rows=self.rows,
            tokens_per_forward=self._per_forward / max(self._with_forwards, 1),
            occupancy=self.owned / max(self.slots, 1),
            idle_row_share=1 - self.working / rows if self.rows else 0.0,
            time_to_first_block=self._first_block / max(self._with_block, 1),
            queue_seconds=self._queued / max(self._with_slot, 1),
            host_microseconds=1e6 * statistics.median(self.host) if self.host else 0.0,
            replayed_share=self.replayed / max(self.steps, 1),
        )  # fmt: skip
