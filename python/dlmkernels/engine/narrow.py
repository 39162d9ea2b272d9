# SPDX-License-Identifier: Apache-2.0
"""Forwards of the rows that have something to decode, and of no more columns than those reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from ..window import AttentionWindow

#: numbers of rows for which steps are recorded, beside all
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def can_be_narrowed(model: DiffusionModel) -> bool:
    """Whether a forward of the model takes its rows one by one: nothing but tokens, positions and a window."""
    return type(model) is DiffusionModel and not model._rotaries and not model.is_compiled


class NarrowModel:
    """A model whose forwards of a whole canvas take some rows of it alone; the others' hidden states are zeros.

    Everything else about it is the model's own.
    """

    def __init__(self, model: DiffusionModel, rows: int, columns: int):
        self._model, self._shape = model, (rows, columns)
        self._index: dict[int, Tensor] = {}
        self._now: Tensor | None = None
        self.width, self._columns = rows, columns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def take(self, rows: Sequence[int], columns: int) -> None:
        """Let forwards take these rows, in the same memory for as many rows, and so many columns."""
        self.width, self._columns = len(rows), columns
        if len(rows) == self._shape[0]:
            self._now = None
            return
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")
        if len(rows) not in self._index:
            self._index[len(rows)] = index.to(self._model.device)
        else:
            self._index[len(rows)].copy_(index)
        self._now = self._index[len(rows)]

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `DiffusionModel.hidden`."""
        is_whole = self._now is None and self._columns == self._shape[1]
        if is_whole or tokens.shape != self._shape or window.shadow is not None or window.cache is not None:
            return self._model.hidden(tokens, positions, window, embeds, opinion)
        cut: dict[str, Any] = {
            f.name: self._cut(value, f.name != "kv_range")
            for f in fields(window)
            if f.init and isinstance(value := getattr(window, f.name), Tensor)
        }
        part = replace(window, **cut)
        assert opinion is None
        hidden = self._model.hidden(
            self._cut(tokens), self._cut(positions), part, None if embeds is None else self._cut(embeds)
        )
        whole = hidden.new_zeros(*self._shape, hidden.shape[2])
        if self._now is None:
            whole[:, : self._columns] = hidden
        else:
            whole[:, : self._columns].index_copy_(0, self._now, hidden)
        return whole

    def _cut(self, values: Tensor, has_columns: bool = True) -> Tensor:
        """Some rows of values `[S]` or `[S, T, …]`, and of the latter some columns."""
        if self._now is not None:
            values = values.index_select(0, self._now)
        return values[:, : self._columns].contiguous() if has_columns and values.dim() > 1 else values


def bucket(count: int, most: int) -> int:
    """The smallest number of rows for which steps are recorded that is at least `count`."""
    return min((size for size in BUCKETS if count <= size < most), default=most)
