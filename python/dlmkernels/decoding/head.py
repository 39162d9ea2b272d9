# SPDX-License-Identifier: Apache-2.0
"""From hidden states to what is asked of their logits, with no more logits in memory than the budget.

Logits are by far the largest tensors of a decoding: float32 ones of 256 rows of 262,144 tokens take 256 MiB, and what
is computed from them is a few numbers a row. Three ways lead from hidden states to these numbers:

- *logits*: the model's head, then `ops.token_confidence`, where the logits fit the budget;
- *slices*: the same for a part of the rows at a time, where they do not;
- *fused*: `ops.lm_head_confidence`, which makes no logits at all, where it is no slower (`prefers_fused`).

Of a tensor-parallel model each rank has a part of the vocabulary, and there is a fourth way:

- *sharded*: `ops.shard_confidence` of the rank's own logits, then `ops.combine_shards` of what all ranks say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import cpu_kernel
from ..models.adapt import DiffusionModel, LogitsModel
from .config import DecodingConfig
from .hidden_rows import HiddenRows
from .sharded_rows import ShardedRows

#: Below this size, in bytes, a processor's caches hold the weights, and torch's linear layer is the faster one.
LARGE_WEIGHT = 64 << 20
#: Up to so many rows the fused head is no slower (benchmarks/README.md); in bfloat16 with products of it in hardware.
MOST_ROWS = {torch.bfloat16: 32, torch.float16: 512, torch.float32: 512}
#: Bytes of logits that `ops.lm_head_confidence` has room for where it filters; beyond, it would read the weights again.
FILTERED = 7_500_000


class Head:
    """A model's language-model head in a decoding.

    Attributes
    ----------
    model : DiffusionModel
    budget : int
        Bytes that logits may take.
    may_fuse : bool
        Whether all that is asked of the logits is asked of the fused head once a step.
    """

    def __init__(self, model: DiffusionModel, config: DecodingConfig, filters: bool):
        """`filters`: whether top-k or top-p leave something out."""
        self.model, self.budget, self.mode = model, config.logits_budget, config.lm_head
        self.is_guided, self.filters = config.cfg_scale > 0, filters
        obstacle = obstacle_to_fusion(model, config)
        if self.mode == "fused" and obstacle:
            raise ValueError(f"lm_head='fused' cannot be used here: {obstacle}; use 'auto'")
        self.may_fuse = self.mode in ("auto", "fused") and obstacle is None
        obstacle = obstacle_to_sharding(model, config, filters) if self.mode in ("auto", "sharded") else "not asked for"
        if self.mode == "sharded" and obstacle:
            raise ValueError(f"lm_head='sharded' cannot be used here: {obstacle}; use 'auto'")
        #: this rank's part of the head, where results are made of what all ranks say
        self.shard = model.head_shard() if obstacle is None else None
        #: number of logits of a row, and their dtype, once a head that is no linear layer has shown them
        self._shown: tuple[int, torch.dtype] | None = None

    def __call__(self, hidden: Tensor) -> Tensor | HiddenRows:
        """Logits `[R, V]` of hidden states `[R, hidden]`, or what answers for them."""
        if isinstance(self.model, LogitsModel):
            return self.model.logits(hidden)  # there already
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
    """Why the fused head cannot serve a decoding, or only by working several times a step; None if it can."""
    weight = model.linear_head()
    if weight is None:
        return f"the head of {type(model.model).__name__} is not a plain linear layer without a bias"
    if weight.device.type not in ("cpu", "cuda"):
        return f"it has kernels for CPUs and CUDA alone, and the head is on {weight.device}"
    if config.rule.reads_logits:
        return f"rule {type(config.rule).__name__} reads the logits themselves"
    if config.constraint is not None:
        return "a constraint may refuse tokens, and asks for others of the same logits"
    if model.self_conditions:
        return "the model takes in the whole distribution of the last forward"
    return None


def obstacle_to_sharding(model: DiffusionModel, config: DecodingConfig, filters: bool) -> str | None:
    """Why ranks cannot exchange words in place of logits, or only by gathering the logits as well; None if they can."""
    if model.group is None:
        return "the model is not divided among ranks (transformers' DistributedConfig(tp_size=…))"
    if config.rule.reads_logits:
        return f"rule {type(config.rule).__name__} reads the logits themselves"
    if filters:
        return "top_k and top_p look at all logits of a position"
    if model.head_shard() is None:
        return (
            "its head is not a plain linear layer without a bias, divided by the vocabulary, with at least one of its "
            "parts of 256 tokens for each rank"
        )
    return None


def prefers_fused(weight: Tensor, rows: int, filters: bool) -> bool:
    """Whether `ops.lm_head_confidence` is no slower than the linear layer of `weight` `[V, d]` on so many rows.

    It has not been measured on a GPU: there it is used where `lm_head="fused"` asks for it.
    """
    if weight.device.type == "cuda":
        return False
    if weight.dtype == torch.bfloat16 and cpu_kernel("lm_head_confidence") not in ("avx512bf16", "amx"):
        return False
    fits = not filters or rows * len(weight) * weight.itemsize <= FILTERED
    return fits and weight.numel() * weight.itemsize >= LARGE_WEIGHT and rows <= MOST_ROWS.get(weight.dtype, 0)
