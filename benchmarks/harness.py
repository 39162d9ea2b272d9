# SPDX-License-Identifier: Apache-2.0
"""Paired timing: our op, its baselines and a limit of the machine are measured alternately in one run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
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

# A limit is considered wrong if three quarters of the rounds exceed it by more than this.
NOISE = 0.05


@dataclass
class Row:
    """One timed candidate.

    `ratio` is its time over ours, as the median over rounds; None for ours and for limits. `share` is the fraction of
    the limit that ours reaches, as the median over rounds, and `low_share` its lower quartile.
    """

    name: str
    seconds: float
    ratio: float | None = None
    rate: float = 0.0
    unit: str = ""
    share: float | None = None
    low_share: float | None = None


@dataclass
class Comparison:
    """The rows of one group: limits, if any, then baselines, then ours."""

    group: str
    rows: list[Row] = field(default_factory=list)


class Limit:
    """A limit of the machine: `run` does `work` and nothing else; its rate is reported in `unit`."""

    def __init__(self, name: str, run: Function, work: float, unit: str):
        self.name, self.run, self.work, self.unit = name, run, work, unit


def read_limit(*tensors: Tensor) -> Limit:
    """Return the limit for reading tensors once, in the same cache state: a sum of their bytes read as float32."""
    flat = [t.contiguous().view(-1).view(torch.float32) for t in tensors]

    def run():
        for x in flat:
            x.sum()

    return Limit("one read of the input", run, sum(t.numel() * t.element_size() for t in tensors), "GB/s")


def exp_limits(*tensors: Tensor) -> list[Limit]:
    """Return the limit for one exponential per element, on values in registers (`limits.cpp`); [] without a compiler.

    `torch.exp2` cannot be used, because it is slower than the ops. Only one thread runs and does its share. Other
    threads would take the same time, and starting them is not measured.
    """
    library = _limits()
    if library is None:
        return []
    threads, at_once = torch.get_num_threads(), library.exponentials(1)
    count = sum(t.numel() for t in tensors)
    repeats = max(1, round(count / threads / at_once))
    work = repeats * at_once * threads * sum(t.nbytes for t in tensors) / count
    return [Limit("one exponential an element", lambda: library.exponentials(repeats), work, "GB/s")]


@functools.cache
def _limits() -> ctypes.CDLL | None:
    """Compile and load limits.cpp for this processor. Returns None if there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, Path(__file__).with_name("limits.cpp"), "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    for name in ("multiply_add_float", "multiply_add_bfloat16", "multiply_add_tiles", "exponentials"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_long], ctypes.c_double
    return loaded


def arithmetic_limits(dtype: torch.dtype) -> list[Limit]:
    """Return the limit for multiply-adds in registers, with the processor's fastest instructions for `dtype`.

    These are fp32 instructions and, for bf16, also those on pairs of values or on tile registers. Without a compiler
    the result is []. As in `exp_limits`, only one thread runs, because a second thread would share the first one's
    processor right after its start.
    """
    library = _limits()
    if library is None:
        return []
    repeats = 100_000
    functions = {"fp32 multiply-add in registers": library.multiply_add_float}
    if dtype == torch.bfloat16:
        functions["bf16 multiply-add in registers"] = library.multiply_add_bfloat16
        functions["bf16 multiply-add in tile registers"] = library.multiply_add_tiles

    def rate(name):
        run = functions[name]
        return run(1) * repeats / min(_timed(lambda: run(repeats), lambda: None, time.perf_counter) for _ in range(3))

    name = max(functions, key=rate)
    function = functions[name]
    return [Limit(name, lambda: function(repeats), function(1) * repeats * torch.get_num_threads(), "GFLOP/s")]


def tighter(*limits: tuple[Limit, float]) -> tuple[Limit, float]:
    """Return the limit that bounds a call's time most, out of pairs of a limit and the call's work in its unit."""

    def seconds(limit: Limit, work: float) -> float:
        limit.run()
        return min(_timed(limit.run, lambda: None, time.perf_counter) for _ in range(5)) / limit.work * work

    return max(limits, key=lambda pair: seconds(*pair))


