# SPDX-License-Identifier: Apache-2.0
"""Forwards with a cache of features: of the whole canvas, but every layer computes the rows alone that need it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..window import AttentionWindow, Rows, TokenWindow
from .block_forward import WHOLE, BlockForward
from .features import LayerwiseCache
from .features.base import Kept, Spans
from .standing import Standing
from .state import put


class LayerwiseForward(BlockForward):
    """As `BlockForward`, with the parts that a `LayerwiseCache` has; a row's phase is the number of its part.

    Phases are counted over the forwards of a request, so that what becomes of it does not depend on its batch.
    """

    def __init__(self, features: LayerwiseCache, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.model = self.model.by_layers(features.name)
        self.features = features
        self._parts = [name for name, _ in features.parts(self.state.step)]
        self.counted = frozenset(self._parts)
        rows = len(self.slots)
        # a row more, which takes what unused rows write
        self.cache = KVCache(self.length, rows + 1)
        #: what the layers have added to the rows of each request
        self.added = Kept(rows, self.length)
        self._all_rows = torch.arange(rows, dtype=torch.int32, device=self.origin.device)
        #: where the response of each request begins, its first open column, int32 [S]
        self._first = self.grid.first.clone()
        self._next = ("whole", 0)  # part and width of the forward that is under way

    def look(self, rows: Tensor | None = None) -> None:
        super().look(rows)
        # all is decided of a row that has nothing open
        behind = torch.where(self.state.is_open, self._columns, self.length).amin(1).int()
        put(self._first, torch.maximum(self.grid.first, torch.minimum(behind, self.grid.ends)), rows)
        if not self.rows_change:
            self.most_columns = int(self._response().max())

    def _response(self) -> Tensor:
        """How many columns each request's response has, int32 `[S]`."""
        return (self.grid.ends - torch.maximum(self._first, self.state.origin)).clamp(min=0)

    @property
    def usual_phase(self) -> int:
        return WHOLE

    def takes_canvas(self, phase: int) -> bool:
        return True

    def part_of(self, phase: int) -> str:
        return self._parts[phase - WHOLE]

    def phases(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's phase, and how many columns its response has, int32 `[S]` each."""
        phase = torch.full_like(index, WHOLE)
        for number, (_, applies) in enumerate(self.features.parts(self.state.step)):
            phase = torch.where(applies, WHOLE + number, phase)
        return phase, self._response()

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        self._next = part, pending
        return super().__call__("whole", window, standing, pick, pending, width, rows)

    def run(
        self, columns: Tensor | None, positions: Tensor, window: AttentionWindow, tokens: Tensor | None = None,
        moment: dict[str, Tensor] | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        part, width = self._next
        cache = self._all_rows if rows is None else torch.where(rows.cache >= 0, rows.cache, len(self._all_rows))
        where = self.origin, self.twice(self._first), self.ends
        origin, first, ends = (x if rows is None else rows.of(x) for x in where)
        total = positions.shape[1]
        spans = Spans(origin, first, ends, cache.long(), min(width, total), total)
        window = replace(window, layers=self.features.layers(part, spans, self.added))
        if rows is None:
            window = replace(window, cache_rows=self._all_rows)
        return super().run(columns, positions, window, tokens, moment, rows)
