# SPDX-License-Identifier: Apache-2.0
"""Published checkpoint forms: translate a `config.json` to a family, a stock configuration and names of weights.

No code that ships with a checkpoint is executed. Its configuration is read as data and translated here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightRenaming

from . import fields as config_fields
from .families import ARCHITECTURES, FAMILIES, Family

#: Fields with the same meaning in every configuration.
COMMON = (
    "torch_dtype", "dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id",
    "initializer_range", "tie_word_embeddings",
)  # fmt: skip
#: Fields of Llama-like configurations.
DECODER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_dropout", "head_dim",
)  # fmt: skip
EXPERTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers",
    "decoder_sparse_step",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Instructions for loading a checkpoint: stock class, configuration and renaming of weights.

    Attributes
    ----------
    family : Family
        Family of the model.
    model_class : type
        Stock class that the weights are loaded into.
    config : PreTrainedConfig
        Configuration of the stock class.
    key_mapping : dict
        Patterns of weight names and their replacements, applied in order.
    raw : mapping
        Configuration of the checkpoint, with the user's changes.
    left_out : str, optional
        Pattern that matches the start of the names of weights that are not loaded.
    """

    family: Family
    model_class: Any
    config: PreTrainedConfig
    key_mapping: dict[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    left_out: str | None = None

    def leaves_out(self, name: str) -> bool:
        """Return whether the weight of this name is skipped because it is not part of the language model."""
        return self.left_out is not None and re.match(self.left_out, name) is not None


@dataclass(frozen=True)
class Form:
    """One published form of `config.json`.

    Attributes
    ----------
    family : str or callable
        Name of the family, or a function that determines it from the raw configuration, or raises `Question`.
    translate : callable
        Maps the raw configuration to (stock model type, fields of its configuration).
    key_mapping : dict
        Patterns of weight names and their replacements, applied in order.
    left_out : str, optional
        Pattern that matches the start of the names of weights that are not loaded, such as those of vision towers.
    """

    family: str | Callable[[Mapping], str]
    translate: Callable[[Mapping], tuple[str, dict[str, Any]]]
    key_mapping: dict[str, str] = field(default_factory=dict)
    left_out: str | None = None


class Question(ValueError):
    """Raised if the configuration fits several families, so that the user must choose one."""


class UnknownField(TypeError):
    """Raised for a keyword that is not a field of the configuration."""


def renamed(names: Iterable[str], key_mapping: Mapping[str, str]) -> dict[str, str]:
    """Map the names of a checkpoint's weights to their names in the stock class."""
    renamings = [WeightRenaming(old, new) for old, new in key_mapping.items()]
    found = {}
    for name in names:
        found[name] = name
        for renaming in renamings:
            found[name], _ = renaming.rename_source_key(found[name])
    return found


def pick(raw: Mapping, *names: str) -> dict[str, Any]:
    """Return the named fields that are present and not None."""
    return {name: raw[name] for name in names if raw.get(name) is not None}


def require(raw: Mapping, **allowed: Any) -> None:
    """Raise ValueError if a field is present with a value other than those that the stock class implements.

    None, False and 0 count as equal.
    """
    for name, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        value = raw.get(name, values[0])
        if value not in values and (value or None) not in [v or None for v in values]:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"its configuration has {name}={value!r}, which is not supported (expected {expected})")


def need(raw: Mapping, *names: str) -> list:
    """Return the values of the named fields, or raise ValueError if some are missing."""
    if absent := [name for name in names if raw.get(name) is None]:
        raise ValueError(f"its configuration lacks {', '.join(absent)}")
    return [raw[name] for name in names]


# --- forms -----------------------------------------------------------------------------------------------------------


def _llada(raw: Mapping):
    """Translate LLaDA-8B's configuration, which describes a Llama with OLMo's field names."""
    require(
        raw, block_type="llama", layer_norm_type="rms", activation_type="silu", rope=True, alibi=False,
        attention_layer_norm=False, include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False,
        input_emb_norm=False, scale_logits=False, block_group_size=(1,), layer_norm_with_affine=True,
    )  # fmt: skip
    hidden, layers, heads, vocab = need(raw, "d_model", "n_layers", "n_heads", "vocab_size")
    kv_heads = raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads)
    return "llama", {
        "vocab_size": raw.get("embedding_size") or vocab,
        "hidden_size": hidden,
        "intermediate_size": raw.get("mlp_hidden_size") or raw.get("mlp_ratio", 4) * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": raw.get("max_sequence_length", 1024),
        "rope_theta": raw.get("rope_theta", 10000.0),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": raw.get("weight_tying", True),
    }


