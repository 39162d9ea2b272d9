# SPDX-License-Identifier: Apache-2.0
"""Token bitmasks: bit v % 32 of word v // 32 is 1 if token v is allowed (the layout of xgrammar and llguidance)."""

from __future__ import annotations

import torch
from torch import Tensor


def without(bitmask: Tensor, token: Tensor, where: Tensor) -> Tensor:
    """Clear the bit of `token` int64 `[B, W]` in int32 bitmasks `[B, W, n]`, at the slots `where` bool `[B, W]`."""
    word, bit = (token.clamp(min=0) // 32)[..., None], _to_int32(1 << token.clamp(min=0) % 32)
    bit = torch.where(where, bit, 0)[..., None]
    return bitmask.scatter(2, word, bitmask.gather(2, word) & ~bit)


def pack(allowed: Tensor) -> Tensor:
    """Pack bool `[…, V]` into int32 bitmasks `[…, ceil(V / 32)]`."""
    vocab = allowed.shape[-1]
    words = torch.nn.functional.pad(allowed, (0, -vocab % 32)).unflatten(-1, (-1, 32))
    return _to_int32((words.long() << torch.arange(32, device=allowed.device)).sum(-1))


def unpack(bitmask: Tensor, vocab: int) -> Tensor:
    """Unpack int32 bitmasks `[…, ceil(vocab / 32)]` into bool `[…, vocab]`."""
    v = torch.arange(vocab, device=bitmask.device)
    return (bitmask[..., v // 32] >> (v % 32) & 1).bool()


def _to_int32(words: Tensor) -> Tensor:
    """Reinterpret words of 32 bits, held in int64, as int32."""
    return torch.where(words < 2**31, words, words - 2**32).int()


def check_kind(bitmask: Tensor, device: torch.device) -> None:
    """Raise a ValueError unless a tensor of allowed tokens has the right dtype, layout, device and dimensions."""
    if bitmask.dtype not in (torch.bool, torch.int32) or bitmask.device != device or bitmask.layout != torch.strided:
        layout = "" if bitmask.layout == torch.strided else f", {bitmask.layout}"
        raise ValueError(
            f"constraint must be an int32 bitmask or bool, on {device}; got {bitmask.dtype} on {bitmask.device}{layout}"
        )
    if bitmask.dim() not in (1, 2, 3):
        raise ValueError(
            f"constraint must have shape [n], [N, n] or [B, N, n], for N positions; got {list(bitmask.shape)}"
        )


def check_bitmask(bitmask: Tensor, tokens: Tensor, columns: int) -> Tensor:
    """Check a bitmask, or bools, and return it as a bitmask `[n]` or `[B or 1, N or 1, n]`; N is `columns`."""
    check_kind(bitmask, tokens.device)
    if bitmask.dtype == torch.bool:
        bitmask = pack(bitmask)
    batch = len(tokens)
    if bitmask.dim() == 2:
        bitmask = bitmask[None]
    if bitmask.dim() == 3 and (bitmask.shape[0] not in (1, batch) or bitmask.shape[1] not in (1, columns)):
        raise ValueError(
            f"constraint must have shape [n], [{columns}, n] or [{batch}, {columns}, n], with n bools or n words of 32 "
            f"tokens; got {list(bitmask.shape)} as a bitmask"
        )
    return bitmask
