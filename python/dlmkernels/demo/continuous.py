# SPDX-License-Identifier: Apache-2.0
"""A continuous model at work: every token of an answer is a vector, which walks from noise to the vector of a token."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

import dlmkernels as dk

from . import LANGFLOW_DIR
from .tasks import TASKS, Problem, decode

#: Forwards of the decoding that is shown.
STEPS = 24
#: What is decoded: sums of digits, each of which needs the one before, so that the answer comes from left to right.
TASK = "running-sum"


@dataclass(frozen=True)
class Film:
    """A decoding as it went.

    Attributes
    ----------
    problem : Problem
    answers : list of str
        The likeliest tokens after each forward.
    solved : bool
        Whether the last of them are right.
    """

    problem: Problem
    answers: list[str]
    solved: bool


def load(folder: Path = LANGFLOW_DIR) -> Any:
    """The shipped continuous model, in float32 so that results are the same on every processor."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"the demonstration's continuous model is not in {folder}: reinstall the package")
    return dk.load(folder, dtype=torch.float32)


def film(model: Any, problem: Problem, steps: int = STEPS, seed: int = 0) -> Film:
    """Decode one problem of a task whose answer stands behind the question."""
    answers: list[str] = []
    ids = torch.from_numpy(problem.ids[: problem.prompt_length]).to(model.device)
    out = dk.generate(
        model, ids, max_new_tokens=len(problem.answer), steps=steps, seed=seed,
        on_step=lambda report: answers.append(decode(report.tokens[0, problem.prompt_length :].tolist())),
    )  # fmt: skip
    text = decode(out.sequences[0].tolist())
    return Film(problem, answers, TASKS[problem.task].check(problem, text))


def show(seed: int, out: TextIO = sys.stdout) -> Film:
    """Decode one problem, and show which tokens its vectors were nearest to after each forward."""
    model = load()
    shown = film(model, TASKS[TASK].make(1, seed=seed)[0], seed=seed)
    size = sum(p.numel() for p in model.parameters())
    out.write(
        f"A continuous model of {size:,} parameters: vectors walk out of noise, and these are the tokens they are\n"
        f"nearest to, as the model reads them. Running sums of {shown.problem.prompt[1:-1]}:\n"
    )
    if out.isatty() and os.environ.get("TERM") != "dumb":
        play(shown, out, colour="NO_COLOR" not in os.environ)
    else:
        out.write(frames(shown) + "\n")
    out.write(f"{len(shown.answers)} forwards, {'solved' if shown.solved else 'not solved'}\n")
    out.flush()
    return shown


def frames(film: Film) -> str:
    """The answers as plain text, a line for each forward after which they were others than before."""
    lines, last = [], ""
    for number, answer in enumerate(film.answers, start=1):
        if answer != last:
            lines.append(f"{f'forward {number}':>12}  {answer}")
        last = answer
    return "\n".join(lines)


def play(film: Film, out: TextIO = sys.stdout, frames_per_second: float = 8.0, colour: bool = True) -> None:
    """Redraw the answer in place after each forward; tokens that have just changed are shown inverted."""
    last = film.answers[0]
    for number, answer in enumerate(film.answers, start=1):
        shown = "".join(
            f"\033[7m{token}\033[0m" if colour and token != before else token for token, before in zip(answer, last)
        )
        out.write(f"\r{f'forward {number}':>12}  {shown}\033[K")
        out.flush()
        last = answer
        time.sleep(1 / frames_per_second)
    out.write(f"\r{f'forward {len(film.answers)}':>12}  {last}\033[K\n")
