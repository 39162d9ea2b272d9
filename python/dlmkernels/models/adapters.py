# SPDX-License-Identifier: Apache-2.0
"""Merge low-rank adapters in PEFT format into the weights they adapt (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from .checkpoint import ADAPTER_CONFIG, HUB_ID, QUIET
from .published import renamed

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def base_of(config: Mapping[str, Any]) -> str | None:
    """Return the base model named in an adapter's configuration, or None if it names none.

    Raises
    ------
    ValueError
        If it is neither a Hub id nor an absolute path. A relative path would be a different folder for each user.
    """
    base = config.get("base_model_name_or_path")
    if base in (None, ""):
        return None
    if not isinstance(base, str) or not (os.path.isabs(base) or HUB_ID.fullmatch(base)) or ".." in base.split("/"):
        raise ValueError(
            f"the adapter's configuration has base_model_name_or_path={base!r}; expected a Hub id or the absolute path "
            "of a folder. Pass base=… to name its base model"
        )
    return base


def merge(
    model, path_or_id: str | PathLike, config: Mapping[str, Any], key_mapping: Mapping[str, str],
    where: Mapping[str, Any], allow_pickle: bool = False,
) -> None:  # fmt: skip
    """Add the adapter's updates to the model's weights: W + s B A, with s = alpha / r, or alpha / sqrt(r) (rsLoRA).

    `key_mapping` maps the weight names that the adapter uses to those of the model.

    Raises
    ------
    ValueError
        If the adapter is not a plain LoRA, one of its matrices is missing or of the wrong shape, or it adapts a weight
        that the model does not have or that is quantized.
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
    names = renamed((module + ".weight" for module in pairs), key_mapping)
    updates = []
    for module, (a, b) in pairs.items():
        name = names[module + ".weight"]
        weight = parameters.get(name)
        if weight is None:
            raise ValueError(f"the adapter adapts {module}, which the model does not have")
        if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
            raise ValueError(
                f"the adapter of {module} has matrices of shapes {list(b.shape)} and {list(a.shape)}; expected two "
                "dimensions, none of them 0"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"the adapter cannot be merged into {name}, which is quantized ({weight.dtype}): load the base model "
                "without quantization"
            )
        shape = (b.shape[0], a.shape[1])
        if (shape[::-1] if config.get("fan_in_fan_out") else shape) != weight.shape or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the adapter of {module} has matrices of shapes {list(b.shape)} and {list(a.shape)}, which do not fit "
                f"its weight of shape {list(weight.shape)}"
            )
        rank = a.shape[0]
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < math.inf:
            raise ValueError(f"the adapter's configuration has lora_alpha={alpha!r} for {module}; expected a number")
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
        raise ValueError(
            f"there is no {WEIGHTS} next to {ADAPTER_CONFIG}; {PICKLE} is read only with allow_pickle=True"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices (A, B) of each adapted module, by its name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise ValueError(f"the adapter contains {name}, which is not a LoRA matrix of a linear layer")
        found.setdefault(match[1], {})[match[2]] = weight
    for module, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"the adapter of {module} lacks lora_{'B' if 'A' in pair else 'A'}")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as in PEFT, or the default."""
    if not isinstance(patterns, (Mapping, type(None))):
        raise ValueError(f"the adapter's configuration has alpha_pattern={patterns!r}; expected an object")
    for pattern, value in (patterns or {}).items():
        # Untrusted patterns: without groups and with few repetitions, matching takes at most cubic time.
        if "(" in pattern or len(re.findall(r"[*+?{]", pattern)) > 3:
            raise ValueError(
                f"the adapter's configuration has the alpha_pattern '{pattern}'; expected no groups and at most 3 "
                "repetitions"
            )
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
