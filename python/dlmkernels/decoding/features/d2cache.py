# SPDX-License-Identifier: Apache-2.0
"""d²Cache: a forward takes the open positions that may soon be decided, what was, and what most is attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import integer, number
from .base import FeatureCache

#: queries whose attention is computed at once
CHUNK = 64


@dataclass(frozen=True)
class D2Cache(FeatureCache):
    """d²Cache (Jiang et al., arXiv:2509.23094), for bidirectional models of Llama's and Qwen's architectures.

    A request's first forward takes the whole canvas. After each, the next one's rows are chosen: the `candidates` open
    positions with the largest product of the confidence they last had and the density of decided positions around them
    (see `scores.DensityWeighted`), which alone may be decided then; what this forward has decided; and of the others
    those that most attention flows to. That is measured by attention rollout over all layers, a row that was not
    forwarded passing on its own alone; taken are the largest shares that together make up no more than `rollout`, and
    at least one position. All other keys and values stay what they were.

    The response is decoded as one block.

    Parameters
    ----------
    rollout : float
        Share of the attention flow that is computed anew.
    candidates : int
        Open positions of a forward.
    sigma : float
        Standard deviation of the density, in positions.
    """

    rollout: float = 0.1
    candidates: int = 32
    sigma: float = 10.0

    name: ClassVar[str] = "d2cache"
    limits: ClassVar = {
        "rollout": number(0, 1), "candidates": integer(1), "sigma": number(0, 1000, above=True),
    }  # fmt: skip


class Rollout:
    """How much attention flows to each position in one forward of B rows of n columns: `AttentionWindow.watch`.

    Abnar and Zuidema (arXiv:2005.00928): the product over the layers of (A + I) / 2, A being the mean of the heads'
    attention, of which the sums of the columns are wanted. They are computed from the last layer down, a vector instead
    of a matrix. Rows that are not forwarded have A = I.

    Parameters
    ----------
    columns, used : Tensor
        int64 and bool `[B, n]`: where the rows stand, and which of them are there.
    rows : Tensor
        int64 `[B]`: their rows of the cache.
    valid : Tensor
        bool `[B, T]`: the columns of each request.
    """

    def __init__(self, columns: Tensor, used: Tensor, rows: Tensor, valid: Tensor):
        self._columns, self._used, self._rows, self._valid = columns, used, rows, valid
        self._layers: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, index: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        # of a guided batch the conditional half comes first
        self._layers.append((q[: len(self._rows)], k_cache, scale))

    def importance(self) -> Tensor:
        """Sums of the columns, float32 `[B, T]`."""
        device = self._valid.device
        flow, one_more = self._valid.float(), self._valid.shape[1]
        place = torch.where(self._used, self._columns, one_more)
        forwarded = torch.nn.functional.pad(torch.zeros_like(self._valid), (0, 1)).scatter(1, place, True)[:, :-1]
        for q, k_cache, scale in reversed(self._layers):
            k = k_cache.index_select(0, self._rows.to(q.device)).float().to(device)
            sent = flow.gather(1, self._columns).masked_fill(~self._used, 0.0)
            flow = torch.where(forwarded, flow / 2, flow)
            for first in range(0, q.shape[1], CHUNK):
                attention = self._attention(q[:, first : first + CHUNK].float().to(device), k, scale)
                flow = flow + torch.einsum("bq,bqt->bt", sent[:, first : first + CHUNK], attention) / 2
        return flow

    def _attention(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Mean of the heads' attention, float32 `[B, n, T]`."""
        groups = k.shape[2]
        scores = torch.einsum("bqghd,bkgd->bghqk", q.unflatten(2, (groups, -1)), k) * scale
        scores = scores.masked_fill(~self._valid[:, None, None, None, :], -torch.inf)
        return torch.softmax(scores, -1).mean((1, 2))


def nucleus(importance: Tensor, among: Tensor, share: float) -> Tensor:
    """The largest of the values float `[B, T]` that together make up at most a share of all, and one at least.

    `among` bool `[B, T]`: which count; of the others none is chosen.
    """
    values = importance.masked_fill(~among, 0.0)
    values = values / (values.sum(1, keepdim=True) + 1e-9)
    order = values.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device)
    chosen = (values.gather(1, order).cumsum(1) <= (share if share < 1 else 2)) | (rank == 0)  # sums are rounded
    return torch.zeros_like(among).scatter(1, order, chosen) & among
