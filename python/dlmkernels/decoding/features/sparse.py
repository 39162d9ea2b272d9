# SPDX-License-Identifier: Apache-2.0
"""Sparse-dLLM: outside the current block, every layer keeps only the keys that the block attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ...cache import KVCache
from ..checks import integer, number
from .base import FeatureCache


def _odd(name: str, value) -> int:
    width = integer(1)(name, value)
    if width is None or width % 2 == 0:
        raise ValueError(f"{name} must be an odd number; got {value!r}")
    return width


@dataclass(frozen=True)
class SparseCache(FeatureCache):
    """Eviction of Sparse-dLLM (Song et al., arXiv:2508.02558), for models with full attention.

    The first two forward passes of a block cover the whole canvas. In the second, every layer keeps the keys and values
    of a share of the positions outside the block: those whose keys have the largest product with the block's mean
    query, averaged over the heads and max-pooled over neighboring positions. Later forward passes cover only the block,
    which sees itself and what was kept.

    Parameters
    ----------
    keep : float
        Share of the positions outside the block to keep, rounded down.
    pool : int
        Width of the pooling window, an odd number. The block is skipped when neighbors are counted.
    """

    keep: float = 0.5
    pool: int = 3

    name: ClassVar[str] = "sparse-dllm"
    limits: ClassVar = {"keep": number(0, 1), "pool": _odd}


class Eviction:
    """Copy what the layers of one forward pass keep to a smaller cache. A callback for `AttentionWindow.watch`.

    Parameters
    ----------
    how : SparseCache
    to : KVCache
        Receives what is kept in its first slots, the most important first.
    rows : Tensor
        int64 `[B]`: row in both caches of each batch row.
    origin, ends : Tensor
        int32 `[B]`: first column and end (exclusive) of each request.
    block, forwarded : tuple of Tensor
        Two int32 `[B]` each: half-open ranges of the columns whose queries count, and of the columns that are not kept
        because later forward passes cover them.
    width : int
        Maximum number of columns of any block.
    """

    def __init__(
        self, how: SparseCache, to: KVCache, rows: Tensor, origin: Tensor, ends: Tensor, block: tuple[Tensor, Tensor],
        forwarded: tuple[Tensor, Tensor], width: int,
    ):  # fmt: skip
        self._how, self._to, self._rows = how, to, rows
        self._origin, self._ends, self._block, self._forwarded, self._width = origin, ends, block, forwarded, width

    def __call__(self, index: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        """Take what layer `index` keeps: `q` is `[B, Q, H, D]`, its cached keys and values are `[rows, S, G, D]`."""
        device = q.device
        rows = self._rows.to(device)
        k, v = k_cache.index_select(0, rows), v_cache.index_select(0, rows)
        columns, valid = self._outside(k.shape[1], device)
        score = (k.float() * self._asked(q, k.shape[2])[:, None]).sum((2, 3)) / q.shape[2]
        score = score.gather(1, columns).masked_fill(~valid, -torch.inf)
        pooled = max_pool1d(score[:, None], self._how.pool, 1, self._how.pool // 2)[:, 0]
        order = pooled.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        kept = columns.gather(1, order)[:, : int(k.shape[1] * self._how.keep)]
        for to, values in zip(self._to.layer(index, k, v), (k, v)):
            chosen = values.gather(1, kept[:, :, None, None].expand(-1, -1, *values.shape[2:]))
            to[:, : kept.shape[1]].index_copy_(0, rows, chosen)

    def _outside(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return all columns but the forwarded ones, int64 `[B, length]`, and which of these the request has."""
        first, last = (x.to(device).long()[:, None] for x in self._forwarded)
        columns = torch.arange(length, device=device)
        columns = torch.where(columns < first, columns, columns + (last - first))
        origin, ends = (x.to(device)[:, None] for x in (self._origin, self._ends))
        return columns.clamp(max=length - 1), (columns >= origin) & (columns < ends)

    def _asked(self, q: Tensor, groups: int) -> Tensor:
        """Return the block's mean query, summed over the heads that share a key, float32 `[B, G, D]`."""
        first, last = (x.to(q.device).long()[:, None] for x in self._block)
        columns = first + torch.arange(self._width, device=q.device)
        inside = (columns < last)[:, :, None, None]
        index = columns.clamp(max=q.shape[1] - 1)[:, :, None, None].expand(-1, -1, *q.shape[2:])
        total = q.gather(1, index).float().masked_fill(~inside, 0.0).sum(1)
        mean = total / inside.sum(1).clamp(min=1)
        return mean.unflatten(1, (groups, -1)).sum(2)