def _llada_as_llama(raw: Mapping):
    """Translate a LLaDA configuration with Llama's field names, as in LLaDA-V's language model (arXiv:2505.16933)."""
    require(raw, attention_bias=False, mlp_bias=False, hidden_act="silu", pretraining_tp=(1,))
    return "llama", pick(raw, *DECODER)


LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.": "model.layers.",
    r"\.(q_proj|k_proj|v_proj)\.": r".self_attn.\1.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",
    r"\.up_proj\.": ".mlp.up_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ff_norm\.": ".post_attention_layernorm.",
}


def _llada_moe(raw: Mapping):
    """Translate LLaDA-MoE: Qwen3-MoE with OLMoE's field names, and without normalizing the top-k router weights."""
    require(
        raw, qk_layernorm=True, clip_qkv=None, partial_rotary_factor=(1, None), shared_expert_intermediate_size=None,
        moe_router_enable_expert_bias=False, moe_router_score_function=("softmax", None), norm_topk_prob=False,
        routed_scaling_factor=(1, None), attention_bias=False, hidden_act="silu",
    )  # fmt: skip
    layers, expert_size = need(raw, "num_hidden_layers", "expert_intermediate_size")
    is_moe = raw.get("moe_layer_freq") or [1] * layers
    return "qwen3_moe", pick(raw, *DECODER, *EXPERTS) | {
        "moe_intermediate_size": expert_size,
        "intermediate_size": raw.get("dense_intermediate_size") or expert_size,
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "norm_topk_prob": False,
        "mlp_only_layers": [i for i, moe in enumerate(is_moe) if not moe],
    }


def _dream(raw: Mapping):
    require(raw, use_sliding_window=False)
    return "qwen2", pick(raw, *DECODER)


def _rnd1(raw: Mapping):
    """Translate RND1. Fields missing from the file default to the published checkpoint's, as in its own class."""
    require(raw, attention_bias=False, use_sliding_window=False, decoder_sparse_step=1)
    defaults = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True,
    }  # fmt: skip
    fields = pick(raw, *DECODER, *EXPERTS)
    return "qwen3_moe", defaults | {name: value for name, value in fields.items() if value is not False}


def _sdar(raw: Mapping):
    require(raw, use_sliding_window=False, attention_bias=False)
    return "qwen3", pick(raw, *DECODER)


def _sdar_moe(raw: Mapping):
    require(raw, use_sliding_window=False, attention_bias=False)
    return "qwen3_moe", pick(raw, *DECODER, *EXPERTS)


def _sdar_family(raw: Mapping) -> str:
    """Tell SDAR, with blocks of 4 to 64 tokens, from strictly causal I-DLM models, with blocks of up to 3."""
    block = raw.get("block_size")
    if block is None:
        raise Question(
            "its configuration has SDAR's form but no block_size, so it may be a block-causal SDAR or a strictly "
            "causal I-DLM. Pass family='sdar' or family='i-dlm'"
        )
    return "sdar" if block >= 4 else "i-dlm"


def _a2d(stock: str):
    """Return the translation for stock models that dllm converted; their configurations do not give the family."""

    def translate(raw: Mapping):
        fields = {key: value for key, value in raw.items() if key not in COMMON}
        return stock, fields

    return translate


def _a2d_family(raw: Mapping) -> str:
    raise Question(
        "its configuration does not say how it was trained: pass family='masked' (trained as MDLM), or "
        "family='a2d-bd3lm' and then block_length=… to generate"
    )


def _fast_dllm_v2(raw: Mapping):
    require(raw, use_sliding_window=False)
    return "qwen2", pick(raw, *DECODER)


