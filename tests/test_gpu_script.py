# SPDX-License-Identifier: Apache-2.0
"""`make gpu` and its workflow, without a GPU: what they run, and what they survive."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import simt_programs

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

import gpu  # noqa: E402
from steps import Run, Step  # noqa: E402

pytestmark = pytest.mark.on_cpu
SUPPORT = ("conftest.py", "harness.py", "device.py", "limits.cpp", "pytest.ini")


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.fixture
def run(tmp_path):
    """`run(groups, budget)`: the outcomes by name, and what is in the result file, which must be the same."""

    def start(groups, budget=60.0, only=(), ended=lambda: None):
        # Without what says that this is a worker of xdist: in one, pytest-benchmark does not time anything.
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        runs = Run(tmp_path, tmp_path, ROOT, environment, budget, only)
        runs.all(groups, ended)
        written = json.loads((tmp_path / "steps.json").read_text())
        assert [step["name"] for step in written] == [outcome.name for outcome in runs.outcomes]
        return {outcome.name: outcome for outcome in runs.outcomes}

    return start


class TestSteps:
    def test_a_missing_tool(self, run):
        """Only what needs it does not run."""
        outcomes = run([
            [Step("needs", python("0"), 5, programs=("dlmkernels-no-such-program",)),
             Step("imports", python("0"), 5, packages=("dlmkernels_no_such_package",)),
             Step("is", ["./dlmkernels-no-such-file"], 5), Step("without", python("print('here')"), 5)],
            [Step("behind", python("0"), 5, after="needs"), Step("next", python("0"), 5, after="without")],
        ])  # fmt: skip
        assert {name: outcome.status for name, outcome in outcomes.items()} == {
            "needs": "not run: missing dlmkernels-no-such-program",
            "imports": "not run: missing dlmkernels_no_such_package",
            "is": "not run: No such file or directory", "without": "passed",
            "behind": "not run: needs did not pass", "next": "passed",
        }  # fmt: skip
        assert outcomes["without"].last_line == "here"
        assert [name for name, outcome in outcomes.items() if outcome.is_fault] == ["needs", "imports", "is", "behind"]

    def test_a_failure(self, run):
        outcomes = run([[Step("bad", python("print('why'); raise SystemExit(3)"), 5), Step("killed", python("""
            import os, signal
            os.kill(os.getpid(), signal.SIGSEGV)
        """), 5)], [Step("next", python("0"), 5)]])  # fmt: skip
        assert (outcomes["bad"].status, outcomes["bad"].last_line) == ("failed (3)", "why")
        assert outcomes["killed"].status == "failed (-11)" and outcomes["next"].status == "passed"

    def test_a_step_that_hangs(self, run, tmp_path):
        """It ends with its children when its time is over, deaf to a request as it is; what comes next runs."""
        hang = """
            import pathlib, signal, subprocess, sys, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
                                      "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
            pathlib.Path(sys.argv[1]).write_text(str(child.pid))
            time.sleep(600)
        """
        note = tmp_path / "child"
        start = time.monotonic()
        outcomes = run([[Step("hangs", [*python(hang), str(note)], 10)], [Step("next", python("0"), 20)]], 30.0)
        assert outcomes["hangs"].status == "timed out after 10 s" and time.monotonic() - start < 30
        assert outcomes["next"].status == "passed"
        assert is_gone(int(note.read_text()))

    def test_nothing_is_left_behind(self, run, tmp_path):
        """A step that passes may have started something that goes on."""
        leave = """
            import pathlib, subprocess, sys
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pathlib.Path(sys.argv[1]).write_text(str(child.pid))
        """
        note = tmp_path / "child"
        assert run([[Step("leaves", [*python(leave), str(note)], 20)]])["leaves"].status == "passed"
        assert is_gone(int(note.read_text()))

    def test_time(self, run):
        """A step may use what is left, less what the later ones are promised; without time nothing starts."""
        outcomes = run(
            [[Step("long", python("import time; time.sleep(600)"), 1)], [Step("late", python("0"), 50)]], 51.0
        )
        assert outcomes["long"].status == "timed out after 1 s" and outcomes["late"].status == "passed"
        outcomes = run([[Step("first", python("0"), 1)], [Step("late", python("0"), 5)]], 0.0)
        assert {outcome.status for outcome in outcomes.values()} == {"not run: no time left"}

    def test_written_when_interrupted(self, run, tmp_path):
        seen = []

        def interrupt():
            seen.append(len(json.loads((tmp_path / "steps.json").read_text())))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run([[Step("one", python("0"), 1)], [Step("two", python("0"), 1)]], ended=interrupt)
        assert seen == [1]

    def test_an_end_from_outside(self, tmp_path):
        """A runner that cancels the script ends its steps with it."""
        note, code = tmp_path / "child", """
            import os, pathlib, signal, sys
            sys.path.insert(0, "scripts")
            from steps import Run, Step
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            folder = pathlib.Path(sys.argv[1])
            hang = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
            steps = [[Step("hangs", [sys.executable, "-c", hang, sys.argv[2]], 50)], [Step("next", ["true"], 1)]]
            Run(folder, folder, folder, dict(os.environ), 60).all(steps)
        """  # fmt: skip
        script = subprocess.Popen([*python(code), str(tmp_path), str(note)], cwd=ROOT)
        while not (note.exists() and note.read_text()):
            time.sleep(0.05)
        script.terminate()
        assert script.wait(timeout=30) == 143 and is_gone(int(note.read_text()))
        assert json.loads((tmp_path / "steps.json").read_text()) == []

    def test_only(self, run):
        steps = [[Step(name, python("0"), 1) for name in ("build", "build-native", "ops")]]
        assert list(run(steps, only=["build"])) == ["build", "build-native"]
        assert list(run(steps, only=["build-native"])) == ["build-native"]


def is_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True  # dead; its new parent has not looked yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_benchmark_that_fails(run, tmp_path):
    """Comparisons are written as they end: neither a failure nor a crash takes those before it away."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in SUPPORT:
        (folder / name).symlink_to(ROOT / "benchmarks" / name)
    (folder / "bench_made_up.py").write_text(
        textwrap.dedent("""
        import os

        def test_good(benchmark, harness):
            harness.compare(benchmark, "good", lambda: sum(range(99)), {"twice": lambda: sum(range(999))})

        def test_bad(benchmark, harness):
            assert False

        def test_good_again(benchmark, harness):
            harness.compare(benchmark, "good again", lambda: sum(range(99)), {"twice": lambda: sum(range(999))})

        def test_crash(benchmark, harness):
            os._exit(7)

        def test_never(benchmark, harness):
            harness.compare(benchmark, "never", lambda: 0, {"other": lambda: 0})
    """)
    )
    about = {"gpu": "a card", "driver": "1", "torch": "2", "nvcc": "3", "date": "today", "commit": "4"}
    step = gpu.benchmarks(tmp_path, ["--seconds", "0.01"], folder)
    outcomes = run([[step]], 300.0, ended=lambda: gpu.write_comparisons(tmp_path, tmp_path, about))
    assert outcomes["benchmarks"].status == "failed (7)"
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(written["comparisons"]) == ["good", "good again"] and written["environment"] == about
    for rows in written["comparisons"].values():
        assert [row["name"] for row in rows] == ["twice", "dlmkernels"] and rows[0]["ratio"] > 1
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("a card, driver 1") and "| good |" in table and "twice" in table


