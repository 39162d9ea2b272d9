# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic: limits, ratios, what is captured, what is compared with earlier results."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from dlmkernels import info

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import compare_benchmarks  # noqa: E402
import device  # noqa: E402
import harness  # noqa: E402

pytestmark = pytest.mark.on_cpu
SUPPORT = ("conftest.py", "harness.py", "device.py", "limits.cpp", "pytest.ini")


class Clock:
    """Time that passes only where a function says so."""

    now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """A function whose calls take these times in turn."""
        times = list(seconds)

        def run():
            times.append(times.pop(0))
            self.now += times[-1]

        return run


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            function()


def compared(ours, limit_seconds, work=1e9, **options):
    """A comparison of functions that take these times, with a limit of 1e9 bytes; and the harness."""
    clock, bench = Clock(), Benchmark()
    run = harness.Harness(0.0, **options)
    limit = harness.Limit("a read", clock.takes(*limit_seconds), 1e9, "GB/s")
    result = run.compare(
        bench, "a group", clock.takes(*ours), {"slow": clock.takes(3.0)}, limit=limit, work=work, clock=clock
    )
    return result, run, bench


class TestLimits:
    def test_share(self):
        result, run, _ = compared([1.25], [1.0])
        ours = result.rows[-1]
        assert (ours.name, ours.share, ours.rate) == ("dlmkernels", 0.8, 0.8e9) and run.passed_limits() == []
        assert [row.name for row in result.rows] == ["a read", "slow", "dlmkernels"]
        assert result.rows[1].ratio == 3.0 / 1.25

    def test_a_limit_that_is_passed(self):
        """Ours takes half of what the limit says is the least: the limit is wrong, and that is said."""
        _, run, _ = compared([0.5], [1.0])
        (line,) = run.passed_limits()
        assert "WRONG LIMIT" in line and "200%" in line and "a group" in line

    def test_work_counts(self):
        """Half the time for half the limit's work is no more than the limit."""
        result, run, _ = compared([0.5], [1.0], work=0.5e9)
        assert result.rows[-1].share == 1.0 and run.passed_limits() == []

    @pytest.mark.parametrize("ours", [[1.0, 1.0, 1.0, 0.6, 0.7], [0.96, 0.97, 0.98, 0.99, 0.96]])
    def test_noise_is_not_a_wrong_limit(self, ours):
        """Single rounds may be beyond it, and all of them by a little."""
        assert compared(ours, [1.0])[1].passed_limits() == []

    def test_the_tighter_of_two(self):
        clock, run = Clock(), harness.Harness(0.0)
        limits = [harness.Limit(str(s), clock.takes(s), 1e9, "GB/s") for s in (0.25, 0.5)]
        result = run.compare(Benchmark(), "a group", clock.takes(1.0), {}, limit=limits, work=1e9, clock=clock)
        assert result.rows[-1].share == 0.5

    def test_what_ours_changes_is_put_back(self):
        clock, run = Clock(), harness.Harness(0.0)
        state = [0]

        def ours():
            assert state[0] == 0
            state[0] = 1
            clock.now += 1

        before = []
        run.compare(
            Benchmark(), "a group", ours, {"same": ours}, clock=clock,
            restore=lambda: (before.append(clock.now), state.__setitem__(0, 0)),
        )  # fmt: skip
        assert len(before) > 10 and len(set(before)) == len(before)

    @pytest.mark.parametrize("limits", ["exp_limits", "arithmetic_limits"])
    def test_in_registers(self, limits):
        """They say how much work they do: twice the elements, or the same operations at all times."""
        if harness._limits() is None:
            pytest.skip("no C++ compiler")
        if limits == "arithmetic_limits":
            (limit,) = harness.arithmetic_limits(torch.float32)
            assert limit.work > 1e5
        else:
            one, two = (harness.exp_limits(torch.zeros(n))[0].work for n in (2**20, 2**21))
            assert two == pytest.approx(2 * one, rel=1e-3) and one == pytest.approx(4 * 2**20, rel=1e-3)


