# SPDX-License-Identifier: Apache-2.0
"""Which way a model attends that is decoded by its own attention: three short forwards tell."""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens of the forwards.
LENGTH = 8
#: Rounding can move a causal model's earlier logits too (where other tokens share a matrix product), by so little.
ROUNDING = 0.05


@torch.no_grad()
def is_causal(model, vocab_size: int | None, device: torch.device, avoid: set[int] = frozenset()) -> bool:
    """Whether later tokens leave the logits of earlier positions alone, while earlier tokens do move later logits.

    Parameters
    ----------
    model : callable
        `model(tokens)` has `.logits` `[1, T, V]`.
    vocab_size : int, optional
        How many tokens there are. None: three are taken to exist.
    avoid : set of int
        Tokens that may be treated in ways of their own (padding, masks).
    """
    ids = range(vocab_size or 3)
    ids = [i for i in ids if i not in avoid] or list(ids)
    # evenly spread, so that tokens differ as in a text
    tokens = torch.tensor([[ids[(2 * i + 1) * len(ids) // (2 * LENGTH)] for i in range(LENGTH)]], device=device)
    first, last = tokens.clone(), tokens.clone()
    first[:, 0], last[:, -1] = ids[-1], ids[0]
    plain = model(tokens).logits
    backward = _difference(plain[:, :-1], model(last).logits[:, :-1])
    forward = _difference(plain[:, 1:], model(first).logits[:, 1:])
    return forward > 0 and backward <= ROUNDING * forward


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; logits that are the same infinity do not differ."""
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0).max().item()
