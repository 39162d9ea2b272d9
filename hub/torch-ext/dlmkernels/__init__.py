# SPDX-License-Identifier: Apache-2.0
"""Ops for diffusion language models: `block_attention`, `token_confidence`, …

The Python package `dlmkernels` has the same ops, and the decoding loops that use them.
"""

from .ops import (
    block_attention,
    combine_shards,
    lm_head_candidates,
    lm_head_confidence,
    remask_,
    select_tokens,
    shard_confidence,
    soft_embedding,
    splice_,
    token_confidence,
    top_candidates,
    verify_drafts,
)

__all__ = [
    "block_attention", "combine_shards", "lm_head_candidates", "lm_head_confidence", "remask_", "select_tokens",
    "shard_confidence", "soft_embedding", "splice_", "token_confidence", "top_candidates", "verify_drafts",
]  # fmt: skip
