# SPDX-License-Identifier: Apache-2.0
"""What is done with a decoding while it goes on: streamers, a function that is called after each step, stop strings.

All of it reads the canvas on the host, so that each step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .output import DecodingOutput
from .state import FROZEN, State
from .stops import stop_at

#: up to which column each row is final, int64 `[S]`, of which columns are open, bool `[S, T]`
Finished = Callable[[Tensor], Tensor]


class Follower(Protocol):
    """Who is told that a program has begun, and of each of its steps."""

    def begin(self) -> None: ...

    def step(self) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What `on_step` of `generate` is given after each step; copies, in CPU memory.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`: the canvas.
    is_open : Tensor
        bool `[B, T]`: where nothing has been decided yet.
    num_forwards : Tensor
        int32 `[B]`: forwards that each request has taken part in.
    prompt_length : int
        Columns before the first of the answers.
    """

    tokens: Tensor
    is_open: Tensor
    num_forwards: Tensor
    prompt_length: int


class Listeners:
    """All who follow the requests of a decoding.

    Parameters
    ----------
    streamers : sequence
        One for each row, or None for those that have none.
    on_step : callable, optional
        Takes a `StepReport`.
    stop_strings : sequence of str
        Texts that end an answer.
    tokenizer : optional
        Makes text of tokens.
    records : bool
        Whether a recorder follows, which whoever equips the program sets.
    """

    def __init__(
        self, streamers: Sequence[Any] = (), on_step: Callable[[StepReport], Any] | None = None,
        stop_strings: Sequence[str] = (), tokenizer=None, records: bool = False,
    ):  # fmt: skip
        self.records = records
        self.recorder: Follower | None = None
        self.streamers, self.on_step = list(streamers), on_step
        self.stop_strings, self.tokenizer = tuple(stop_strings), tokenizer
        self._state: State
        self._start = 0
        self._finished: Finished
        self._closes = False
        self._ends: list[int] = []
        self._shown: list[int] = []
        self._has_ended: list[bool] = []
        #: column behind the token that completes a stop string, by row
        self.stops: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self.records or self.stop_strings or self.on_step or any(s is not None for s in self.streamers))

    def attend(self, state: State, start: int, ends: Sequence[int], finished: Finished, closes: bool) -> None:
        """Follow the decoding of a state whose answers begin at column `start`, and end before those columns.

        `closes`: whether a row that has come to a stop string may be taken as done.
        """
        self._state, self._start, self._finished, self._closes = state, start, finished, closes
        self._ends = list(ends)
        rows = len(state.tokens)
        if not self.streamers:
            self.streamers = [None] * rows
        self._shown, self._has_ended = [start] * rows, [False] * rows

    def step(self, end: int, has_draft: bool) -> None:
        """After a step, with `end` the column after the last that can be shown."""
        state = self._state
        if self.recorder is not None:
            self.recorder.step()
        is_open = state.is_open
        finished = self._finished(is_open).tolist()
        tokens = state.tokens[:, :end].to("cpu", copy=True)
        self._stop(tokens, [min(column, end) for column in finished])
        for row, streamer in enumerate(self.streamers):
            if streamer is None or self._has_ended[row]:
                continue
            if has_draft and hasattr(streamer, "put_draft"):
                streamer.put_draft(tokens[row, self._start :])
            self._show(row, tokens, min(finished[row], end))
        if self.on_step is not None:
            self.on_step(StepReport(tokens, is_open[:, :end].cpu(), state.step.to("cpu", copy=True), self._start))

    def finish(self, end: int) -> None:
        """After the last step: all the rest."""
        tokens = self._state.tokens[:, :end].to("cpu", copy=True)
        self._stop(tokens, [end] * len(tokens))
        for row, streamer in enumerate(self.streamers):
            if streamer is not None and not self._has_ended[row]:
                self._show(row, tokens, end)
                self._end(row)

    def _show(self, row: int, tokens: Tensor, end: int) -> None:
        """Hand a row's streamer what is final up to column `end`."""
        end = min(end, self._ends[row], self.stops.get(row, end))
        if end > self._shown[row]:
            self.streamers[row].put(tokens[row, self._shown[row] : end])
            self._shown[row] = end
        if row in self.stops:
            self._end(row)

    def _end(self, row: int) -> None:
        self._has_ended[row] = True
        self.streamers[row].end()

    def _stop(self, tokens: Tensor, finished: Sequence[int]) -> None:
        """Look for stop strings in what is final, from the left."""
        if not self.stop_strings:
            return
        for row, end in enumerate(finished):
            if row in self.stops or end <= self._start:
                continue
            found = stop_at(tokens[row, self._start : end].tolist(), self.stop_strings, self.tokenizer)
            if found is not None:
                self.stops[row] = self._start + found
                if self._closes:
                    close(self._state, row, self.stops[row])

    def cut(self, out: DecodingOutput, pad: int) -> DecodingOutput:
        """The result without what stands behind the stop strings."""
        if not self.stops:
            return out
        end = torch.full_like(out.length, out.sequences.shape[1])
        for row, column in self.stops.items():
            end[row] = column
        behind = torch.arange(out.sequences.shape[1], device=end.device) >= end[:, None]
        has_stop = end < out.sequences.shape[1]
        return replace(
            out, sequences=out.sequences.masked_fill(behind, pad), commit_step=out.commit_step.masked_fill(behind, -1),
            confidence=out.confidence.masked_fill(behind, 0.0), length=torch.minimum(out.length, end),
            complete=out.complete | has_stop, stop_strings=self.stop_strings,
        )  # fmt: skip


def close(state: State, row: int, column: int) -> None:
    """Let a row have nothing to decode from a column on."""
    state.state[row, column:] = FROZEN
    state.commit_step[row, column:] = -1
    state.confidence[row, column:] = 0.0
    state.end[row] = column


class Stream:
    """Hands a streamer the one request's tokens, from the left as far as they are decided; or all `Listeners` theirs.

    It reads the canvas on the host: the columns from `start` on.
    """

    def __init__(self, streamer, state: State, start: int):
        self.streamer, self.state, self.start, self.shown = streamer, state, start, start
        if isinstance(streamer, Listeners) and streamer.recorder is not None:
            streamer.recorder.begin()

    def step(self, end: int, finished: int | None, has_draft: bool) -> None:
        """After a step, with `end` the column after the last; `finished`: up to where, None: to the first open one."""
        if isinstance(self.streamer, Listeners):
            self.streamer.step(end, has_draft)
            return
        if has_draft and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self.state.tokens[0, self.start : end].cpu())
        if finished is None:
            still_open = self.state.is_open[0, :end].nonzero()
            finished = int(still_open[0]) if len(still_open) else end
        self._show(min(finished, end))

    def finish(self, end: int) -> None:
        """After the last step: all the rest."""
        if isinstance(self.streamer, Listeners):
            self.streamer.finish(end)
            return
        self._show(end)
        self.streamer.end()

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.streamer.put(self.state.tokens[0, self.shown : end].cpu())
            self.shown = end
