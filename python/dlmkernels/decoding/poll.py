# SPDX-License-Identifier: Apache-2.0
"""Step reports: the only data the host reads while a decoding runs, such as the number of open positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .checks import integer


class OpenCount:
    """Reads the reports of the steps while the device keeps working.

    On a GPU, each report is copied to the host right after its step, and the host reads the report that was sent `lag`
    reports before the newest. It waits for that report if necessary and never checks whether a newer one has arrived:
    the shapes of a forward pass must not depend on the relative speed of host and device. Otherwise two runs could
    choose different matrix products and, at a near tie, different tokens. With a lag of 1, the device still has a whole
    step to run while the host waits. The number of open positions never grows within a block, so an old count is a
    valid upper bound: using it may cost a step that commits nothing, but never changes a token. For the same reason the
    host need not read after every step: any number of steps may run between two calls of `latest`.

    Parameters
    ----------
    *first : int
        Initial report.
    """

    #: number of reports left in flight, by type of the device that produces them; 0 for types not listed
    lag_on: ClassVar[dict[str, int]] = {"cuda": 1}

    def __init__(self, *first: int):
        self._known, self._number = first, 0  # the last report read, and its number
        self._submitted = self._lag = 0
        self._ring: Ring | None = None

    @property
    def behind(self) -> int:
        """Number of reports submitted since the one that was last read."""
        return self._submitted - self._number

    @property
    def known(self) -> tuple[int, ...]:
        """The report that was last read."""
        return self._known

    def submit(self, counts: Tensor) -> None:
        """Submit a report: integers `[n]`, as many as in the initial report."""
        if self._ring is None:
            self._lag = self.lag_on.get(counts.device.type, 0)
            self._ring = Ring(counts, self._lag + 1)
        self._submitted += 1
        self._ring.put(self._submitted, counts)

    def latest(self) -> tuple[int, ...]:
        """Read the report that was submitted `lag` reports before the newest, waiting for it if necessary."""
        number = self._submitted - self._lag
        if self._ring is not None and number > self._number:
            self._known, self._number = self._ring.read(number), number
        return self._known


class Ring:
    """Ring buffer of the newest reports, in host memory that is allocated once.

    For CUDA tensors the buffers are pinned, so that copies run asynchronously, in order, on the current stream of the
    report's device. A report that has not been read by the time its buffer is reused is overwritten. That is safe: the
    stream runs in order, and only reports of a fixed age are ever read.

    Parameters
    ----------
    like : Tensor
        A report, which sets shape, dtype and device.
    size : int
        Number of reports that the ring holds.
    """

    def __init__(self, like: Tensor, size: int):
        is_cuda = like.device.type == "cuda"
        self._buffers = [
            torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=is_cuda) for _ in range(size)
        ]
        self._events = [torch.cuda.Event() for _ in range(size)] if is_cuda else []

    def put(self, number: int, values: Tensor) -> None:
        """Start copying report number `number` to the host."""
        place = number % len(self._buffers)
        self._buffers[place].copy_(values, non_blocking=True)
        if self._events:
            self._events[place].record(torch.cuda.current_stream(values.device))  # may not be the current device

    def read(self, number: int) -> tuple[int, ...]:
        """Wait for report number `number` to arrive, and return it."""
        place = number % len(self._buffers)
        if self._events:
            self._events[place].synchronize()
        return tuple(self._buffers[place].tolist())


def check_polls(steps_per_poll: int) -> int:
    """Check `steps_per_poll`, the number of steps after which the host reads a report, and return it."""
    checked = integer(1)("steps_per_poll", steps_per_poll)
    assert isinstance(checked, int)
    return checked
