# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.0 and 2.1: GLM-4-MoE with other weight names and a fused query-key-value matrix (arXiv:2512.15745).

The stock class already implements the partial rotary embedding, per-head norms of queries and keys, sigmoid router with
groups and a selection bias, shared experts and dense first layers. This module renames the weights and splits the fused
matrix.
"""

from __future__ import annotations

from typing import Any

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)


class LLaDA2Config(Glm4MoeConfig):
    model_type = "llada2_moe"


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    config_class = LLaDA2Config


class SplitHeads(ConversionOps):
    """Split a matrix that stacks the rows of all query heads, key heads and value heads into three matrices."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        config = kwargs["config"]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        rows = [n * config.head_dim for n in (heads, groups, groups)]
        if fused.shape[0] != sum(rows):
            raise ValueError(f"query_key_value has {fused.shape[0]} rows; expected {sum(rows)}")
        return dict(zip(target_patterns, (part.contiguous() for part in fused.split(rows))))

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


def _fused(leaf: str) -> WeightConverter:
    targets = [f"self_attn.{part}_proj.{leaf}" for part in "qkv"]
    return WeightConverter(f"attention.query_key_value.{leaf}", targets, operations=[SplitHeads()])


register_checkpoint_conversion_mapping(
    LLaDA2Config.model_type,
    [
        WeightRenaming("model.word_embeddings.", "model.embed_tokens."),
        WeightRenaming("attention.dense.", "self_attn.o_proj."),
        WeightRenaming("attention.query_layernorm.", "self_attn.q_norm."),
        WeightRenaming("attention.key_layernorm.", "self_attn.k_norm."),
        WeightRenaming("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
        _fused("weight"),
        _fused("bias"),
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ],
    overwrite=True,
)
