# SPDX-License-Identifier: Apache-2.0
"""From hidden states to statistics of their logits, with no more logits in memory than the budget allows.

Logits are by far the largest tensors of a decoding: in float32, 256 rows of 262,144 tokens take 256 MiB. Only a few
numbers per row are computed from them. There are three ways from hidden states to these numbers:

- *logits*: the model's head, then `ops.token_confidence`, if the logits fit the budget;
- *slices*: the same for some of the rows at a time, if they do not;
- *fused*: `ops.lm_head_confidence`, which never stores the logits, where it is no slower (`prefers_fused`).

In a tensor-parallel model, each rank holds a part of the vocabulary. This adds a fourth way:

- *sharded*: `ops.shard_confidence` on each rank's own logits, then `ops.combine_shards` on the results of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu_kernel
from ..models.adapt import DiffusionModel, LogitsModel
from .config import DecodingConfig
from .hidden_rows import HiddenRows
from .sharded_rows import ShardedRows

#: Below this size, in bytes, the weights fit into a processor's caches, and torch's linear layer is faster.
LARGE_WEIGHT = 64 << 20
#: Up to this many rows, the fused head is no slower (benchmarks/README.md); bfloat16: on CPUs with bfloat16 products.
MOST_ROWS = {torch.bfloat16: 32, torch.float16: 512, torch.float32: 512}
#: Bytes of logits that `ops.lm_head_confidence` can hold when it filters; for more, it would read the weights again.
FILTERED = 7_500_000


class Head:
    """The language-model head, as used by a decoding.

    Attributes
    ----------
    model : DiffusionModel
    budget : int
        Maximum size of the logits, in bytes.
    may_fuse : bool
        Whether a single call of the fused head per step can compute everything that is needed of the logits.
    """

    def __init__(self, model: DiffusionModel, config: DecodingConfig, filters: bool):
        """`filters`: whether top-k or top-p is active."""
        self.model, self.budget, self.mode = model, config.logits_budget, config.lm_head
        self.is_guided, self.filters = config.cfg_scale > 0, filters
        obstacle = obstacle_to_fusion(model, config)
        if self.mode == "fused" and obstacle:
            raise ValueError(f"lm_head='fused' cannot be used here: {obstacle}; use 'auto'")
        self.may_fuse = self.mode in ("auto", "fused") and obstacle is None
        obstacle = obstacle_to_sharding(model, config, filters) if self.mode in ("auto", "sharded") else "not asked for"
        if self.mode == "sharded" and obstacle:
            raise ValueError(f"lm_head='sharded' cannot be used here: {obstacle}; use 'auto'")
        #: this rank's part of the head, if the ranks combine their results; else None
        self.shard = model.head_shard() if obstacle is None else None
        #: number of logits per row and their dtype, known once a head that is not a linear layer has been run
        self._shown: tuple[int, torch.dtype] | None = None

    def __call__(self, hidden: Tensor) -> Tensor | HiddenRows:
        """Return logits `[R, V]` of hidden states `[R, hidden]`, or `HiddenRows` that compute them on demand."""
        if isinstance(self.model, LogitsModel):
            return self.model.logits(hidden)  # the model has computed logits already
        if self.shard is not None:
            return ShardedRows(self.model.logits, hidden, self.shard, self.is_guided, self.budget)
        weight = self.model.linear_head()
        if weight is not None and self._fuses(weight, hidden):
            return self._lazily(hidden, weight, len(weight), weight.dtype)
        if weight is not None:
            vocab, dtype = len(weight), weight.dtype
        else:
            if self._shown is None:
                one = self.model.logits(hidden[:1])
                self._shown = one.shape[1], one.dtype
            vocab, dtype = self._shown
        if len(hidden) * vocab * dtype.itemsize <= self.budget:
            return self.model.logits(hidden)
        return self._lazily(hidden, None, vocab, dtype)

    def _fuses(self, weight: Tensor, hidden: Tensor) -> bool:
        if not self.may_fuse or weight.dtype != hidden.dtype:
            return False
        rows = len(hidden) // 2 if self.is_guided else len(hidden)
        return self.mode == "fused" or prefers_fused(weight, rows, self.filters)

    def _lazily(self, hidden: Tensor, weight: Tensor | None, vocab: int, dtype: torch.dtype) -> HiddenRows:
        return HiddenRows(self.model.logits, hidden, weight, vocab, dtype, self.is_guided, self.budget)


def obstacle_to_fusion(model: DiffusionModel, config: DecodingConfig) -> str | None:
    """Return why the fused head cannot be used, or would have to run several times per step; None if it can be used."""
    weight = model.linear_head()
    if weight is None:
        return f"the head of {type(model.model).__name__} is not a plain linear layer without a bias"
    if weight.device.type not in ("cpu", "cuda"):
        return f"it has kernels for CPUs and CUDA only, and the head is on {weight.device}"
    if config.rule.reads_logits:
        return f"rule {type(config.rule).__name__} reads the logits themselves"
    if config.constraint is not None:
        return "a constraint may reject tokens, and then needs others from the same logits"
    if model.self_conditions:
        return "the model is conditioned on the whole distribution of the last forward pass"
    return None


def obstacle_to_sharding(model: DiffusionModel, config: DecodingConfig, filters: bool) -> str | None:
    """Return why ranks cannot exchange statistics alone, without gathering the logits; None if they can."""
    if model.group is None:
        return "the model is not split across ranks (transformers' DistributedConfig(tp_size=…))"
    if config.rule.reads_logits:
        return f"rule {type(config.rule).__name__} reads the logits themselves"
    if filters:
        return "top_k and top_p need all logits of a position"
    if model.head_shard() is None:
        return (
            "its head is not a plain linear layer without a bias, split by vocabulary, with at least one chunk of 256 "
            "tokens for each rank"
        )
    return None


def prefers_fused(weight: Tensor, rows: int, filters: bool) -> bool:
    """Return whether `ops.lm_head_confidence` is no slower than the linear layer of `weight` `[V, d]`.

    It has not been measured on a GPU, where it is used only with `lm_head="fused"`.
    """
    if weight.device.type == "cuda":
        return False
    if weight.dtype == torch.bfloat16 and cpu_kernel("lm_head_confidence") not in ("avx512bf16", "amx"):
        return False
    fits = not filters or rows * len(weight) * weight.itemsize <= FILTERED
    return fits and weight.numel() * weight.itemsize >= LARGE_WEIGHT and rows <= MOST_ROWS.get(weight.dtype, 0)