@pytest.mark.slow
def test_a_run_fails_where_a_limit_is_passed(tmp_path):
    """The exit status says so, and the summary, which names the processor."""
    for name in SUPPORT:
        (tmp_path / name).symlink_to(ROOT / "benchmarks" / name)
    (tmp_path / "bench_made_up.py").write_text(
        textwrap.dedent("""
        import pytest
        from harness import Limit

        @pytest.mark.parametrize("size", [9, 9999])
        def test_quick(benchmark, harness, size):
            limit = Limit("a sum", lambda: sum(range(999)), 1e9, "GB/s")
            harness.compare(benchmark, f"of {size}", lambda: sum(range(size)), {}, limit=limit, work=1e9)
    """)
    )

    def bench(*options):
        command = [sys.executable, "-m", "pytest", str(tmp_path), "--benchmark-only", "--seconds", "0.01", *options]
        environment = os.environ | {"PYTHONPATH": str(Path(info.__file__).parents[1])}
        environment.pop("PYTEST_XDIST_WORKER", None)  # of this run; the plugin would not time anything
        command += ["-p", "no:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        return done.returncode, done.stdout

    status, text = bench()
    assert status == 1 and text.count("WRONG LIMIT") == 1 and "of it): of 9\n" in text
    assert info.processor() in text
    status, text = bench("-k", "9999")
    assert status == 0 and "WRONG LIMIT" not in text


def test_each_comparison_is_written_when_it_ends(tmp_path):
    file = tmp_path / "lines"
    result, _, bench = compared([1.25], [1.0], lines=file)
    (entry,) = map(json.loads, file.read_text().splitlines())
    assert entry == bench.extra_info
    assert entry["group"] == "a group" and entry["comparison"] == [vars(row) for row in result.rows]
    compared([1.25], [1.0], lines=file)
    assert len(file.read_text().splitlines()) == 2


class Cuda:
    """As much of `torch.cuda` as timing needs: work takes the time of the clock, and a graph does what it captured."""

    def __init__(self, clock):
        self.clock, self.mode, self.captures, self.current = clock, 0, 0, None

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def Event(self, enable_timing):
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.clock.now)
        event.elapsed_time = lambda other: (other.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        graph = types.SimpleNamespace(work=[])
        graph.replay = lambda: [work() for work in graph.work]
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        self.captures, self.current = self.captures + 1, graph
        yield
        self.current = None

    def kernel(self, seconds):
        def work():
            self.clock.now += seconds

        def run():
            self.current.work.append(work) if self.current else work()

        return run

    def item(self):
        """Waits for the device."""
        assert self.current is None, "a wait was captured"
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda(Clock())
    monkeypatch.setattr(device, "torch", types.SimpleNamespace(cuda=cuda))
    return cuda


class TestRepeated:
    def test_captured(self, cuda):
        repeated = device.Repeated(cuda.kernel(1e-4))
        assert repeated.captured and repeated.calls == 20 and cuda.captures == 1
        assert repeated.seconds() == pytest.approx(1e-4)

    def test_a_function_that_waits_is_not_captured(self, cuda):
        """As torch.multinomial does: a capture that fails could spoil the generator."""
        kernel = cuda.kernel(1e-4)
        repeated = device.Repeated(lambda: (kernel(), cuda.item()))
        assert not repeated.captured and cuda.captures == 0 and cuda.mode == 0
        assert repeated.seconds() == pytest.approx(1e-4)

    def test_what_puts_things_back_takes_no_time(self, cuda):
        repeated = device.Repeated(cuda.kernel(1e-4), cuda.kernel(3e-4))
        assert cuda.captures == 2 and repeated.seconds() == pytest.approx(1e-4)
        kernel = cuda.kernel(1e-4)
        repeated = device.Repeated(lambda: (kernel(), cuda.item()), cuda.kernel(3e-4))
        assert repeated.seconds() == pytest.approx(1e-4)


@pytest.mark.parametrize("text,name", [
    ("processor\t: 0\nmodel name\t: Some  Processor 9 @ 2GHz\nflags\t: x\nmodel name\t: other\n",
     "Some Processor 9 @ 2GHz"),
    ("Features\t: fp\nHardware\t: A Board\n", "A Board"),
])  # fmt: skip
def test_processor(text, name):
    assert info.processor(text) == name
    assert info.processor("") and info.processor()


class TestCompare:
    ROWS = [
        {"name": "a read", "ratio": None}, {"name": "plain", "ratio": 4.0}, {"name": "sorted", "ratio": 10.0},
        {"name": "dlmkernels", "ratio": None},
    ]  # fmt: skip

    def write(self, file, *, form="ours", **groups):
        """A file of benchmarks: the ratios of ROWS times a factor, in each group."""
        comparisons = {
            name: [row | {"ratio": row["ratio"] and row["ratio"] * factor} for row in self.ROWS]
            for name, factor in groups.items()
        }
        if form == "ours":
            content = {"environment": {}, "comparisons": comparisons}
        else:
            infos = [{"group": group, "comparison": rows} for group, rows in comparisons.items()]
            content = {"machine_info": {}, "benchmarks": [{"name": "x", "extra_info": i} for i in [*infos, {}]]}
        file.write_text(json.dumps(content))
        return str(file)

    @pytest.mark.parametrize("form", ["ours", "pytest-benchmark"])
    @pytest.mark.parametrize("factor,status,verdict", [
        (1.0, 0, ""), (0.9, 0, ""), (0.86, 0, ""), (0.84, 1, "**slower**"), (1.3, 0, "faster"),
    ])  # fmt: skip
    def test_ratios(self, tmp_path, capsys, form, factor, status, verdict):
        files = (
            self.write(tmp_path / "a", greedy=1, sample=1),
            self.write(tmp_path / "b", form=form, greedy=1, sample=factor),
        )
        assert compare_benchmarks.main(list(files)) == status
        lines = capsys.readouterr().out.splitlines()
        assert f"| sample | plain | 4.00× | {4 * factor:.2f}× | {factor - 1:+.0%} | {verdict} |" in lines
        assert "| greedy | sorted | 10.00× | 10.00× | +0% |  |" in lines
        assert lines[-1] == f"4 ratios; {2 * status} slower by more than 15%, or gone"

    def test_tolerance(self, tmp_path):
        files = [self.write(tmp_path / "a", greedy=1), self.write(tmp_path / "b", greedy=0.7)]
        assert compare_benchmarks.main([*files, "--tolerance", "0.4"]) == 0
        assert compare_benchmarks.main([*files, "--tolerance", "0.2"]) == 1
        with pytest.raises(SystemExit):
            compare_benchmarks.main([*files, "--tolerance", "1.5"])

    def test_new_and_gone(self, tmp_path, capsys):
        old, new = self.write(tmp_path / "a", greedy=1), self.write(tmp_path / "b", greedy=1, sample=1)
        assert compare_benchmarks.main([old, new]) == 0
        assert "| sample | plain |  | 4.00× |  | new |" in capsys.readouterr().out
        assert compare_benchmarks.main([new, old]) == 1
        assert "| sample | plain | 4.00× |  |  | **gone** |" in capsys.readouterr().out

    @pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"comparisons": {"a": []}}', '{"benchmarks": [{}]}'])
    def test_unreadable(self, tmp_path, capsys, text):
        good, bad = self.write(tmp_path / "a", greedy=1), tmp_path / "b"
        if text is not None:
            bad.write_text(text)
        assert compare_benchmarks.main([good, str(bad)]) == 2
        assert "compare_benchmarks: " in capsys.readouterr().err
