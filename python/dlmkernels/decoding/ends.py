# SPDX-License-Identifier: Apache-2.0
"""End tokens of each request's own, so that requests that end at different tokens can share forwards.

`ops.remask_` takes one list of end tokens for all rows. Where rows differ, theirs are a tensor of the state, and what
follows does in plain tensor operations what the op does with the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops

OPEN, FROZEN, DIRTY = ops.STATE_OPEN, ops.STATE_FROZEN, ops.STATE_DIRTY
#: what the tensor is called among the parameters of a state
ENDS = "eos_token_id"
#: what stands where a row has fewer end tokens than another: neither a token nor -1, which is "no proposal"
NO_TOKEN = -2


def own_ends(ids: Any) -> tuple[tuple[int, ...], ...] | None:
    """End tokens of each request, where a configuration's `eos_token_id` has them; None where all have the same."""
    return ids if isinstance(ids, tuple) and any(isinstance(own, tuple) for own in ids) else None


def end_ids(ids: Any) -> list[int]:
    """All end tokens that a configuration's `eos_token_id` names, of any request."""
    own = own_ends(ids)
    if own is not None:
        return list(dict.fromkeys(token for ends in own for token in ends))
    return [ids] if isinstance(ids, int) else list(ids)


class Canvas(Protocol):
    """What is read and written here of a `State`."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def state(self) -> Tensor: ...
    @property
    def commit_step(self) -> Tensor: ...
    @property
    def confidence(self) -> Tensor: ...


def end_table(ids: Sequence[Sequence[int]], device: torch.device, width: int | None = None) -> Tensor:
    """End tokens of each request, int64 `[B, E]`, with `NO_TOKEN` behind them; E is `width`, or what is needed."""
    width = max([1, *(len(own) for own in ids)]) if width is None else width
    rows = [[*own, *[NO_TOKEN] * (width - len(own))] for own in ids]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(ids), width).to(device)


def is_end(tokens: Tensor, ends: Tensor) -> Tensor:
    """Which of the tokens int64 `[B, W]` are end tokens of their row, of which there are `ends` `[B, E]`."""
    return (tokens[:, :, None] == ends[:, None, :]).any(2)


def end_rows(state: Canvas, info: Tensor, ends: Tensor, end: Tensor, pad: int | None) -> None:
    """What `ops.remask_` does about end tokens, with end tokens `ends` int64 `[S, E]` of each row's own.

    It finds the end of each request, which is the first of its end tokens that is decided and has nothing given behind
    it. With a `pad`, what stands behind it becomes that in rows in which nothing before it is open. Columns from `end`
    int32 `[S]` on do not count. `info` int32 `[S, 9]` is what the op has returned, called without end tokens; its
    columns of what is open, of the end and of completeness are brought up to date, and that of changed tokens grows by
    those of the padding.
    """
    width = state.tokens.shape[1]
    column = torch.arange(width, dtype=torch.int32, device=ends.device)
    inside = column < end[:, None]
    bits = state.state & (OPEN | FROZEN)
    given = torch.where(inside & (bits >= FROZEN), column, -1).amax(1, keepdim=True)
    ending = is_end(state.tokens, ends) & (bits == 0) & inside & (column > given)
    first = torch.where(ending, column, width).amin(1, keepdim=True)
    if pad is not None:
        first_open = torch.where(inside & (bits == OPEN), column, width).amin(1, keepdim=True)
        fills = (first < width) & (first_open > first)
        tail = fills & (column > first) & inside
        changes = tail & (state.tokens != pad)
        state.tokens.masked_fill_(tail, pad)
        closed = torch.where(tail, state.state & ~OPEN, state.state)
        state.state.copy_(torch.where(changes, closed | DIRTY, closed))
        state.commit_step.masked_fill_(tail, -1)
        state.confidence.masked_fill_(tail, 0.0)
        for name, value in (("open_window", 0), ("open", 0), ("prefix", width), ("done", 1)):
            info[:, _column(name)].masked_fill_(fills[:, 0], value)
        info[:, _column("changed")].add_(changes.sum(1, dtype=torch.int32))
    info[:, _column("first_eos")].copy_(torch.where(first < width, first, -1)[:, 0])


def _column(name: str) -> int:
    return ops.INFO_FIELDS.index(name)
