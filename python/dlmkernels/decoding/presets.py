# SPDX-License-Identifier: Apache-2.0
"""Published decoders by name."""

from __future__ import annotations

from .config import DecodingConfig
from .rules import Quota, Threshold, TimeQuota
from .streams import Reordered, Strided

PRESETS: dict[str, DecodingConfig] = {
    # LLaDA, arXiv:2502.09992: low-confidence remasking, one block of the whole answer by default
    "llada": DecodingConfig(rule=Quota(), score="probability", eos_policy="none"),
    # Dream, arXiv:2508.15487: entropy order, nucleus before temperature's confidence is read, logits one row early
    "dream": DecodingConfig(
        rule=TimeQuota(), score="entropy", distribution="filtered", temperature=0.2, top_p=0.95, top_p_first=True,
        eos_policy="none", logit_alignment="shift",
    ),
    # Fast-dLLM, arXiv:2505.22618: confidence threshold over a dual cache
    "fast-dllm": DecodingConfig(
        rule=Threshold(0.9), score="probability", cache="dual", block_length=32, eos_policy="none"
    ),
    # SDAR, arXiv:2510.06303: all that is surer than 0.85, of what was drawn
    "sdar": DecodingConfig(
        rule=Threshold(0.85, strict=True), temperature=1.0, distribution="filtered", cache="block"
    ),
    # LLaDA2.0, arXiv:2512.15745
    "llada2": DecodingConfig(rule=Threshold(0.95, strict=True), distribution="filtered", cache="block"),
    # Fast-dLLM v2, arXiv:2509.26328: parts of a block one after another
    "fast-dllm-v2": DecodingConfig(
        rule=Threshold(0.9, strict=True), distribution="filtered", cache="block", sub_block_length=8
    ),
    # Discrete Diffusion Forcing, arXiv:2508.09192, its blocks one after another
    "d2f": DecodingConfig(rule=Threshold(0.9, strict=True), cache="block"),
    # Nemotron-Labs-Diffusion, arXiv:2607.05722
    "nemotron": DecodingConfig(rule=Threshold(0.9), cache="block"),
    # WeDLM, arXiv:2512.22737
    "wedlm": DecodingConfig(rule=Reordered(), temperature=0.2, cache="block"),
    # I-DLM, arXiv:2604.11035
    "i-dlm": DecodingConfig(
        rule=Strided(4), temperature=1.0, top_k=50, top_p=0.95, distribution="filtered", cache="block"
    ),
}  # fmt: skip


def preset(name: str, **overrides) -> DecodingConfig:
    """The configuration of a published decoder: one of `PRESETS`, with fields overridden."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].replace(**overrides)
