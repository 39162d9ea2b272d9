# SPDX-License-Identifier: Apache-2.0
"""Unwrap models from torch.compile, parallelism wrappers and PEFT, and reject wrappers that cannot be removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .devices import input_device
from .twin import twin_of

#: Wrapper classes that run their attribute `module` on several devices or in several processes.
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
#: PEFT adapter types with an effect outside the layers they adapt.
_OUTSIDE = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")


def unwrap(model):
    """Return the model inside any nesting of `torch.compile`, PEFT and parallelism wrappers. Adapters stay active.

    Raises
    ------
    ValueError
        If an adapter acts outside the layers that it adapts (such as prompt learning), or the model's parameters are
        sharded.
    """
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model):
    """Return what the outermost wrapper contains, or None if `model` is not a wrapper."""
    compiled = getattr(model, "_torchdynamo_orig_callable", None)  # a compiled method or callable
    if compiled is not None:
        return getattr(compiled, "__self__", compiled)
    if not isinstance(model, nn.Module):
        return None
    if "_orig_mod" in model._modules:
        return model._orig_mod
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        _check_adapters(model)
        return model.get_base_model()
    held = getattr(model, "module", None)
    if isinstance(held, nn.Module) and (_is_parallel(model) or _only_holds(model, held)):
        _check_whole(model)
        return held
    return None


def _is_parallel(model: nn.Module) -> bool:
    return any(base.__name__ in _PARALLEL for base in type(model).__mro__)


def _only_holds(model: nn.Module, held: nn.Module) -> bool:
    """Return whether a wrapper of another class only calls the module in it, tested with a short forward pass."""
    if list(model._modules.values()) != [held] or model._parameters or model._buffers:
        return False
    twin: Any = twin_of(model)
    try:
        tokens = torch.ones((1, 4), dtype=torch.int64, device=input_device(held))
        with torch.no_grad():
            outer, inner = twin(tokens).logits, twin.module(tokens).logits
    except Exception:  # it has other inputs or outputs
        return False
    return torch.equal(outer, inner)


def _check_adapters(model) -> None:
    active = model.active_adapters if hasattr(model, "active_adapters") else [getattr(model, "active_adapter", None)]
    active = [active] if isinstance(active, str) else active() if callable(active) else active
    for name in active:
        config = model.peft_config.get(name)
        kind = str(getattr(config, "peft_type", None)).rsplit(".", 1)[-1]
        outside = getattr(config, "is_prompt_learning", False) or kind in _OUTSIDE
        if outside or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"model: its adapter '{name}' of type {kind} acts outside the layers it adapts, which dlmkernels does "
                "not support: disable it, or use one that acts within the layers (LoRA, IA3, …)"
            )


def _check_whole(model: nn.Module) -> None:
    if any(base.__name__ == "FullyShardedDataParallel" for base in type(model).__mro__) and any(
        p.numel() == 0 or type(p).__name__ == "FlatParameter" for p in model.parameters()
    ):
        raise ValueError(
            "model: its parameters are sharded over processes: decode inside "
            "FullyShardedDataParallel.summon_full_params(model), or load it without sharding"
        )
