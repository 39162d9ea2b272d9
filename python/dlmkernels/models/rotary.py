# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings whose frequencies depend on the length: fixed for a request, whatever stands beside it.

Of the scalings that transformers knows, "dynamic" (NTK) and "longrope" (LongRoPE, arXiv:2402.13753) choose their
frequencies anew in every forward, by the largest position that is in it. A request would then be decoded differently
beside a longer one, and keys in a cache would be of other frequencies than the queries that read them. Here a request
keeps the frequencies of its full length from its first forward to its last. They are transformers' own.
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

#: Rows of a batch that have the same frequencies, and the stock module with those; None stands for all rows.
Groups = list[tuple[Tensor | None, nn.Module]]
#: By the id of each `RequestRotary` of a model.
Rotations = Mapping[int, Groups]

_in_use: ContextVar[Rotations | None] = ContextVar("dlmkernels_rotations", default=None)


@contextmanager
def use(rotations: Rotations | None) -> Iterator[None]:
    """In forwards of this thread, let the rows have these frequencies."""
    token = _in_use.set(rotations)
    try:
        yield
    finally:
        _in_use.reset(token)


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is a stock rotary embedding that chooses its frequencies by the length."""
    return bool(_scaled(module))


def fix_lengths(tree: nn.Module) -> list[RequestRotary]:
    """Put a `RequestRotary` in place of every length-dependent rotary embedding below `tree`."""
    found: dict[int, RequestRotary] = {}
    for parent in list(tree.modules()):
        for name, child in parent._modules.items():
            if child is not None and depends_on_length(child):
                parent._modules[name] = found.setdefault(id(child), RequestRotary(child))
    return list(found.values())


class RequestRotary(nn.Module):
    """A stock rotary embedding with the frequencies of each request's length."""

    stock: Any

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock = stock
        self.eval()

    def groups(self, lengths: Sequence[int]) -> Groups:
        """The rows of a batch of requests of these lengths, by the frequencies that they have."""
        reached = [self._reached(length) for length in lengths]
        modules = {key: self._with_frequencies(key) for key in dict.fromkeys(reached)}
        if len(modules) == 1:
            return [(None, module) for module in modules.values()]
        return [
            (torch.tensor([row for row, key in enumerate(reached) if key == wanted], device="cpu"), module)
            for wanted, module in modules.items()
        ]

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs):
        """Cosines and sines of the positions `[B, Q]`, as the stock module returns them."""
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
        """What a length comes to for the frequencies of each kind of layer: 0 up to the length of training."""
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
        """The stock module with frequencies that stay what they are."""
        stock, scaled = self.stock, _scaled(self.stock)
        module = twin_of(stock)
        vars(module)["_buffers"] = dict(stock._buffers)
        for (kind, scaling), length in zip(scaled.items(), reached):
            prefix = "" if kind is None else f"{kind}_"
            if length == 0:
                frequencies = getattr(stock, f"{prefix}original_inv_freq")
                factor = getattr(stock, f"{prefix}attention_scaling")
            else:
                # a tensor where transformers has one: its arithmetic is that of float32 then
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
    """The scaling of a rotary embedding for each kind of layer, under None where all layers have one."""
    types = vars(module).get("rope_type")
    if isinstance(types, str):
        return {None: types}
    return dict(types) if isinstance(types, dict) else {}


def _scaled(module: nn.Module) -> dict[str | None, str]:
    """Those that depend on the length."""
    return {kind: name for kind, name in _types(module).items() if "dynamic" in name or name == "longrope"}
