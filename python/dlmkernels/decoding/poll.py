# SPDX-License-Identifier: Apache-2.0
"""The one thing the host learns while a decoding runs: what each step reports of the positions that are still open."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch
from torch import Tensor


class OpenCount:
    """What the steps report, read while the device goes on.

    On a GPU each report travels to the host behind the step that made it, and the host takes the one that was sent
    `lag` reports before the newest. It waits for that one if it must, and does not look whether a newer one has
    arrived: what a forward computes on must not depend on how fast the host or the device happens to be, or two runs
    could choose different matrix products and, at a near tie, different tokens. With a lag of 1 the device has a whole
    step to do while the host waits. Open positions never grow within a block, so an old count is a valid bound: it can
    cost a step that commits nothing, never a token.

    Parameters
    ----------
    *first : int
        What is known to begin with.
    """

    #: reports that are left under way, by the type of the device that makes them; where not named, none are
    lag_on: ClassVar[dict[str, int]] = {"cuda": 1}

    def __init__(self, *first: int):
        self._latest = first
        self._under_way: deque[tuple[int, ...] | Landing] = deque()
        self._lag = 0

    @property
    def behind(self) -> int:
        """How many reports have been submitted since the one that `latest` gave."""
        return len(self._under_way)

    def submit(self, counts: Tensor) -> None:
        """Hand over a report: integers `[n]`, as many as there were first."""
        device = counts.device.type
        self._lag = self.lag_on.get(device, 0)
        self._under_way.append(Landing(counts) if device == "cuda" else tuple(counts.tolist()))

    def latest(self) -> tuple[int, ...]:
        """The report that was submitted `lag` before the newest."""
        while len(self._under_way) > self._lag:
            report = self._under_way.popleft()
            self._latest = report.read() if isinstance(report, Landing) else report
        return self._latest


class Landing:
    """A CUDA tensor's values on their way to the host, behind what its device's current stream has to do."""

    def __init__(self, values: Tensor):
        self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))  # the current device may be another

    def read(self) -> tuple[int, ...]:
        """The values, once they are there."""
        self._event.synchronize()
        return tuple(self._values.tolist())
