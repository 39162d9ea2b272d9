# SPDX-License-Identifier: Apache-2.0
"""Configurations of published decoders, by name."""

from __future__ import annotations

from .config import DecodingConfig
from .features import DLLMCache
from .names import PRESET_NAMES, close_match
from .rules import (
    Ancestral,
    AncestralRemask,
    Backtracking,
    CreditThreshold,
    DilatedSchedule,
    DynamicThreshold,
    EarlyAnswer,
    EmbeddingFlow,
    EntropyBound,
    EntropyPipeline,
    EntropySum,
    Expanding,
    Factor,
    Frechet,
    HierarchicalThreshold,
    LearnedNoise,
    Lengthening,
    LocalThreshold,
    PathPlanning,
    Pipeline,
    PredictorCorrector,
    Quota,
    RenoisedEntropyBound,
    Reordered,
    RunEditing,
    ScoreAncestral,
    SelfSpeculative,
    SimplexDenoising,
    SmoothedThreshold,
    SplitEditing,
    StableThreshold,
    Strided,
    Threshold,
    TimeQuota,
    TokenEditing,
    UniformState,
    VectorDenoising,
    WideInNarrowOut,
)
from .rules.named import RULES
from .scores import DensityWeighted, PositionWeighted

LLADA = DecodingConfig(rule=Quota(), score="probability", eos_policy="none")
# positions ordered by the entropy of the filtered distribution, top-p before top-k, logits shifted by one position
DREAM = DecodingConfig(
    rule=TimeQuota(), score="entropy", distribution="filtered", temperature=0.2, top_p=0.95, top_p_first=True,
    eos_policy="none", logit_alignment="shift",
)  # fmt: skip
FAST_DLLM = DecodingConfig(rule=Threshold(0.9), cache="dual", block_length=32, eos_policy="none")
SDAR = DecodingConfig(rule=DynamicThreshold(0.85), distribution="filtered", temperature=1.0, cache="block")
MDLM = DecodingConfig(rule=Ancestral(), temperature=1.0, eos_policy="none")
REMDM = DecodingConfig(
    rule=AncestralRemask(strategy="cap", eta=0.008), temperature=1.0, top_p=0.9, keep_crossing=False,
    distribution="filtered", eos_policy="none",
)  # fmt: skip
PSI = MDLM.replace(rule=PredictorCorrector(denoise=False), top_p=0.9, distribution="filtered")
D3LLM = DecodingConfig(rule=EntropyPipeline(0.5, 0.1, 0.95, delay=2), block_length=32)
DINFER = DecodingConfig(rule=Threshold(0.9, tie=1e-5), block_length=32, eos_policy="block")

