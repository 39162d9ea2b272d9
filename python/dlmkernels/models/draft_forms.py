# SPDX-License-Identifier: Apache-2.0
"""Configurations of block-diffusion drafters, translated from each published form to one `DraftForm`.

The published forms are DFlash and DFlash 2 (arXiv:2602.06036 and its code), DSpark (arXiv:2607.05147), the speculators
library's form of all three, and the Muse Glimmer assistant in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import fields

#: fields of a Qwen3 configuration that define a drafter's layers
OF_THE_LAYERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "hidden_act", "attention_bias", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "layer_types", "sliding_window",
)  # fmt: skip
#: class names in published checkpoints, and the kind of drafter each stands for
CLASSES = {
    "DFlashDraftModel": "dflash", "DFlash2DraftModel": "dflash2", "Qwen3DSparkModel": "dspark",
    "DSparkDraftModel": "dspark", "MuseGlimmerAssistantModel": "muse",
}  # fmt: skip
SPECULATORS = ("dflash", "dflash2", "dspark")
#: fields that change a drafter's forward pass in ways not implemented here, each with its values that have no effect
UNKNOWN_TO_US: dict[str, tuple[Any, ...]] = {
    "projector_type": (None, ""), "shift_label": (None, False), "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1, 1.0), "pure_draft_prefix_len": (None, 0), "gru_hidden_dim": (None, 0),
    "emb_dim": (None, 0), "target_hidden_size": (None,),
}  # fmt: skip
#: rotary embeddings whose frequencies depend on the sequence length
BY_LENGTH = ("dynamic", "longrope")
MOST_ROWS = 256


@dataclass(frozen=True)
class DraftForm:
    """Configuration of a drafter.

    Attributes
    ----------
    kind : {"dflash", "dflash2", "dspark", "muse"}
        Architecture of the drafter.
    layers : dict
        Fields of the Qwen3 configuration of its layers.
    block_size : int
        Number of rows in its block: the last token, followed by mask tokens.
    taps : tuple of int
        Indices, from 0, of the target's layers whose outputs the drafter sees.
    mask_token_id : int
        Mask token, in the target's vocabulary.
    from_anchor : bool
        Whether row i of the block predicts the token that follows it, so that every row yields a draft. Otherwise each
        row predicts the token at its own position, and the first row predicts nothing.
    causal : tuple of bool
        Whether attention within the block is causal, for each layer.
    embedding_scale, output_multiplier : float
        Factors applied to the embeddings and to the logits.
    softcap : float
        Soft cap on the logits; 0 for none.
    convolution : tuple of int, optional
        DFlash 2: kernel size, and number of channels that share a kernel.
    selector : tuple of int, optional
        DFlash 2: rank, and number of candidates for each position.
    markov : str, optional
        DSpark: how a row's logits depend on the preceding token: "vanilla", "gated" or "rnn". None for no dependence.
    rank : int
        DSpark: rank of that dependence.
    confidence : str, optional
        DSpark: input of its acceptance estimate: "hidden" for the hidden state, "markov" for the preceding token as
        well. None for no estimate.
    draft_vocab : int, optional
        Number of tokens that the drafter's own head covers. None if it covers the target's whole vocabulary, or the
        drafter uses the target's head.
    """

    kind: str
    layers: dict[str, Any]
    block_size: int
    taps: tuple[int, ...]
    mask_token_id: int
    from_anchor: bool
    causal: tuple[bool, ...]
    embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    softcap: float = 0.0
    convolution: tuple[int, int] | None = None
    selector: tuple[int, int] | None = None
    markov: str | None = None
    rank: int = 0
    confidence: str | None = None
    draft_vocab: int | None = None

    @property
    def drafts(self) -> int:
        """Number of tokens drafted at once."""
        return self.block_size if self.from_anchor else self.block_size - 1


def kind_of(raw: Mapping[str, Any]) -> str:
    """Return the kind of drafter that a configuration describes.

    Raises
    ------
    ValueError
        If its form is unknown.
    """
    theirs = raw.get("speculators_model_type")
    if theirs is not None:
        if theirs not in SPECULATORS:
            raise ValueError(
                f"its configuration has speculators_model_type={theirs!r}; expected one of {', '.join(SPECULATORS)}"
            )
        return theirs
    if raw.get("model_type") == "muse_glimmer_assistant":
        return "muse"
    named = raw.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        if name in CLASSES:
            return CLASSES[name]
    raise ValueError(
        f"its configuration has architectures={named!r} and no speculators_model_type, so it is not a known drafter; "
        f"expected one of {', '.join(CLASSES)}"
    )


def read_form(raw: Mapping[str, Any], num_layers: int, vocab: int, mask_token_id: int | None = None) -> DraftForm:
    """Read a drafter's configuration, for a target with `num_layers` layers and a vocabulary of `vocab` tokens.

    Raises
    ------
    ValueError
        If a field is missing, out of range or not implemented. The message names the field.
    """
    fields.check({"config.json": dict(raw)})
    kind, is_speculators = kind_of(raw), "speculators_model_type" in raw
    own = _part(raw, "dflash_config")
    of_layers = _part(raw, "transformer_layer_config") if is_speculators else raw

    def value(name: str, default: Any = None) -> Any:
        found = own.get(name)
        found = raw.get(name) if found is None else found
        return default if found is None else found

    _refuse_unknown(raw, own)
    layers = {name: of_layers[name] for name in OF_THE_LAYERS if of_layers.get(name) is not None}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if name not in layers:
            raise ValueError(f"its configuration has no {name}")
    layers.setdefault("num_key_value_heads", layers["num_attention_heads"])
    count = layers["num_hidden_layers"]
    types = layers.setdefault("layer_types", ["sliding_attention" if kind == "muse" else "full_attention"] * count)
    if not isinstance(types, list) or len(types) != count or {*types} - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"its configuration has layer_types={types!r}; expected 'full_attention' or 'sliding_attention' for each "
            f"of {count} layers"
        )
    if "sliding_attention" in types:
        window = _integer("sliding_window", layers.get("sliding_window"), 1, fields.MOST - 1)
        # A bidirectional window in transformers includes the token at distance `sliding_window`; others exclude it.
        layers["sliding_window"] = window + 1 if kind == "muse" else window
    _check_rope(layers)
    mask = value("mask_token_id", mask_token_id) if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("its configuration has no mask_token_id: pass load_drafter(…, mask_token_id=…)")
    form: dict[str, Any] = dict(
        kind=kind, layers=layers, block_size=_integer("block_size", value("block_size", 16), 2, MOST_ROWS),
        taps=_taps(raw, value, num_layers, count, is_speculators),
        mask_token_id=_integer("mask_token_id", mask, 0, vocab - 1),
        from_anchor=_flag("sample_from_anchor", value("sample_from_anchor", kind == "dspark")),
        causal=tuple(_is_causal(kind, type_, raw, value, is_speculators) for type_ in types),
        embedding_scale=_number("input_embedding_scale", value("input_embedding_scale", 1.0)),
        output_multiplier=_number("output_multiplier", value("output_multiplier", 1.0)),
        softcap=_number("final_logit_softcapping", value("final_logit_softcapping", 0.0)),
    )  # fmt: skip
    if kind == "dflash2":
        form |= _of_dflash2(value, layers["hidden_size"], is_speculators)
    if kind == "dspark":
        form |= _of_dspark(value)
    if is_speculators:
        drafted = _integer("draft_vocab_size", raw.get("draft_vocab_size", vocab), 1, vocab)
        form["draft_vocab"] = None if drafted == vocab else drafted
        if kind == "dflash2" and drafted != vocab:
            raise ValueError(
                f"its configuration has draft_vocab_size={drafted}, less than the target's vocabulary of {vocab} "
                "tokens, which is not implemented for dflash2"
            )
    return DraftForm(**form)


def _part(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = raw.get(name) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"its configuration has {name}={part!r}; expected an object")
    return part


def _refuse_unknown(raw: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that are not implemented, because ignoring them would silently give bad drafts."""
    for part in (raw, own):
        for name, without_effect in UNKNOWN_TO_US.items():
            if part.get(name) not in without_effect:
                raise ValueError(f"its configuration has {name}={part[name]!r}, which is not implemented")
        for name, given in part.items():
            if name.startswith("lilicorr") and given:
                raise ValueError(f"its configuration has {name}={given!r}, which is not implemented")


