# SPDX-License-Identifier: Apache-2.0
"""Specification of `splice_` in plain torch."""

import torch
from torch import Tensor

from .remask import STATE_DIRTY, STATE_FROZEN, STATE_OPEN
from .rows import per_row

_INT32_MAX = torch.iinfo(torch.int32).max


def splice_(
    tokens: Tensor,
    start: Tensor,
    *,
    insert: Tensor | None = None,
    remove: Tensor | None = None,
    length: Tensor | None = None,
    end: Tensor | None = None,
    state: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    fill_token_id: int = -1,
    pad_token_id: int = -1,
) -> tuple[Tensor, Tensor]:
    """Insert positions before the slots of a window, and remove others.

    Slot w is position start + w; a start of -1 leaves the row unchanged. Slots below n = length (or end, by default T)
    are positions; the slot at n can only be inserted at; slots above n are ignored, and a frozen position is not
    removed. The content of [start, n), after insertions and removals, is written from start on:

    - With length, all of it. The length becomes n + inserted - removed, and positions from there to n become padding:
      `pad_token_id`, frozen. If the new length exceeds T, nothing is done and the excess is reported.
    - Without length, as much as [start, n) holds. The rest is dropped and its number reported, or the span is filled up
      with new positions.

    A new position holds `fill_token_id` and is open; new positions and padding have step -1 and confidence 0. Other
    content keeps its state and records when it moves, except for the dirty bit: a position is dirty if it was dirty
    before or if its token changed.
    """
    B, T = tokens.shape
    before = tokens.clone()
    companions = [
        (values, values.clone(), new, padding)
        for values, new, padding in (
            (tokens, fill_token_id, pad_token_id),
            (state, STATE_OPEN, STATE_FROZEN),
            (commit_step, -1, -1),
            (commit_confidence, 0.0, 0.0),
        )
        if values is not None
    ]
    given_end = per_row(end, B, T)
    source = torch.arange(T, dtype=torch.int32, device=tokens.device).repeat(B, 1)
    info = torch.zeros(B, 3, dtype=torch.int32, device=tokens.device)
    for b in range(B):
        first, n = int(start[b]), int(length[b] if length is not None else given_end[b])
        if first < 0 or first > n:
            continue
        content: list[int] = []  # source positions, -1 for a new one
        inserted = removed = 0
        window = insert if insert is not None else remove
        for t in range(first, n + 1):
            w = t - first
            inside = window is not None and w < window.shape[1]
            count = int(insert[b, w]) if inside and insert is not None else 0
            content += [-1] * min(count, T + 1)
            inserted += count
            if t == n:
                break
            frozen = state is not None and bool(state[b, t] & STATE_FROZEN)
            if inside and remove is not None and remove[b, w] and not frozen:
                removed += 1
            else:
                content.append(t)
        total = n + inserted - removed
        if length is not None and total > T:
            info[b, 2] = min(total - T, _INT32_MAX)
            continue
        info[b, 0], info[b, 1] = min(inserted, _INT32_MAX), removed
        if length is not None:
            length[b] = total
            content += [-2] * (n - total)
        else:
            info[b, 2] = min(max(total - n, 0), _INT32_MAX)
            content = (content + [-1] * (n - total))[: n - first]
        now = torch.tensor(content, dtype=torch.long, device=tokens.device)
        span = slice(first, first + len(content))
        for values, old, new, padding in companions:
            moved = old[b, now.clamp(min=0)] if T else old[b, :0]
            moved = torch.where(now == -1, torch.full_like(moved, new), moved)
            values[b, span] = torch.where(now == -2, torch.full_like(moved, padding), moved)
            if values is state:
                changed = (tokens[b, span] != before[b, span]) | (old[b, span] & STATE_DIRTY != 0)
                state[b, span] = (state[b, span] & ~STATE_DIRTY) | changed * STATE_DIRTY
        source[b, span] = now.clamp(min=-1).int()
    return source, info
