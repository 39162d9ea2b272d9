# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way to a streamer while a request is decoded."""

from __future__ import annotations

from .state import State


class Stream:
    """Hands a streamer the one request's tokens, from the left as far as they are decided.

    It reads the canvas on the host: the columns from `start` on.
    """

    def __init__(self, streamer, state: State, start: int):
        self.streamer, self.state, self.start, self.shown = streamer, state, start, start

    def step(self, end: int, finished: int | None, has_draft: bool) -> None:
        """After a step, with `end` the column after the last; `finished`: up to where, None: to the first open one."""
        if has_draft and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self.state.tokens[0, self.start : end].cpu())
        if finished is None:
            still_open = self.state.is_open[0, :end].nonzero()
            finished = int(still_open[0]) if len(still_open) else end
        self._show(min(finished, end))

    def finish(self, end: int) -> None:
        """After the last step: all the rest."""
        self._show(end)
        self.streamer.end()

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.streamer.put(self.state.tokens[0, self.shown : end].cpu())
            self.shown = end
