# SPDX-License-Identifier: Apache-2.0
"""Compare ways of decoding the demo's causal model, and diffusion with the masked model.

The causal model is decoded one token per forward, with a drafter, and self-speculatively (it drafts for itself). All
three give the same text. For this model a Sudoku is written as the puzzle, ``=``, and the solution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dlmkernels as dk

from . import CAUSAL_DIR, DRAFTER_DIR
from .tasks import TASKS, Problem, decode, encode

#: Decodes problems. Returns the decoding output and the filled-in canvases (see `tasks`).
Decoder = Callable[[list[Problem]], tuple[dk.DecodingOutput, list[str]]]
BATCH = 16  # problems decoded together
#: title, task and difficulty of each set of problems
SETS: tuple[tuple[str, str, int | None], ...] = (
    ("Sudoku, 60 clues", "sudoku", 60),
    ("16-digit addition", "addition", None),
    ("running sum of 32 digits", "running-sum", None),
)
ONE, DRAFTED, BY_ITSELF, DIFFUSION = "one token per forward", "with a drafter", "self-speculative", "diffusion"


@dataclass(frozen=True)
class Row:
    """Means over the problems of a set.

    Attributes
    ----------
    solved : float
        Fraction of problems whose whole answer is right.
    forwards : float
        Forwards of the model per problem, not counting those of a drafter.
    tokens_per_second : float
        Decoded tokens per second of wall-clock time, with up to `BATCH` problems at a time. For a Sudoku, diffusion
        decodes only the blanks; the causal model also copies the clues.
    """

    set: str
    how: str
    problems: int
    solved: float
    forwards: float
    tokens_per_second: float


def question(problem: Problem) -> Tensor:
    """Return the prompt of a problem for the causal model, token ids int64 `[P]`."""
    text = problem.canvas + "=" if problem.task == "sudoku" else problem.prompt
    return torch.from_numpy(encode(text))


def answered(problem: Problem, ids: Tensor) -> str:
    """Return the canvas that results from the causal model's answer, token ids int64 `[N]`."""
    given = problem.canvas[:1] if problem.task == "sudoku" else problem.prompt
    return given + decode(ids.tolist())


def load() -> tuple[Any, Any]:
    """Load the causal model, in float32 so that results are the same on every processor, and its drafter."""
    for folder in (CAUSAL_DIR, DRAFTER_DIR):
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"the demo's causal model or its drafter is not in {folder}: reinstall the package")
    model = dk.load(CAUSAL_DIR, dtype=torch.float32)
    return model, dk.load_drafter(DRAFTER_DIR, model)


def ways(drafter: Any) -> dict[str, dict[str, Any]]:
    """Return the ways to decode the causal model, as options of `generate` by name."""
    itself = {
        "rule": dk.SelfSpeculative(), "attention": "causal-context", "cache": "block", "seeded": True,
        "block_length": drafter.form.block_size,
    }  # fmt: skip
    return {ONE: {"rule": dk.NextToken()}, DRAFTED: {"drafter": drafter}, BY_ITSELF: itself}


def compare(masked: Any, count: int, seed: int, say: Callable[[str], None] = print) -> list[Row]:
    """Decode `count` held-out problems of each set in every way, and print the table row by row.

    `masked` is the demo's masked model, used for diffusion.
    """
    model, drafter = load()
    width = max(len(title) for title, *_ in SETS), max(map(len, (ONE, DRAFTED, BY_ITSELF, DIFFUSION)))
    say(f"{'task':<{width[0]}}  {'method':<{width[1]}}   solved  forwards  tokens/s")
    rows = []
    for title, name, difficulty in SETS:
        problems = TASKS[name].make(count, seed=seed, difficulty=difficulty)
        todo = {
            how: lambda part, options=options: answers(model, part, options) for how, options in ways(drafter).items()
        } | {DIFFUSION: lambda part: filled(masked, part)}  # fmt: skip
        for i, (how, decoded) in enumerate(todo.items()):
            row = measure(title, how, problems, decoded)
            say(f"{title if i == 0 else '':<{width[0]}}  {how:<{width[1]}}  {row.solved:6.1%}  {row.forwards:8.1f}  "
                f"{row.tokens_per_second:8.0f}")  # fmt: skip
            rows.append(row)
    return rows


def measure(title: str, how: str, problems: list[Problem], decoded: Decoder) -> Row:
    """Decode problems of one task, `BATCH` at a time, and check the answers against the rules of the task."""
    solved, forwards, tokens, seconds = 0, 0, 0, 0.0
    for first in range(0, len(problems), BATCH):
        part = problems[first : first + BATCH]
        start = time.perf_counter()
        out, texts = decoded(part)
        forwards, tokens = forwards + int(out.num_forwards.sum()), tokens + int(out.decoded.sum())
        seconds += time.perf_counter() - start
        solved += sum(TASKS[p.task].check(p, text) for p, text in zip(part, texts))
    n = len(problems)
    return Row(title, how, n, solved / n, forwards / n, tokens / seconds)


def answers(model: Any, problems: list[Problem], options: dict[str, Any]) -> tuple[dk.DecodingOutput, list[str]]:
    """Decode with the causal model. Returns its output, whose tokens include the end token, and the canvases."""
    ids = torch.stack([question(p) for p in problems]).to(model.device)
    longest = TASKS[problems[0].task].length - problems[0].prompt_length + 1
    out = dk.generate(model, ids, max_new_tokens=longest, **options)
    return out, [answered(p, row) for p, row in zip(problems, out.generated)]


def filled(masked: Any, problems: list[Problem]) -> tuple[dk.DecodingOutput, list[str]]:
    """Fill in the canvases with the masked model. Returns its output and the filled-in canvases."""
    ids = torch.stack([torch.from_numpy(p.ids) for p in problems]).to(masked.device)
    out = dk.infill(masked, ids)
    return out, [decode(row.tolist()) for row in out.sequences]


def markdown(rows: list[Row]) -> str:
    """Format the results as a Markdown table, with one row per method and one column per set."""
    titles, kinds = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("set", "how"))
    cell = {(r.how, r.set): f"{r.solved:.0%} · {r.forwards:.1f} · {r.tokens_per_second:.0f}" for r in rows}
    lines = [
        f"| solved, of {rows[0].problems} · forwards · tokens/s | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
        *(f"| {how} | {' | '.join(cell[how, title] for title in titles)} |" for how in kinds),
    ]
    return "\n".join([*lines, ""])
