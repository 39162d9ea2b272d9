# SPDX-License-Identifier: Apache-2.0
"""Where a model's inputs belong: on one device, on several, or with a part on disk."""

from __future__ import annotations

import torch
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model reads its tokens: that of its input embeddings, or where a hook brings them.

    Models with parts elsewhere carry the hooks of accelerate, which know on which device a module is executed.
    """
    table = _input_embeddings(model)
    for module in (table, model) if table is not None else (model,):
        device = _execution_device(module)
        if device is not None:
            return device
    weights = table.parameters() if table is not None else iter(())
    weight = next(weights, None)
    weight = next(model.parameters(), None) if weight is None else weight
    return torch.device("cpu") if weight is None else weight.device


def check_loaded(model: nn.Module, may_be_elsewhere: bool = True) -> None:
    """Raise if parameters have no values, and no hook that brings them from where they are.

    `may_be_elsewhere`: whether hooks count.
    """
    for module in model.modules():
        empty = (weight for weight in module._parameters.values() if weight is not None and weight.is_meta)
        weight = next(empty, None)
        if weight is not None and not (may_be_elsewhere and _offloads(module)):
            name = next(name for name, parameter in model.named_parameters() if parameter is weight)
            rest = "" if may_be_elsewhere else " in memory: its parts on disk or in CPU memory cannot be shared"
            raise ValueError(f"model: its parameter {name} is on the device 'meta', it has no values{rest}")


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _hooks(module: nn.Module) -> list:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []


def _execution_device(module: nn.Module) -> torch.device | None:
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            # "cuda" without a number is some device; its tensors know which
            return torch.empty(0, device=device).device
    return None


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _hooks(module))
