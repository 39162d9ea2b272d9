# SPDX-License-Identifier: Apache-2.0
"""Problems from the generators of reasoning-gym, scored by its own functions."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from datasets import Dataset

PROBLEMS, SEED = 100, 42
INSTRUCTION = (
    "Solve the problem step by step. Give the final answer alone between <answer> and </answer>.\n\n"
)  # fmt: skip


@lru_cache
def _generator(name: str, num_problems: int, problem_seed: int):
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError("tasks gym_* need reasoning-gym: pip install 'dlmkernels[eval]'") from None
    return reasoning_gym.create_dataset(name, size=num_problems, seed=problem_seed)


def load(generator: str, num_problems: int = PROBLEMS, problem_seed: int = SEED, **kwargs: Any):
    """Return problems of a generator, determined by the arguments."""
    entries = [_generator(generator, num_problems, problem_seed)[i] for i in range(num_problems)]
    docs = [
        {
            "generator": generator, "question": entry["question"], "answer": str(entry["answer"]),
            "entry": json.dumps(entry, default=_number),
        }
        for entry in entries
    ]  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def prompt(doc: dict[str, Any]) -> str:
    """Return the question, preceded by the instruction for how to answer."""
    return f"{INSTRUCTION}{doc['question']}\n"


def scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return `score` (the generator's), `solved` (full score) and `answered` (the answer has the requested format).

    Without an answer in that format, the last non-empty line is scored. Comparing `solved` with `answered` thus tells
    a model that ignores the format from one that does not solve the problems.
    """
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(results[0])
    lines = [line.strip() for line in results[0].splitlines() if line.strip()]
    said = answer if answer is not None else lines[-1] if lines else ""
    score = float(get_score_answer_fn(doc["generator"])(said, json.loads(doc["entry"])))
    return {"score": score, "solved": float(score >= 1), "answered": float(answer is not None)}
