# SPDX-License-Identifier: Apache-2.0
"""Record a decoding step by step, by comparing the state after each step with the state before it.

The state is copied to the host after each step, so every step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..trace import Event, Recording
from .output import DecodingOutput
from .programs import Program
from .state import State


@dataclass(frozen=True)
class _Row:
    """State of one request on the host, as lists of length T."""

    tokens: list[int]
    is_open: list[bool]
    committed: list[int]
    confidence: list[float]

    @classmethod
    def all_of(cls, state: State) -> list[_Row]:
        fields = (state.tokens, state.is_open, state.commit_step, state.confidence)
        return [cls(*row) for row in zip(*(x.cpu().tolist() for x in fields))]

    def moved(self, source: list[int], mask: int) -> _Row:
        """Return a copy with moved positions: each takes the values of position `source`, or a new mask token at -1."""

        def of(values: list, new: Any) -> list:
            return [values[i] if i >= 0 else new for i in source]

        return _Row(of(self.tokens, mask), of(self.is_open, True), of(self.committed, -1), of(self.confidence, 0.0))


class Recorder:
    """Records the events of a program. Must be created before the program begins."""

    def __init__(self, program: Program):
        self._state, self._mask = program.state, program.special.mask
        self._rows: list[_Row] = []
        self._taken: list[int] = []
        self._events: list[list[Event]] = []
        self._moves: list[Tensor] = []
        self._begun: tuple[Tensor, Tensor] | None = None
        self._blocks = [
            tuple(range(first, min(end, last), program.grid.length))
            for first, end, last in zip(
                program.grid.first.tolist(), program.grid.ends.tolist(), program.grid.asked.tolist()
            )
        ]
        program.on_move = lambda source: self._moves.append(source.cpu())

    def begin(self) -> None:
        """Record the start. Some programs have then already committed the first token of each answer."""
        state = self._state
        self._rows, self._taken = _Row.all_of(state), state.step.tolist()
        committed = (state.commit_step >= 0).cpu()
        tokens = torch.where(committed, self._mask, state.tokens.cpu())
        self._begun = tokens, state.is_open.cpu() | committed
        self._events = [
            [Event(row.committed[p], "commit", p, row.tokens[p], row.confidence[p]) for p in here]
            for row, here in zip(self._rows, (x.nonzero().flatten().tolist() for x in committed))
        ]

    def step(self) -> None:
        """Record what the last step has changed."""
        moves, self._moves = [source.tolist() for source in self._moves], []
        now, taken = _Row.all_of(self._state), self._state.step.tolist()
        for row, (before, after) in enumerate(zip(self._rows, now)):
            forward = max(taken[row] - 1, 0)
            events = self._events[row]
            for source in moves:
                before = _move(before, source[row], forward, self._mask, events)
            events += _differences(before, after, forward)
        self._rows, self._taken = now, taken

    def recorded(self, out: DecodingOutput) -> DecodingOutput:
        """Return the result with the recording added."""
        assert self._begun is not None, "the program has not begun"
        events = tuple(tuple(row) for row in self._events)
        return replace(out, recording=Recording(*self._begun, events, tuple(self._blocks), self._mask))


def _move(before: _Row, source: list[int], forward: int, mask: int, events: list[Event]) -> _Row:
    """Move the positions of a row. Removals, from right to left, and then insertions are appended to `events`."""
    if source == list(range(len(source))):
        return before
    kept = set(source)
    removed = [p for p in range(len(source)) if p not in kept]
    events += [Event(forward, "remove", p, before.tokens[p]) for p in reversed(removed)]
    events += [Event(forward, "insert", p, mask) for p, old in enumerate(source) if old < 0]
    return before.moved(source, mask)


def _differences(before: _Row, after: _Row, forward: int) -> list[Event]:
    """Return the events that turn the state `before` into `after`, position by position."""
    if before == after:
        return []
    found = []
    for position, token in enumerate(after.tokens):
        changed = token != before.tokens[position]
        was_open, is_open = before.is_open[position], after.is_open[position]
        if is_open:
            kind = "renoise" if was_open else "remask"
            if changed or not was_open:
                found.append(Event(forward, kind, position, token))
        elif was_open or changed:
            by_step = after.committed[position] >= 0
            kind = ("commit" if was_open else "edit") if by_step else "fill"
            found.append(Event(forward, kind, position, token, after.confidence[position] if by_step else 0.0))
    return found