class TestPlan:
    ABOUT = {"gpu": "a card", "capability": "9.0", "missing": []}

    def steps(self, tmp_path, quick=False):
        return [step for group in gpu.plan(self.ABOUT, tmp_path, quick) for step in group]

    def test_covers_every_op(self, tmp_path):
        registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                      if name.startswith("dlmkernels::")}  # fmt: skip
        assert set(gpu.op_tests()) == {f"tests/ops/test_{name.rstrip('_')}.py" for name in registered} and registered
        assert all((ROOT / file).is_file() for file in gpu.op_tests())
        (ops,) = (step for step in self.steps(tmp_path) if step.name == "ops")
        assert set(gpu.op_tests()) < set(ops.command) and ops.command[ops.command.index("--device") + 1] == "cuda"

    def test_fits_ten_minutes(self, tmp_path):
        groups = gpu.plan(self.ABOUT, tmp_path, False)
        assert sum(max(step.limit for step in group) for group in groups) <= gpu.BUDGET < 600 - 3 * len(groups)

    def test_order(self, tmp_path):
        """What a step needs comes in a group before its own."""
        for groups in (gpu.plan(self.ABOUT, tmp_path, False), gpu.plan_on_cpu(tmp_path)):
            earlier = set()
            for group in groups:
                assert {step.after for step in group} <= earlier | {""}
                earlier |= {step.name for step in group}

    def test_a_dry_run_has_the_same_steps(self, tmp_path):
        names = [[step.name for step in group] for group in gpu.plan(self.ABOUT, tmp_path, False)]
        assert names == [[step.name for step in group] for group in gpu.plan_on_cpu(tmp_path)]

    def test_quick(self, tmp_path):
        skipped = [step.name for step in self.steps(tmp_path, quick=True) if step.skipped]
        assert skipped == [f"sanitizer-{tool}" for tool in gpu.SANITIZERS]
        assert not any(step.skipped for step in self.steps(tmp_path))

    def test_sanitized_tests_exist(self):
        """The names given to the program, which runs what it knows and nothing else."""
        sources = "".join(path.read_text() for path in (ROOT / "tests/cpp").glob("test_*.cpp"))
        for name in gpu.SANITIZED:
            assert (ROOT / f"tests/cpp/{name}.cpp").is_file() or f"TEST({name})" in sources, name

    def test_native_programs_exist(self):
        makefile = (ROOT / "tests/cpp/CMakeLists.txt").read_text()
        for name in gpu.NATIVE_PROGRAMS.values():
            assert re.search(rf"\b{name}\b", makefile), name

    def test_a_program_of_an_earlier_run_is_not_taken_for_a_new_one(self, tmp_path):
        program = tmp_path / "native" / "gpu_tests"
        program.parent.mkdir()
        program.touch()
        self.steps(tmp_path)
        assert not program.exists()


