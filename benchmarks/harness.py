# SPDX-License-Identifier: Apache-2.0
"""Paired timing: ours and its baselines take turns in one run, beside a limit of the machine measured in between."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from device import Floors, Function, Repeated


@dataclass
class Row:
    """One timed candidate. `ratio` is its time over ours, the median over the rounds; None for ours and the limit."""

    name: str
    seconds: float
    ratio: float | None = None
    rate: float = 0.0
    unit: str = ""
    share: float | None = None


@dataclass
class Comparison:
    """The rows of one group: the limits if there are any, baselines, ours last."""

    group: str
    rows: list[Row] = field(default_factory=list)


class Limit:
    """What the machine allows: work a second, measured by something that does nothing else."""

    def __init__(self, name: str, run: Function, work: float, unit: str):
        self.name, self.run, self.work, self.unit = name, run, work, unit


def read_limit(*tensors: Tensor) -> Limit:
    """Reading the same tensors once, in the same cache state: a sum over their bytes taken as float32."""
    flat = [t.contiguous().view(-1).view(torch.float32) for t in tensors]

    def run():
        for x in flat:
            x.sum()

    return Limit("one read of the input", run, sum(t.numel() * t.element_size() for t in tensors), "GB/s")


def exp_limit(*tensors: Tensor) -> Limit:
    """One exponential for each element of the tensors: `torch.exp2` over floats that stay in a core's cache.

    (`torch.exp` takes four times as long.) One thread does its share; the others' would take the same time, and no time
    goes into starting them.
    """
    threads = torch.get_num_threads()
    count = sum(t.numel() for t in tensors) / threads
    x = torch.linspace(-20, 0, min(65536, math.ceil(count)))
    out = torch.empty_like(x)

    def run():
        torch.set_num_threads(1)
        for _ in range(round(count / x.numel())):
            torch.exp2(x, out=out)
        torch.set_num_threads(threads)

    return Limit("one exponential an element", run, sum(t.numel() * t.element_size() for t in tensors), "GB/s")


def matmul_limit(dtype: torch.dtype, n: int = 1024) -> Limit:
    """A square product in the same dtype."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return Limit(f"{n} x {n} x {n} product", lambda: torch.mm(a, b), 2.0 * n**3, "GFLOP/s")


