# SPDX-License-Identifier: Apache-2.0
"""The problems that the demo model was trained for, as tasks for lm-eval."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from dlmkernels.demo.tasks import TASKS, Problem

#: Number and seed of the problems, as in `dlmkernels demo`.
PROBLEMS, SEED = 48, 1
#: Number of clues of a Sudoku.
CLUES = 40


def _docs(task: str, difficulty: int | None, num_problems: int, problem_seed: int) -> dict[str, Dataset]:
    problems = TASKS[task].make(num_problems, seed=problem_seed, difficulty=difficulty)
    docs = [
        {"task": task, "canvas": p.canvas, "prompt_length": p.prompt_length, "prompt": p.prompt} for p in problems
    ]  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def sudoku(num_problems: int = PROBLEMS, problem_seed: int = SEED, clues: int = CLUES, **kwargs: Any):
    """Make Sudokus, whose prompts have mask tokens between the clues."""
    return _docs("sudoku", clues, num_problems, problem_seed)


def addition(num_problems: int = PROBLEMS, problem_seed: int = SEED, **kwargs: Any):
    """Make additions of two 16-digit numbers."""
    return _docs("addition", None, num_problems, problem_seed)


def running_sum(num_problems: int = PROBLEMS, problem_seed: int = SEED, **kwargs: Any):
    """Make running sums mod 10 of 32 digits."""
    return _docs("running-sum", None, num_problems, problem_seed)


def solved(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the whole answer is right. The answer starts at the first blank."""
    problem = Problem(doc["task"], doc["canvas"], doc["prompt_length"])
    text = doc["canvas"][: doc["canvas"].index("_")] + results[0]
    return {"solved": float(TASKS[doc["task"]].check(problem, text))}


def next_digit(num_problems: int = PROBLEMS, problem_seed: int = SEED, **kwargs: Any):
    """Make multiple-choice questions for the next digit of a running sum; answers have one token."""
    draw = random.Random(problem_seed)
    docs = []
    for problem in TASKS["running-sum"].make(num_problems, seed=problem_seed):
        digits = [int(c) for c in problem.prompt[1:-1]]
        sums = [sum(digits[: i + 1]) % 10 for i in range(len(digits))]
        known = draw.randrange(len(sums))
        docs.append(
            {
                "prompt": problem.prompt + "".join(map(str, sums[:known])),
                "choices": [str(d) for d in range(10)], "gold": sums[known],
            }
        )  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def which_sum(num_problems: int = PROBLEMS, problem_seed: int = SEED, **kwargs: Any):
    """Make additions with four candidate sums, each wrong one off by one digit; answers have 17 tokens."""
    draw = random.Random(problem_seed)
    docs = []
    for problem in TASKS["addition"].make(num_problems, seed=problem_seed):
        a, b = problem.prompt[1:-1].split("+")
        right = f"{int(a) + int(b):017d}"
        choices = [right]
        while len(choices) < 4:
            place, digit = draw.randrange(17), str(draw.randrange(10))
            wrong = right[:place] + digit + right[place + 1 :]
            if wrong not in choices:
                choices.append(wrong)
        draw.shuffle(choices)
        docs.append({"prompt": problem.prompt, "choices": choices, "gold": choices.index(right)})
    return {"test": Dataset.from_list(docs)}
