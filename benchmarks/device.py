# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: by events around captured graphs; and the two floors, bytes over bandwidth and flops over rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cached_property

import torch

Function = Callable[[], object]


class Repeated:
    """Many calls of a function in one CUDA graph, so that launching costs nothing; called plainly if it waits."""

    def __init__(self, run: Function, target_ms: float = 2.0):
        self.calls = max(1, min(200, round(target_ms / max(_milliseconds(run), 1e-3))))
        self.captured = False
        self._replay = lambda: [run() for _ in range(self.calls)]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(self.calls):
                    run()
        except RuntimeError:  # it reads a value on the host
            torch.cuda.synchronize()
            return
        self.captured = True
        self._replay = graph.replay

    def seconds(self) -> float:
        """Time of one call."""
        return _milliseconds(self._replay) / self.calls * 1e-3


def _milliseconds(run: Function) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Floors:
    """What the card does with nothing else to do, measured when first asked for."""

    @cached_property
    def bytes_a_second(self) -> float:
        """Reading and writing together, of a large copy."""
        a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return 2 * a.numel() / self._best(lambda: b.copy_(a))

    @cached_property
    def flops_a_second(self) -> float:
        """A large bf16 product by torch's library."""
        n = 8192
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self._best(lambda: torch.mm(a, b))

    def seconds(self, moved: float, flops: float) -> tuple[str, float]:
        """The larger of the two floors, and its name."""
        copy = ("bytes / copy bandwidth", moved / self.bytes_a_second)
        product = ("flops / bf16 product", flops / self.flops_a_second)
        return max(copy, product, key=lambda floor: floor[1])

    @staticmethod
    def _best(run: Function) -> float:
        for _ in range(3):
            run()
        return statistics.median(_milliseconds(run) for _ in range(20)) * 1e-3