def _check_rope(layers: Mapping[str, Any]) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        rope = layers.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"its configuration has {name}={rope!r}; expected an object")
        if rope.get("rope_type", rope.get("type")) in BY_LENGTH:
            raise ValueError(
                f"its configuration has {name}={dict(rope)!r}; rotary frequencies that depend on the length are not "
                "supported"
            )


def _taps(raw: Mapping[str, Any], value, num_layers: int, count: int, is_speculators: bool) -> tuple[int, ...]:
    """Return the tapped layers of the target. The speculators form counts the embeddings as layer 0; others do not."""
    name = "aux_hidden_state_layer_ids" if is_speculators else "target_layer_ids"
    listed = raw.get(name) if is_speculators else value(name)
    said = value("num_target_layers")
    if said is not None and said != num_layers:
        raise ValueError(f"its configuration has num_target_layers={said}; this target has {num_layers} layers")
    if listed is None and is_speculators:
        raise ValueError(f"its configuration has no {name}")
    if listed is None:
        if count == 1:
            listed = [num_layers // 2]
        else:
            listed = [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"its configuration has {name}={listed!r}; expected a non-empty list of layer numbers")
    first = 1 if is_speculators else 0
    # The last layer cannot be tapped: the last hidden states that transformers returns are already normalized.
    last = num_layers - 2 + first
    if any(not isinstance(i, int) or isinstance(i, bool) or not first <= i <= last for i in listed):
        raise ValueError(
            f"its configuration has {name}={listed!r}; expected numbers from {first} to {last}, because the target has "
            f"{num_layers} layers and the last cannot be used"
        )
    return tuple(i - first for i in listed)


def _is_causal(kind: str, type_: str, raw: Mapping[str, Any], value, is_speculators: bool) -> bool:
    is_sliding = type_ == "sliding_attention"
    if kind == "muse":
        return False
    if is_speculators:
        both_ways = raw.get("sliding_window_non_causal")
        return is_sliding and not _flag(
            "sliding_window_non_causal", kind == "dflash2" if both_ways is None else both_ways
        )
    if _flag("causal_head", value("causal_head", False)):
        return True
    said = raw.get("is_causal")
    # DeepSpec's code passes is_causal=False to every layer.
    return (is_sliding and kind != "dspark") if said is None else _flag("is_causal", said)


def _of_dflash2(value, hidden: int, is_speculators: bool) -> dict[str, Any]:
    numbers = {
        name: value(name, default if is_speculators else None)
        for name, default in {
            "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16
        }.items()
    }  # fmt: skip
    for name, most in {
        "conv_kernel_size": 16, "conv_group_size": hidden, "selector_rank": fields.MOST, "selector_top_k": 64
    }.items():  # fmt: skip
        _integer(name, numbers[name], 1, most)
    if hidden % numbers["conv_group_size"]:
        raise ValueError(
            f"its configuration has conv_group_size={numbers['conv_group_size']}; expected a divisor of "
            f"hidden_size={hidden}"
        )
    return {
        "convolution": (numbers["conv_kernel_size"], numbers["conv_group_size"]),
        "selector": (numbers["selector_rank"], numbers["selector_top_k"]),
    }


def _of_dspark(value) -> dict[str, Any]:
    rank = _integer("markov_rank", value("markov_rank", 256), 0, fields.MOST)
    how = value("markov_head_type", "vanilla")
    if how not in ("vanilla", "gated", "rnn"):
        raise ValueError(f"its configuration has markov_head_type={how!r}; expected 'vanilla', 'gated' or 'rnn'")
    confidence = None
    if _flag("enable_confidence_head", value("enable_confidence_head", True)):
        confidence = (
            "markov" if _flag("confidence_head_with_markov", value("confidence_head_with_markov", True)) else "hidden"
        )
    if confidence == "markov" and rank == 0:
        raise ValueError(
            "its configuration has confidence_head_with_markov=true, which requires a markov_rank of at least 1; got 0"
        )
    return {"markov": how if rank else None, "rank": rank, "confidence": confidence}


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"its configuration has {name}={value!r}; expected an integer from {low} to {high}")
    return value


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"its configuration has {name}={value!r}; expected a finite number of at least 0")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"its configuration has {name}={value!r}; expected true or false")
    return value
