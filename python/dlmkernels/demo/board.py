# SPDX-License-Identifier: Apache-2.0
"""Show how a Sudoku is unmasked: animated in a terminal, as plain text, or as a picture."""

from __future__ import annotations

import sys
import time
from os import PathLike
from typing import TextIO

from ..trace import Trace
from .tasks import MASK, MASK_ID, TASKS, decode

SUDOKU = TASKS["sudoku"]
# terminal color codes: decided cells from least to most confident; given cells, open cells, cells just decided
SHADES, GIVEN, OPEN, FRESH = (130, 136, 142, 106, 70, 34), "1", "2", "7"


def play(trace: Trace, frames_per_second: float = 2.5, colour: bool = True, out: TextIO = sys.stdout) -> None:
    """Redraw the board in place after each forward; cells that the forward decided are shown inverted."""
    steps = int(trace.commit_step[0].max()) + 1
    height = 0
    for step in range(-1, steps + 1):  # the extra frame at the end inverts no cell
        shown = min(step, steps - 1)
        lines = [*_coloured(trace, shown, step, colour), _caption(trace, shown)]
        out.write((f"\033[{height}A" if height else "") + "".join(f"\r{line}\033[K\n" for line in lines))
        out.flush()
        height = len(lines)
        if step < steps:
            time.sleep(1 / frames_per_second)


def frames(trace: Trace) -> str:
    """Return the board at the start, in the middle and at the end as plain text, side by side."""
    last = int(trace.commit_step[0].max())
    steps = sorted({-1, (last - 1) // 2, last})
    columns = [[_caption(trace, step), *SUDOKU.render(_text(trace, step)).splitlines()] for step in steps]
    return "\n".join("   ".join(f"{cell:<23}" for cell in row).rstrip() for row in zip(*columns))


def plot(trace: Trace, path: str | PathLike) -> None:
    """Save a PNG of the solved board, with each cell colored by the forward that decided it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = trace.commit_step[0, 1:].cpu().numpy().reshape(9, 9)
    text = _text(trace, int(steps.max()))[1:]
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow((steps + 1) * 1.0, cmap="viridis_r", vmin=1, alpha=(steps >= 0) * 0.85)
    bright = (steps + 1) > 0.6 * (steps.max() + 1)
    for i, digit in enumerate(text):
        r, c = divmod(i, 9)
        given = steps[r, c] < 0
        axes.text(c, r, digit, ha="center", va="center", fontsize=13, weight="bold" if given else "normal",
                  color="white" if bright[r, c] and not given else "black")  # fmt: skip
    for i in range(10):
        width = 1.8 if i % 3 == 0 else 0.4
        axes.axhline(i - 0.5, color="black", lw=width)
        axes.axvline(i - 0.5, color="black", lw=width)
    axes.set(xticks=[], yticks=[], title="Bold: given. Color: the forward that decided the cell")
    axes.title.set_fontsize(10)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="forward", ticks=MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


def _text(trace: Trace, step: int) -> str:
    return decode(trace.canvas_at(step, MASK_ID)[0].tolist())


def _caption(trace: Trace, step: int) -> str:
    text = _text(trace, step)
    if step < 0:
        return f"start: {text.count(MASK)} open"
    return f"after forward {step + 1}: {text.count(MASK)} open"


def _coloured(trace: Trace, step: int, fresh: int, colour: bool) -> list[str]:
    """Render the board after forward `step` with colored digits; cells decided in forward `fresh` are inverted."""
    text = _text(trace, step)
    lines = SUDOKU.render(text).splitlines()
    if not colour:
        return lines
    commit, confidence = trace.commit_step[0].tolist(), trace.confidence[0].tolist()
    cell, painted = 1, []
    for line in lines:
        out = ""
        for c in line:
            if c.isdigit() or c == "·":
                if c == "·":
                    code = OPEN
                elif commit[cell] < 0:
                    code = GIVEN
                else:
                    shade = SHADES[min(int(confidence[cell] * len(SHADES)), len(SHADES) - 1)]
                    code = f"38;5;{shade}" + (f";{FRESH}" if commit[cell] == fresh else "")
                c = f"\033[{code}m{c}\033[0m"
                cell += 1
            out += c
        painted.append(out)
    return painted
