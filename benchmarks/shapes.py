# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models, at which the benchmarks run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model according to its configuration file. `block` is the block length used for decoding."""

    name: str
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int

    def __str__(self) -> str:
        return self.name


LLADA = Shape("LLaDA-8B", vocab=126464, heads=32, kv_heads=32, head_dim=128, block=32)
DREAM = Shape("Dream-7B", vocab=152064, heads=28, kv_heads=4, head_dim=128, block=32)
SDAR = Shape("SDAR-8B", vocab=151936, heads=32, kv_heads=8, head_dim=128, block=4)
DEMO = Shape("demo", vocab=32, heads=4, kv_heads=4, head_dim=32, block=82)
