# SPDX-License-Identifier: Apache-2.0
"""Forward passes with eviction: a block attends to itself and to what its second pass has kept of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..window import AttentionWindow, Rows, TokenWindow
from .block_forward import REST, WHOLE, BlockForward
from .features import SparseCache
from .features.sparse import Eviction
from .schedule import Block
from .standing import Place, Standing

#: phase of a row whose forward pass, over the whole canvas, also selects what is kept
EVICT = REST + 1


class EvictingForward(BlockForward):
    """A `BlockForward` with the parts "whole", "evict" (whole, and selects what is kept) and "part" (the block)."""

    def __init__(self, sparse: SparseCache, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.model.rotations(self.ends - self.origin) is not None:
            raise ValueError(
                f"cache='{sparse.name}' needs a model whose rotary frequencies do not depend on a request's length"
            )
        self.sparse = sparse
        rows = len(self.slots)
        # one extra row, into which unused rows write
        self.cache: KVCache = KVCache(self.length, rows + 1)
        self._width = self.columns_of(None)[0]
        #: the kept keys and values of each row, followed by those of the block
        self.small = KVCache(int(self.length * sparse.keep) + self._width, rows + 1)
        self._all_rows = torch.arange(rows, device=self.origin.device)
        self._evicts = False

    def reserve(self) -> None:
        super().reserve()
        self.small.reserve_as(self.cache)

    @property
    def usual_phase(self) -> int:
        return REST

    def takes_canvas(self, phase: int) -> bool:
        return phase != REST

    def part_of(self, phase: int) -> str:
        return {WHOLE: "whole", EVICT: "evict", REST: "part"}[phase]

    def phases(self, index: Tensor) -> tuple[Tensor, Tensor]:
        phase = torch.where(index == 0, WHOLE, torch.where(index == 1, EVICT, REST))
        return phase.int(), torch.zeros_like(index)

    def columns_of(self, block: Block | None) -> tuple[int, ...]:
        return (self.shift + (self._longest if block is None else block.length),)

    def _forwarded(self) -> tuple[Tensor, Tensor]:
        """Return the request's columns in "part", as first and last + 1: int32 `[S]` each (2 S with guidance)."""
        start, length = self.twice(self._place.start), self.twice(self._place.length)
        first = torch.maximum(start - self.shift, self.origin)
        return first, torch.maximum(torch.minimum(start + length, self.ends), first)

    def enter(self, place: Place, block: Block | None) -> None:
        super().enter(place, block)
        first, last = self._forwarded()
        begin = place.start - self.shift
        kept = ((self.ends - self.origin - (last - first)).clamp(min=0).double() * self.sparse.keep).floor().int()
        speaker = torch.maximum(place.window - self.shift, self.state.origin[:, None]).clamp(min=0).long()
        self._prepare("part", speaker, begin, self._width, None, stop=place.start + place.length)
        window = self._windows["part"]
        assert window.slots is not None
        # the block comes right after the kept slots
        slots = torch.where(window.slots >= 0, window.slots - first[:, None] + kept[:, None], -1)
        seen = torch.stack((torch.zeros_like(kept), kept + last - first), 1)
        self._windows["part"] = replace(
            window, slots=self._keep("small slots", slots), kv_range=self._keep("small range", seen), cache=self.small
        )  # fmt: skip

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        self._evicts = part == "evict"
        return super().__call__("whole" if self._evicts else part, window, standing, pick, pending, width, rows)

    def run(
        self, columns: Tensor | None, positions: Tensor, window: AttentionWindow, tokens: Tensor | None = None,
        moment: dict[str, Tensor] | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        if self._evicts:
            cache = self._all_rows
            if rows is not None:
                cache = torch.where(rows.cache >= 0, rows.cache, len(self._all_rows)).long()
            first, last = self._forwarded()
            start = torch.minimum(torch.maximum(self.twice(self._place.start), first), last)
            origin, ends, start, first, last = (
                x if rows is None else rows.of(x) for x in (self.origin, self.ends, start, first, last)
            )
            eviction = Eviction(
                self.sparse, self.small, cache, origin, ends, (start, last), (first, last), self._width
            )  # fmt: skip
            window = replace(window, watch=eviction)
        if rows is None:
            window = replace(window, cache_rows=self._all_rows.int())
        return super().run(columns, positions, window, tokens, moment, rows)
