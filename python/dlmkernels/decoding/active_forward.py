# SPDX-License-Identifier: Apache-2.0
"""Forward passes over the canvas positions that d²Cache selects after each pass, wherever they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..window import AttentionWindow, Rows, TokenWindow
from .block_forward import REST, WHOLE, BlockForward
from .features import D2Cache
from .features.d2cache import Rollout, nucleus
from .schedule import Block
from .scores import density
from .standing import Place, Standing
from .state import put
from .step import Step


class ActiveForward(BlockForward):
    """A `BlockForward` with the parts "whole" and "active"; `learn` chooses the columns of "active"."""

    counted = frozenset({"active"})

    def __init__(self, how: D2Cache, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.rows_change:
            raise ValueError(f"cache='{how.name}' needs requests that start together, as those of generate do")
        if self.grid.count > 1:
            raise ValueError(f"cache='{how.name}' decodes the answer as a single block: leave out block_length")
        self.how = how
        rows = len(self.slots)
        # one extra row, into which unused rows write
        self.cache = KVCache(self.length, rows + 1)
        #: positions that the next forward pass computes, and those it may commit (`readable`), bool [S, T]
        self.active = torch.ones_like(self.state.is_open)
        self.readable = self._candidates = torch.ones_like(self.active)
        #: confidence of each position when it was last computed, float32 [S, T + 1]; the last column is a dummy
        self._confidence = torch.zeros(len(self.active), self.length + 1, device=self.origin.device)
        self._all_rows = torch.arange(len(self.active), device=self.origin.device)
        self._rollout: Rollout | None = None

    def begin(self) -> None:
        super().begin()
        self.active.fill_(True)
        self._candidates.fill_(True)
        self._confidence.fill_(0)

    # --- what rows need -----------------------------------------------------------------------------------------------

    @property
    def usual_phase(self) -> int:
        return REST

    def part_of(self, phase: int) -> str:
        return "whole" if phase == WHOLE else "active"

    def phases(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's phase and the number of its columns to compute, int32 `[S]` each."""
        return torch.where(self.state.step == 0, WHOLE, REST).int(), self.active.sum(1, dtype=torch.int32)

    def columns_of(self, block: Block | None) -> tuple[int, ...]:
        return ()

    def enter(self, place: Place, block: Block | None) -> None:
        super().enter(place, block)
        speaker = torch.maximum(place.window - self.shift, self.state.origin[:, None]).clamp(min=0).long()
        self._keep("speaker", speaker)

    # --- steps --------------------------------------------------------------------------------------------------------

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        self._note_open(rows)
        if part == "whole":
            return super().__call__("whole", window, standing, pick, pending, width, rows)
        both = rows.twice() if rows is not None and self.is_guided else rows
        slots = self.slots[: len(self.active)]
        columns = torch.where(self.active, slots, self.length).topk(pending, 1, largest=False).values
        hidden = self.at(self.twice(columns), self.ends, rows=both)
        place = (self.active.cumsum(1) - 1).clamp(0, pending - 1).gather(1, self._buffers["speaker"])
        return self._select(hidden, place, pick, rows)

    def run(
        self, columns: Tensor | None, positions: Tensor, window: AttentionWindow, tokens: Tensor | None = None,
        moment: dict[str, Tensor] | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        slots, valid = window.slots, self._valid()
        assert slots is not None
        used = slots >= 0
        cache = self._all_rows
        if rows is not None:
            slots, used = rows.of(slots), rows.of(used)
            cache = rows.cache[: len(rows.cache) // (2 if self.is_guided else 1)].long()
            cache = torch.where(cache >= 0, cache, len(self.slots))
            valid = rows.of(self.twice(valid))
        else:
            window = replace(window, cache_rows=torch.arange(len(slots), dtype=torch.int32, device=slots.device))
        half = len(cache)
        slots, used, valid = slots[:half].long().clamp(min=0), used[:half], valid[:half]
        self._rollout = Rollout(slots, used & valid.gather(1, slots), cache, valid)
        return super().run(columns, positions, replace(window, watch=self._rollout), tokens, moment, rows)

    def _valid(self) -> Tensor:
        """Return which columns belong to each request, bool `[S, T]`."""
        return (self._columns >= self.state.origin[:, None]) & (self._columns < self.grid.ends[:, None])

    def learn(self, step: Step, rows: Rows | None) -> None:
        """After a step has been written, choose the positions that the next forward pass computes."""
        assert self._rollout is not None
        taken = None if rows is None else rows.taken
        column = torch.where(step.used, step.window.positions, self.length).long()
        self._confidence.scatter_(1, column, step.confidence)
        is_open, valid = self.state.is_open, self._valid()
        score = self._confidence[:, :-1] * density(~is_open, self.state.end, self.how.sigma)
        order = score.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.how.candidates]
        candidates = torch.zeros_like(is_open).scatter(1, order, True) & is_open
        active = candidates
        if self.shift:
            left = torch.nn.functional.pad(candidates[:, 1:], (0, 1))
            active = (left & valid) | (candidates & (self._columns == self.state.origin[:, None]))
        active = active | (self.was_open & ~is_open)
        importance, self._rollout = self._rollout.importance(), None
        if rows is not None:
            importance = importance.index_select(0, rows.place.clamp(max=len(importance) - 1))
        active = active | nucleus(importance, valid & ~active, self.how.rollout)
        put(self._candidates, candidates, taken)
        put(self.active, active, taken)
