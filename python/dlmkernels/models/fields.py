# SPDX-License-Identifier: Apache-2.0
"""Validation of a checkpoint's `config.json`: which fields are used, and their allowed types and ranges.

A configuration is untrusted data. It may not select code (attention implementations, kernels, other files to read), nor
describe a model larger than its weights, which could exhaust memory or take unbounded time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .checkpoint import Shapes

#: Fields that select code, files or devices, or that create lists of any length. Only the user may set them.
UNHEEDED = {
    "auto_map", "custom_generate", "custom_pipelines", "name_or_path", "transformers_weights", "configuration_files",
    "device_map", "device_mesh", "tp_plan", "tp_size", "torchscript", "compression_config",
    "num_labels", "id2label", "label2id", "problem_type",
}  # fmt: skip
#: Further fields of this kind, including ones that future versions of transformers may add.
CHOOSES_CODE = re.compile(r"_|.*(implementation|kernel|fusion|distributed|remote_code)")
#: Quantizers that only use installed libraries. The others in transformers download kernels from the Hub.
LOCAL_QUANTIZERS = (
    "aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit",
    "compressed-tensors", "gptq", "higgs", "hqq", "quanto", "quark", "spqr", "torchao", "vptq",
)  # fmt: skip
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

LAYERS = {"num_hidden_layers", "n_layers", "n_layer", "n_blocks"}
#: Fields that are a dimension of some weight, or count parts of such a dimension (heads, for example).
SIZES = {
    "vocab_size", "embedding_size", "hidden_size", "d_model", "n_embd", "intermediate_size", "mlp_hidden_size",
    "n_inner", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "n_kv_heads", "head_dim",
    "num_experts", "n_routed_experts", "num_local_experts", "num_shared_experts", "n_shared_experts",
    "moe_intermediate_size", "expert_intermediate_size", "dense_intermediate_size", "shared_expert_intermediate_size",
    "hidden_dim", "cond_dim",
    "global_head_dim", "num_global_key_value_heads", "n_positions", "type_vocab_size", "first_k_dense_replace",
}  # fmt: skip
#: Integer fields that no weight's shape reveals.
COUNTS = {
    "max_position_embeddings", "max_sequence_length", "model_length", "num_experts_per_tok", "top_k_experts",
    "sliding_window", "local_attention", "canvas_length", "decoder_sparse_step", "n_group", "topk_group",
    "original_max_position_embeddings", "max_window_layers", "global_attn_every_n_layers",
}  # fmt: skip
REALS = {
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rope_theta", "attention_dropout", "mlp_ratio",
    "initializer_range", "routed_scaling_factor", "partial_rotary_factor", "factor",
}  # fmt: skip
#: Fields that must be at least 1. In others, 0 means "none".
NEEDED = {
    "vocab_size", "hidden_size", "hidden_dim", "cond_dim", "d_model", "n_embd", "num_attention_heads", "n_heads",
    "n_head", "num_key_value_heads", "n_kv_heads", "max_position_embeddings", "max_sequence_length", "model_length",
    "n_positions",
}  # fmt: skip
MOST_LAYERS, MOST = 10_000, 2**31 - 1
#: Most weights that one element of a quantized checkpoint can hold: 2 bits each in 64 bits.
PACKED = 32


def heeded(raw: Mapping[str, Any], config_class: type | None = None) -> dict[str, Any]:
    """Return the fields of a configuration that may be used, filtering nested configurations likewise.

    If `config_class` is given, names of its attributes and methods that are not fields are dropped as well.
    """
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if name in UNHEEDED or CHOOSES_CODE.match(name) or _is_no_field(name, config_class):
            continue
        if name == "per_layer_config" and value is not None:
            fields[name] = _by_layer(value)
            continue
        inner = name.endswith("_config") and name != "quantization_config" and isinstance(value, Mapping)
        fields[name] = heeded(value) if inner else value
    return fields


def _by_layer(value: Any) -> dict[str, Any]:
    """Filter the fields that apply to single layers, which are given by layer number."""
    is_number = re.compile(r"\d{1,4}").fullmatch  # below MOST_LAYERS
    if not isinstance(value, Mapping) or not all(
        is_number(str(layer)) and isinstance(own, Mapping) for layer, own in value.items()
    ):
        raise ValueError(
            f"its configuration has per_layer_config={value!r}; expected an object that maps layer numbers to fields"
        )
    return {layer: heeded(own) for layer, own in value.items()}


def _is_no_field(name: str, config_class: type | None) -> bool:
    """Return whether the name is an attribute of the class that is not a field (a method, property or constant)."""
    if config_class is None or name in field_names(config_class):
        return False
    return hasattr(config_class, name)


def field_names(config_class: type) -> set[str]:
    """Return the names of all fields of a transformers configuration class, aliases included."""
    found = {"rope_theta", "rope_scaling", "torch_dtype"} | set(getattr(config_class, "attribute_map", {}))
    if dataclasses.is_dataclass(config_class):
        return found | {field.name for field in dataclasses.fields(config_class)}
    for base in config_class.__mro__:  # before transformers 5.4
        code = getattr(vars(base).get("__init__"), "__code__", None)
        if code is not None:
            found |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return found


def check(raw: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, if a field has the wrong type or is out of range."""
    for name, value in _fields(raw):
        leaf = name.rpartition(".")[2]
        if leaf in LAYERS:
            _check_number(name, value, 1, MOST_LAYERS)
        elif leaf in SIZES or leaf in COUNTS:
            # some configurations use -1 for "none"
            _check_number(name, value, 1 if leaf in NEEDED else -1, MOST)
        elif leaf.endswith("_token_id"):
            _check_ids(name, value)
        elif leaf == "layer_types" and value is not None:
            if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
                raise ValueError(f"its configuration has {name}={value!r:.200}; expected a list of strings")
        elif leaf in ("dtype", "torch_dtype"):
            if value is not None and str(value).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"its configuration has {name}={value!r}; expected one of {', '.join(DTYPES)}")
        elif leaf in REALS and not isinstance(value, (int, float, type(None))):
            raise ValueError(f"its configuration has {name}={value!r}; expected a number")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"its configuration has {name}={value}; expected a finite number")


def ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are token ids."""
    return {name: value for name, value in raw.items() if name.endswith("_token_id")}


def _fields(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value of every field. The names of nested fields are joined by dots."""
    for name, value in raw.items():
        if (
            isinstance(value, Mapping)
            and not name.endswith("_token_id")
            and name not in LAYERS | SIZES | COUNTS | REALS
        ):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if value is None or value is False:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"its configuration has {name}={value!r}; expected an integer")
    if not least <= value <= most:
        raise ValueError(f"its configuration has {name}={value}; expected {least} to {most}")


def _check_ids(name: str, value: Any) -> None:
    several = name.endswith("eos_token_id") and isinstance(value, list)
    for token in value if several else [value]:
        if token is not None and (not isinstance(token, int) or isinstance(token, bool) or not -1 <= token <= MOST):
            raise ValueError(f"its configuration has {name}={value!r}; expected token ids")


def check_quantizer(raw: Mapping[str, Any], chosen: Any) -> None:
    """Raise ValueError if the configuration asks for a quantizer that may bring its own code.

    `chosen` is the user's `quantization_config`. If it is not None, any quantizer is allowed.
    """
    for name, value in raw.items():
        if name == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            if (
                isinstance(value, Mapping)
                and method is None
                and (value.get("load_in_8bit") or value.get("load_in_4bit"))
            ):
                method = "bitsandbytes"
            if method not in LOCAL_QUANTIZERS and chosen is None:
                raise ValueError(
                    f"its configuration asks for the quantizer {method!r}. By default, load only uses quantizers that "
                    f"are installed libraries ({', '.join(LOCAL_QUANTIZERS)}). To use another, pass "
                    "quantization_config=…"
                )
        elif isinstance(value, Mapping):
            check_quantizer(value, chosen)


def check_sizes(raw: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise ValueError, naming the field, if a configuration describes a larger model than its weights' shapes."""
    layers = 1 + max((int(i) for name in shapes for i in re.findall(r"\.(\d{1,9})\.", name)[:1]), default=-1)
    largest = max((n for shape in shapes.values() for n in shape), default=0)
    largest *= PACKED if _is_quantised(raw) else 1
    for name, value in _fields(raw):
        leaf = name.rpartition(".")[2]
        most = layers if leaf in LAYERS else largest if leaf in SIZES else None
        if most is not None and isinstance(value, int) and value > most:
            of = f"{layers} layers" if leaf in LAYERS else f"no dimension above {largest}"
            raise ValueError(f"its configuration has {name}={value}, but its weights have {of}")


def check_model(model, raw: Mapping[str, Any], names: Mapping[str, str], shapes: Shapes) -> None:
    """Raise ValueError if `model`, built on the meta device, does not match the shapes of the checkpoint's weights.

    `names` maps the weights' names in the checkpoint to those in the model. Weights that have to be assembled from
    several are left to transformers to check; here, only the total number of elements is compared.
    """
    wanted = {name: tuple(x.shape) for name, x in (*model.named_parameters(), *model.named_buffers())}
    if not _is_quantised(raw):
        wrong = [
            f"{names[name]} {list(shape)}, expected {list(wanted[names[name]])}"
            for name, shape in shapes.items()
            if names[name] in wanted and wanted[names[name]] != shape
        ]
        if wrong:
            raise ValueError(f"wrong shapes: {'; '.join(sorted(wrong))}")
    described = sum(x.numel() for x in model.parameters())
    stored = sum(math.prod(shape) for shape in shapes.values()) * (PACKED if _is_quantised(raw) else 1)
    if described > 2 * stored + 2**20:
        raise ValueError(
            f"its configuration describes a model of {described} parameters, but its weights have at most {stored}"
        )


def _is_quantised(raw: Mapping[str, Any]) -> bool:
    return any(name.rpartition(".")[0].endswith("quantization_config") for name, _ in _fields(raw))


def longest_canvas(config) -> int | None:
    """Return the largest number of positions that the position encoding supports, or None if it is not configured.

    A rotary encoding scaled by a factor supports that many times the original training length. Some configurations give
    the original length in `max_position_embeddings`, others the scaled one; both are handled.
    """
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if length is None or not isinstance(rope, Mapping):
        return length
    by_layer = [inner for inner in rope.values() if isinstance(inner, Mapping)]
    stretched = ("yarn",) if by_layer else ("yarn", "linear", "dynamic")
    for inner in by_layer or [rope]:
        if inner.get("rope_type", inner.get("type")) in stretched and inner.get("factor"):
            first = inner.get("original_max_position_embeddings") or length
            length = max(length, int(first * inner["factor"]))
    return length
