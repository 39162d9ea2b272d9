# SPDX-License-Identifier: Apache-2.0
"""Problems that reasoning-gym's generators make, scored by their own functions."""

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
    """Problems of a generator, the same for the same numbers."""
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
    """The question, with what says how to answer."""
    return f"{INSTRUCTION}{doc['question']}\n"


def scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The generator's own score; whether it is full; and whether there was an answer in the form asked for.

    Where there is none, what is scored is the last line that is not empty, so that a model that solves problems and
    ignores the form is told from one that does not solve them: compare `solved` with `answered`.
    """
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(results[0])
    lines = [line.strip() for line in results[0].splitlines() if line.strip()]
    said = answer if answer is not None else lines[-1] if lines else ""
    score = float(get_score_answer_fn(doc["generator"])(said, json.loads(doc["entry"])))
    return {"score": score, "solved": float(score >= 1), "answered": float(answer is not None)}
