# SPDX-License-Identifier: Apache-2.0
"""Stock layers on some of a forward's rows: a layer is row-wise but for its attention, and that reads a cache by slots.

What each layer computes is said by `AttentionWindow.layers`, a function of a `LayerCall`. Nothing of a layer is written
here anew: its rows are gathered, the stock layer runs on them, and attends through our function to all that the cache
holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..window import AttentionWindow

#: `config.model_type` of the stock classes whose layers can be run in parts: those norm what comes in, and what they
#: project it to are the values that are attended to
TYPES = ("llama", "qwen2", "qwen3")
#: those whose feed-forward chooses experts for each row by itself
WITH_EXPERTS = ("qwen3_moe", "llada2_moe")


@dataclass(frozen=True)
class LayerCall:
    """One layer of one forward of B rows of Q columns, before it has computed anything.

    Attributes
    ----------
    number : int
        Which layer, from 0.
    x : Tensor
        `[B, Q, hidden]`: what comes into it.
    window : AttentionWindow
        What the forward's rows are and see. It has a cache.
    """

    number: int
    x: Tensor
    window: AttentionWindow
    _layer: Any
    _forward: Callable[..., Tensor]
    _options: dict[str, Any]

    def whole(self) -> Tensor:
        """What the layer makes of all columns, `[B, Q, hidden]`."""
        return self._forward(self.x, dlm_window=self.window, **self._options)

    def at(self, columns: Tensor, used: Tensor) -> Tensor:
        """What the layer makes of the columns int64 `[B, n]` alone, `[B, n, hidden]`.

        Their keys and values are written into the cache, all that the cache holds is seen. Columns that are not `used`,
        bool `[B, n]`, write nothing, and what they become means nothing.
        """
        if columns.shape[1] == 0:
            self.window.attended.add(id(self._layer.self_attn))  # it has nothing to attend for
            return self.x[:, :0]
        window, options = self._few(columns, used)
        return self._forward(_at(self.x, columns.to(self.x.device)), dlm_window=window, **options)

    def attend(self, columns: Tensor, used: Tensor) -> None:
        """Let the layer attend for the columns, as in `at`, and do no more with them.

        Their keys and values are written, and `AttentionWindow.watch` is called.
        """
        window, options = self._few(columns, used)
        x = self._layer.input_layernorm(_at(self.x, columns.to(self.x.device)))
        self._layer.self_attn(x, dlm_window=window, **options)

    def with_window(self, **changes: Any) -> LayerCall:
        """The same call with other fields of its window."""
        window = replace(self.window.to(self.x.device), **changes)
        vars(window)["attended"] = self.window.attended
        return replace(self, window=window)

    def _few(self, columns: Tensor, used: Tensor) -> tuple[AttentionWindow, dict[str, Any]]:
        """The window and the other arguments of the layer for some of the columns."""
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
        """The value vectors `[B, n, G, D]` that the layer has for the columns int64 `[B, n]`."""
        x = _at(self.x, columns.to(self.x.device))
        attention = self._layer.self_attn
        return attention.v_proj(self._layer.input_layernorm(x)).unflatten(-1, (-1, attention.head_dim))

    def kept_values(self) -> Tensor:
        """Where the cache keeps the layer's value vectors, `[rows, S, G, D]`; written by a forward before this one."""
        assert self.window.cache is not None
        return self.window.cache.values(self._layer.self_attn.layer_idx)


def _at(x: Tensor, columns: Tensor) -> Tensor:
    """`x` `[B, Q, n]` at the columns int64 `[B, k]`."""
    return x.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, x.shape[2]))


def check(twin: nn.Module, cache: str, experts: bool = False) -> None:
    """Raise unless the model's layers can be run in parts; `experts`: those of `WITH_EXPERTS`, too."""
    kind = getattr(twin.config, "model_type", type(twin).__name__)
    types = (*TYPES, *WITH_EXPERTS) if experts else TYPES
    if kind not in types:
        raise ValueError(f"cache='{cache}' needs a model of type {', '.join(types)}; got one of type '{kind}'")


def run_by_plan(twin: nn.Module) -> None:
    """Let the layers of a twin compute what `AttentionWindow.layers` says of a forward, where it says something."""
    base: Any = twin.base_model
    for number, layer in enumerate(base.layers):
        layer.__dict__["forward"] = _Planned(number, layer, layer.forward)


class _Planned:
    """The forward of a layer."""

    def __init__(self, number: int, layer: Any, forward: Callable[..., Tensor]):
        self._number, self._layer, self._stock = number, layer, forward

    def __call__(self, hidden_states: Tensor, dlm_window: AttentionWindow, **options: Any) -> Tensor:
        if dlm_window.layers is None:
            return self._stock(hidden_states, dlm_window=dlm_window, **options)
        call = LayerCall(self._number, hidden_states, dlm_window, self._layer, self._stock, options)
        return dlm_window.layers(call)
