# SPDX-License-Identifier: Apache-2.0
"""The one thing the host learns while a decoding runs: what each step reports of the positions that are still open."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .checks import integer


class OpenCount:
    """What the steps report, read while the device goes on.

    On a GPU each report travels to the host behind the step that made it, and the host takes the one that was sent
    `lag` reports before the newest. It waits for that one if it must, and does not look whether a newer one has
    arrived: what a forward computes on must not depend on how fast the host or the device happens to be, or two runs
    could choose different matrix products and, at a near tie, different tokens. With a lag of 1 the device has a whole
    step to do while the host waits. Open positions never grow within a block, so an old count is a valid bound: it can
    cost a step that commits nothing, never a token. For the same reason the host need not look after every step: any
    number of steps may be made between two calls of `latest`.

    Parameters
    ----------
    *first : int
        What is known to begin with.
    """

    #: reports that are left under way, by the type of the device that makes them; where not named, none are
    lag_on: ClassVar[dict[str, int]] = {"cuda": 1}

    def __init__(self, *first: int):
        self._known, self._number = first, 0  # the report that is known, and how many had been submitted with it
        self._submitted = self._lag = 0
        self._ring: Ring | None = None

    @property
    def behind(self) -> int:
        """How many reports have been submitted since the one that is known."""
        return self._submitted - self._number

    @property
    def known(self) -> tuple[int, ...]:
        """The report that `latest` gave."""
        return self._known

    def submit(self, counts: Tensor) -> None:
        """Hand over a report: integers `[n]`, as many as there were first."""
        if self._ring is None:
            self._lag = self.lag_on.get(counts.device.type, 0)
            self._ring = Ring(counts, self._lag + 1)
        self._submitted += 1
        self._ring.put(self._submitted, counts)

    def latest(self) -> tuple[int, ...]:
        """The report that was submitted `lag` before the newest."""
        number = self._submitted - self._lag
        if self._ring is not None and number > self._number:
            self._known, self._number = self._ring.read(number), number
        return self._known


class Ring:
    """The newest reports, in host memory that is allocated once: a buffer for each, used again in turn.

    Of a CUDA tensor the buffers are pinned, so that its values travel while host and device go on, behind what its
    device's current stream has to do. A report that nobody has read by then is overwritten, which is in order: the
    stream does one thing after the other, and only the reports of fixed age are ever read.

    Parameters
    ----------
    like : Tensor
        A report.
    size : int
        How many reports there are places for.
    """

    def __init__(self, like: Tensor, size: int):
        is_cuda = like.device.type == "cuda"
        self._buffers = [
            torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=is_cuda) for _ in range(size)
        ]
        self._events = [torch.cuda.Event() for _ in range(size)] if is_cuda else []

    def put(self, number: int, values: Tensor) -> None:
        """Send a report on its way; `number` counts them."""
        place = number % len(self._buffers)
        self._buffers[place].copy_(values, non_blocking=True)
        if self._events:
            self._events[place].record(torch.cuda.current_stream(values.device))  # the current device may be another

    def read(self, number: int) -> tuple[int, ...]:
        """The report of that number, once it is there."""
        place = number % len(self._buffers)
        if self._events:
            self._events[place].synchronize()
        return tuple(self._buffers[place].tolist())


def check_polls(steps_per_poll: int) -> int:
    """After how many steps the host looks at a report, checked."""
    checked = integer(1)("steps_per_poll", steps_per_poll)
    assert isinstance(checked, int)
    return checked
