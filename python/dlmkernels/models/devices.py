# SPDX-License-Identifier: Apache-2.0
"""Find the device of a model's inputs, for models on one device, on several, or partly offloaded."""

from __future__ import annotations

import torch
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model expects its tokens: the one on which its input embeddings are executed.

    In models with offloaded or dispatched parts, accelerate's hooks determine the device of each module.
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
    """Raise ValueError if parameters are on the meta device, so that they have no values.

    If `may_be_elsewhere`, parameters that an offloading hook of accelerate loads on demand are accepted.
    """
    for module in model.modules():
        empty = (weight for weight in module._parameters.values() if weight is not None and weight.is_meta)
        weight = next(empty, None)
        if weight is not None and not (may_be_elsewhere and _offloads(module)):
            name = next(name for name, parameter in model.named_parameters() if parameter is weight)
            rest = "" if may_be_elsewhere else " in memory; offloaded parameters cannot be shared with a stock class"
            raise ValueError(f"model: its parameter {name} is on the device 'meta' and has no values{rest}")


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _hooks(module: nn.Module) -> list:
    """Return accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []


def _execution_device(module: nn.Module) -> torch.device | None:
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            # "cuda" has no index; a tensor's device does
            return torch.empty(0, device=device).device
    return None


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _hooks(module))