class TestWorkflow:
    """The shell steps of .github/workflows/gpu.yml, run as the runner runs them."""

    @pytest.fixture(scope="class")
    def workflow(self):
        yaml = pytest.importorskip("yaml")
        return yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())

    def test_form(self, workflow):
        triggers = workflow[True]  # YAML takes `on` for a truth value
        assert {"schedule", "workflow_dispatch", "pull_request"} <= set(triggers)
        assert triggers["pull_request"]["types"] == ["labeled"]
        job = workflow["jobs"]["gpu"]
        assert "self-hosted" in job["runs-on"] and "label.name == 'gpu'" in job["if"]
        assert job["timeout-minutes"] * 60 > gpu.BUDGET
        assert workflow["permissions"] == {"contents": "read"} and workflow["defaults"]["run"]["shell"] == "bash"
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)

    @pytest.mark.slow
    def test_dry_run(self, workflow, tmp_path):
        """Build, test, measure and compare on the CPU; everything that `make gpu` writes is there."""
        simt_programs.build("simt_plain")
        job = workflow["jobs"]["gpu"]
        results = tmp_path / "results"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {
            "PYTHON": sys.executable, "RESULTS": str(results), "ARGS": f"--dry-run --out {results}",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        assert set(job["env"]) <= set(environment)
        for step in job["steps"]:
            if "run" in step:
                shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
                done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{step['name']}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"

        about = json.loads((results / "environment.json").read_text())
        steps = json.loads((results / "steps.json").read_text())
        expected = [step.name for group in gpu.plan_on_cpu(tmp_path) for step in group]
        assert [step["name"] for step in steps] == expected
        for step in steps:
            on_card = "shipped" in step["name"] or step["name"].startswith("sanitizer")
            assert step["status"] == ("skipped: needs a GPU" if on_card else "passed")
        comparisons = json.loads((results / "benchmarks.json").read_text())["comparisons"]
        for op in (file[len("tests/ops/test_") : -len(".py")] for file in gpu.op_tests()):
            words = {"token_confidence": "token, margin and entropy"}.get(op, op)
            assert any(group.startswith(words) for group in comparisons), op
        assert any(group.startswith("generate") for group in comparisons)
        table = (results / "table.md").read_text()
        assert table.startswith(about["gpu"]) and all(group in table for group in comparisons)
        summary = (tmp_path / "summary.md").read_text()
        assert table in summary and "nothing to compare with" in summary


def test_no_card(monkeypatch):
    """A machine without one is told so at once, before anything is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device: torch .* finds none"):
        gpu.main([])
