# SPDX-License-Identifier: Apache-2.0
"""Specification of `verify_drafts` in plain torch."""

import torch
from torch import Tensor

from .race import race_of_weights
from .randomness import bernoulli, philox, plain_exp
from .rows import per_row


def _tempered_probabilities(z: Tensor, temperature: Tensor, logsumexp: Tensor, banned: Tensor | None) -> Tensor:
    """Return softmax(z / T) of one row of logits, float32, given its logsumexp.

    It is 0 where z is NaN and for banned ids.
    """
    z = z.float().clamp(max=torch.finfo(torch.float32).max)
    p = plain_exp((z * (1.0 / temperature) - logsumexp).clamp(max=0.0))
    return p if banned is None else p.index_fill(0, banned[banned >= 0], 0.0)


def verify_drafts(
    drafts: Tensor,
    token: Tensor,
    *,
    logits: Tensor | None = None,
    logsumexp: Tensor | None = None,
    row_map: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    draft_row_map: Tensor | None = None,
    banned: Tensor | None = None,
    temperature: Tensor | None = None,
    leniency: float = 1.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of each row's drafts and find the token after it.

    A row's drafts end at its first -1. From left to right, until one fails:

    - Without draft logits, at temperature 0, and where one of the two rows is -1, draft i passes iff it equals
      token[i]. If it fails, token[i] replaces it.
    - Otherwise, with p and q = exp(z / T - logsumexp) in float32 (at most 1; 0 for NaN and for banned ids) of the
      target's and the draft's row, it passes with probability min(1, p(s) / (leniency * q(s))), where 0 / 0 is 0, by
      the bits (position + i, step, "verify", 0). If it fails, it is replaced by a token drawn from max(p - q, 0) by a
      two-level race (race.py), or by token[i] if p exceeds q nowhere.

    After the last draft comes token[i] of the row after it. Results: the number of drafts accepted, and the accepted
    drafts, the token after them, and -1 to the end.
    """
    B, W = drafts.shape
    tokens = torch.full_like(token, -1)
    accepted = torch.zeros(B, dtype=torch.int32, device=drafts.device)
    T = per_row(temperature, B, 0.0)
    key, now = per_row(seed, B, 0).long(), per_row(step, B, 0).long()
    for b in range(B):
        i = 0
        for i in range(W + 1):
            following = token[b, i]
            if i == W or drafts[b, i] < 0:
                break
            draft = int(drafts[b, i])
            row = int(row_map[b, i]) if row_map is not None else b * (W + 1) + i
            draft_row = int(draft_row_map[b, i]) if draft_row_map is not None else b * W + i
            if draft_logits is None or T[b] == 0 or row < 0 or draft_row < 0:
                if draft != following:
                    break
            else:
                assert logits is not None and logsumexp is not None and draft_logsumexp is not None
                assert position is not None
                p = _tempered_probabilities(logits[row], T[b], logsumexp[b, i], banned)
                q = _tempered_probabilities(draft_logits[draft_row], T[b], draft_logsumexp[b, i], banned)
                at, zero = position[b].long() + i, torch.zeros((), dtype=torch.long, device=drafts.device)
                bits = philox(key[b], at, now[b], "verify", zero)
                lenient = torch.tensor(leniency, dtype=torch.float32, device=q.device)
                if not bernoulli(bits, p[draft] / (lenient * q[draft])):
                    rest = (p - q).clamp(min=0.0).unsqueeze(0)
                    if rest.max() > 0:
                        request = (key[b].view(1, 1), at.view(1, 1), now[b].view(1, 1))
                        following = race_of_weights(rest, *request).squeeze(0)
                    break
            tokens[b, i] = draft
        tokens[b, i] = following
        accepted[b] = i
    return accepted, tokens
