# SPDX-License-Identifier: Apache-2.0
"""Forward passes over blocks that continue, after the first layers, with only the positions that FOCUS selects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..window import AttentionWindow, Rows, TokenWindow
from .block_forward import BlockForward
from .config import DecodingConfig, SpecialTokens
from .features import FocusCache
from .features.focus import Narrowing, targets
from .parameters import changed
from .standing import Standing
from .state import State, put
from .step import Step


class FocusForward(BlockForward):
    """A `BlockForward` with cache="block" and the same parts, whose layers compute only some of their columns.

    The predicted positions are known only after the forward pass. They are not in `readable`; see `spoken_of`.
    """

    counted = BlockForward.counted | {"block"}
    narrows = True

    def __init__(
        self, how: FocusCache, model: Any, state: State, config: DecodingConfig, special: SpecialTokens, *args: Any,
        **options: Any,
    ):  # fmt: skip
        super().__init__(model, state, changed(config, {"cache": "block"}), special, *args, **options)
        self.model, self.how = self.model.by_layers(how.name, experts=True), how
        rows, device = len(state.tokens), self.origin.device
        #: tokens of the block that are no longer computed, and positions that the last pass predicted, bool [S, T]
        self._settled, self._spoken = torch.zeros_like(state.is_open), torch.ones_like(state.is_open)
        #: column up to which all layers have keys and values of the block, -1 if they have none, int32 [S]
        self._done = torch.full_like(self.state.origin, -1)
        #: number of tokens decided in the block, and of forward passes that decided any, int32 [S]
        self._decided, self._forwards = torch.zeros_like(self._done), torch.zeros_like(self._done)
        self._all_rows = torch.arange(2 * rows if self.is_guided else rows, device=device)
        self._is_step = self._measures = False

    def forget(self, rows: Tensor) -> None:
        super().forget(rows)
        self._settled.masked_fill_(rows[:, None], False)
        self._done.masked_fill_(rows, -1)
        self._decided.masked_fill_(rows, 0)
        self._forwards.masked_fill_(rows, 0)

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        self._note_open(rows)
        # forms whose shapes suit any rows give the maximum number of columns
        self._is_step, self._measures = True, pending < self.most_columns
        hidden = super().__call__(part, window, standing, pick, pending, width, rows)
        self._is_step = False
        return hidden

    def run(
        self, columns: Tensor | None, positions: Tensor, window: AttentionWindow, tokens: Tensor | None = None,
        moment: dict[str, Tensor] | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        if not self._is_step:
            return super().run(columns, positions, window, tokens, moment, rows)
        plan = self._narrowing(window, rows)
        hidden = super().run(columns, positions, replace(window, layers=plan), tokens, moment, rows)
        self._take_notice(plan, rows)
        return hidden

    def _block(self, slots: Tensor) -> Tensor:
        """Return which of the columns int `[S, Q]` are in their row's block; `[2 S, Q]` with guidance."""
        first, length = self._place.outer[:, None], self._place.outer_length[:, None]
        if len(slots) > len(first):
            first, length = torch.cat((first, first)), torch.cat((length, length))
        return (slots >= first) & (slots < first + length)

    def _narrowing(self, window: AttentionWindow, rows: Rows | None) -> Narrowing:
        slots = window.slots
        assert slots is not None
        inside, position = self._block(slots), slots.clamp(min=0).long()
        is_open = inside & self.twice(self.state.is_open).gather(1, position)
        used = (slots >= 0) & ~(inside & self.twice(self._settled).gather(1, position))
        open_now = is_open.sum(1, dtype=torch.int32)
        target = targets(self.how.alpha, open_now, self.twice(self._decided), self.twice(self._forwards))
        parts = {
            "position": position, "used": used, "is_open": is_open, "inside": inside, "target": target,
            "done": self.twice(self._done), "least": self.twice(self._place.outer),
        }  # fmt: skip
        cache = self._all_rows
        if rows is not None:
            parts = {name: rows.of(value) for name, value in parts.items()}
            parts["used"] = parts["used"] & (rows.cache >= 0)[:, None]
            parts["is_open"] = parts["is_open"] & parts["used"]
            cache = rows.cache.clamp(min=0).long()
        half = len(cache) // 2 if self.is_guided else len(cache)
        return Narrowing(**parts, rows=cache, half=half, measures=self._measures)

    def _take_notice(self, plan: Narrowing, rows: Rows | None) -> None:
        """Store the positions that the pass predicted, and how far all layers have the block's keys and values now."""
        count = len(self._row) if rows is None else len(rows.index) // (2 if self.is_guided else 1)
        column, reached = plan.spoken(count, self.length)
        spoken = torch.zeros_like(self._spoken[:1]).repeat(count, 1)
        spoken = torch.nn.functional.pad(spoken, (0, 1)).scatter(1, column, True)[:, :-1]
        done = (reached - 1).int()
        if rows is None:
            self._spoken.copy_(spoken)
            self._done.copy_(done)
            return
        own = Rows(rows.index[:count], rows.cache[:count], rows.taken[: len(self._row)], rows.place[: len(self._row)])
        own.write(self._spoken, spoken)
        own.write(self._done, done)

    def spoken_of(self, window: TokenWindow) -> TokenWindow:
        index = window.positions.clamp(min=0).long()
        used = window.used & self._spoken.gather(1, index)
        return TokenWindow.of(torch.where(used, window.positions, -1), window.origin, used)

    def learn(self, step: Step, rows: Rows | None) -> None:
        """Count the tokens that a step has decided, and find the ones that need not be computed again."""
        taken = None if rows is None else rows.taken
        columns = self.slots[: len(self._settled)]
        inside = self._block(columns)
        was_decided = ~self.was_open
        count = (inside & self.was_open & ~self.state.is_open).sum(1, dtype=torch.int32)
        put(self._decided, self._decided + count, taken)
        put(self._forwards, self._forwards + (count > 0), taken)
        if not self.how.delayed:
            return
        last = torch.minimum(self._place.outer + self._place.outer_length, self.grid.ends)[:, None] - 1
        right = torch.nn.functional.pad(was_decided[:, 1:], (0, 1), value=True) | (columns == last)
        put(self._settled, self._settled | (inside & was_decided & right), taken)