@functools.cache
def _limits() -> ctypes.CDLL | None:
    """limits.cpp, compiled for this very processor; None where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, Path(__file__).with_name("limits.cpp"), "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    for function in (loaded.multiply_add_float, loaded.multiply_add_bfloat16):
        function.argtypes, function.restype = [ctypes.c_long], ctypes.c_double
    return loaded


def arithmetic_limit(dtype: torch.dtype) -> Limit:
    """Multiplications and additions in registers: of bf16 pairs where `dtype` is bf16 and there is such an instruction,
    else of floats. Where there is no compiler, a square product.

    One thread does its share, as in `exp_limit`: a second one that has just been started shares its processor at first.
    """
    library = _limits()
    if library is None:
        return matmul_limit(dtype)
    name, function = "fp32 multiply-add in registers", library.multiply_add_float
    if dtype == torch.bfloat16 and library.multiply_add_bfloat16(1) > 0:
        name, function = "bf16 multiply-add in registers", library.multiply_add_bfloat16
    repeats = 100_000
    return Limit(name, lambda: function(repeats), function(1) * repeats * torch.get_num_threads(), "GFLOP/s")


def tighter(*limits: tuple[Limit, float]) -> tuple[Limit, float]:
    """Of limits, each with the work that one call has in its unit, the one under which the call takes longest."""

    def seconds(limit: Limit, work: float) -> float:
        limit.run()
        return min(_timed(limit.run, lambda: None, time.perf_counter) for _ in range(5)) / limit.work * work

    return max(limits, key=lambda pair: seconds(*pair))


def touch(*tensors: Tensor) -> Function:
    """Reads tensors, so that every candidate finds them in the same state of the caches."""

    def run():
        for t in tensors:
            t.view(-1).view(torch.uint8).sum()

    return run


class Harness:
    """Runs comparisons and keeps their results for the summary."""

    def __init__(self, seconds: float, device: str = "cpu"):
        self.seconds = seconds
        self.floors = Floors() if device == "cuda" else None
        self.comparisons: list[Comparison] = []

    def compare(
        self,
        benchmark,
        group: str,
        ours: Function,
        baselines: dict[str, Function],
        *,
        before: Function | None = None,
        limit: Limit | list[Limit] | None = None,
        work: float = 0.0,
        moved: float = 0.0,
        unit: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> Comparison:
        """Time `ours` through the `benchmark` fixture, and between its rounds each baseline once.

        Parameters
        ----------
        benchmark : fixture
            pytest-benchmark's; the other rows go to its `extra_info`.
        group : str
        ours : callable
        baselines : dict
            name -> callable.
        before : callable, optional
            Called before each candidate, outside its time.
        limit : Limit or list of them, optional
            Timed in turn with the others; of several the slowest is what ours is measured against.
        work : float
            Bytes, floating-point operations or tokens of one call of ours; the limit's unit where there is one.
        moved : float
            Bytes that one call must read and write, where `work` is something else: for a GPU's floors.
        unit : str
            Unit of the rate where there is no limit: "tokens/s".
        clock : callable, optional
            Seconds; one that stands still for what is not to count. On a CPU only.
        """
        if self.floors is not None:
            return self._compare_on_gpu(benchmark, group, ours, baselines, limit, work, moved, unit)
        before = before or (lambda: None)
        others = dict(baselines)
        limits = limit if isinstance(limit, list) else [limit] if limit else []
        others |= {limit.name: limit.run for limit in limits}
        everything = [*others.values(), ours]
        for run in everything:
            run()
        round_seconds = sum(_timed(run, before, time.perf_counter) for run in everything)
        rounds = max(5, min(100, round(self.seconds / round_seconds)))
        times: dict[str, list[float]] = {name: [] for name in others}
        own: list[float] = []
        names = list(others)

        def others_first():
            for i in range(len(names)):  # another one goes first each round
                name = names[(i + len(own)) % len(names)]
                times[name].append(_timed(others[name], before, clock))
            before()

        def timed_ours():
            own.append(_timed(ours, lambda: None, clock))

        benchmark.pedantic(timed_ours, setup=others_first, rounds=rounds, iterations=1)
        result = Comparison(group)
        for name in baselines:
            ratio = statistics.median(t / o for t, o in zip(times[name], own))
            result.rows.append(Row(name, statistics.median(times[name]), ratio))
        mine = Row("dlmkernels", statistics.median(own), None, work / statistics.median(own), unit)
        bounds = []
        for limit in limits:
            seconds = statistics.median(times[limit.name])
            bounds.append(Row(limit.name, seconds, None, limit.work / seconds, limit.unit))
        if bounds:
            slowest = max(bounds, key=lambda row: row.seconds)
            mine.unit, mine.share = slowest.unit, mine.rate / slowest.rate
        result.rows[:0] = bounds
        result.rows.append(mine)
        benchmark.extra_info |= {"group": group, "comparison": [vars(row) for row in result.rows]}
        self.comparisons.append(result)
        return result

    def _compare_on_gpu(self, benchmark, group, ours, baselines, limit, work, moved, unit) -> Comparison:
        """The same on a GPU: device time of captured graphs, the caches as the call before left them."""
        for run in (*baselines.values(), ours):
            run()
        torch.cuda.synchronize()
        others = {name: Repeated(run) for name, run in baselines.items()}
        mine = Repeated(ours)
        times: dict[str, list[float]] = {name: [] for name in others}
        own: list[float] = []

        def others_first():
            for name, run in others.items():
                times[name].append(run.seconds())

        round_seconds = sum(run.seconds() * run.calls for run in (*others.values(), mine))
        rounds = max(5, min(50, round(self.seconds / round_seconds)))
        benchmark.pedantic(lambda: own.append(mine.seconds()), setup=others_first, rounds=rounds, iterations=1)
        result = Comparison(group)
        for name, seconds in times.items():
            ratio = statistics.median(t / o for t, o in zip(seconds, own))
            result.rows.append(Row(name, statistics.median(seconds), ratio))
        row = Row("dlmkernels", statistics.median(own), None, work / statistics.median(own), unit)
        if limit is not None:
            row.unit = limit.unit
            bytes_, flops = (work, 0.0) if limit.unit == "GB/s" else (moved, work)
            name, floor = self.floors.seconds(bytes_, flops)
            row.share = floor / row.seconds
            result.rows.insert(0, Row(name, floor, None, work / floor, limit.unit))
        result.rows.append(row)
        benchmark.extra_info |= {
            "group": group, "comparison": [vars(r) for r in result.rows], "calls_a_round": mine.calls,
            "captured": mine.captured,
        }  # fmt: skip
        self.comparisons.append(result)
        return result

    def table(self) -> list[str]:
        """All comparisons as lines of text."""
        width = max((len(row.name) for c in self.comparisons for row in c.rows), default=0)
        lines = [f"  {'':<{width}}  {'median':>11}  {'ours is':>13}  {'rate':>15}  {'of the limit':>12}"]
        for comparison in self.comparisons:
            lines += ["", comparison.group]
            for row in comparison.rows:
                rate = f"{_short(row.rate / (1e9 if row.unit.startswith('G') else 1))} {row.unit}" if row.rate else ""
                share = "" if row.share is None else f"{row.share:.0%}"
                lines.append(
                    f"  {row.name:<{width}}  {_milliseconds(row.seconds):>11}  {_ratio(row.ratio):>13}  {rate:>15}  "
                    f"{share:>12}".rstrip()
                )
        return lines


def _timed(run: Function, before: Function, clock: Callable[[], float]) -> float:
    before()
    start = clock()
    run()
    return clock() - start


def _short(x: float) -> str:
    """Three significant digits."""
    digits = max(0, 2 - math.floor(math.log10(x))) if x > 0 else 0
    return f"{x:,.{digits}f}"


def _milliseconds(seconds: float) -> str:
    return f"{_short(seconds * 1e3)} ms"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{_short(ratio)}x faster" if ratio >= 1 else f"{_short(1 / ratio)}x slower"
