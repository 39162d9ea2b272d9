# SPDX-License-Identifier: Apache-2.0
"""Specification of `remask_` in plain torch."""

import torch
from torch import Tensor

from .randomness import philox, uniform_below
from .rows import per_row

STATE_OPEN, STATE_FROZEN, STATE_EDITED, STATE_DIRTY = 1, 2, 4, 8  # bits of a position's state (csrc/common/params.h)


def remask_(
    tokens: Tensor,
    state: Tensor,
    position: Tensor,
    proposal: Tensor,
    *,
    commit: Tensor | None = None,
    edit: Tensor | None = None,
    remask: Tensor | None = None,
    renoise: Tensor | None = None,
    confidence: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    step: Tensor | None = None,
    seed: Tensor | None = None,
    origin: Tensor | None = None,
    end: Tensor | None = None,
    mask_token_id: int = -1,
    vocab_size: int = 0,
    eos_token_ids: list[int] | tuple[int, ...] = (),
    eos_policy: str = "none",
    fill_token_id: int = -1,
) -> Tensor:
    """Write one denoising step into tokens, state and the records, in place; return the info of every row.

    A frozen position has been given: it is neither open nor decided and is never written. Positions from `end` on do
    not belong to the request: they are neither open, decided nor given, and are never written. If several masks apply
    to a slot, only the last one of commit, edit, remask, renoise takes effect, and the others leave no trace:

    - commit (if open and proposal >= 0): write the proposal; the position is decided; step and confidence are recorded.
    - edit (if decided and the proposal is >= 0 and a different token): write the proposal; the position is marked as
      edited; confidence is recorded.
    - remask (if decided, or about to be committed in this call): write the mask token; open; record -1 and 0.
    - renoise: write a uniform token; open; record -1 and 0.

    The end of a request is the first end-of-sequence token at a decided position with no given position after it. Then,
    with eos_policy "fill", a row in which nothing before its end is open gets `fill_token_id` in all positions after
    it; they are decided, with records -1 and 0. Positions whose token differs from that before the call are marked
    dirty. The step of rows with a used slot increases by one.
    """
    B, T = tokens.shape
    row, slot = (position >= 0).nonzero(as_tuple=True)
    at = (row, position[row, slot].long())
    before, token, bits, proposed = tokens.clone(), tokens[at], state[at], proposal[row, slot]
    now = step.clone() if step is not None else torch.zeros(B, dtype=torch.int32, device=tokens.device)

    index = torch.arange(T, device=tokens.device)
    inside = index < per_row(end, B, T).to(tokens.device)[:, None]
    may_write = inside[at] & (bits & STATE_FROZEN == 0)

    def asked(mask: Tensor | None) -> Tensor:
        return mask[row, slot] & may_write if mask is not None else torch.zeros_like(row, dtype=torch.bool)

    is_open = bits & STATE_OPEN != 0
    commits = asked(commit) & is_open & (proposed >= 0)
    edits = asked(edit) & ~is_open & (proposed >= 0) & (proposed != token)
    renoises = asked(renoise)
    remasks = asked(remask) & (~is_open | commits) & ~renoises
    commits &= ~remasks & ~renoises
    edits &= ~remasks & ~renoises

    token = torch.where(commits | edits, proposed, token).masked_fill(remasks, mask_token_id)
    if renoise is not None:
        key, start = per_row(seed, B, 0)[row], per_row(origin, B, 0)[row]
        drawn = philox(key, at[1] - start, now[row].long(), "renoise", torch.zeros_like(row))
        token = torch.where(renoises, uniform_below(drawn, vocab_size), token)
    bits = torch.where(commits, bits & ~STATE_OPEN, bits)
    bits = torch.where(edits, bits | STATE_EDITED, bits)
    bits = torch.where(remasks | renoises, bits | STATE_OPEN, bits)
    tokens[at], state[at] = token, bits

    if commit_step is not None:
        recorded = torch.where(commits, now[row], commit_step[at])
        commit_step[at] = recorded.masked_fill(remasks | renoises, -1)
    if commit_confidence is not None:
        recorded = commit_confidence[at]
        if confidence is not None:
            recorded = torch.where(commits | edits, confidence[row, slot], recorded)
        commit_confidence[at] = recorded.masked_fill(remasks | renoises, 0.0)
    if step is not None:
        step += (position >= 0).any(-1)

    def first(where: Tensor) -> Tensor:
        """Return the index of the first True of each row, or T."""
        return torch.where(where, index, T).amin(1) if T else torch.zeros(B, dtype=torch.long, device=tokens.device)

    def opens() -> Tensor:
        return inside & (state & (STATE_OPEN | STATE_FROZEN) == STATE_OPEN)

    given = inside & (state & STATE_FROZEN != 0)
    given_behind = given.flip(1).cumsum(1).flip(1) > 0
    decided = inside & (state & (STATE_OPEN | STATE_FROZEN) == 0)
    is_eos = torch.isin(tokens, torch.tensor(eos_token_ids, dtype=torch.long, device=tokens.device))
    eos = first(decided & ~given_behind & is_eos)
    if eos_policy == "fill":
        ends = (eos < T) & (first(opens()) > eos)
        tail = ends[:, None] & (index > eos[:, None]) & inside
        tokens.masked_fill_(tail, fill_token_id)
        state.copy_(torch.where(tail, state & ~STATE_OPEN, state))
        if commit_step is not None:
            commit_step.masked_fill_(tail, -1)
        if commit_confidence is not None:
            commit_confidence.masked_fill_(tail, 0.0)
    changed = tokens != before
    state.copy_(torch.where(changed, state | STATE_DIRTY, state))

    def per_request(slots: Tensor) -> Tensor:
        return torch.zeros(B, dtype=torch.long, device=tokens.device).index_add_(0, row, slots.long())

    open_after = opens()
    columns = (
        per_request(open_after[at]),
        open_after.sum(1),
        per_request(commits),
        per_request(edits),
        per_request(remasks | renoises),
        changed.sum(1),
        torch.where(eos < T, eos, -1),
        first(open_after),
        ~open_after.any(1),
    )
    return torch.stack([column.to(torch.int32) for column in columns], 1)
