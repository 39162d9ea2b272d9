# SPDX-License-Identifier: Apache-2.0
"""Bitmasks of tokens: bit v % 32 of word v // 32 is 1 where token v is allowed (the layout of xgrammar, llguidance)."""

from __future__ import annotations

import torch
from torch import Tensor


def without(bitmask: Tensor, token: Tensor, where: Tensor) -> Tensor:
    """Bitmasks int32 `[B, W, n]` with the bit of `token` int64 `[B, W]` cleared `where` bool `[B, W]` says so."""
    word, bit = (token.clamp(min=0) // 32)[..., None], _to_int32(1 << token.clamp(min=0) % 32)
    bit = torch.where(where, bit, 0)[..., None]
    return bitmask.scatter(2, word, bitmask.gather(2, word) & ~bit)


def pack(allowed: Tensor) -> Tensor:
    """Bitmasks int32 `[…, ceil(V / 32)]` of bool `[…, V]`."""
    vocab = allowed.shape[-1]
    words = torch.nn.functional.pad(allowed, (0, -vocab % 32)).unflatten(-1, (-1, 32))
    return _to_int32((words.long() << torch.arange(32, device=allowed.device)).sum(-1))


def unpack(bitmask: Tensor, vocab: int) -> Tensor:
    """Which of `vocab` tokens bitmasks int32 `[…, ceil(vocab / 32)]` allow, bool `[…, vocab]`."""
    v = torch.arange(vocab, device=bitmask.device)
    return (bitmask[..., v // 32] >> (v % 32) & 1).bool()


def _to_int32(words: Tensor) -> Tensor:
    """The int32 with the same low 32 bits."""
    return torch.where(words < 2**31, words, words - 2**32).int()