def _llada2(raw: Mapping):
    require(
        raw, use_bias=False, use_qk_norm=True, norm_head=False, norm_topk_prob=(True, None), use_sliding_window=False,
        score_function=("sigmoid", None), moe_router_enable_expert_bias=(True, None),
    )  # fmt: skip
    shared = raw.get("num_shared_experts") or 0
    if shared < 1:
        raise ValueError(f"its configuration has num_shared_experts={shared}; expected at least 1")
    rotary, factor = raw.get("rotary_dim"), raw.get("partial_rotary_factor", 0.5)
    if rotary is not None and rotary != int(raw["head_dim"] * factor):
        raise ValueError(
            f"its configuration has rotary_dim={rotary}, which contradicts partial_rotary_factor={factor} and "
            f"head_dim={raw['head_dim']}"
        )
    names = ("moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor",
             "first_k_dense_replace")  # fmt: skip
    return "llada2_moe", pick(raw, *DECODER, *names) | {
        "n_routed_experts": raw["num_experts"],
        "n_shared_experts": shared,
        "attention_bias": bool(raw.get("use_qkv_bias", False)),
        "partial_rotary_factor": factor,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "num_mtp_layers": 0,
    }


def _nemotron(raw: Mapping):
    require(raw, dlm_paradigm=("block_diff", "bidirectional", None), attention_bias=False, mlp_bias=False,
            sliding_window=None)  # fmt: skip
    return "ministral3", pick(raw, *DECODER)


