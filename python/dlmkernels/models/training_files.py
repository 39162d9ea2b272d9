# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints of SEDD, MDLM, BD3-LM and Duo (pickles of weights and moving averages), and similar files.

A training checkpoint has no configuration, so the model's sizes are inferred from the weights. It also contains objects
of the training program (settings, a tokenizer), so torch's own safe loading rejects it. Here, only tensors, numbers,
text, lists and dicts are read. Everything else is replaced by an inert placeholder, and no other code is looked up or
called. Diffusion-LM, SSD-LM and Plaid publish pickles that are read in the same way.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .published import Plan, plan

SUFFIXES = (".ckpt", ".pth", ".pt")
#: `model_type` of the published form with equivalent fields (SEDD's has none), by family
MODEL_TYPES = {"mdlm": "mdlm", "bd3-lm": "bd3lm", "duo": "DUO", "sedd": None}
PREFIX = re.compile(r"^(backbone\.|module\.|_orig_mod\.)+")


class Nothing:
    """Placeholder for an object of a class that is not read. It ignores everything that a pickle does with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Nothing:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


#: The functions and classes needed to restore tensors.
READ = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves only what is needed to restore tensors, and replaces everything else by `Nothing`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"):
            return getattr(torch, name)
        return READ.get((module, name), Nothing)


def _pickle_module() -> types.ModuleType:
    """Return a substitute for the `pickle` module, to be passed to `torch.load`."""
    module = types.ModuleType("pickle")
    module.Unpickler = _Unpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return module


def read_training_file(path: str) -> dict[str, Any]:
    """Return the dict stored in a training checkpoint, with its tensors on the CPU.

    Raises
    ------
    ValueError
        If the file cannot be read or contains something other than a dict.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(("/constants.pkl", ".py")) for name in archive.namelist()):
                raise ValueError("it contains a TorchScript program, which is not supported; expected a dict")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_pickle_module())
    except Exception as error:  # a damaged pickle can raise any kind of error
        raise ValueError(f"it cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must contain a dict; got {type(content).__name__}")
    return content


def weights_of(content: Mapping[str, Any], averaged: bool = True) -> dict[str, Tensor]:
    """Return the weights by their names without prefixes, or their moving averages if `averaged` and the file has them.

    Raises
    ------
    ValueError
        If there are no weights, or the averages do not match the parameters.
    """
    named = content.get("state_dict", content.get("model", content))
    if not isinstance(named, Mapping) or not any(isinstance(w, Tensor) for w in named.values()):
        raise ValueError("it contains no weights; expected tensors under 'state_dict' or 'model', or at the top level")
    tensors = {PREFIX.sub("", str(name)): w for name, w in named.items() if isinstance(w, Tensor)}
    weights = {name: w for name, w in tensors.items() if re.match("vocab_embed|sigma_map|blocks|output_layer", name)}
    ema = content.get("ema")
    if not averaged or not isinstance(ema, Mapping):
        return weights | {name: w for name, w in tensors.items() if name == "rotary_emb.inv_freq"}
    averages = ema.get("shadow_params")
    if not isinstance(averages, list) or [w.shape for w in averages] != [w.shape for w in weights.values()]:
        raise ValueError("its moving averages (ema) do not match the parameters; expected one for each, in their order")
    return dict(zip(weights, averages)) | {n: w for n, w in tensors.items() if n == "rotary_emb.inv_freq"}


