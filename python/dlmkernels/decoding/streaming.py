# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way to a streamer while a request advances by itself."""

from __future__ import annotations

from torch import Tensor

from .canvas import Canvas


class Stream:
    """Hands a streamer the one request's tokens, from the left as far as they are decided; without one, does nothing.

    It reads the canvas on the host: the columns from `start` on.
    """

    def __init__(self, streamer, canvas: Canvas, start: int):
        self.streamer, self.canvas, self.start, self.shown = streamer, canvas, start, start

    def step(self, end: int | Tensor) -> None:
        """After a forward, with `end` the column after the last, or one for each row."""
        if self.streamer is None:
            return
        last = self._column(end)
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self.canvas.tokens[0, self.start : last].cpu())
        still_open = self.canvas.is_open[0, :last].nonzero()
        self._show(int(still_open[0]) if len(still_open) else last)

    def finish(self, end: int | Tensor) -> None:
        """After the last forward: all the rest."""
        if self.streamer is None:
            return
        self._show(self._column(end))
        self.streamer.end()

    @staticmethod
    def _column(end: int | Tensor) -> int:
        return int(end[0]) if isinstance(end, Tensor) else end

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.streamer.put(self.canvas.tokens[0, self.shown : end].cpu())
            self.shown = end