PRESETS: dict[str, DecodingConfig] = {
    # LLaDA, arXiv:2502.09992: low-confidence remasking; by default, the whole answer is one block
    "llada": LLADA,
    "llada-random": LLADA.replace(score="random"),
    # Dream, arXiv:2508.15487: its four algorithms
    "dream": DREAM,
    "dream-maskgit-plus": DREAM.replace(score="probability"),
    "dream-topk-margin": DREAM.replace(score="margin"),
    "dream-origin": DREAM.replace(rule=Ancestral(eps=1e-3, denoise=False)),
    # RND1, github.com/RadicalNumerics/RND1: positions ordered by entropy, tokens spread evenly over the forwards
    "rnd1": DecodingConfig(
        rule=Quota(spread=True), score="entropy", distribution="filtered", temperature=0.1, eos_policy="none"
    ),
    # DiffuLLaMA, arXiv:2410.17891: each position is unmasked at random; DiffuGPT uses a temperature of 0.95
    "diffullama": DecodingConfig(
        rule=Ancestral(eps=0.0, denoise=False), temperature=0.9, top_p=0.9, distribution="filtered", eos_policy="none"
    ),
    # Fast-dLLM, arXiv:2505.22618: confidence threshold with a dual cache
    "fast-dllm": FAST_DLLM,
    "fast-dllm-factor": FAST_DLLM.replace(rule=Factor(1.0)),
    # Fast-dLLM++, arXiv:2606.02955
    "fast-dllm++": FAST_DLLM.replace(rule=Frechet(0.25)),
    # SDAR, arXiv:2510.06303, and its inference engine, JetEngine
    "sdar": SDAR,
    "sdar-static": SDAR.replace(rule=Quota(of_block=True)),
    "sdar-sequential": SDAR.replace(rule=Quota(of_block=True), score="position"),
    "sdar-entropy-bounded": SDAR.replace(rule=EntropySum(0.35), distribution="tempered"),
    # LLaDA2.0, arXiv:2512.15745
    "llada2": DecodingConfig(rule=DynamicThreshold(0.95), distribution="filtered", cache="block"),
    # EB-Sampler, arXiv:2505.24857
    "eb-sampler": DecodingConfig(rule=EntropyBound(0.1), score="entropy"),
    # dInfer, arXiv:2510.08666
    "dinfer-threshold": DINFER,
    "dinfer-hierarchy": DINFER.replace(rule=HierarchicalThreshold(0.9, 0.4)),
    "dinfer-credit": DINFER.replace(rule=CreditThreshold(0.9)),
    "dinfer-smoothing": DINFER.replace(rule=SmoothedThreshold(0.9)),
    "dinfer-vicinity": DINFER.replace(cache="dual", vicinity=(16, 16)),
    # dKV-Cache, arXiv:2505.15781: the variant "decode"
    "dkv-cache": LLADA.replace(cache="delayed", warmup=2, refresh_interval=4, block_length=32),
    # the same for Dream, whose published program counts forwards from the first
    "dkv-cache-dream": DREAM.replace(cache="delayed", refresh_interval=4),
    # dLLM-Cache, arXiv:2506.06295: the published settings for GSM8K, with LLaDA and with Dream
    "dllm-cache": LLADA.replace(cache="dllm-cache", block_length=8),
    "dllm-cache-dream": DREAM.replace(cache=DLLMCache(25, 2, 0.25)),
    # Sparse-dLLM, arXiv:2508.02558
    "sparse-dllm": LLADA.replace(cache="sparse-dllm", block_length=32),
    # KLASS, arXiv:2511.05664
    "klass": DecodingConfig(rule=StableThreshold(0.9, 0.01, 2), block_length=64, eos_policy="none"),
    # Prophet, arXiv:2508.19982
    "prophet": LLADA.replace(rule=EarlyAnswer()),
    # PC-Sampler, arXiv:2508.13021; score=scores.PositionWeighted(frequency) adds corpus frequencies
    "pc-sampler": LLADA.replace(score=PositionWeighted()),
    # d2Cache, arXiv:2509.23094: its decoding order alone, and together with its cache
    "d2cache-order": LLADA.replace(score=DensityWeighted()),
    "d2cache": LLADA.replace(score=DensityWeighted(), cache="d2cache"),
    # LocalLeap, arXiv:2510.07081
    "localleap": DecodingConfig(rule=LocalThreshold(0.9, 0.75, 4), block_length=32, eos_policy="none"),
    # DUS, arXiv:2506.19037
    "dus": DecodingConfig(rule=DilatedSchedule(2), block_length=32, eos_policy="none"),
    # LLaDA2.1, arXiv:2602.08676: quality mode and speed mode
    "llada2.1": DecodingConfig(rule=TokenEditing(0.95, 0.9), distribution="filtered", cache="block"),
    "llada2.1-speed": DecodingConfig(rule=TokenEditing(0.5, 0.0), distribution="filtered", cache="block"),
    # LLaDA2.2, as served by SGLang
    "llada2.2": DecodingConfig(rule=SplitEditing(0.5, 0.0), distribution="filtered", cache="block"),
    # DMax, arXiv:2604.08302
    "dmax": DecodingConfig(rule=RunEditing(0.5), cache="block"),
    # Saber, arXiv:2510.18165
    "saber": DecodingConfig(rule=Backtracking(2), eos_policy="none"),
    # WINO, arXiv:2507.18578
    "wino": DecodingConfig(rule=WideInNarrowOut(0.6, 0.9), block_length=128, eos_policy="none"),
    # P2, arXiv:2502.03540
    "p2": DecodingConfig(rule=PathPlanning(1.0), temperature=1.0, eos_policy="none"),
    # MDLM, arXiv:2406.07524; SEDD, arXiv:2310.16834; Duo, arXiv:2506.10892
    "mdlm": MDLM,
    "sedd": MDLM.replace(rule=ScoreAncestral()),
    "duo": MDLM.replace(rule=UniformState()),
    # LangFlow, arXiv:2604.11748
    "langflow": DecodingConfig(rule=EmbeddingFlow(), eos_policy="none"),
    # Diffusion-LM, arXiv:2205.14217
    "diffusion-lm": DecodingConfig(rule=VectorDenoising(), eos_policy="none"),
    # SSD-LM, arXiv:2210.17432
    "ssd-lm": DecodingConfig(rule=SimplexDenoising(), eos_policy="none"),
    # Plaid, arXiv:2305.18619
    "plaid": DecodingConfig(rule=LearnedNoise(), eos_policy="none"),
    # Ψ-samplers, arXiv:2602.21185, with the settings of its scripts: three for text, one for images
    "psi": PSI,
    "psi-rescale": PSI.replace(rule=PredictorCorrector(denoise=False, strategy="rescale", eta=0.05)),
    "psi-loop": PSI.replace(rule=PredictorCorrector(denoise=False, strategy="loop"), top_p=0.95),
    "psi-constant": PSI.replace(
        rule=PredictorCorrector(denoise=False, strategy="constant", kappa=0.95, t_on=0.5, t_off=0.1), top_p=1.0
    ),
    # BD3-LM, arXiv:2503.09573, with the first-hitting sampler of arXiv:2409.02908: one random position per forward
    "bd3-lm": DecodingConfig(rule=Quota(), score="random", temperature=1.0, cache="block"),
    # ReMDM, arXiv:2503.00307
    "remdm": REMDM,
    "remdm-rescale": REMDM.replace(rule=AncestralRemask(strategy="rescale", eta=0.015)),
    "remdm-conf": REMDM.replace(rule=AncestralRemask(strategy="conf")),
    "remdm-loop": REMDM.replace(rule=AncestralRemask(strategy="loop", eta=0.02)),
    # DiffusionGemma, as in transformers
    "diffusion-gemma": DecodingConfig(rule=RenoisedEntropyBound(), distribution="tempered", cache="block"),
    # Fast-dLLM v2, arXiv:2509.26328: sub-blocks of a block, one after another
    "fast-dllm-v2": DecodingConfig(
        rule=Threshold(0.9, strict=True), distribution="filtered", cache="block", sub_block_length=8
    ),
    # Discrete Diffusion Forcing, arXiv:2508.09192, with the shares used by most of its scripts
    "d2f": DecodingConfig(rule=Pipeline(0.9, 0.1, 0.95), cache="block"),
    # the same with at most four open blocks, as served by Diffulex
    "multi-block": DecodingConfig(rule=Pipeline(0.9, 0.1, 0.95, buffer=4), cache="block"),
    # d3LLM, arXiv:2601.07568: with LLaDA (without and with its cache), and with Dream
    "d3llm": D3LLM,
    "d3llm-prefix": D3LLM.replace(cache="prefix", refresh_interval=3),
    "d3llm-dream": D3LLM.replace(rule=EntropyPipeline(0.5, 0.1, 0.95, best_of_all=False)),
    # Nemotron-Labs-Diffusion, arXiv:2607.05722
    "nemotron": DecodingConfig(rule=Threshold(0.9), cache="block"),
    "nemotron-speculative": DecodingConfig(rule=SelfSpeculative(), cache="block"),
    # WeDLM, arXiv:2512.22737
    "wedlm": DecodingConfig(rule=Reordered(), temperature=0.2, cache="block"),
    # DreamOn, arXiv:2602.01326, with the order and filters of Dream
    "dreamon": DREAM.replace(rule=Expanding(), top_p=0.9, max_new_tokens=64),
    # DAEDAL, arXiv:2508.00819
    "daedal": DecodingConfig(rule=Lengthening(), block_length=32, eos_policy="none", max_new_tokens=2048),
    # I-DLM, arXiv:2604.11035
    "i-dlm": DecodingConfig(
        rule=Strided(4), temperature=1.0, top_k=50, top_p=0.95, distribution="filtered", cache="block"
    ),
}  # fmt: skip
PRESETS = {name: config.as_preset() for name, config in PRESETS.items()}

PRESET_NAMES += PRESETS


def preset(name: str, **overrides) -> DecodingConfig:
    """Return the configuration of a published decoder, with some fields overridden.

    Parameters
    ----------
    name : str
        One of the keys of `PRESETS`.
    **overrides
        Fields of `DecodingConfig`.

    Returns
    -------
    DecodingConfig

    Raises
    ------
    ValueError
        If there is no preset of this name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_hint(name)}")
    return PRESETS[name].replace(**overrides)


def _hint(name: object) -> str:
    """Return what to add to the message about an unknown preset."""
    if near := close_match(str(name), PRESETS):
        return f": did you mean {near!r}?"
    if str(name).partition(":")[0] in RULES:
        return f": that is a rule; pass rule={name!r}, or --rule {name} on the command line"
    some = "llada, dream, fast-dllm, klass, sdar"
    return f"; dlmkernels.PRESETS has {len(PRESETS)} of them, such as {some}. `dlmkernels generate --help` lists all"


def default_config(preset_of_family: str | None) -> DecodingConfig:
    """Return the default configuration for a model family: its preset if it has one, else a plain `DecodingConfig`."""
    return DecodingConfig() if preset_of_family is None else preset(preset_of_family)
