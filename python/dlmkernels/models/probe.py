# SPDX-License-Identifier: Apache-2.0
"""Which way a model attends that is decoded by its own attention: three short forwards tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Tokens of the forwards.
LENGTH = 8
#: Rounding can move a causal model's earlier logits too (where other tokens share a matrix product), by so little.
ROUNDING = 0.05


def short_text(ids: Sequence[int], device: torch.device) -> Tensor:
    """Tokens `[1, LENGTH]` for a forward, spread evenly over `ids`, so that they differ as in a text."""
    return torch.tensor([[ids[(2 * i + 1) * len(ids) // (2 * LENGTH)] for i in range(LENGTH)]], device=device)


@torch.no_grad()
def is_causal(model, tokens: Tensor, ids: Sequence[int]) -> bool:
    """Whether later tokens leave the logits of earlier positions alone, while earlier tokens do move later logits.

    Parameters
    ----------
    model : callable
        `model(tokens)` has `.logits` `[B, T, V]`.
    tokens : Tensor
        int64 `[B, T]`: of the first forward; in the second their last ones are others, in the third their first ones.
    ids : sequence of int
        Tokens that have no meaning of their own, as padding and masks have.
    """
    first, last = tokens.clone(), tokens.clone()
    for changed in (first[:, 0], last[:, -1]):
        changed.copy_(torch.where(changed == ids[0], ids[-1], ids[0]))
    plain = model(tokens).logits
    backward = _difference(plain[:, :-1], model(last).logits[:, :-1])
    forward = _difference(plain[:, 1:], model(first).logits[:, 1:])
    return forward > 0 and backward <= ROUNDING * forward


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; logits that are the same infinity do not differ."""
    if a.numel() == 0:
        return 0.0
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0).max().item()
