# SPDX-License-Identifier: Apache-2.0
"""Separate end tokens for each request, so that requests with different end tokens can share forward passes.

`ops.remask_` takes one list of end tokens for all rows. If rows differ, their end tokens are a tensor of the state, and
the functions below implement with tensor operations what the op does with the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops

OPEN, FROZEN, DIRTY = ops.STATE_OPEN, ops.STATE_FROZEN, ops.STATE_DIRTY
#: name of this tensor among the parameters of a state
ENDS = "eos_token_id"
#: filler for rows with fewer end tokens than others: neither a token id nor -1, which means "no proposal"
NO_TOKEN = -2


def own_ends(ids: Any) -> tuple[tuple[int, ...], ...] | None:
    """Return the end tokens of each request, from a configuration's `eos_token_id`; None if all have the same."""
    return ids if isinstance(ids, tuple) and any(isinstance(own, tuple) for own in ids) else None


def end_ids(ids: Any) -> list[int]:
    """Return all end tokens in a configuration's `eos_token_id`, of any request."""
    own = own_ends(ids)
    if own is not None:
        return list(dict.fromkeys(token for ends in own for token in ends))
    return [ids] if isinstance(ids, int) else list(ids)


class Canvas(Protocol):
    """The attributes of a `State` that are read and written here."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def state(self) -> Tensor: ...
    @property
    def commit_step(self) -> Tensor: ...
    @property
    def confidence(self) -> Tensor: ...


def end_table(ids: Sequence[Sequence[int]], device: torch.device, width: int | None = None) -> Tensor:
    """Return the end tokens of each request, int64 `[B, E]`, padded with `NO_TOKEN` to E = `width` or as needed."""
    width = max([1, *(len(own) for own in ids)]) if width is None else width
    rows = [[*own, *[NO_TOKEN] * (width - len(own))] for own in ids]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(ids), width).to(device)


def is_end(tokens: Tensor, ends: Tensor) -> Tensor:
    """Return which of the tokens int64 `[B, W]` are among the end tokens `ends` `[B, E]` of their row."""
    return (tokens[:, :, None] == ends[:, None, :]).any(2)


def end_rows(state: Canvas, info: Tensor, ends: Tensor, end: Tensor, pad: int | None) -> None:
    """Process end tokens as `ops.remask_` does, with separate end tokens `ends` int64 `[S, E]` for each row.

    The end of a request is its first end token that is decided and not followed by a given token. If `pad` is not None,
    everything after the end becomes `pad` in rows without an open position before the end. Columns from `end` int32
    `[S]` on are ignored. `info` int32 `[S, 9]` is the result of the op, called without end tokens. Its columns for open
    positions, the end and completeness are updated, and the padding is added to its count of changed tokens.
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
