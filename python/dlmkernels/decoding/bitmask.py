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


def check_bitmask(bitmask: Tensor, tokens: Tensor, columns: int) -> Tensor:
    """A bitmask `[n]` or `[B or 1, N or 1, n]` on the device of the canvas `tokens`, from one or from bools."""
    if bitmask.dtype == torch.bool:
        bitmask = pack(bitmask)
    if bitmask.dtype != torch.int32 or bitmask.device != tokens.device:
        raise ValueError(
            f"constraint must be an int32 bitmask or bool, on {tokens.device}; got {bitmask.dtype} on {bitmask.device}"
        )
    batch = len(tokens)
    if bitmask.dim() == 2:
        bitmask = bitmask[None]
    if bitmask.dim() not in (1, 3) or (
        bitmask.dim() == 3 and (bitmask.shape[0] not in (1, batch) or bitmask.shape[1] not in (1, columns))
    ):
        raise ValueError(
            f"constraint must have shape [n], [{columns}, n] or [{batch}, {columns}, n], n words of 32 tokens or n "
            f"bools; got {list(bitmask.shape)} as a bitmask"
        )
    return bitmask
