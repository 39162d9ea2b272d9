# SPDX-License-Identifier: Apache-2.0
"""The one thing the host learns while the step loop runs: how many positions are still open."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class OpenCount:
    """Upper bounds of the open positions of a block and of the whole canvas, read without stopping the device.

    On a GPU each count travels to pinned memory behind its step, and `latest` takes whatever has arrived; it waits
    only when more than `max_lag` steps are under way. Open positions never grow within a block, so an old count is a
    valid bound: it can cost a step that commits nothing, never a token.
    """

    max_lag = 2

    def __init__(self, in_block: int, in_canvas: int):
        self._latest = (in_block, in_canvas)
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @property
    def behind(self) -> int:
        """How many counts have been submitted since the latest that has arrived."""
        return len(self._under_way)

    def submit(self, counts: Tensor) -> None:
        """Hand over `[2]` counts: largest number of open positions of any row, in the block and in the canvas."""
        if counts.device.type != "cuda":
            self._latest = tuple(counts.tolist())
            return
        landing = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        landing.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((landing, event))

    def latest(self) -> tuple[int, int]:
        """The newest counts that have arrived: (in the block, in the canvas)."""
        while self._under_way:
            landing, event = self._under_way[0]
            if len(self._under_way) > self.max_lag:
                event.synchronize()
            elif not event.query():
                break
            self._latest = tuple(landing.tolist())
            self._under_way.popleft()
        return self._latest
