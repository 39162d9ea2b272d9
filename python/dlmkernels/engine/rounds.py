# SPDX-License-Identifier: Apache-2.0
"""The engine's main loop. Each round takes in, delivers and admits requests, and runs a step of every lane."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from .delivery import Deliveries
from .lane import Lane
from .metrics import Meter
from .pool import Pool
from .reading import final_output, interim_output, seen_stop
from .request import Answer, Request, RequestOutput, RequestStatus


class Rounds:
    """All requests from arrival to delivery. One thread at a time runs rounds; any thread may add to the inbox.

    Attributes
    ----------
    live : dict
        Requests that have not been delivered yet, by id.
    inbox : deque
        Requests that have arrived since the last round, and ids of requests to cancel.
    lock : Lock
        Protects `live` and `inbox`.
    """

    def __init__(self, pool: Pool, tokenizer) -> None:
        self.pool, self._tokenizer = pool, tokenizer
        self.deliveries, self.meter = Deliveries(), Meter()
        self.lock = threading.Lock()
        self.live: dict[str, Request] = {}
        self.inbox: deque[Request | str] = deque()

    def make(self) -> bool:
        """Run one round, and return whether anything is left to do."""
        started = time.perf_counter()
        self._take_in()
        self._deliver_done()
        for failure in self.pool.admit():
            self._fail(failure.request, failure.error)
        self._mark_started()
        steps = self._advance()
        self._watch()
        self.meter.visit(started, steps)
        return bool(self.pool.busy or self.pool.waiting or self.inbox)

    @property
    def waiting(self) -> int:
        """Number of requests that have no slot yet."""
        with self.lock:
            return sum(isinstance(one, Request) for one in self.inbox) + len(self.pool.waiting)

    def end(self, reason: str) -> None:
        """Stop decoding, and deliver the remaining requests as failed for the given reason."""
        with self.lock:
            left = list(self.live.values())
            self.inbox.clear()
        for request in left:
            self._deliver(request, request.output(RequestStatus.FAILED, error=reason, finish_reason="error"))
        self.pool.waiting.clear()
        self.pool.lanes.clear()
        self.deliveries.wake()

    def _take_in(self) -> None:
        """Process the requests and cancellations in the inbox."""
        with self.lock:
            inbox, self.inbox = self.inbox, deque()
        for one in inbox:
            if isinstance(one, Request):
                self.pool.waiting.append(one)
            else:
                self._cancel(one)

    def _cancel(self, request_id: str) -> None:
        request = self.live.get(request_id)
        if request is None:
            return
        fields: dict[str, Any] = {"error": "cancelled", "finish_reason": "cancelled"}
        for lane, row, other in self.pool.rows():
            if other is request:
                (answer,) = lane.read([row])
                self._deliver(request, final_output(request, answer, self._tokenizer, **fields))
                lane.release(row, False)
                return
        self.pool.waiting.remove(request)
        self._deliver(request, request.output(RequestStatus.CANCELLED, **fields))

    def _deliver_done(self) -> None:
        for lane in list(self.pool.lanes.values()):
            rows = list(lane.poll())
            if not rows:
                continue
            errors = lane.errors()
            for row, answer in zip(rows, lane.read(rows)):
                request = lane.owner[row]
                assert request is not None
                lane.release(row, True)
                if row in errors:
                    self._fail(request, errors[row])
                else:
                    self._deliver(request, final_output(request, answer, self._tokenizer))

    def _mark_started(self) -> None:
        now = time.perf_counter()
        for _, _, request in self.pool.rows():
            if request.started < 0:
                request.started, request.status = now, RequestStatus.DECODING

    def _advance(self) -> int:
        """Run steps of every lane that has requests, and return how many were run."""
        made = 0
        for key, lane in list(self.pool.lanes.items()):
            if lane.busy == 0:
                continue
            try:
                for _ in range(self._steps_ahead(lane)):
                    if not self._step(lane):
                        break
                    made += 1
            except Exception as error:
                for request in self.pool.part(key):
                    self._fail(request, error)
        return made

    def _steps_ahead(self, lane: Lane) -> int:
        """Return how many steps a lane runs before its report is read.

        This is 1 while a request waits for a slot, or while a request of the lane is read during decoding.
        """
        if self.pool.waiting or self.inbox or any(owner is not None and owner.is_watched for owner in lane.owner):
            return 1
        return self.pool.size.steps_per_poll

    def _step(self, lane: Lane) -> bool:
        """Run one step of a lane, and return whether there was a step to run."""
        forwards, replayed = lane.forwards, getattr(lane.steps, "replayed", 0)
        was_made = lane.advance()
        self.meter.step(
            len(lane.owner), lane.width, lane.busy, lane.working, lane.forwards - forwards, lane.seconds,
            getattr(lane.steps, "replayed", 0) > replayed,
        )  # fmt: skip
        return was_made

    def _watch(self) -> None:
        """Read requests whose owners want outputs during decoding, or that may have reached a stop string.

        Requests whose processors or constraints have raised fail here.
        """
        for lane in list(self.pool.lanes.values()):
            for row in lane.errors():
                request = lane.owner[row]
                if request is not None:
                    self._fail(request, lane.errors()[row])
                    lane.release(row, False)
            rows = [row for row, request in enumerate(lane.owner) if request is not None and request.is_watched]
            if rows:
                for row, answer in zip(rows, lane.read(rows)):
                    self._tell(lane, row, answer)

    def _tell(self, lane: Lane, row: int, answer: Answer) -> None:
        """Deliver an output for a row's request: the last one if a stop string is complete, else an interim one."""
        request, tokenizer = lane.owner[row], self._tokenizer
        assert request is not None
        stop = seen_stop(request, answer, tokenizer)
        if stop is not None:
            lane.release(row, False)
            self._deliver(request, final_output(request, answer, tokenizer))
            return
        grew = answer.length(answer.final) > request.shown
        is_due = request.drafts or (request.streaming and grew)
        output = interim_output(request, answer, tokenizer if is_due or request.on_step is not None else None)
        try:
            if request.on_step is not None:
                request.on_step(output)
        except Exception as error:
            lane.release(row, False)
            self._fail(request, error)
            return
        request.shown = len(output.generated_tokens)
        if is_due:
            self.deliveries.put(output)

    def _fail(self, request: Request, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        self._deliver(request, request.output(RequestStatus.FAILED, error=text, finish_reason="error"))

    def _deliver(self, request: Request, output: RequestOutput) -> None:
        """Deliver the last output of a request, exactly once."""
        assert output.is_finished() and not request.is_delivered
        request.is_delivered = True
        self.meter.delivered(output)
        self.deliveries.put(output)
        with self.lock:
            self.live.pop(request.request_id, None)
        self.deliveries.wake()
