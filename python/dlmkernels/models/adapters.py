# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in PEFT's format, merged into the weights they adapt (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.core_model_loading import WeightRenaming
from transformers.utils import cached_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def adapter_config(path_or_id: str | PathLike, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `adapter_config.json` at a folder or hub id, None if there is none."""
    file = cached_file(path_or_id, CONFIG, **where, **QUIET)
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False,
         "_raise_exceptions_for_gated_repo": False}  # fmt: skip


def merge(
    model, path_or_id: str | PathLike, config: Mapping[str, Any], key_mapping: Mapping[str, str],
    where: Mapping[str, Any], allow_pickle: bool = False,
) -> None:  # fmt: skip
    """Add the adapter's updates to the model's weights: W + s B A, with s = alpha / r, or alpha / sqrt(r) (rsLoRA).

    `key_mapping` says what became of the names that the adapter knows the weights by.

    Raises
    ------
    ValueError
        When the adapter is of another kind, one of its matrices is missing or of another shape, or it adapts a weight
        that the model does not have.
    """
    unsupported = {
        "peft_type": config.get("peft_type", "LORA") != "LORA", "bias": config.get("bias", "none") != "none",
        "use_dora": config.get("use_dora"), "modules_to_save": config.get("modules_to_save"),
    }  # fmt: skip
    for name, is_used in unsupported.items():
        if is_used:
            raise ValueError(f"the adapter's configuration has {name}={config[name]!r}, which is not supported")
    pairs = _pairs(_weights(path_or_id, where, allow_pickle))
    parameters = dict(model.named_parameters())
    renamings = [WeightRenaming(old, new) for old, new in key_mapping.items()]
    updates = []
    for module, (a, b) in pairs.items():
        name = module + ".weight"
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        weight = parameters.get(name)
        if weight is None:
            raise ValueError(f"the adapter adapts {module}, which the model does not have")
        if not weight.is_floating_point():
            raise ValueError(f"the adapter cannot be merged into {name}: it is quantised ({weight.dtype})")
        shape = (b.shape[0], a.shape[1])
        if (shape[::-1] if config.get("fan_in_fan_out") else shape) != weight.shape or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the adapter of {module} has matrices {list(b.shape)} and {list(a.shape)} for a weight of "
                f"{list(weight.shape)}"
            )
        rank = a.shape[0]
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        updates.append((weight, b, a, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))
    with torch.no_grad():
        for weight, b, a, scale in updates:
            change = scale * (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32))
            change = change.T if config.get("fan_in_fan_out") else change
            weight.copy_(weight.float() + change)


def _weights(path_or_id: str | PathLike, where: Mapping[str, Any], allow_pickle: bool) -> dict[str, Tensor]:
    file = cached_file(path_or_id, WEIGHTS, **where, **QUIET)
    if file is not None:
        return load_file(file)
    file = cached_file(path_or_id, PICKLE, **where, **QUIET) if allow_pickle else None
    if file is None:
        raise ValueError(f"there is no {WEIGHTS} beside {CONFIG}")
    return torch.load(file, map_location="cpu", weights_only=True)


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A, B)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise ValueError(f"the adapter holds {name}, which is not a LoRA matrix of a linear layer")
        found.setdefault(match[1], {})[match[2]] = weight
    for module, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"the adapter of {module} lacks lora_{'B' if 'A' in pair else 'A'}")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's per-module values: the first pattern that ends the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
