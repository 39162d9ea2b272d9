# SPDX-License-Identifier: Apache-2.0
"""The queue, the lanes, and which request is given which slot."""

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

#: How many requests behind one that has to wait are looked at for one that need not.
LOOK_AHEAD = 64
#: How often the oldest request is passed over before nothing passes it any more.
PATIENCE = 64


class Failure(NamedTuple):
    """A request that could not be taken in, and why."""

    request: Request
    error: Exception


@dataclass(frozen=True)
class Size:
    """How large the engine is.

    Attributes
    ----------
    slots, columns : int
        How many requests are decoded at once, and how many tokens prompt, answer and suffix may have together.
    prompt_tokens : int
        How many tokens of prompts are admitted between two steps, one request in any case.
    lanes : int
        How many configurations are decoded at the same time.
    may_be_few : bool
        Whether a forward may take the rows alone that need it.
    steps_per_poll : int
        How many steps a lane makes between two looks at its report, at most.
    """

    slots: int
    columns: int
    prompt_tokens: int
    lanes: int
    may_be_few: bool
    steps_per_poll: int = 1


class Pool:
    """All requests that are not delivered yet: first come, first served, and first done, first out.

    Requests that are decoded alike share a lane, that is, their forwards. All lanes together have no more requests than
    there are slots.
    """

    def __init__(self, model: DiffusionModel, size: Size, steps_of: StepsOf, steps_of_gangs: StepsOf):
        self.model, self.size, self._steps_of, self._steps_of_gangs = model, size, steps_of, steps_of_gangs
        self.waiting: deque[Request] = deque()
        self.lanes: dict[Hashable, Lane] = {}
        #: the lane that is never given up
        self.first: Hashable = None
        self._passed_over = 0

    @property
    def busy(self) -> int:
        """How many slots have a request."""
        return sum(lane.busy for lane in self.lanes.values())

    def rows(self) -> Iterator[tuple[Lane, int, Request]]:
        """Every row that has a request."""
        for lane in list(self.lanes.values()):
            for row, request in enumerate(lane.owner):
                if request is not None:
                    yield lane, row, request

    def lane_key(self, request: Request) -> Hashable:
        """Requests of the same key can share a lane."""
        if request.alone:
            return request.request_id
        length = len(request.answer) if request.has_fixed_length else None
        return request.config_key, request.wishes.kind, length

    def _goes_by_itself(self, request: Request) -> bool:
        return not request.alone and goes_by_itself(self.model, request.config)

    def make(self, request: Request) -> Lane:
        """A lane for a request and those like it."""
        model, size = self.model, self.size
        if not self._goes_by_itself(request):
            rows = 1 if request.alone or getattr(model, "_by_length", False) else size.slots
            return GangLane(model, rows, self._steps_of_gangs)
        return SlotLane(model, request, size.slots, size.columns, self._steps_of, size.may_be_few)

    def open(self, request: Request) -> None:
        """Make the lane of a request that may come, and keep it; not where a lane has to know its requests."""
        if self._goes_by_itself(request) and not request.has_fixed_length:
            key = self.lane_key(request)
            self.lanes[key] = self.make(request)
            if self.size.lanes > 1:
                self.first = key

    # --- admission ----------------------------------------------------------------------------------------------------

    def admit(self) -> list[Failure]:
        """Give free slots to those who have waited longest; who could not be taken in, and why."""
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
        """Requests of the queue, by the lane that takes them in; and those that no lane can be made for."""
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
        """The lane of a key, made if there is none; None if there are too many already."""
        if key not in self.lanes:
            if len(self.lanes) >= self.size.lanes and not self._give_up_one(chosen):
                return None
            self.lanes[key] = self.make(request)
        lane = self.lanes.pop(key)  # to the end: the ones in front have not been used for longest
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
        """Give up a lane whose step has failed: its requests are decoded again, each alone.

        Those that were alone already are returned: they have failed.
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
