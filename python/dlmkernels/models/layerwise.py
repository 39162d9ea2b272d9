# SPDX-License-Identifier: Apache-2.0
"""Run stock layers on a subset of a forward pass's positions.

This works because a layer processes each position on its own except in its attention, which reads the other positions
from a KV cache. `AttentionWindow.layers`, a function of a `LayerCall`, decides what each layer computes. No layer is
reimplemented here: the chosen positions are gathered, and the stock layer runs on them, attending through our attention
function to everything in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..window import AttentionWindow

#: `config.model_type` of the stock classes whose layers can be run on part of the positions. They normalize their
#: input, and project it directly to the values that attention uses.
TYPES = ("llama", "qwen2", "qwen3")
#: further such types, with a mixture of experts that are chosen for each position independently
WITH_EXPERTS = ("qwen3_moe", "llada2_moe")


@dataclass(frozen=True)
class LayerCall:
    """A pending call of one layer, in a forward pass over B batch rows of Q columns.

    Attributes
    ----------
    number : int
        Index of the layer, from 0.
    x : Tensor
        `[B, Q, hidden]`: input of the layer.
    window : AttentionWindow
        The positions in the forward pass and what they attend to. It has a cache.
    """

    number: int
    x: Tensor
    window: AttentionWindow
    _layer: Any
    _forward: Callable[..., Tensor]
    _options: dict[str, Any]

    def whole(self) -> Tensor:
        """Run the layer on all columns and return its output `[B, Q, hidden]`."""
        return self._forward(self.x, dlm_window=self.window, **self._options)

    def at(self, columns: Tensor, used: Tensor) -> Tensor:
        """Run the layer on the given columns, int64 `[B, n]`, only, and return its output `[B, n, hidden]`.

        Their keys and values are written into the cache, and they attend to everything in it. Columns that are not
        `used`, bool `[B, n]`, write nothing, and their output is meaningless.
        """
        if columns.shape[1] == 0:
            self.window.attended.add(id(self._layer.self_attn))  # counts as attended; there is nothing to compute
            return self.x[:, :0]
        window, options = self._few(columns, used)
        return self._forward(_at(self.x, columns.to(self.x.device)), dlm_window=window, **options)

    def attend(self, columns: Tensor, used: Tensor) -> None:
        """Run only the layer's attention on the columns, with arguments as in `at`, and discard its output.

        This writes their keys and values into the cache and calls `AttentionWindow.watch`.
        """
        window, options = self._few(columns, used)
        x = self._layer.input_layernorm(_at(self.x, columns.to(self.x.device)))
        self._layer.self_attn(x, dlm_window=window, **options)

    def with_window(self, **changes: Any) -> LayerCall:
        """Return this call with some fields of its window replaced."""
        window = replace(self.window.to(self.x.device), **changes)
        vars(window)["attended"] = self.window.attended
        return replace(self, window=window)

    def _few(self, columns: Tensor, used: Tensor) -> tuple[AttentionWindow, dict[str, Any]]:
        """Return the window and the layer's other arguments, restricted to some of the columns."""
        columns, used = columns.to(self.x.device), used.to(self.x.device)
        window = self.window.to(self.x.device)
        slots = columns.int() if window.slots is None else window.slots.gather(1, columns)
        few = replace(window, slots=torch.where(used, slots, -1), layers=None)
        vars(few)["attended"] = window.attended
        options = dict(self._options)
        options["position_embeddings"] = tuple(_at(part, columns) for part in options["position_embeddings"])
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"].gather(1, columns)
        return few, options

    def values(self, columns: Tensor) -> Tensor:
        """Compute the layer's value vectors `[B, n, G, D]` for the columns int64 `[B, n]`."""
        x = _at(self.x, columns.to(self.x.device))
        attention = self._layer.self_attn
        return attention.v_proj(self._layer.input_layernorm(x)).unflatten(-1, (-1, attention.head_dim))

    def kept_values(self) -> Tensor:
        """Return the cache's buffer of the layer's value vectors, `[rows, S, G, D]`, filled by earlier forwards."""
        assert self.window.cache is not None
        return self.window.cache.values(self._layer.self_attn.layer_idx)


def _at(x: Tensor, columns: Tensor) -> Tensor:
    """Gather `x` `[B, Q, n]` at the columns int64 `[B, k]`."""
    return x.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, x.shape[2]))


def check(twin: nn.Module, cache: str, experts: bool = False) -> None:
    """Raise ValueError unless the model is of a type in `TYPES` or, if `experts`, in `WITH_EXPERTS`."""
    kind = getattr(twin.config, "model_type", type(twin).__name__)
    types = (*TYPES, *WITH_EXPERTS) if experts else TYPES
    if kind not in types:
        raise ValueError(f"cache='{cache}' needs a model of type {', '.join(types)}; got one of type '{kind}'")


def run_by_plan(twin: nn.Module) -> None:
    """Make the layers of a twin call `AttentionWindow.layers` if the window of a forward pass has it."""
    base: Any = twin.base_model
    for number, layer in enumerate(base.layers):
        layer.__dict__["forward"] = _Planned(number, layer, layer.forward)


class _Planned:
    """Replacement for the `forward` method of a layer."""

    def __init__(self, number: int, layer: Any, forward: Callable[..., Tensor]):
        self._number, self._layer, self._stock = number, layer, forward

    def __call__(self, hidden_states: Tensor, dlm_window: AttentionWindow, **options: Any) -> Tensor:
        if dlm_window.layers is None:
            return self._stock(hidden_states, dlm_window=dlm_window, **options)
        call = LayerCall(self._number, hidden_states, dlm_window, self._layer, self._stock, options)
        return dlm_window.layers(call)