def plan_of(weights: Mapping[str, Tensor], family: str | None, changes: Mapping[str, Any]) -> Plan:
    """Determine how to load a training checkpoint, from the shapes of its weights and the user's `changes`.

    Raises
    ------
    ValueError
        If the family is not one with such files, or a required field can be found neither in the weights nor in
        `changes`.
    """
    if family not in MODEL_TYPES:
        raise ValueError(
            f"family must be one of {', '.join(MODEL_TYPES)}, diffusion-lm for a training checkpoint; got {family!r}"
        )
    table, inner = weights.get("vocab_embed.embedding"), weights.get("sigma_map.mlp.2.weight")
    if table is None or inner is None:
        raise ValueError(
            "it lacks vocab_embed.embedding or sigma_map.mlp.2.weight; expected the weights of a model of family "
            f"{', '.join(MODEL_TYPES)}"
        )
    vocab, hidden = table.shape
    frequencies = weights.get("rotary_emb.inv_freq")
    heads = None if frequencies is None else hidden // (2 * len(frequencies))
    heads = changes.get("num_attention_heads", changes.get("n_heads", heads))
    if heads is None:
        raise ValueError("the number of attention heads cannot be inferred from it: pass num_attention_heads=…")
    if family == "bd3-lm" and changes.get("block_size") is None:
        raise ValueError("the length of its blocks cannot be inferred from it: pass block_size=…")
    layers = 1 + max((int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    length = changes.get("max_position_embeddings", 1024)
    if family == "sedd":
        model = {"hidden_size": hidden, "cond_dim": len(inner), "n_blocks": layers, "n_heads": heads, "length": length}
        raw = {
            "tokens": vocab - 1, "model": model | {"scale_by_sigma": True}, "graph": {"type": "absorb"},
            "noise": {"type": "loglinear"},
        }  # fmt: skip
    else:
        raw = {
            "model_type": MODEL_TYPES[family], "vocab_size": vocab, "hidden_dim": hidden, "cond_dim": len(inner),
            "n_blocks": layers, "n_heads": heads, "model_length": length, "block_size": changes.get("block_size"),
            "time_conditioning": False,
        }  # fmt: skip
    return plan(raw, family, changes)


# --- Diffusion-LM ----------------------------------------------------------------------------------------------------


def read_diffusion_lm(content: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Plan, dict[str, Tensor]]:
    """Return how to load a training checkpoint of Diffusion-LM, and its weights.

    Raises
    ------
    ValueError
        If a weight that determines a size is missing.
    """
    weights = {name: w for name, w in content.items() if isinstance(w, Tensor) and name != "position_ids"}
    sizes = {
        "word_embedding.weight": 0, "position_embeddings.weight": 0, "time_embed.0.weight": 1,
        "input_transformers.layer.0.intermediate.dense.weight": 0,
    }  # fmt: skip
    if absent := [name for name in sizes if name not in weights]:
        raise ValueError(f"it lacks {', '.join(absent)}; expected the weights of a Diffusion-LM")
    vocab, positions, time, inner = (weights[name].shape[axis] for name, axis in sizes.items())
    layers = [int(f[1]) for name in weights if (f := re.match(r"input_transformers\.layer\.(\d+)\.", name))]
    raw = {
        "model_type": "dlm_diffusion_lm", "vocab_size": vocab, "max_position_embeddings": positions, "time_dim": time,
        "intermediate_size": inner, "hidden_size": weights["position_embeddings.weight"].shape[1],
        "embed_dim": weights["word_embedding.weight"].shape[1], "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": 12, "noise_steps": 2000,
    }  # fmt: skip
    outside = ("word_embedding.", "lm_head.")
    named = {name if name.startswith(outside) else f"backbone.{name}": w for name, w in weights.items()}
    return plan(raw, "diffusion-lm", changes), named


# --- SSD-LM: a RoBERTa and two files ----------------------------------------------------------------------------------

#: Files with the layers that SSD-LM adds to a RoBERTa, and the prefix of their weights here.
SSD_FILES = {"embed_sum_layer.pt": "embed_sum.", "timestep_layer.pt": "timestep."}


def is_ssd_lm(folder: str) -> bool:
    """Return whether a folder contains the two files that SSD-LM adds to a RoBERTa."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in SSD_FILES)


def read_ssd_lm(folder: str, changes: Mapping[str, Any]) -> tuple[Plan, dict[str, Tensor]]:
    """Return how to load SSD-LM, and its weights.

    Raises
    ------
    ValueError
        If a file cannot be read, or the configuration is not that of a RoBERTa or does not match the weights.
    """
    weights: dict[str, Tensor] = {}
    for name, prefix in {"pytorch_model.bin": "", **SSD_FILES}.items():
        content = read_training_file(os.path.join(folder, name))
        tensors = {leaf.removeprefix("module."): w for leaf, w in content.items() if isinstance(w, Tensor)}
        weights |= {f"{prefix}{leaf}": w for leaf, w in tensors.items()}
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        raw = json.load(stream)
    if not isinstance(raw, dict) or raw.get("model_type") != "roberta":
        raise ValueError("its configuration is not that of a RoBERTa; expected model_type='roberta'")
    if raw.get("vocab_size") != weights["embed_sum.weight"].shape[1]:
        raise ValueError(
            f"its configuration has vocab_size={raw.get('vocab_size')}; expected "
            f"{weights['embed_sum.weight'].shape[1]}, as in embed_sum_layer.pt"
        )
    return plan({**raw, "model_type": "dlm_ssd_lm"}, "ssd-lm", changes), weights


# --- Plaid: four files ------------------------------------------------------------------------------------------------

#: Files in which Plaid's weights are published, and the prefix of their names here.
PLAID_FILES = {
    "model.pt": "backbone.", "noise_schedule.pt": "noise_schedule.", "gamma_bounds.pt": "gamma_bounds.",
    "embedding_matrix.pt": "embedding_matrix.",
}  # fmt: skip


def is_plaid(folder: str) -> bool:
    """Return whether a folder contains Plaid's four files."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in PLAID_FILES)


def read_plaid(folder: str, changes: Mapping[str, Any]) -> tuple[Plan, dict[str, Tensor]]:
    """Return how to load Plaid, and its weights.

    Raises
    ------
    ValueError
        If a file cannot be read, a weight that determines a size is missing, or the number of attention heads is
        unknown.
    """
    weights: dict[str, Tensor] = {}
    for name, prefix in PLAID_FILES.items():
        content = read_training_file(os.path.join(folder, name))
        weights |= {f"{prefix}{leaf}": w for leaf, w in content.items() if isinstance(w, Tensor)}
    frequencies = weights.pop("backbone.rotary_emb.inv_freq", None)
    inner, head = weights.get("backbone.input_linear.weight"), weights.get("backbone.output_linear.weight")
    if inner is None or head is None:
        raise ValueError("model.pt lacks input_linear.weight or output_linear.weight")
    heads = None if frequencies is None else len(inner) // (2 * len(frequencies))
    layers = [int(found[1]) for name in weights if (found := re.match(r"backbone\.blocks\.(\d+)\.", name))]
    raw = {
        "model_type": "dlm_plaid", "vocab_size": len(head), "hidden_size": len(inner), "embed_dim": inner.shape[1],
        "num_hidden_layers": 1 + max(layers, default=-1),
        "num_attention_heads": changes.get("num_attention_heads", heads),
    }  # fmt: skip
    if raw["num_attention_heads"] is None:
        raise ValueError("the number of attention heads cannot be inferred from it: pass num_attention_heads=…")
    return plan(raw, "plaid", changes), weights
