# SPDX-License-Identifier: Apache-2.0
"""Model families as data: how a stock class is reached into, and how a kind of checkpoint is decoded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# --- architectures: one stock transformers class each ----------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What has to be known of a stock class to forward parts of a canvas through it.

    Attributes
    ----------
    model_class : str
        The class with its language-model head.
    head : callable
        `head(model)` returns the module that maps hidden states to logits.
    position_offset : callable
        `position_offset(config)`: what the model adds to a position before its embedding table.
    family : str
        How models of this architecture are decoded where nothing else says so, a key of `FAMILIES`.
    whole_canvas : callable
        `whole_canvas(config)`: whether what a row becomes depends on all of its tokens even before attention, so that
        no part of a canvas can be forwarded alone.
    two_stacks : bool
        Whether what is decided is read by an encoder and what is open by a decoder (see `adapt.EncoderDecoderModel`).
    timed : bool
        Whether a forward is told the noise level (see `adapt.TimedModel`).
    only : tuple of str
        The families that its models can be of, where that is not any.
    module : str
        Where the class is found.
    """

    model_class: str
    head: Callable[[Any], Callable[[Tensor], Tensor]]
    position_offset: Callable[[Any], int] = lambda config: 0
    whole_canvas: Callable[[Any], bool] = lambda config: False
    family: str = "masked"
    two_stacks: bool = False
    timed: bool = False
    only: tuple[str, ...] = ()
    module: str = "transformers"

    def check_family(self, name: str) -> None:
        """Raise if models of this architecture cannot be decoded as this family."""
        if self.two_stacks and name != self.family:
            raise ValueError(f"family must be '{self.family}' for this model; got '{name}'")
        if self.only and name not in self.only:
            expected = " or ".join(f"'{family}'" for family in self.only)
            raise ValueError(f"family must be {expected} for this model; got '{name}'")

    def load_class(self) -> Any:
        return getattr(importlib.import_module(self.module, __package__), self.model_class)


def _lm_head(model):
    return model.lm_head


def _soft_capped_head(model):
    cap = model.config.text_config.final_logit_softcapping
    return lambda hidden: cap * (model.lm_head(hidden).float() / cap).tanh()


def _gemma_head(model):
    """The same where there may be no cap, in the dtype of the logits."""
    cap = model.config.final_logit_softcapping
    return model.lm_head if cap is None else lambda hidden: cap * (model.lm_head(hidden) / cap).tanh()


def _granite_head(model):
    return lambda hidden: model.lm_head(hidden) / model.config.logits_scaling


def _cohere_head(model):
    return lambda hidden: model.lm_head(hidden) * model.logit_scale


def _timed_head(model):
    return model.head


def _after_padding(config) -> int:
    return config.pad_token_id + 1


