# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a model whose vocabulary is sharded across ranks, which exchange statistics instead of logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from .. import ops
from ..models.parallel import HeadShard
from .calls import shard_confidence
from .hidden_rows import HiddenRows

#: options of `ops.token_confidence` that are sliced to each rank's tokens, and how many tokens an element stands for
_BY_TOKEN = {"bias": 1, "bitmask": 32}
#: options that a shard does not take: `Head` makes no `ShardedRows` if top-k or top-p is in effect, and
#: `ops.combine_shards` computes the margin
_OF_WHOLE_ROWS = ("top_k", "top_p", "top_p_first", "keep_crossing", "with_margin")


class ShardedRows(HiddenRows):
    """Hidden states that every rank holds, in place of logits `[R, V]`, of which each rank computes its own columns.

    All ranks must call the same methods in the same order. Each method returns bitwise the same result on all ranks.
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor], hidden: Tensor, shard: HeadShard, is_guided: bool, budget: int
    ):
        super().__init__(logits, hidden, None, shard.vocab, shard.weight.dtype, is_guided, budget)
        self._shard = shard
        #: number of rows whose logits this rank computes at a time
        self._own_count = max(1, budget // (len(shard.weight) * self.dtype.itemsize))

    @cached_property
    def _own(self) -> Tensor | None:
        """This rank's logits `[R, n]`, or None if they would exceed the budget."""
        return linear(self.hidden, self._shard.weight) if len(self) <= self._own_count else None

    def confidence(self, row_map: Tensor, options: dict[str, Any]) -> ops.TokenConfidence:
        shard, own = self._shard, self._own
        source, weight = (self.hidden.to(shard.weight.dtype), shard.weight) if own is None else (own, None)
        uncond = None
        if self.is_guided:
            source, uncond = source.chunk(2)
        asked = {name: value for name, value in options.items() if name not in _OF_WHOLE_ROWS}
        for name, tokens in _BY_TOKEN.items():
            if asked.get(name) is not None:
                first = shard.first // tokens
                last = -(-(shard.first + len(shard.weight)) // tokens)
                asked[name] = asked[name][..., first:last].contiguous()
        words = shard_confidence(source, shard.first, weight=weight, row_map=row_map, uncond=uncond, **asked)
        everyone = words.new_empty((dist.get_world_size(shard.group), *words.shape))
        dist.all_gather(list(everyone.unbind()), words, group=shard.group)
        return ops.combine_shards(
            everyone, temperature=options["temperature"], distribution=options["distribution"],
            with_margin=options["with_margin"], with_entropy=options["with_entropy"],
        )  # fmt: skip

    def of_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        own, weight = self._own, self._shard.weight
        column = tokens - self._shard.first
        is_here = (column >= 0) & (column < len(weight))
        column = column.clamp(0, len(weight) - 1)[:, None]
        if own is not None:
            z = own[rows].gather(1, column)
        else:
            parts = zip(rows.split(self._own_count), column.split(self._own_count))
            z = torch.cat([linear(self.hidden[part], weight).gather(1, at) for part, at in parts])
        z = torch.where(is_here, z[:, 0].float().nan_to_num(-torch.inf, torch.inf, -torch.inf), -torch.inf)
        dist.all_reduce(z, dist.ReduceOp.MAX, self._shard.group)
        return z
