# SPDX-License-Identifier: Apache-2.0
"""A second tree of modules for a loaded model, with the same parameters but its own configuration.

The attention function of a model is a field of its configuration, which every layer reads in every call. Decoding needs
our attention function there, but the user's own calls must not be affected. So the model is left unchanged: each of its
modules gets a twin, and the twins refer to each other and to a copy of the configuration.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

Model = TypeVar("Model", bound=nn.Module)

#: Attributes of `nn.Module` itself: dictionaries of parameters, buffers and hooks, which twins share.
_SHARED = frozenset(nn.Module().__dict__)
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device))
_FUNCTIONS = (MethodType, FunctionType, functools.partial, type(None))


def twin_of(model: Model, attention: str | None = None) -> Model:
    """Return a tree of modules that computes what `model` does in evaluation mode, with another attention function.

    Each module gets a twin of the same class with a shallow copy of its attributes. The dictionaries of parameters,
    buffers and hooks are shared, so `.to(…)`, weights loaded later and hooks affect the twin as well. Attributes set on
    the model after this call and modules replaced later do not; a twin is cheap, so make a new one.

    Parameters
    ----------
    model : Module
        The model, which is left unchanged.
    attention : str, optional
        Name of the attention function, as registered with transformers. If None, the model's own is used.

    Returns
    -------
    Module
        The twin of `model`.

    Raises
    ------
    ValueError
        If a module's `forward` was replaced by an object that cannot be redirected to the twin.
    """
    return _Twins(model, attention).of(model)


class _Twins:
    def __init__(self, model: nn.Module, attention: str | None):
        self._attention = attention
        modules = list(model.modules())
        self._twins: dict[int, Any] = {id(m): object.__new__(type(m)) for m in modules}
        for module in modules:
            # A module compiled by torch.compile gets the twin of the original, which is among the modules too.
            if "_orig_mod" in module._modules:
                self._twins[id(module)] = self._twins[id(_uncompiled(module))]
        for module in modules:
            if "_orig_mod" not in module._modules:
                self._fill(self._twins[id(module)], module)

    def of(self, value):
        """Return the twins' counterpart of `value`, or `value` itself if it does not refer to the model."""
        if type(value) in _PLAIN:
            return value
        if id(value) in self._twins:
            return self._twins[id(value)]
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, MethodType):
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if type(value) in (list, tuple):
            items = type(value)(map(self.of, value))
            return items if any(a is not b for a, b in zip(items, value)) else value
        if type(value) in (dict, OrderedDict):
            items = type(value)((key, self.of(item)) for key, item in value.items())
            return items if any(items[key] is not value[key] for key in value) else value
        return value

    def _fill(self, twin: nn.Module, module: nn.Module) -> None:
        state = dict(module.__dict__)
        for name, value in module.__dict__.items():
            if type(value) not in _PLAIN and name not in _SHARED:
                state[name] = self.of(value)
        if not isinstance(state.get("forward"), _FUNCTIONS):
            state["forward"] = self._object(module, state["forward"])
        children = type(module._modules)()
        children.update((name, self._twins.get(id(child), child)) for name, child in module._modules.items())
        state |= {"_modules": children, "training": False}
        state.pop("_compiled_call_impl", None)  # set by `module.compile()`; it would call the original model
        # direct assignment would go through `nn.Module.__setattr__`
        twin.__dict__.update(state)

    def _object(self, module: nn.Module, value):
        """Return the twin's counterpart of a module's `forward` that was replaced by a callable object."""
        if not hasattr(value, "__dict__") or isinstance(value, type):
            raise ValueError(
                f"model: the forward method of its {type(module).__name__} was replaced by an object of type "
                f"{type(value).__name__}, which cannot be copied: restore it before decoding"
            )
        twin = object.__new__(type(value))
        twin.__dict__.update((name, self.of(item)) for name, item in vars(value).items())
        return twin

    def _partial(self, value: functools.partial) -> functools.partial:
        twin = functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        twin.__dict__.update(self.of(vars(value)))
        return twin

    def _function(self, value: FunctionType):
        """Return the counterpart of a function, with its closure redirected to the twins and torch.compile removed."""
        original = getattr(value, "_torchdynamo_orig_callable", None)
        if original is not None:
            return self.of(original)
        cells = value.__closure__ or ()
        self._twins[id(value)] = value  # a function's closure may contain the function itself
        contents = [self.of(cell.cell_contents) if _is_filled(cell) else None for cell in cells]
        changed = [_is_filled(cell) and new is not cell.cell_contents for cell, new in zip(cells, contents)]
        if any(changed):
            closure = tuple(CellType(new) if is_new else cell for cell, new, is_new in zip(cells, contents, changed))
            twin = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
            twin.__kwdefaults__ = value.__kwdefaults__
            twin.__dict__.update(self.of(vars(value)))
            self._twins[id(value)] = twin
        return self._twins[id(value)]

    def _config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return a copy of a configuration, nested ones included, with the twins' attention function."""
        if self._attention is None:
            return config
        twin = self._twins[id(config)] = object.__new__(type(config))
        vars(twin).update((name, self.of(value)) for name, value in vars(config).items())
        twin._attn_implementation = self._attention
        return twin


def _uncompiled(module: nn.Module) -> nn.Module:
    while "_orig_mod" in module._modules:
        module = module._orig_mod  # type: ignore[assignment]
    return module


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
