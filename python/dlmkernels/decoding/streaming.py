# SPDX-License-Identifier: Apache-2.0
"""Follow a decoding while it runs: streamers, a function called after each step, and stop strings.

All of these read the canvas on the host, so every step waits for the device.
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

#: takes the open columns, bool `[S, T]`; returns the column up to which each row is final, int64 `[S]`
Finished = Callable[[Tensor], Tensor]


class Follower(Protocol):
    """Object that is notified when a program has begun, and after each of its steps."""

    def begin(self) -> None: ...

    def step(self) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """Argument of `generate`'s `on_step` callback after each step. All tensors are copies in CPU memory.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`: the canvas, which holds the prompts followed by the answers.
    is_open : Tensor
        bool `[B, T]`: positions that are still undecided.
    num_forwards : Tensor
        int32 `[B]`: number of forward passes that each request has taken part in.
    prompt_length : int
        Number of columns before the answers.
    """

    tokens: Tensor
    is_open: Tensor
    num_forwards: Tensor
    prompt_length: int


class Listeners:
    """Everything that follows the requests of a decoding: streamers, `on_step`, stop strings and a recorder.

    Parameters
    ----------
    streamers : sequence
        A streamer, or None, for each row.
    on_step : callable, optional
        Called with a `StepReport` after each step.
    stop_strings : sequence of str
        Texts that end an answer.
    tokenizer : optional
        Decodes tokens to find stop strings.
    records : bool
        Whether the decoding is recorded. The caller must then set `recorder`.
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
        #: by row, the column after the token that completes a stop string
        self.stops: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self.records or self.stop_strings or self.on_step or any(s is not None for s in self.streamers))

    def attend(self, state: State, start: int, ends: Sequence[int], finished: Finished, closes: bool) -> None:
        """Follow the decoding of a state whose answers begin at column `start` and end before columns `ends`.

        `closes` says whether a row that contains a stop string may be treated as done.
        """
        self._state, self._start, self._finished, self._closes = state, start, finished, closes
        self._ends = list(ends)
        rows = len(state.tokens)
        if not self.streamers:
            self.streamers = [None] * rows
        self._shown, self._has_ended = [start] * rows, [False] * rows

    def step(self, end: int, has_draft: bool) -> None:
        """Process the canvas after a step; `end` is the column after the last one that can be shown."""
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
        """Process the rest of the canvas after the last step; `end` is the column after its last one."""
        tokens = self._state.tokens[:, :end].to("cpu", copy=True)
        self._stop(tokens, [end] * len(tokens))
        for row, streamer in enumerate(self.streamers):
            if streamer is not None and not self._has_ended[row]:
                self._show(row, tokens, end)
                self._end(row)

    def _show(self, row: int, tokens: Tensor, end: int) -> None:
        """Pass the tokens before column `end` that it has not seen yet to a row's streamer."""
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
        """Search each row for stop strings, from the left, up to the column before which it is final."""
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
        """Return the result with everything after the stop strings replaced by padding."""
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
    """Mark a row as complete from a column on, so that nothing more is decoded there."""
    state.state[row, column:] = FROZEN
    state.commit_step[row, column:] = -1
    state.confidence[row, column:] = 0.0
    state.end[row] = column


class Stream:
    """Passes the decided tokens of a single request, from the left, to a streamer, or notifies all `Listeners`.

    It reads the canvas on the host, from column `start` on.
    """

    def __init__(self, streamer, state: State, start: int):
        self.streamer, self.state, self.start, self.shown = streamer, state, start, start
        if isinstance(streamer, Listeners) and streamer.recorder is not None:
            streamer.recorder.begin()

    def step(self, end: int, finished: int | None, has_draft: bool) -> None:
        """Process the canvas after a step; `end` is the column after its last one.

        Columns before `finished` are final. If None, this is the first open column.
        """
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
        """Process the rest of the canvas after the last step; `end` is the column after its last one."""
        if isinstance(self.streamer, Listeners):
            self.streamer.finish(end)
            return
        self._show(end)
        self.streamer.end()

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.streamer.put(self.state.tokens[0, self.shown : end].cpu())
            self.shown = end