def product_timing(dtype: torch.dtype, flops: float, moved: float, *read: Tensor) -> dict:
    """Return arguments of `Harness.compare` for matrix products of `flops` operations that must read tensors `read`.

    If the default device is a GPU, the harness measures the GPU's limits itself. It only needs to know that `work` is
    in operations and that `moved` bytes are read and written.
    """
    if torch.get_default_device().type == "cuda":
        return {"limit": Limit("", lambda: None, 0.0, "GFLOP/s"), "work": flops, "moved": moved}
    reading = (read_limit(*read), sum(t.nbytes for t in read))
    limit, work = tighter(reading, *((limit, flops) for limit in arithmetic_limits(dtype)))
    return {"limit": limit, "work": work}


def touch(*tensors: Tensor) -> Function:
    """Return a function that reads tensors, so that every candidate starts with the same cache state."""

    def run():
        for t in tensors:
            t.view(-1).view(torch.uint8).sum()

    return run


class Harness:
    """Runs comparisons and keeps their results for the summary. Each result is also appended to the file `lines`."""

    def __init__(self, seconds: float, device: str = "cpu", lines: Path | None = None):
        self.seconds = seconds
        self.lines = lines
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
        restore: Function | None = None,
        limit: Limit | list[Limit] | None = None,
        work: float = 0.0,
        moved: float = 0.0,
        unit: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> Comparison:
        """Time `ours` with the `benchmark` fixture, and between its rounds each baseline once.

        Parameters
        ----------
        benchmark : fixture
            The fixture of pytest-benchmark. The other rows go to its `extra_info`.
        group : str
            Title of the comparison.
        ours : callable
        baselines : dict
            name -> callable.
        before : callable, optional
            Called before each candidate, untimed, to bring the caches into the same state. On a CPU only.
        restore : callable, optional
            Called before each candidate, untimed, to undo what candidates change.
        limit : Limit or list of Limit, optional
            Timed alternately with the others. Ours is compared with the slowest of them.
        work : float
            Bytes, floating-point operations or tokens of one call of ours; in the unit of the limit if there is one.
        moved : float
            Bytes that one call must read and write, if `work` is not in bytes. Used for a GPU's floors.
        unit : str
            Unit of the rate if there is no limit, such as "tokens/s".
        clock : callable, optional
            Returns the time in seconds. May exclude time that should not count. On a CPU only.

        Returns
        -------
        Comparison
        """
        if self.floors is not None:
            with _no_default_device():
                return self._compare_on_gpu(benchmark, group, ours, baselines, restore, limit, work, moved, unit)
        before = before or restore or (lambda: None)
        others = dict(baselines)
        limits = limit if isinstance(limit, list) else [limit] if limit else []
        others |= {limit.name: limit.run for limit in limits}
        everything = [*others.values(), ours]
        for run in everything:
            before()
            run()
        round_seconds = sum(_timed(run, before, time.perf_counter) for run in everything)
        rounds = max(5, min(100, round(self.seconds / round_seconds)))
        times: dict[str, list[float]] = {name: [] for name in others}
        own: list[float] = []
        names = list(others)

        def others_first():
            for i in range(len(names)):  # a different one goes first in each round
                name = names[(i + len(own)) % len(names)]
                times[name].append(_timed(others[name], before, clock))
            before()

        def timed_ours():
            own.append(_timed(ours, lambda: None, clock))

        benchmark.pedantic(timed_ours, setup=others_first, rounds=rounds, iterations=1)
        rows = [Row(name, statistics.median(times[name]), _paired(times[name], own)) for name in baselines]
        mine = Row("dlmkernels", statistics.median(own), None, work / statistics.median(own), unit)
        bounds = []
        for limit in limits:
            seconds = statistics.median(times[limit.name])
            bounds.append(Row(limit.name, seconds, None, limit.work / seconds, limit.unit))
            shares = [t / o * work / limit.work for t, o in zip(times[limit.name], own)]
            if mine.share is None or statistics.median(shares) > mine.share:  # the tightest limit counts
                mine.unit, mine.share, mine.low_share = limit.unit, *_middle_and_low(shares)
        return self._ended(benchmark, Comparison(group, [*bounds, *rows, mine]))

    def _compare_on_gpu(self, benchmark, group, ours, baselines, restore, limit, work, moved, unit) -> Comparison:
        """Implement `compare` on a GPU, with device times of CUDA graphs and caches as the previous call left them."""
        for run in (*baselines.values(), ours):
            (restore or (lambda: None))()
            run()
        torch.cuda.synchronize()
        others = {name: Repeated(run, restore) for name, run in baselines.items()}
        mine = Repeated(ours, restore)
        times: dict[str, list[float]] = {name: [] for name in others}
        own: list[float] = []

        def others_first():
            for name, run in others.items():
                times[name].append(run.seconds())

        round_seconds = sum(run.seconds() * run.calls for run in (*others.values(), mine))
        rounds = max(5, min(50, round(self.seconds / round_seconds)))
        benchmark.pedantic(lambda: own.append(mine.seconds()), setup=others_first, rounds=rounds, iterations=1)
        rows = [Row(name, statistics.median(seconds), _paired(seconds, own)) for name, seconds in times.items()]
        row = Row("dlmkernels", statistics.median(own), None, work / statistics.median(own), unit)
        limits = limit if isinstance(limit, list) else [limit] if limit else []
        if limits:
            row.unit = limits[0].unit
            bytes_, flops = (work, 0.0) if row.unit == "GB/s" else (moved, work)
            name, floor = self.floors.seconds(bytes_, flops)
            row.share, row.low_share = _middle_and_low([floor / seconds for seconds in own])
            rows.insert(0, Row(name, floor, None, work / floor, row.unit))
        benchmark.extra_info |= {"calls_a_round": mine.calls, "captured": mine.captured}
        return self._ended(benchmark, Comparison(group, [*rows, row]))

    def _ended(self, benchmark, result: Comparison) -> Comparison:
        entry = {"group": result.group, "comparison": [vars(row) for row in result.rows]}
        benchmark.extra_info |= entry
        if self.lines:
            with self.lines.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        self.comparisons.append(result)
        return result

    def passed_limits(self) -> list[str]:
        """Return a line for each comparison that is faster than its limit by more than noise, so the limit is wrong."""
        return [
            f"WRONG LIMIT, exceeded in three quarters of the rounds ({row.share:.0%} of it): {comparison.group}"
            for comparison in self.comparisons
            for row in comparison.rows
            if row.low_share is not None and row.low_share > 1 + NOISE
        ]

    def table(self) -> list[str]:
        """Return all comparisons as lines of text."""
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


def _paired(times: list[float], own: list[float]) -> float:
    """Return the ratio of a baseline's time to ours, as the median over rounds."""
    return statistics.median(t / o for t, o in zip(times, own))


def _middle_and_low(shares: list[float]) -> tuple[float, float]:
    """Return the median and the lower quartile."""
    return statistics.median(shares), statistics.quantiles(shares, n=4)[0]


@contextlib.contextmanager
def _no_default_device():
    """Unset the default device during timing, because it adds microseconds to every torch call."""
    before = torch.get_default_device()
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device(before)


def _timed(run: Function, before: Function, clock: Callable[[], float]) -> float:
    before()
    start = clock()
    run()
    return clock() - start


def _short(x: float) -> str:
    """Format a number with three significant digits."""
    digits = max(0, 2 - math.floor(math.log10(x))) if x > 0 else 0
    return f"{x:,.{digits}f}"


def _milliseconds(seconds: float) -> str:
    return f"{_short(seconds * 1e3)} ms"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{_short(ratio)}x faster" if ratio >= 1 else f"{_short(1 / ratio)}x slower"
