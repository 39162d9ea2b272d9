# SPDX-License-Identifier: Apache-2.0
"""Forward passes with a feature cache: they cover the whole canvas, but each layer computes only some of its rows."""

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
    """A `BlockForward` with the parts of a `LayerwiseCache`; a row's phase is the index of its part, plus WHOLE.

    Phases depend on the number of forward passes of the request itself, so that its result does not depend on the rest
    of the batch.
    """

    def __init__(self, features: LayerwiseCache, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.model = self.model.by_layers(features.name)
        self.features = features
        self._parts = [name for name, _ in features.parts(self.state.step)]
        self.counted = frozenset(self._parts)
        rows = len(self.slots)
        # one extra row, to which unused rows write
        self.cache = KVCache(self.length, rows + 1)
        #: for each request, the last computed change of every layer to its hidden states
        self.added = Kept(rows, self.length)
        self._all_rows = torch.arange(rows, dtype=torch.int32, device=self.origin.device)
        #: start of each request's response (its first open column), int32 [S]
        self._first = self.grid.first.clone()
        self._next = ("whole", 0)  # part and width of the current forward pass

    def look(self, rows: Tensor | None = None) -> None:
        super().look(rows)
        # a row without open positions is fully decided
        behind = torch.where(self.state.is_open, self._columns, self.length).amin(1).int()
        put(self._first, torch.maximum(self.grid.first, torch.minimum(behind, self.grid.ends)), rows)
        if not self.rows_change:
            self.most_columns = int(self._response().max())

    def _response(self) -> Tensor:
        """Return the number of columns of each request's response, int32 `[S]`."""
        return (self.grid.ends - torch.maximum(self._first, self.state.origin)).clamp(min=0)

    @property
    def usual_phase(self) -> int:
        return WHOLE

    def takes_canvas(self, phase: int) -> bool:
        return True

    def part_of(self, phase: int) -> str:
        return self._parts[phase - WHOLE]

    def phases(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's phase and the number of columns of its response, int32 `[S]` each."""
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