NEMOTRON_KEYS = {r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."}


def _wedlm(raw: Mapping):
    """Translate WeDLM: Qwen2.5 (biases, no query and key norms) or Qwen3 (query and key norms, no biases)."""
    require(raw, use_sliding_window=False)
    norms, biases = bool(raw.get("qk_norm", False)), bool(raw.get("attention_bias", True))
    if norms == biases:
        raise ValueError(
            f"its configuration has qk_norm={norms} and attention_bias={biases}; expected exactly one of them to be set"
        )
    return "qwen3" if norms else "qwen2", pick(raw, *DECODER)


#: DiffuLLaMA and DiffuGPT: some checkpoints were saved from a wrapper with other names. Key: stock model type.
WRAPPED_KEYS = {
    "gpt2": {r"^denoise_model\.": "transformer.", r"^embed_tokens\.": "transformer.wte."},
    "llama": {r"^denoise_model\.": "model.", r"^embed_tokens\.": "model.embed_tokens."},
}


def _dit(raw: Mapping, defaults: Mapping[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    """Translate a model of `models.dit` published for transformers, given the defaults of its configuration class."""
    require(raw, causal=(False, None), adaln=True)
    sizes = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_dim", "cond_dim": "cond_dim",
        "num_hidden_layers": "n_blocks", "num_attention_heads": "n_heads", "max_position_embeddings": "model_length",
    }  # fmt: skip
    return "dlm_dit", {ours: raw.get(theirs, defaults.get(theirs)) for ours, theirs in sizes.items()} | fields


#: Defaults of the published configuration classes of MDLM, BD3-LM and Duo.
DIT_DEFAULTS = {
    "vocab_size": 50258, "hidden_dim": 768, "cond_dim": 129, "n_blocks": 12, "n_heads": 12, "model_length": 1024,
}  # fmt: skip
BERT_VOCABULARY, BERT_MASK = 30522, 103


def _last_is_mask(raw: Mapping) -> dict[str, Any]:
    """Return the mask token of MDLM and BD3-LM: the last id, or BERT's own mask token with BERT's tokenizer."""
    vocab = raw.get("vocab_size", DIT_DEFAULTS["vocab_size"])
    return {"mask_token_id": BERT_MASK if vocab == BERT_VOCABULARY else vocab - 1}


def _mdlm(raw: Mapping):
    time = "sigma" if raw.get("time_conditioning") else "none"
    return _dit(raw, DIT_DEFAULTS, time=time, **_last_is_mask(raw) | pick(raw, "mask_token_id"))


def _bd3lm(raw: Mapping):
    """Translate BD3-LM. Without `cross_attn` it is the MDLM model that training started from, and has no blocks."""
    require(raw, time_conditioning=False)
    fields = _last_is_mask(raw) | pick(raw, "mask_token_id")
    if not raw.get("cross_attn", True):
        return _dit(raw, DIT_DEFAULTS, time="none", block_size=None, **fields)
    return _dit(raw, DIT_DEFAULTS, time="none", block_size=raw.get("block_size", 1), **fields)


def _bd3lm_family(raw: Mapping) -> str:
    return "bd3-lm" if raw.get("cross_attn", True) else "mdlm"


def _duo(raw: Mapping):
    return _dit(raw, DIT_DEFAULTS | {"cond_dim": 128}, time="sigma")


def _langflow(raw: Mapping):
    require(raw, use_bias=True)
    defaults = {
        "vocab_size": 50257, "hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12, "model_length": 1024
    }  # fmt: skip
    names = {
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }
    sizes = {name: names.get(name, name) for name in ("vocab_size", "hidden_size", "cond_dim", *names)}
    return "dlm_dit", {
        **{ours: raw.get(theirs, defaults[theirs]) for ours, theirs in sizes.items()},
        **pick(raw, "gumbel_loc", "gumbel_scale", "gumbel_cutoff"),
        "self_conditioning": raw.get("self_conditioning", True),
        "normalized_embedding": raw.get("use_normalized_embedding", True),
        "time": "gamma", "head": "flow", "noise": "gumbel",
    }  # fmt: skip


def _sedd(raw: Mapping):
    """Translate SEDD's nested training settings. Its vocabulary is the tokenizer's, followed by the mask token."""
    (tokens,) = need(raw, "tokens")
    model, graph, noise = (raw[name] for name in SEDD_PARTS)
    require(graph, type="absorb")
    require(noise, type="loglinear")
    require(model, scale_by_sigma=True)
    hidden, cond, layers, heads, length = need(model, "hidden_size", "cond_dim", "n_blocks", "n_heads", "length")
    if not isinstance(tokens, int) or not 0 < tokens < config_fields.MOST:
        raise ValueError(f"its configuration has tokens={tokens!r}; expected the size of the vocabulary")
    return "dlm_dit", {
        "vocab_size": tokens + 1, "hidden_size": hidden, "cond_dim": cond, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": length, "mask_token_id": tokens, "head": "score",
    }  # fmt: skip


#: Parts of SEDD's configuration, which identify it because it has no model type.
SEDD_PARTS = ("model", "graph", "noise")
DIT_KEYS = {r"^backbone\._orig_mod\.": "backbone."}
#: SEDD's weights have no prefix.
SEDD_KEYS = {r"^(vocab_embed|sigma_map|rotary_emb|blocks|output_layer)\.": r"backbone.\1."}
#: Weights of LLaVA-like models that are not part of the language model.
VISION = r"(model\.)?(vision_tower|vision_resampler|mm_projector|image_newline)\b"

#: Key: the file's `model_type`, extended where two forms share one (see `form_of`).
FORMS: dict[str, Form] = {
    "llada": Form("llada", _llada, LLADA_KEYS),
    "llada, Llama's names": Form("llada", _llada_as_llama),
    # LaViDa, arXiv:2505.16839, and LLaDA-V: the language models
    "llava_llada": Form("llada", _llada, LLADA_KEYS, VISION),
    "llava_llada, Llama's names": Form("llada", _llada_as_llama, {}, VISION),
    # as saved by github.com/ZHZisZZ/dllm
    "fastdllm_llada": Form("llada", _llada, LLADA_KEYS),
    "fastdllm_dream": Form("dream", _dream),
    "llada21_moe": Form("llada2", _llada2),
    "lladamoe": Form("llada-moe", _llada_moe),
    "Dream": Form("dream", _dream),
    "rnd1": Form("rnd1", _rnd1),
    "sdar": Form(_sdar_family, _sdar),
    "sdar_moe": Form("sdar", _sdar_moe),
    "llada2_moe": Form("llada2", _llada2),
    "Fast_dLLM_Qwen": Form("fast-dllm-v2", _fast_dllm_v2),
    "wedlm": Form("wedlm", _wedlm),
    "nemotron_labs_diffusion": Form("nemotron", _nemotron, NEMOTRON_KEYS),
    "mdlm": Form("mdlm", _mdlm, DIT_KEYS),
    "bd3lm": Form(_bd3lm_family, _bd3lm, DIT_KEYS),
    "DUO": Form("duo", _duo, DIT_KEYS),
    "LangFlow": Form("langflow", _langflow, DIT_KEYS),
    "sedd": Form("sedd", _sedd, SEDD_KEYS),
    "a2d-llama": Form(_a2d_family, _a2d("llama")),
    "a2d-qwen2": Form(_a2d_family, _a2d("qwen2")),
    "a2d-qwen3": Form(_a2d_family, _a2d("qwen3")),
}


def form_of(raw: Mapping) -> Form | None:
    """Return the published form of a raw configuration, or None if it has none (a stock or unknown model type)."""
    model_type = raw.get("model_type")
    if model_type is None and all(isinstance(raw.get(part), Mapping) for part in SEDD_PARTS):
        model_type = "sedd"
    if not isinstance(model_type, str):
        return None
    if raw.get("dlm_family") and model_type in ARCHITECTURES:
        return None  # loaded by `load` and saved by transformers
    # LLaDA-8B and LLaDA-MoE share a model type, and LLaDA-8B's configuration has two sets of field names.
    if model_type == "llada" and (raw.get("num_experts") or 0) > 0:
        model_type = "lladamoe"
    elif "d_model" not in raw and f"{model_type}, Llama's names" in FORMS:
        model_type += ", Llama's names"
    return FORMS.get(model_type)


def known_types() -> str:
    return ", ".join(sorted({*ARCHITECTURES, *(name.partition(",")[0] for name in FORMS)}))


def plan(raw: Mapping, family: str | None = None, changes: Mapping[str, Any] | None = None) -> Plan:
    """Determine how to load a checkpoint from its raw configuration.

    Parameters
    ----------
    raw : mapping
        Contents of `config.json`.
    family : str, optional
        A key of `FAMILIES`. If None, it is taken from the configuration.
    changes : mapping, optional
        Fields that override the file's, by their names in the file or in the stock configuration.

    Raises
    ------
    UnknownField
        If a change does not name a field.
    ValueError
        If the model type is unknown, the configuration asks for something that the stock class does not implement, a
        field has an invalid value, or the configuration fits several families.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    changes = changes or {}
    raw = config_fields.heeded(raw) | {name: value for name, value in changes.items() if name in raw}
    config_fields.check({**raw, **changes})
    for name in ("block_size", "bd_size"):
        block = raw.get(name)
        if block is not None and (not isinstance(block, int) or block < 1):
            raise ValueError(f"its configuration has {name}={block!r}; expected an integer of at least 1")
    form = form_of(raw)
    if form is None:
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ValueError(
                f"its configuration has model_type={model_type!r}; expected one of {known_types()}. Load other models "
                "with their own class and pass them to dlmkernels.generate"
            )
        name = family or raw.get("dlm_family") or ARCHITECTURES[model_type].family
        ARCHITECTURES[model_type].check_family(name)
        fields: dict[str, Any] = dict(raw)
        key_mapping, left_out = WRAPPED_KEYS.get(model_type, {}) if name == "diffullama" else {}, None
    else:
        name = family or (form.family if isinstance(form.family, str) else form.family(raw))
        model_type, fields = form.translate(raw)
        # Forms name the block length differently; here it has one name.
        blocks = {"block_size": raw.get("block_size") or raw.get("bd_size")}
        fields = pick(raw, *COMMON) | pick(blocks, "block_size") | fields
        key_mapping, left_out = form.key_mapping, form.left_out
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"its configuration has dlm_family={name!r}; expected one of {', '.join(FAMILIES)}")
    model_class = ARCHITECTURES[model_type].load_class()
    config_class = model_class.config_class
    fields = _changed(fields, changes, raw, config_class)
    fields.pop("model_type", None)
    fields.pop("architectures", None)
    config = config_class.from_dict(config_fields.heeded(fields, config_class))
    config.dlm_family = name
    if FAMILIES[name].knows_ids_of(config) and getattr(config, "mask_token_id", None) is None:
        config.mask_token_id = FAMILIES[name].mask_token_id
    return Plan(FAMILIES[name], model_class, config, key_mapping, {**raw, **fields}, left_out)


def _changed(fields: dict[str, Any], changes: Mapping, raw: Mapping, config_class: Any) -> dict[str, Any]:
    """Apply the user's changes to the fields of a stock configuration, including those inside its `text_config`."""
    inner = getattr(config_class, "sub_configs", {}).get("text_config")
    names = config_fields.field_names(config_class) | {"mask_token_id", "block_size"}
    inner_names = set() if inner is None else config_fields.field_names(inner)
    for name, value in changes.items():
        if name in names:
            fields = fields | {name: value}
        elif name in inner_names:
            fields = fields | {"text_config": dict(fields.get("text_config") or {}) | {name: value}}
        elif name not in raw:
            near = difflib.get_close_matches(name, names | inner_names, 3)
            raise UnknownField(
                f"load got an unexpected keyword '{name}': neither an argument of from_pretrained nor a field of "
                f"{config_class.__name__}" + (f". Did you mean {', '.join(near)}?" if near else "")
            )
    return fields
