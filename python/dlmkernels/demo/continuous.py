# SPDX-License-Identifier: Apache-2.0
"""Show a continuous diffusion model: each Sudoku cell is a vector that moves from noise to the embedding of a digit."""

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
from .tasks import MASK, MASK_ID, TASKS, Problem, decode

SUDOKU = TASKS["sudoku"]
#: Number of forwards in the decoding that is shown, and number of given cells.
STEPS, CLUES = 24, 64


@dataclass(frozen=True)
class Film:
    """A recorded decoding.

    Attributes
    ----------
    problem : Problem
    boards : list of str
        The canvas (prompt and answer) after each forward, with the currently most likely digit in every open cell.
    solved : bool
        Whether the last board is a correct solution.
    """

    problem: Problem
    boards: list[str]
    solved: bool


def load(folder: Path = LANGFLOW_DIR) -> Any:
    """Load the shipped continuous model, in float32 so that results are the same on every processor."""
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"the demo's continuous model is not in {folder}: reinstall the package")
    return dk.load(folder, dtype=torch.float32)


def film(model: Any, problem: Problem, steps: int = STEPS, seed: int = 0) -> Film:
    """Decode one Sudoku and record the board after every forward."""
    ids = torch.from_numpy(problem.ids).to(model.device)
    start, boards = problem.prompt_length, []
    dk.generate(
        model, ids[:start], given=ids[start:].masked_fill(ids[start:] == MASK_ID, -1), max_new_tokens=len(ids) - start,
        steps=steps, seed=seed, on_step=lambda report: boards.append(decode(report.tokens[0].tolist())),
    )  # fmt: skip
    return Film(problem, boards, SUDOKU.check(problem, boards[-1]))


def show(seed: int, out: TextIO | None = None) -> Film:
    """Decode one Sudoku and show the most likely digits after each forward."""
    out = sys.stdout if out is None else out
    model = load()
    shown = film(model, SUDOKU.make(1, seed=seed, difficulty=CLUES)[0], seed=seed)
    size = sum(p.numel() for p in model.parameters())
    out.write(
        f"Continuous model, {size:,} parameters: it turns all open cells from noise into digits at the same time\n"
    )
    if out.isatty() and os.environ.get("TERM") != "dumb":
        play(shown, out, colour="NO_COLOR" not in os.environ)
    else:
        out.write(frames(shown) + "\n")
    out.write(
        f"Sudoku with {CLUES} clues: {len(shown.boards)} forwards, {'solved' if shown.solved else 'not solved'}\n"
    )
    out.flush()
    return shown


def frames(film: Film) -> str:
    """Return the first, a middle and the last board as plain text, side by side."""
    last = len(film.boards) - 1
    columns = [_lines(film, number) for number in sorted({0, last // 2, last})]
    return "\n".join("   ".join(f"{cell:<29}" for cell in row).rstrip() for row in zip(*columns))


def play(film: Film, out: TextIO, frames_per_second: float = 6.0, colour: bool = True) -> None:
    """Redraw the board in place after each forward; digits that have just changed are shown inverted."""
    for number in range(len(film.boards)):
        lines = _lines(film, number, colour)
        out.write((f"\033[{len(lines)}A" if number else "") + "".join(f"\r{line}\033[K\n" for line in lines))
        out.flush()
        time.sleep(1 / frames_per_second)


def _lines(film: Film, number: int, colour: bool = False) -> list[str]:
    """Return a caption and the board after forward `number` as lines. With `colour`, given digits are bold."""
    board, before = film.boards[number], film.boards[max(number - 1, 0)]
    open_cells = [i for i, c in enumerate(film.problem.canvas) if c == MASK]
    final = sum(board[i] == film.boards[-1][i] for i in open_cells)
    caption = f"forward {number + 1}: {final} of {len(open_cells)} final"
    lines = SUDOKU.render(board).splitlines()
    if not colour:
        return [caption, *lines]
    cells = iter(range(1, len(board)))
    painted = []
    for line in lines:
        text = ""
        for c in line:
            if c.isdigit():
                cell = next(cells)
                code = "1" if film.problem.canvas[cell] != MASK else "7" if board[cell] != before[cell] else "32"
                c = f"\033[{code}m{c}\033[0m"
            text += c
        painted.append(text)
    return [caption, *painted]
