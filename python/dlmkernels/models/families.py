# SPDX-License-Identifier: Apache-2.0
"""Model families as data: which parts of each stock class are used, and how each kind of checkpoint is decoded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# --- architectures: one stock transformers class each ----------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Facts about a stock model class that are needed to run parts of a canvas (prompt and answer) through it.

    Attributes
    ----------
    model_class : str
        Name of the class that includes the language-model head.
    head : callable
        `head(model)` returns the module or function that maps hidden states to logits.
    position_offset : callable
        `position_offset(config)` returns the number that the model adds to a position before looking up its embedding.
    family : str
        Default family of the architecture's models, a key of `FAMILIES`.
    whole_canvas : callable
        `whole_canvas(config)` returns whether a batch row's embeddings depend on all of its tokens even before
        attention, so that part of a canvas cannot be run alone.
    two_stacks : bool
        Whether an encoder reads the committed tokens and a decoder the open ones (see `adapt.EncoderDecoderModel`).
    timed : bool
        Whether the forward pass takes the noise level as input (see `adapt.TimedModel`).
    only : tuple of str
        The families allowed for the architecture's models. Empty if all are.
    module : str
        Module that contains the class.
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
        """Raise ValueError if models of this architecture cannot be decoded as the given family."""
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
    """Return the head with its optional soft cap, computed in the dtype of the logits."""
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
    # Rotary ESM only uses relative positions. With token dropout, embeddings are scaled by the row's mask ratio.
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
    """Properties of one family of checkpoints that determine how they are decoded, with the published values.

    Attributes
    ----------
    name : str
        Name of the family in `load(..., family=…)` and `config.dlm_family`.
    logit_alignment : {"same", "shift"}
        Whether the logits that predict position i are in row i ("same") or row i - 1 ("shift").
    attention : {"full", "block", "causal", "causal-context", "reordered"}
        Which positions a position attends to. "full": all. "block": its own block and earlier ones. "causal": those to
        its left. "causal-context": committed blocks are causal, and the open block attends to them and to all of
        itself. "reordered": causal, as if all committed tokens preceded the open ones.
    block_grid : {"absolute", "prompt", "both-ways"}
        Where the block grid starts. "absolute": at the request's first token. "prompt": at the end of the prompt,
        which forms a single block. "both-ways": at the end of the prompt, which is divided into blocks as well,
        counted backwards so that only its first block may be shorter.
    block_length : int, optional
        Block length for "block" and "causal-context" attention if the configuration does not give one.
    whole_blocks : bool
        Whether the last block is always decoded in full, even if fewer tokens were requested. On the absolute grid,
        blocks always are.
    seeded : bool
        Whether the first token of a block is predicted by the last row of the context.
    mask_token_id, eos_token_ids, num_tokens : int, tuple of int, int
        Mask token, end tokens and number of ids of the tokenizer that the published checkpoints share. They apply to
        models with this `vocab_size`. The mask token is used if the configuration has none, the end tokens are added to
        those of the configuration, and ids from `num_tokens` on are never chosen.
    vocab_size : int, optional
        Number of logits of the published checkpoints.
    noise : {"mask", "uniform", "continuous"}
        Noise that the model removes: mask tokens, uniformly drawn tokens, or noise on embeddings.
    preset : str, optional
        Default decoder of `generate`, a key of `PRESETS`: the one that the family was published with. None if that is a
        fixed schedule (LLaDA, Dream, RND1, DiffuLLaMA, MDLM, SEDD). The default is then that of `DecodingConfig`, and
        the published decoder must be requested by name.
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
        """Return whether this family's token ids apply to a model with the given configuration."""
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
        # BD3-LM, arXiv:2503.09573: any model that denoises one block given clean earlier ones
        Family("bd3-lm", attention="block", block_grid="absolute"),
        # BD3-LM as trained by github.com/ZHZisZZ/dllm, which pads prompts to whole blocks
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