# transformers' `config.model_type` -> architecture
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _lm_head),
    "arcee": Architecture("ArceeForCausalLM", _lm_head),
    "apertus": Architecture("ApertusForCausalLM", _lm_head),
    "cohere": Architecture("CohereForCausalLM", _cohere_head),
    "cohere2": Architecture("Cohere2ForCausalLM", _cohere_head),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", _lm_head),
    "exaone4": Architecture("Exaone4ForCausalLM", _lm_head),
    "gemma": Architecture("GemmaForCausalLM", _lm_head),
    "gemma2": Architecture("Gemma2ForCausalLM", _gemma_head),
    "gemma3_text": Architecture("Gemma3ForCausalLM", _gemma_head),
    "glm": Architecture("GlmForCausalLM", _lm_head),
    "glm4": Architecture("Glm4ForCausalLM", _lm_head),
    "glm4_moe": Architecture("Glm4MoeForCausalLM", _lm_head),
    "gpt2": Architecture("GPT2LMHeadModel", _lm_head),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", _lm_head),
    "gpt_oss": Architecture("GptOssForCausalLM", _lm_head),
    "granite": Architecture("GraniteForCausalLM", _granite_head),
    "granitemoe": Architecture("GraniteMoeForCausalLM", _granite_head),
    "helium": Architecture("HeliumForCausalLM", _lm_head),
    "hunyuan_v1_dense": Architecture("HunYuanDenseV1ForCausalLM", _lm_head),
    "llada2_moe": Architecture("LLaDA2ForCausalLM", _lm_head, module=".llada2"),
    "ministral": Architecture("MinistralForCausalLM", _lm_head),
    "ministral3": Architecture("Ministral3ForCausalLM", _lm_head),
    "mistral": Architecture("MistralForCausalLM", _lm_head),
    "mixtral": Architecture("MixtralForCausalLM", _lm_head),
    "olmo": Architecture("OlmoForCausalLM", _lm_head),
    "olmo2": Architecture("Olmo2ForCausalLM", _lm_head),
    "olmo3": Architecture("Olmo3ForCausalLM", _lm_head),
    "olmoe": Architecture("OlmoeForCausalLM", _lm_head),
    "phi": Architecture("PhiForCausalLM", _lm_head),
    "phi3": Architecture("Phi3ForCausalLM", _lm_head),
    "qwen2": Architecture("Qwen2ForCausalLM", _lm_head),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", _lm_head),
    "qwen3": Architecture("Qwen3ForCausalLM", _lm_head),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", _lm_head),
    "seed_oss": Architecture("SeedOssForCausalLM", _lm_head),
    "smollm3": Architecture("SmolLM3ForCausalLM", _lm_head),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _lm_head),
    "bert": Architecture("BertForMaskedLM", head=lambda model: model.cls),
    "camembert": Architecture("CamembertForMaskedLM", _lm_head, position_offset=_after_padding),
    "eurobert": Architecture("EuroBertForMaskedLM", _lm_head),
    "modernbert": Architecture("ModernBertForMaskedLM", head=lambda model: nn.Sequential(model.head, model.decoder)),
    "roberta": Architecture("RobertaForMaskedLM", _lm_head, position_offset=_after_padding),
    "xlm-roberta": Architecture("XLMRobertaForMaskedLM", _lm_head, position_offset=_after_padding),
    # Rotary ESM counts from anywhere; with token dropout an embedding is scaled by the share of masks in its row.
    "esm": Architecture(
        "EsmForMaskedLM", _lm_head,
        position_offset=lambda config: 0 if config.position_embedding_type == "rotary" else _after_padding(config),
        whole_canvas=lambda config: config.token_dropout,
    ),
    "dlm_dit": Architecture(
        "DiTForDiffusionLM", _timed_head, family="mdlm", timed=True, module=".dit",
        only=("mdlm", "sedd", "duo", "bd3-lm", "langflow"),
    ),
    "dlm_plaid": Architecture(
        "PlaidForDiffusionLM", _timed_head, family="plaid", timed=True, module=".plaid", only=("plaid",)
    ),
    "dlm_diffusion_lm": Architecture(
        "DiffusionLM", _timed_head, family="diffusion-lm", timed=True, module=".diffusion_lm", only=("diffusion-lm",)
    ),
    "dlm_ssd_lm": Architecture(
        "SSDLMForDiffusion", _lm_head, position_offset=_after_padding, family="ssd-lm", module=".ssd_lm",
        only=("ssd-lm",),
    ),
    "diffusion_gemma": Architecture(
        "DiffusionGemmaForBlockDiffusion", _soft_capped_head, family="diffusion-gemma", two_stacks=True
    ),
}  # fmt: skip

# --- families: how a kind of checkpoint is decoded -------------------------------------------------------------------

ATTENTIONS = ("full", "block", "causal", "causal-context", "reordered")
GRIDS = ("absolute", "prompt", "both-ways")


@dataclass(frozen=True)
class Family:
    """How checkpoints of one kind are decoded; the numbers are those of the published checkpoints.

    Attributes
    ----------
    name : str
        What `load(..., family=…)` and `config.dlm_family` call it.
    logit_alignment : {"same", "shift"}
        Whether the logits of position i are found in row i or in row i - 1.
    attention : {"full", "block", "causal", "causal-context", "reordered"}
        What a position sees. full: everything. block: its own block and those before it. causal: what stands left of
        it. causal-context: decided blocks see what stands left, the open block sees them and all of itself. reordered:
        causal, as if what is decided stood before what is open.
    block_grid : {"absolute", "prompt", "both-ways"}
        Where blocks are counted from. absolute: the request's first token. prompt: the end of its prompt, which is
        one block that sees itself. both-ways: the end of its prompt, which has blocks too, only the first of them
        shorter.
    block_length : int, optional
        Length of the blocks of "block" and "causal-context" attention where the configuration does not say.
    whole_blocks : bool
        Whether the last block is decoded whole, however much of it was asked for (those of the absolute grid are).
    seeded : bool
        Whether a block's first token is the one that the last row of the context predicts.
    mask_token_id, eos_token_ids, num_tokens : int, tuple of int, int
        Of the tokenizer that the published checkpoints share: used where the configuration is silent and has this
        `vocab_size`. `num_tokens` is how many ids the tokenizer knows; the logits beyond them are never chosen.
    vocab_size : int, optional
        Number of logits of the published checkpoints.
    noise : {"mask", "uniform", "continuous"}
        What the model takes noise away from: masks, tokens drawn uniformly, or noisy embeddings.
    preset : str, optional
        What `generate` does by default: the decoder the family was published with, one of `PRESETS`. None where that is
        a fixed schedule (LLaDA, Dream, RND1, DiffuLLaMA, MDLM, SEDD): there the default is that of `DecodingConfig`,
        and the published decoder is asked for by its name.
    """

    name: str
    logit_alignment: str = "same"
    attention: str = "full"
    block_grid: str = "prompt"
    block_length: int | None = None
    whole_blocks: bool = False
    seeded: bool = False
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_tokens: int | None = None
    vocab_size: int | None = None
    noise: str = "mask"
    preset: str | None = None

    def knows_ids_of(self, config) -> bool:
        """Whether the ids written here are those of the tokenizer of a model of this configuration."""
        return self.vocab_size is not None and getattr(config, "vocab_size", None) == self.vocab_size


