# SPDX-License-Identifier: Apache-2.0
"""Runs programs side by side and one after another, within a time that all of them share."""

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

GRACE = 3.0  # seconds between asking a program to end and ending it


@dataclass(frozen=True)
class Step:
    """A program to run.

    Attributes
    ----------
    name : str
    command : list of str
    limit : float
        Seconds that it is promised; it may take more where others leave some.
    after : str
        Name of a step that must have passed. "": none.
    programs, packages : tuple of str
        Programs on PATH, and Python packages, without which it cannot run.
    skipped : str
        Why it is not to run, where that is no fault.
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
    """What came of a step: `status` is passed, skipped, failed, timed out or not run, with the reason behind it."""

    name: str
    status: str
    seconds: float = 0.0
    last_line: str = ""

    @property
    def is_fault(self) -> bool:
        return not self.status.startswith(("passed", "skipped"))


def missing(programs: Sequence[str], packages: Sequence[str]) -> list[str]:
    """Those that this machine, and this Python, do not have."""
    return [program for program in programs if shutil.which(program) is None] + [
        package for package in packages if importlib.util.find_spec(package) is None
    ]


class Run:
    """The outcomes so far, and how to get more.

    Parameters
    ----------
    folder, logs : Path
        `steps.json` goes to the one after every group of steps, a log of each step to the other.
    root : Path
        Working directory of the programs.
    environment : dict
        Theirs.
    budget : float
        Seconds for everything.
    only : sequence of str
        Names of the steps to run, or how they begin up to a hyphen. Empty: all.
    """

    def __init__(
        self, folder: Path, logs: Path, root: Path, environment: dict[str, str], budget: float, only: Sequence[str] = ()
    ):
        self.folder, self.logs, self.root, self.environment = folder, logs, root, environment
        self.only, self.ends = only, time.monotonic() + budget
        self.outcomes: list[Outcome] = []
        self.running: set[subprocess.Popen] = set()

    def all(self, groups: list[list[Step]], ended: Callable[[], None] = lambda: None) -> None:
        """Run the groups in order, the steps of one side by side; `ended` is called after each group.

        A group may take what is left of the time, less what the later ones are promised.
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
            except BaseException:  # interrupted: nothing may stay behind
                for program in list(self.running):
                    end_group(program)
                raise

    def _is_wanted(self, name: str) -> bool:
        return not self.only or name in self.only or name.split("-")[0] in self.only

    def _one(self, step: Step, left: float) -> Outcome:
        """Run a step, unless something stands against it; say what came of it."""
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
            return f"not run: there is no {', no '.join(lacks)}"
        if any(outcome.name == step.after and outcome.status != "passed" for outcome in self.outcomes):
            return f"not run: {step.after} has not passed"
        return "not run: no time is left" if left <= 0 else ""

    def _run(self, command: list[str], log: Path, limit: float) -> str:
        """Run `command` for at most `limit` seconds, its output to a file, and end with it what it has started.

        Says what came of it: passed; failed, with the exit status; timed out; or not run, where it could not start.
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
        """A line for each step."""
        return "\n".join(f"{o.name:<24} {o.status:<14} {o.seconds:6.1f} s  {o.last_line}" for o in self.outcomes)


def end_group(program: subprocess.Popen) -> None:
    """End a program that leads its process group, and whatever is left of the group; an orderly end comes first."""
    if program.poll() is None:
        _signal(program, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(timeout=GRACE)
    _signal(program, signal.SIGKILL)
    program.wait()


def _signal(program: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # where all have ended
        os.killpg(program.pid, number)
