# SPDX-License-Identifier: Apache-2.0
"""Which token was committed when, and how sure the model was: as numbers, as text, as a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

from torch import Tensor


@dataclass(frozen=True)
class Trace:
    """History of a decoding.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`, the finished canvas.
    commit_step : Tensor
        int32 `[B, T]`, -1 for tokens that were given, for masks that are left and for padding.
    confidence : Tensor
        float32 `[B, T]`.
    prompt_length : int
        Columns before the first decoded one.
    """

    tokens: Tensor
    commit_step: Tensor
    confidence: Tensor
    prompt_length: int = 0

    def canvas_at(self, step: int, mask_token_id: int) -> Tensor:
        """The canvas after forward number `step` (from 0; -1: before the first), int64 `[B, T]`.

        What no forward has committed, padding after an end token too, is there from the start.
        """
        return self.tokens.masked_fill(self.commit_step > step, mask_token_id)

    def order(self, row: int = 0) -> list[list[int]]:
        """Canvas positions of one row in the order of their commitment, one list a forward."""
        steps = self.commit_step[row].tolist()
        return [[p for p, s in enumerate(steps) if s == i] for i in range(max(steps, default=-1) + 1)]

    def text(self, decode: Callable[[list[int]], str], mask_token_id: int, row: int = 0) -> str:
        """One line a forward: the generated part as it stood, masks included; `decode` maps ids to a string."""
        lines = []
        for step in range(-1, int(self.commit_step[row].max()) + 1):
            canvas = self.canvas_at(step, mask_token_id)[row, self.prompt_length :]
            lines.append(f"{step + 1:4d}  {decode(canvas.tolist())}")
        return "\n".join(lines)

    def plot(self, path: str | PathLike, row: int = 0) -> None:
        """Save a PNG: position against the forward that committed it, coloured by confidence (needs matplotlib)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = self.commit_step[row].cpu()
        decided = (steps >= 0).nonzero().flatten()
        figure = Figure(figsize=(max(6.0, len(decided) / 12), 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        dots = axes.scatter(decided - self.prompt_length, steps[decided], c=self.confidence[row].cpu()[decided],
                            cmap="viridis", vmin=0, vmax=1, s=28)  # fmt: skip
        axes.set(xlabel="position", ylabel="forward", title="When each token was committed")
        axes.invert_yaxis()
        figure.colorbar(dots, label="confidence")
        figure.savefig(path, dpi=120)
