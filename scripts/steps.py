# SPDX-License-Identifier: Apache-2.0
"""Run programs in parallel and in sequence, within a shared time budget."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

GRACE = 3.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Step:
    """A program to run.

    Attributes
    ----------
    name : str
    command : list of str
    limit : float
        Seconds reserved for it. It may take longer if other steps leave time.
    after : str
        Name of a step that must have passed before; "" if there is none.
    programs, packages : tuple of str
        Programs on PATH, and Python packages, that it needs.
    skipped : str
        Reason for skipping it, which does not count as a fault; "" to run it.
    """

    name: str
    command: list[str]
    limit: float
    after: str = ""
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    skipped: str = ""


@dataclass
class Outcome:
    """Outcome of a step. `status` starts with passed, skipped, failed, timed out or not run; a reason may follow."""

    name: str
    status: str
    seconds: float = 0.0
    last_line: str = ""

    @property
    def is_fault(self) -> bool:
        return not self.status.startswith(("passed", "skipped"))


def missing(programs: Sequence[str], packages: Sequence[str]) -> list[str]:
    """Return the programs and packages that are not installed."""
    return [program for program in programs if shutil.which(program) is None] + [
        package for package in packages if importlib.util.find_spec(package) is None
    ]


class Run:
    """Runs steps and collects their outcomes.

    Parameters
    ----------
    folder, logs : Path
        Folder for `steps.json`, which is written after every group of steps, and folder for the log of each step.
    root : Path
        Working directory of the programs.
    environment : dict
        Environment variables of the programs.
    budget : float
        Seconds for all steps together.
    only : sequence of str
        Names of the steps to run, or the parts of names before the first hyphen. If empty, all steps run.
    """

    def __init__(
        self, folder: Path, logs: Path, root: Path, environment: dict[str, str], budget: float, only: Sequence[str] = ()
    ):
        self.folder, self.logs, self.root, self.environment = folder, logs, root, environment
        self.only, self.ends = only, time.monotonic() + budget
        self.outcomes: list[Outcome] = []
        self.running: set[subprocess.Popen] = set()

    def all(self, groups: list[list[Step]], ended: Callable[[], None] = lambda: None) -> None:
        """Run the groups in order, the steps of a group in parallel, and call `ended` after each group.

        A group may use the remaining time, minus the time reserved for later groups.
        """
        later = [max((step.limit for step in group), default=0.0) for group in groups]
        for number, group in enumerate(groups):
            left = self.ends - time.monotonic() - sum(later[number + 1 :])
            wanted = [step for step in group if self._is_wanted(step.name)]
            try:
                self._side_by_side(wanted, left)
            finally:
                steps = [asdict(outcome) for outcome in self.outcomes]
                (self.folder / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
                ended()

    def _side_by_side(self, steps: list[Step], left: float) -> None:
        with ThreadPoolExecutor(max(1, len(steps))) as pool:
            try:
                self.outcomes += pool.map(lambda step: self._one(step, left), steps)
            except BaseException:  # interrupted: leave no process behind
                for program in list(self.running):
                    end_group(program)
                raise

    def _is_wanted(self, name: str) -> bool:
        return not self.only or name in self.only or name.split("-")[0] in self.only

    def _one(self, step: Step, left: float) -> Outcome:
        """Run a step, unless something prevents it, and return its outcome."""
        start = time.perf_counter()
        against = self._against(step, left)
        if against:
            outcome = Outcome(step.name, against)
        else:
            print(f"== {step.name}", flush=True)
            log = self.logs / f"{step.name}.log"
            status = self._run(step.command, log, left)
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
            outcome = Outcome(step.name, status, round(time.perf_counter() - start, 1), lines[-1].strip()[:200])
            if outcome.is_fault:
                print("\n".join(lines[-25:]))
        print(f"   {step.name}: {outcome.status}, {outcome.seconds:.0f} s: {outcome.last_line}", flush=True)
        return outcome

    def _against(self, step: Step, left: float) -> str:
        if step.skipped:
            return f"skipped: {step.skipped}"
        lacks = missing(step.programs, step.packages)
        if lacks:
            return f"not run: missing {', '.join(lacks)}"
        if any(outcome.name == step.after and outcome.status != "passed" for outcome in self.outcomes):
            return f"not run: {step.after} did not pass"
        return "not run: no time left" if left <= 0 else ""

    def _run(self, command: list[str], log: Path, limit: float) -> str:
        """Run `command` for at most `limit` seconds, with its output in a file, and end all processes it has started.

        Returns the status: passed; failed, with the exit code; timed out; or not run, if it could not start.
        """
        with log.open("w") as out:
            try:
                program = subprocess.Popen(
                    command, cwd=self.root, env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                out.write(f"{command[0]}: {error.strerror}\n")
                return f"not run: {error.strerror}"
            self.running.add(program)
            try:
                status = program.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return f"timed out after {limit:.0f} s"
            finally:
                end_group(program)
                self.running.discard(program)
        return "passed" if status == 0 else f"failed ({status})"

    def table(self) -> str:
        """Return a table with one line per step."""
        return "\n".join(f"{o.name:<24} {o.status:<14} {o.seconds:6.1f} s  {o.last_line}" for o in self.outcomes)


def end_group(program: subprocess.Popen) -> None:
    """End a program and its process group: SIGTERM for a clean exit first, SIGKILL after `GRACE` seconds."""
    if program.poll() is None:
        _signal(program, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(timeout=GRACE)
    _signal(program, signal.SIGKILL)
    program.wait()


def _signal(program: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has already ended
        os.killpg(program.pid, number)