QWEN2_IDS: dict[str, Any] = {"eos_token_ids": (151643,), "vocab_size": 152064}
QWEN3_IDS: dict[str, Any] = {
    "mask_token_id": 151669,
    "eos_token_ids": (151645, 151643),
    "num_tokens": 151670,
    "vocab_size": 151936,
}
LLADA_IDS: dict[str, Any] = {"mask_token_id": 126336, "eos_token_ids": (126081, 126348), "vocab_size": 126464}
LLADA2_IDS: dict[str, Any] = {"mask_token_id": 156895, "eos_token_ids": (156892,), "vocab_size": 157184}

GPT2_IDS: dict[str, Any] = {"eos_token_ids": (50256,), "vocab_size": 50258}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # any bidirectional masked language model
        Family("masked"),
        # LLaDA, arXiv:2502.09992; 1.5, arXiv:2505.19223
        Family("llada", **LLADA_IDS),
        Family("llada-moe", **LLADA2_IDS),
        # Dream, arXiv:2508.15487; also Dream-Coder, DiffuCoder
        Family("dream", logit_alignment="shift", mask_token_id=151666, num_tokens=151667, **QWEN2_IDS),
        # RND1, github.com/RadicalNumerics/RND1
        Family("rnd1", logit_alignment="shift", **QWEN3_IDS),
        # MDLM, arXiv:2406.07524; SEDD, arXiv:2310.16834; Duo, arXiv:2506.10892
        Family("mdlm", mask_token_id=50257, **GPT2_IDS),
        Family("sedd", mask_token_id=50257, **GPT2_IDS),
        Family("duo", noise="uniform", **GPT2_IDS, preset="duo"),
        # LangFlow, arXiv:2604.11748
        Family("langflow", noise="continuous", eos_token_ids=(50256,), vocab_size=50257, preset="langflow"),
        # Diffusion-LM, arXiv:2205.14217
        Family("diffusion-lm", noise="continuous", preset="diffusion-lm"),
        # SSD-LM, arXiv:2210.17432
        Family("ssd-lm", noise="continuous", preset="ssd-lm"),
        # Plaid, arXiv:2305.18619
        Family("plaid", noise="continuous", preset="plaid"),
        # BD3-LM, arXiv:2503.09573: any model that denoises a block after clean ones
        Family("bd3-lm", attention="block", block_grid="absolute"),
        # the same as trained by github.com/ZHZisZZ/dllm, which pads prompts to whole blocks
        Family("a2d-bd3lm", attention="block", block_grid="both-ways"),
        # SDAR, arXiv:2510.06303
        Family("sdar", attention="block", block_grid="absolute", block_length=4, **QWEN3_IDS, preset="sdar"),
        # LLaDA2.0, arXiv:2512.15745; 2.1 has the same architecture
        Family("llada2", attention="block", block_grid="absolute", block_length=32, **LLADA2_IDS, preset="llada2"),
        # Fast-dLLM v2, arXiv:2509.26328
        Family(
            "fast-dllm-v2", logit_alignment="shift", attention="block", block_grid="absolute", block_length=32,
            seeded=True, mask_token_id=151665, eos_token_ids=(151645,), num_tokens=151666, vocab_size=152064,
            preset="fast-dllm-v2",
        ),
        # Discrete Diffusion Forcing, arXiv:2508.09192: adapters of LLaDA and Dream
        Family("d2f-llada", attention="block", block_grid="prompt", block_length=32, **LLADA_IDS, preset="d2f"),
        Family(
            "d2f-dream", logit_alignment="shift", attention="block", block_grid="prompt", block_length=32,
            mask_token_id=151666, num_tokens=151667, **QWEN2_IDS, preset="d2f",
        ),
        # d3LLM, arXiv:2601.07568: distilled from LLaDA, and from Dream and Dream-Coder
        Family("d3llm-llada", **LLADA_IDS, preset="d3llm"),
        Family(
            "d3llm-dream", logit_alignment="shift", mask_token_id=151666, num_tokens=151667, **QWEN2_IDS,
            preset="d3llm-dream",
        ),
        # Nemotron-Labs-Diffusion, arXiv:2607.05722
        Family(
            "nemotron", attention="causal-context", block_length=32, seeded=True, mask_token_id=100,
            eos_token_ids=(11,), vocab_size=131072, preset="nemotron",
        ),
        # I-DLM, arXiv:2604.11035
        Family("i-dlm", logit_alignment="shift", attention="causal", **QWEN3_IDS, preset="i-dlm"),
        # WeDLM, arXiv:2512.22737
        Family(
            "wedlm", attention="reordered", mask_token_id=151665, eos_token_ids=(151643, 151645), vocab_size=151936,
            preset="wedlm",
        ),
        # DiffusionGemma, as in transformers
        Family("diffusion-gemma", attention="causal-context", whole_blocks=True, preset="diffusion-gemma"),
        # DiffuLLaMA, DiffuGPT, arXiv:2410.17891
        Family("diffullama", logit_alignment="shift"),
    )
}  # fmt: skip
