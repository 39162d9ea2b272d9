# SPDX-License-Identifier: Apache-2.0
"""d²Cache: forward passes cover candidates to be decided, newly decided positions, and the most attended others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import integer, number
from .base import FeatureCache

#: number of queries whose attention is computed at once
CHUNK = 64


@dataclass(frozen=True)
class D2Cache(FeatureCache):
    """d²Cache (Jiang et al., arXiv:2509.23094), for bidirectional models of the Llama and Qwen architectures.

    The first forward pass of a request covers the whole canvas (prompt and answer). Each later one covers only the
    following positions, while the keys and values of all others stay as they are:

    - the `candidates` open positions with the largest product of their last known confidence and the density of decided
      positions around them (see `scores.DensityWeighted`). Only these may be decided;
    - the positions that the previous forward pass decided;
    - of the remaining positions, those that receive the most attention, by attention rollout over all layers, in which
      a position that was not forwarded passes on only its own. Taken are the largest shares that together make up at
      most `rollout`, and at least one position.

    The response is decoded as one block.

    Parameters
    ----------
    rollout : float
        Share of the attention flow whose positions are recomputed, from 0 to 1.
    candidates : int
        Number of open positions in a forward pass.
    sigma : float
        Standard deviation of the density's kernel, in positions.
    """

    rollout: float = 0.1
    candidates: int = 32
    sigma: float = 10.0

    name: ClassVar[str] = "d2cache"
    limits: ClassVar = {
        "rollout": number(0, 1), "candidates": integer(1), "sigma": number(0, 1000, above=True),
    }  # fmt: skip


class Rollout:
    """Measure the attention that flows to each position in one forward pass. A callback for `AttentionWindow.watch`.

    Attention rollout (Abnar and Zuidema, arXiv:2005.00928) is the product over the layers of (A + I) / 2, where A is
    the mean of the heads' attention. Only its column sums are needed. They are computed from the last layer down, with
    a vector instead of a matrix. Positions that are not forwarded have A = I.

    Parameters
    ----------
    columns, used : Tensor
        int64 and bool `[B, n]`: canvas columns forwarded in each batch row, and which of these entries are used.
    rows : Tensor
        int64 `[B]`: cache row of each batch row.
    valid : Tensor
        bool `[B, T]`: columns of the canvas that belong to each request.
    """

    def __init__(self, columns: Tensor, used: Tensor, rows: Tensor, valid: Tensor):
        self._columns, self._used, self._rows, self._valid = columns, used, rows, valid
        self._layers: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, index: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        # in a batch with guidance, the conditional half comes first
        self._layers.append((q[: len(self._rows)], k_cache, scale))

    def importance(self) -> Tensor:
        """Return the column sums of the rollout, float32 `[B, T]`."""
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
        """Return the mean of the heads' attention, float32 `[B, n, T]`."""
        groups = k.shape[2]
        scores = torch.einsum("bqghd,bkgd->bghqk", q.unflatten(2, (groups, -1)), k) * scale
        scores = scores.masked_fill(~self._valid[:, None, None, None, :], -torch.inf)
        return torch.softmax(scores, -1).mean((1, 2))


def nucleus(importance: Tensor, among: Tensor, share: float) -> Tensor:
    """Return the positions with the largest values that make up at most `share` of the sum, at least one per row.

    `importance` is float `[B, T]`, the result bool `[B, T]`. Only the positions `among` bool `[B, T]` are considered.
    """
    values = importance.masked_fill(~among, 0.0)
    values = values / (values.sum(1, keepdim=True) + 1e-9)
    order = values.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device)
    # a share of 1 takes all, whatever the rounding of the sums
    chosen = (values.gather(1, order).cumsum(1) <= (share if share < 1 else 2)) | (rank == 0)
    return torch.zeros_like(among).scatter(1, order, chosen) & among
