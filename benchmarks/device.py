# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU with events around CUDA graphs, and lower bounds on times from memory bandwidth and flop rate."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

Function = Callable[[], object]


def waits(run: Function) -> bool:
    """Return whether `run` synchronizes with the device, for example to read a value, so that it cannot be captured.

    This calls `run`. Trying to capture it instead could leave torch's generator in a state in which every later call
    fails.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


class Repeated:
    """Times many calls of a function in one CUDA graph, which removes launch overhead.

    A function that synchronizes with the device is called without a graph. `restore` runs before every call and undoes
    what the call changes. Its time is measured in the same way and subtracted.
    """

    def __init__(self, run: Function, restore: Function | None = None, target_ms: float = 2.0):
        whole = run if restore is None else functools.partial(_both, restore, run)
        self.calls = max(1, min(200, round(target_ms / max(_milliseconds(whole), 1e-3))))
        self.captured = not waits(whole)
        self._whole = self._many(whole)
        self._restore = None if restore is None else self._many(restore)

    def seconds(self) -> float:
        """Measure the time of one call, in seconds."""
        own = _milliseconds(self._whole) - (_milliseconds(self._restore) if self._restore else 0.0)
        return max(own, 1e-6) / self.calls * 1e-3

    def _many(self, run: Function) -> Function:
        def plainly():
            for _ in range(self.calls):
                run()

        if not self.captured:
            return plainly
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plainly()
        return graph.replay


def _both(first: Function, second: Function) -> None:
    first()
    second()


def _milliseconds(run: Function) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Floors:
    """Peak rates of the GPU, measured on first use."""

    @functools.cache  # noqa: B019 - one object per run
    def bytes_a_second(self, moved: int = 2**31) -> float:
        """Measure bandwidth, reads plus writes: the better of a copy and a sum that repeatedly move `moved` bytes.

        Data that fits in the caches stays there, as it does for the timed ops.
        """
        words = max(1, moved // 8)
        a, b = (torch.zeros(words, dtype=torch.float32, device="cuda") for _ in range(2))
        both = torch.zeros(2 * words, dtype=torch.float32, device="cuda")
        return 8 * words / min(self._seconds(lambda: b.copy_(a)), self._seconds(both.sum))

    @functools.cached_property
    def flops_a_second(self) -> float:
        """Rate of a large bf16 matrix product in torch."""
        n = 8192
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self._seconds(lambda: torch.mm(a, b))

    def seconds(self, moved: float, flops: float) -> tuple[str, float]:
        """Return the name and the time of the larger of the two floors."""
        copy = ("bytes / bandwidth", moved / self.bytes_a_second(int(moved)))
        product = ("flops / bf16 product", flops / self.flops_a_second)
        return max(copy, product, key=lambda floor: floor[1])

    @staticmethod
    def _seconds(run: Function) -> float:
        for _ in range(3):
            run()
        repeated = Repeated(run)
        return statistics.median(repeated.seconds() for _ in range(10))
