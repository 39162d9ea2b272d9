# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings with length-dependent frequencies, made independent of the other requests in the batch.

In transformers, the scalings "dynamic" (NTK) and "longrope" (LongRoPE, arXiv:2402.13753) choose their frequencies in
every forward pass, based on the largest position in it. The result for a request would then depend on longer requests
in the same batch, and cached keys could have other frequencies than the queries that read them. Here, a request uses
the frequencies for its full length in all of its forward passes. They are computed by transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .twin import twin_of

#: Batch rows that share the same frequencies (None for all rows), each with a stock module that has these frequencies.
Groups = list[tuple[Tensor | None, nn.Module]]
#: Groups for each `RequestRotary` of a model, by its id.
Rotations = Mapping[int, Groups]

_in_use: ContextVar[Rotations | None] = ContextVar("dlmkernels_rotations", default=None)


@contextmanager
def use(rotations: Rotations | None) -> Iterator[None]:
    """Use the given frequencies in this thread's forward passes within the `with` block."""
    token = _in_use.set(rotations)
    try:
        yield
    finally:
        _in_use.reset(token)


def depends_on_length(module: nn.Module) -> bool:
    """Return whether a module is a stock rotary embedding whose frequencies depend on the length."""
    return bool(_scaled(module))


def fix_lengths(tree: nn.Module) -> list[RequestRotary]:
    """Replace every length-dependent rotary embedding in `tree` by a `RequestRotary`, and return these."""
    found: dict[int, RequestRotary] = {}
    for parent in list(tree.modules()):
        for name, child in parent._modules.items():
            if child is not None and depends_on_length(child):
                parent._modules[name] = found.setdefault(id(child), RequestRotary(child))
    return list(found.values())


class RequestRotary(nn.Module):
    """A stock rotary embedding that uses the frequencies for each request's own length."""

    stock: Any

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock = stock
        self.eval()

    def groups(self, lengths: Sequence[int]) -> Groups:
        """Group the batch rows of requests of the given lengths by their frequencies."""
        reached = [self._reached(length) for length in lengths]
        modules = {key: self._with_frequencies(key) for key in dict.fromkeys(reached)}
        if len(modules) == 1:
            return [(None, module) for module in modules.values()]
        return [
            (torch.tensor([row for row, key in enumerate(reached) if key == wanted], device="cpu"), module)
            for wanted, module in modules.items()
        ]

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs):
        """Return cosines and sines for `position_ids` `[B, Q]`, as the stock module does."""
        position_ids = position_ids.to(x.device)
        groups = (_in_use.get() or {}).get(id(self))
        if groups is None:
            groups = self.groups((position_ids.amax(1) + 1).tolist())
        if groups[0][0] is None:
            return groups[0][1](x, position_ids, *args, **kwargs)
        parts = [
            (rows.to(x.device), module(x, position_ids[rows.to(x.device)], *args, **kwargs))
            for rows, module in groups
            if rows is not None
        ]
        tables = []
        for kind in range(2):
            whole = torch.cat([part[kind] for _, part in parts])
            tables.append(torch.empty_like(whole).index_copy_(0, torch.cat([rows for rows, _ in parts]), whole))
        return tuple(tables)

    def _reached(self, length: int) -> tuple[int, ...]:
        """Return a key for a length's frequencies, one number for each layer type: 0 up to the original length."""
        reached = []
        for kind, scaling in _scaled(self.stock).items():
            original = self._original_length(kind)
            beyond = original + 1 if scaling == "longrope" else length
            reached.append(beyond if length > original else 0)
        return tuple(reached)

    def _original_length(self, kind: str | None) -> int:
        parameters = self.stock.config.rope_parameters
        parameters = parameters if kind is None else parameters[kind]
        if _scaled(self.stock)[kind] == "longrope":
            return parameters["original_max_position_embeddings"]
        return self.stock.original_max_seq_len

    def _with_frequencies(self, reached: tuple[int, ...]) -> nn.Module:
        """Return a twin of the stock module whose frequencies are fixed."""
        stock, scaled = self.stock, _scaled(self.stock)
        module = twin_of(stock)
        vars(module)["_buffers"] = dict(stock._buffers)
        for (kind, scaling), length in zip(scaled.items(), reached):
            prefix = "" if kind is None else f"{kind}_"
            if length == 0:
                frequencies = getattr(stock, f"{prefix}original_inv_freq")
                factor = getattr(stock, f"{prefix}attention_scaling")
            else:
                # a tensor in the same case as in transformers, whose arithmetic is then in float32
                device = getattr(stock, f"{prefix}inv_freq").device
                seq_len = length if scaling == "longrope" else torch.tensor(length, device=device)
                frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](
                    stock.config, device, seq_len=seq_len, layer_type=kind
                )
            vars(module).pop(f"{prefix}inv_freq", None)
            module._buffers[f"{prefix}inv_freq"] = frequencies
            vars(module)[f"{prefix}attention_scaling"] = factor
        fixed = {kind: "default" if kind in scaled else name for kind, name in _types(stock).items()}
        vars(module)["rope_type"] = fixed.get(None, fixed)
        return module


def _types(module: nn.Module) -> dict[str | None, str]:
    """Return a rotary embedding's scaling for each layer type; the key is None if all layers share one."""
    types = vars(module).get("rope_type")
    if isinstance(types, str):
        return {None: types}
    return dict(types) if isinstance(types, dict) else {}


def _scaled(module: nn.Module) -> dict[str | None, str]:
    """Return the entries of `_types` whose frequencies depend on the length."""
    return {kind: name for kind, name in _types(module).items() if "dynamic" in name or name == "longrope"}
