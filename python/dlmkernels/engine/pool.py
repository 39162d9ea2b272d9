# SPDX-License-Identifier: Apache-2.0
"""The queue, the lanes, and the admission of requests to slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..models.adapt import DiffusionModel
from .gang import GangLane
from .lane import Lane, StepsOf
from .request import Request
from .slots import SlotLane, goes_by_itself

#: How many requests that cannot be admitted now are skipped in search of one that can.
LOOK_AHEAD = 64
#: How many times the oldest request may be overtaken before nothing overtakes it any more.
PATIENCE = 64


class Failure(NamedTuple):
    """A request that could not be admitted, and the error."""

    request: Request
    error: Exception


@dataclass(frozen=True)
class Size:
    """Size limits of an engine.

    Attributes
    ----------
    slots, columns : int
        Number of requests decoded at once, and maximum combined length, in tokens, of prompt, answer and suffix.
    prompt_tokens : int
        Maximum number of prompt tokens admitted between two steps. At least one request is always admitted.
    lanes : int
        Maximum number of configurations decoded at the same time.
    may_be_few : bool
        Whether a forward pass may take only the rows that need it, instead of all rows.
    steps_per_poll : int
        Maximum number of steps that a lane runs before its report is read.
    """

    slots: int
    columns: int
    prompt_tokens: int
    lanes: int
    may_be_few: bool
    steps_per_poll: int = 1


class Pool:
    """The queue of waiting requests, and the lanes that decode the admitted ones.

    Requests are admitted in order of arrival and leave as soon as they are done. Requests with compatible
    configurations share a lane and its forward passes. All lanes together hold at most as many requests as there are
    slots.
    """

    def __init__(self, model: DiffusionModel, size: Size, steps_of: StepsOf, steps_of_gangs: StepsOf):
        self.model, self.size, self._steps_of, self._steps_of_gangs = model, size, steps_of, steps_of_gangs
        self.waiting: deque[Request] = deque()
        self.lanes: dict[Hashable, Lane] = {}
        #: key of the lane that is never removed to make room for another
        self.first: Hashable = None
        self._passed_over = 0

    @property
    def busy(self) -> int:
        """Number of slots that hold a request."""
        return sum(lane.busy for lane in self.lanes.values())

    def rows(self) -> Iterator[tuple[Lane, int, Request]]:
        """Yield every row that holds a request, with its lane and the request."""
        for lane in list(self.lanes.values()):
            for row, request in enumerate(lane.owner):
                if request is not None:
                    yield lane, row, request

    def lane_key(self, request: Request) -> Hashable:
        """Return a key that is equal for requests that can share a lane."""
        if request.alone:
            return request.request_id
        length = len(request.answer) if request.has_fixed_length else None
        return request.config_key, request.wishes.kind, length

    def _goes_by_itself(self, request: Request) -> bool:
        return not request.alone and goes_by_itself(self.model, request.config)

    def make(self, request: Request) -> Lane:
        """Create a lane for a request and others with the same key."""
        model, size = self.model, self.size
        if not self._goes_by_itself(request):
            rows = 1 if request.alone or getattr(model, "_by_length", False) else size.slots
            return GangLane(model, rows, self._steps_of_gangs)
        return SlotLane(model, request, size.slots, size.columns, self._steps_of, size.may_be_few)

    def open(self, request: Request) -> None:
        """Create a lane in advance for requests like this one, unless its shape depends on the actual requests.

        The lane is never removed again, unless there can be only one.
        """
        if self._goes_by_itself(request) and not request.has_fixed_length:
            key = self.lane_key(request)
            self.lanes[key] = self.make(request)
            if self.size.lanes > 1:
                self.first = key

    # --- admission ----------------------------------------------------------------------------------------------------

    def admit(self) -> list[Failure]:
        """Give free slots to the requests that have waited longest. Return those that could not be admitted."""
        chosen, failures = self._choose()
        for key, requests in chosen.items():
            lane = self.lanes[key]
            try:
                lane.admit(requests)
            except Exception as error:
                del self.lanes[key]
                others = [request for request in lane.owner if request is not None and request not in requests]
                failures += [Failure(request, error) for request in self._part([*others, *requests], lane)]
        return failures

    def _choose(self) -> tuple[dict[Hashable, list[Request]], list[Failure]]:
        """Take requests from the queue: those to admit, by the key of their lane, and those no lane can be made for."""
        chosen: dict[Hashable, list[Request]] = {}
        failures: list[Failure] = []
        free, tokens, looked_at, has_overtaken = self.size.slots - self.busy, 0, 0, False
        staying: deque[Request] = deque()
        while self.waiting and free > 0 and looked_at <= LOOK_AHEAD:
            request = self.waiting[0]
            if tokens and tokens + len(request.prompt) > self.size.prompt_tokens:
                break
            if staying and self._passed_over >= PATIENCE:
                break
            self.waiting.popleft()
            key = self.lane_key(request)
            try:
                lane = self._lane(key, request, chosen)
            except Exception as error:
                failures.append(Failure(request, error))
                continue
            if lane is None or lane.room <= len(chosen.get(key, ())):
                staying.append(request)
                looked_at += 1
                continue
            has_overtaken = has_overtaken or bool(staying)
            chosen.setdefault(key, []).append(request)
            tokens += len(request.prompt)
            free -= 1
        self.waiting.extendleft(reversed(staying))
        self._passed_over = self._passed_over + 1 if has_overtaken else self._passed_over if staying else 0
        return chosen, failures

    def _lane(self, key: Hashable, request: Request, chosen: dict[Hashable, list[Request]]) -> Lane | None:
        """Return the lane of a key, creating it if needed; None if there are too many lanes already."""
        if key not in self.lanes:
            if len(self.lanes) >= self.size.lanes and not self._give_up_one(chosen):
                return None
            self.lanes[key] = self.make(request)
        lane = self.lanes.pop(key)  # move it to the end: the least recently used lanes come first
        self.lanes[key] = lane
        return lane

    def _give_up_one(self, chosen: dict[Hashable, list[Request]]) -> bool:
        for key, lane in self.lanes.items():
            if lane.busy == 0 and key != self.first and key not in chosen:
                del self.lanes[key]
                return True
        return False

    # --- failures -----------------------------------------------------------------------------------------------------

    def part(self, key: Hashable) -> list[Request]:
        """Remove a lane whose step has failed, and queue its requests to be decoded again, each alone.

        Returns the requests that were alone already; these have failed for good.
        """
        lane = self.lanes.pop(key)
        return self._part([request for request in lane.owner if request is not None], lane)

    def _part(self, requests: Sequence[Request], lane: Lane) -> list[Request]:
        lane.owner = [None] * len(lane.owner)
        failed = [request for request in requests if request.alone]
        again = [request for request in requests if not request.alone]
        for request in again:
            request.alone = True
        self.waiting.extendleft(reversed(again))
        return failed
