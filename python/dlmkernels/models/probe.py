# SPDX-License-Identifier: Apache-2.0
"""Test with three short forward passes whether a model's own attention is causal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Number of tokens in each forward pass.
LENGTH = 8
#: Relative tolerance: even in a causal model, rounding can change earlier logits slightly when later tokens change.
ROUNDING = 0.05


def short_text(ids: Sequence[int], device: torch.device) -> Tensor:
    """Return tokens int64 `[1, LENGTH]` for a test, spread evenly over `ids`, so that they vary as in a real text."""
    return torch.tensor([[ids[(2 * i + 1) * len(ids) // (2 * LENGTH)] for i in range(LENGTH)]], device=device)


@torch.no_grad()
def is_causal(model, tokens: Tensor, ids: Sequence[int]) -> bool:
    """Return whether changing the last token leaves earlier logits alone while changing the first moves later ones.

    Parameters
    ----------
    model : callable
        `model(tokens)` returns an object with `.logits` `[B, T, V]`.
    tokens : Tensor
        int64 `[B, T]`: tokens of the first forward pass. The second changes the last token of each row, and the third
        the first token.
    ids : sequence of int
        Ordinary tokens, excluding special ones such as padding and mask tokens.
    """
    first, last = tokens.clone(), tokens.clone()
    for changed in (first[:, 0], last[:, -1]):
        changed.copy_(torch.where(changed == ids[0], ids[-1], ids[0]))
    plain = model(tokens).logits
    backward = _difference(plain[:, :-1], model(last).logits[:, :-1])
    forward = _difference(plain[:, 1:], model(first).logits[:, 1:])
    return forward > 0 and backward <= ROUNDING * forward


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; equal infinities do not differ."""
    if a.numel() == 0:
        return 0.0
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0).max().item()
