# SPDX-License-Identifier: Apache-2.0
"""dLLM-Cache: recompute the prompt rarely, the response more often, and in between only what changed most in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...models.layerwise import LayerCall
from ..checks import integer, number
from .base import CHANGED, PROMPT, RESPONSE, WHOLE, Kept, Layers, LayerwiseCache, Spans


@dataclass(frozen=True)
class DLLMCache(LayerwiseCache):
    """dLLM-Cache (Liu et al., arXiv:2506.06295), for bidirectional models of the Llama and Qwen architectures.

    The cache keeps what every layer but the first adds to each position. Each forward pass computes the first layer for
    all positions. The other layers compute the prompt in every `prompt_interval`-th forward pass of a request, and the
    response in every `response_interval`-th. In between, they compute the positions of the response whose value vectors
    have changed most since the previous forward pass, by cosine similarity. The value vectors themselves are computed
    for the whole response. With both intervals set to 1, nothing is approximated.

    The defaults are the authors' settings for LLaDA-Instruct on GSM8K.

    Parameters
    ----------
    prompt_interval, response_interval : int
        Forward passes of a request from one recomputation to the next, at least 1.
    share : float
        Share of the response to compute in between, rounded down to whole positions. If 0, no position and no value
        vector is computed in between.
    """

    prompt_interval: int = 50
    response_interval: int = 7
    share: float = 0.25

    name: ClassVar[str] = "dllm-cache"
    limits: ClassVar = {"prompt_interval": integer(1), "response_interval": integer(1), "share": number(0, 1)}

    def parts(self, step: Tensor) -> tuple[tuple[str, Tensor], ...]:
        prompt, response = step % self.prompt_interval == 0, step % self.response_interval == 0
        return (
            (CHANGED, torch.ones_like(prompt)), (RESPONSE, response), (PROMPT, prompt & ~response),
            (WHOLE, prompt & response),
        )  # fmt: skip

    def layers(self, part: str, spans: Spans, kept: Kept) -> Layers:
        return _Layers(self.share, part, spans, kept)


class _Layers:
    def __init__(self, share: float, part: str, spans: Spans, kept: Kept):
        self._share, self._part, self._spans, self._kept = share, part, spans, kept
        if part == WHOLE:
            return
        device = spans.first.device
        # in each row, a window as wide as the longest response, which contains the row's own response
        begin = torch.maximum(spans.first, spans.origin)[:, None].long()
        start = torch.minimum(begin, begin.new_full((), spans.columns - spans.width))
        self._columns = start + torch.arange(spans.width, device=device)
        self._used = (self._columns >= begin) & (self._columns < spans.ends[:, None])
        #: how many of the most changed columns to compute, per row and at most
        length = (spans.ends[:, None] - begin).clamp(min=0)
        self._counts = (length.double() * share).floor().long()
        self._count = int(spans.width * share)
        every = torch.arange(spans.columns, device=device)
        self._is_prompt = (every >= spans.origin[:, None]) & (every < begin)

    def __call__(self, call: LayerCall) -> Tensor:
        if call.number == 0:
            return call.whole()
        kept, rows = self._kept.of(call.number, call.x), self._spans.cache.to(call.x.device)
        width = call.x.shape[1]
        if self._part == WHOLE:
            out = call.whole()
            place = rows[:, None] * kept.shape[1] + torch.arange(width, device=rows.device)
            kept.flatten(0, 1).index_copy_(0, place.flatten(), (out - call.x).flatten(0, 1))
            return out
        # one extra column for unused entries
        out = torch.nn.functional.pad(call.x, (0, 0, 0, 1)) + kept.index_select(0, rows)[:, : width + 1]
        columns, used = self._columns_of(call)
        computed = call.at(columns, used)
        columns, used = columns.to(rows.device), used.to(rows.device)
        before = call.x.gather(1, columns[..., None].expand_as(computed))
        for to, values, row, last in (
            (kept, computed - before, rows, self._kept.columns),
            (out, computed, torch.arange(len(rows), device=rows.device), width),
        ):
            place = row[:, None] * to.shape[1] + torch.where(used, columns, last)
            to.view(-1, to.shape[2]).index_copy_(0, place.flatten(), values.flatten(0, 1))
        return out[:, :width]

    def _columns_of(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the columns int64 `[B, n]` that a layer computes, and which of these entries are used."""
        if self._part == RESPONSE:
            return self._columns, self._used
        changed, is_used = self._changed(call)
        if self._part == CHANGED:
            return changed, is_used
        width = call.x.shape[1]
        wanted = torch.nn.functional.pad(self._is_prompt, (0, 1))
        wanted = wanted.scatter(1, torch.where(is_used, changed, width), True)[:, :width]
        # all columns, with unwanted ones marked as unused
        return torch.arange(width, device=wanted.device).expand(len(wanted), width), wanted

    def _changed(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the columns int64 `[B, n]` of the response whose values changed most, in order, and which are used.

        Writes all value vectors of the response to the cache.
        """
        if self._share == 0:
            return self._columns[:, :0], self._used[:, :0]
        kept = call.kept_values()
        rows, columns = self._spans.cache.to(kept.device)[:, None], self._columns.to(kept.device)
        used = self._used.to(kept.device)
        old, new = kept[rows, columns], call.values(columns).to(kept.dtype)
        # compare by 2 (1 - cosine), as the squared distance of unit vectors: most cosines are 1 up to rounding
        a, b = (torch.nn.functional.normalize(v.float().flatten(2), dim=-1) for v in (old, new))
        distance = (a - b).square().sum(-1).masked_fill(~used, -1.0)
        kept[rows, columns] = torch.where(used[..., None, None], new, old)
        order = distance.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        rank = torch.arange(self._count, device=order.device)
        return columns.gather(1, order), rank < self._counts.to(order.device)
