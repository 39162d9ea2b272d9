# SPDX-License-Identifier: Apache-2.0
"""Forwards of a decoding that goes block after block: which columns each takes, with and without a cache.

What depends on the block alone (columns, slots, places of the answers) is written into buffers when a block is entered,
so that a step finds it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..window import AttentionWindow, TokenWindow
from .forward import Forward, rows_at
from .schedule import Block
from .standing import Standing


@dataclass(frozen=True)
class Place:
    """Where the rows of a forward stand: int32 tensors, `[S]` but for `window`.

    Attributes
    ----------
    start : Tensor
        First column of each row's block, or part of one.
    outer, outer_length : Tensor
        The same of the block of the grid that it is a part of; and how many columns that has.
    window : Tensor
        `[S, W]`: the columns that steps in the block ask for, -1 for none.
    """

    start: Tensor
    outer: Tensor
    outer_length: Tensor
    window: Tensor


class BlockForward(Forward):
    """The forwards of one decoding. Columns to forward, by `part`:

    - "whole": all of the canvas;
    - "part": what cache="prefix" and "dual" do not keep: the block, its vicinity, or all from there on;
    - "open": with cache="delayed", what was open before the last step;
    - "block": with cache="block", the block of the grid;
    - "append": the same, and before it what has been decided and is not in the cache;
    - "inner": with sub_block_cache, the part of the block alone.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        config = self.config
        #: whether the context of a block is forwarded before the block, and not with it
        self.commits_apart = bool(config.seeded) or (
            config.cache == "block" and (not config.fuse_commit or config.attention == "causal-context")
        )
        self._carried: Tensor | None = None  # hidden state of the last of a block's context, [S, hidden]
        #: with cache="delayed": what was open before the last step, bool [S, T]
        self.was_open = self.state.is_open
        # what a block's forwards need, and the same for blocks of other lengths, too
        self._buffers: dict[str, Tensor] = {}
        self._all_buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._windows: dict[str, AttentionWindow] = {}
        self._before: dict[str, int] = {}  # how many rows of the context stand before those of a part
        self._place: Place
        self._row = torch.arange(len(self.state.tokens), device=self.origin.device)[:, None]

    def _keep(self, name: str, value: Tensor) -> Tensor:
        """The buffer of that name, with this value; there is one for each shape."""
        key = name, tuple(value.shape)
        if key not in self._all_buffers:
            self._all_buffers[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
        self._buffers[name] = self._all_buffers[key]
        return self._buffers[name].copy_(value)

    def begin(self) -> None:
        super().begin()
        self.was_open.copy_(self.state.is_open)

    # --- a block is entered -------------------------------------------------------------------------------------------

    def enter(self, place: Place, block: Block | None) -> None:
        """Write down what the steps of a block need. `block`: the one all rows are in, None where they differ."""
        self._place = place
        speaker = torch.maximum(place.window - self.shift, self.state.origin[:, None]).clamp(min=0).long()
        self._keep("whole rows", (speaker + self._row * self.length).flatten())
        self._windows["whole"] = AttentionWindow(
            self.slots.contiguous() if "whole" not in self._windows else self._windows["whole"].slots,
            self.kv_range, self.cache, rotations=self.rotations, **self._visibility(False),
        )  # fmt: skip
        cache, columns = self.config.cache, self.columns_of(block)
        if cache == "delayed":
            self._keep("speaker", speaker)
        elif cache in ("prefix", "dual"):
            lead = max(self.config.vicinity[0], self.shift)
            self._prepare("part", speaker, place.start - lead, columns[0], self.kv_range)
        elif cache == "block":
            end = torch.minimum(self.twice(place.outer + place.outer_length), self.ends)
            kv_range = self._keep("kv range", torch.stack((self.origin, end), 1))
            self._prepare("block", speaker, place.outer, columns[0], kv_range, self.shift)
            if self.config.sub_block_cache:
                lead = columns[2]
                self._prepare("inner", speaker, place.start - lead, columns[1], kv_range, self.shift - lead)

    def columns_of(self, block: Block | None) -> tuple[int, ...]:
        """How many columns of a block are forwarded, by the cache that there is.

        With "prefix" and "dual" those of "part". With "block", and without a cache, those of "block" and "inner", and
        how many of the latter stand left of the part.
        """
        cache, (left, right) = self.config.cache, self.config.vicinity
        if block is None or cache == "delayed":
            return ()
        if cache in ("none", "block"):
            lead = self.shift if block.start > block.outer else 0
            return block.outer_length, lead + block.length, lead
        lead = max(left, self.shift)
        if cache == "dual":
            return (lead + block.length + right,)
        return (self.length - (self.grid.span[0] + block.start - lead),)

    def _prepare(
        self, part: str, speaker: Tensor, first: Tensor, width: int, kv_range: Tensor | None, before: int = 0
    ) -> None:
        """Buffers for forwards of `width` columns from `first` int32 `[S]` on, with `before` rows put before them."""
        self._before[part] = before
        row = (speaker - first[:, None] + before).clamp(0, width + before - 1)
        self._keep(f"{part} rows", (row + self._row * (width + before)).flatten())
        columns = self.twice(first)[:, None] + torch.arange(width, dtype=torch.int32, device=first.device)
        outside = (columns < self.origin[:, None]) | (columns >= self.ends[:, None])
        index = self._keep(f"{part} columns", columns.clamp(0, self.length - 1).long())
        self._keep(f"{part} positions", self.positions.gather(1, index))
        slots = self._keep(f"{part} slots", torch.where(outside, -1, columns))
        self._windows[part] = AttentionWindow(
            slots, kv_range, self.cache, rotations=self.rotations, **self._visibility(False)
        )

    def _visibility(self, decided: bool) -> dict[str, Any]:
        """What the rows of a forward see of each other, as arguments of `AttentionWindow`."""
        attention = self.config.attention
        if attention == "block":
            return self.block_causal()
        if attention == "causal" or (attention == "causal-context" and decided):
            return {"causal_block": 1}
        if attention == "causal-context" and self.cache is None:
            # what is decided is causal; the block sees itself and what stands left of it
            start = self.twice(self._place.outer)[:, None]
            end = start + self.twice(self._place.outer_length)[:, None]
            order = torch.where((self.slots < start) | (self.slots >= end), self.slots, end - 1)
            order = self._keep("order", order)
            return {"q_limit": order, "k_order": order}
        if attention == "causal-context":
            return {"context_end": self._keep("context end", self.twice(self._place.outer))}
        return {}

    # --- steps --------------------------------------------------------------------------------------------------------

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0
    ) -> Tensor:  # fmt: skip
        """Hidden states `[R, hidden]` (2 R under guidance) of the window's slots, or of those that `pick` `[R]` names.

        `pending`: with "append", how many columns before the block are to be appended; with "open", how many are
        forwarded of each row.
        """
        moment = self._moment(standing)
        if self.config.rule.shadow:
            return self._with_shadow(window, pick, moment)
        if part == "open":
            return self._in_part(pending, window, pick)
        if self.config.cache == "delayed":
            self.was_open.copy_(self.state.is_open)
        if part == "append":
            hidden = self._append_with_block(pending, moment)
            part = "block"
        elif part == "whole":
            hidden = self._whole(moment)
        else:
            columns, positions = self._buffers[f"{part} columns"], self._buffers[f"{part} positions"]
            hidden = self.run(columns, positions, self._windows[part], moment=moment)
        if self._before.get(part):
            if self._carried is None:  # of a first block without a context, which asks for none of it
                self._carry(torch.zeros_like(hidden[:, 0]))
            hidden = torch.cat((self.last_of_context()[:, None], hidden), 1)
        return self._select(hidden, self._buffers[f"{part} rows"], pick)

    def _moment(self, standing: Standing) -> dict[str, Tensor]:
        if not self.takes_time:
            return {}
        moment = {
            "step": standing.index,
            "num_steps": standing.num_steps.clone(),
            "progress": standing.progress_before.float(),
        }
        rule = self.config.rule
        if rule.time(0, 1) is not None:
            moment["time"] = standing.tables.look_up("time", rule.time, standing.step, torch.float32)
        return moment

    def _select(self, hidden: Tensor, rows: Tensor, pick: Tensor | None) -> Tensor:
        """Rows numbered int64 `[N]` through `hidden` `[S, Q, hidden]`; and those of a guided batch's other half."""
        if pick is not None:
            rows = rows.index_select(0, pick)
        if self.is_guided:
            rows = torch.cat((rows, rows + len(self._row) * hidden.shape[1]))
        return hidden.flatten(0, 1).index_select(0, rows)

    def _whole(self, moment: dict[str, Tensor] | None = None) -> Tensor:
        window = self._windows["whole"]
        if self.config.attention == "reordered":
            order = self.reading_order()
            window = AttentionWindow(
                self.slots.contiguous(), self.kv_range, self.cache, rotations=self.rotations, q_limit=order,
                k_order=order,
            )  # fmt: skip
        return self.run(None, self.positions, window, moment=moment)

    def _carry(self, hidden: Tensor) -> None:
        if self._carried is None:
            self._carried = torch.empty_like(hidden)
        self._carried.copy_(hidden)

    def _append_with_block(self, pending: int, moment: dict[str, Tensor]) -> Tensor:
        """Hidden states of the block in one forward with what comes before it and is not in the cache yet."""
        first = self.twice(self._place.outer) - pending
        hidden = self._rows(first, pending + self._buffers["block columns"].shape[1], False)
        if pending:
            self._carry(hidden[:, pending - 1])
        return hidden[:, pending:]

    def append_context(self, pending: int) -> Tensor:
        """Forward what is decided left of the block and not in the cache; bool `[S]`: which rows have some."""
        outer = self.twice(self._place.outer)
        if self.cache is not None:
            self._carry(self._rows(outer - pending, pending, True)[:, -1])
        else:
            self._carry(rows_at(self._whole(), (outer - 1)[:, None])[:, 0])
        return self._place.outer > self.state.origin

    def last_of_context(self) -> Tensor:
        """Hidden states `[S, hidden]` (twice under guidance) of the last row of what `append_context` has appended."""
        assert self._carried is not None
        return self._carried

    def _rows(self, first: Tensor, width: int, decided: bool) -> Tensor:
        columns = first[:, None] + torch.arange(width, dtype=torch.int32, device=first.device)
        # beyond the block nothing has been written
        return self.at(columns, self._buffers["kv range"][:, 1], **self._visibility(decided))

    def _in_part(self, at_most: int, window: TokenWindow, pick: Tensor | None) -> Tensor:
        """A forward for what was open before the last step, of which no request has more than `at_most`."""
        pending = self.was_open.clone()
        self.was_open.copy_(self.state.is_open)
        slots, origin = self.slots[: len(pending)], self.state.origin[:, None]
        if self.shift:
            before = torch.nn.functional.pad(pending[:, 1:], (0, 1))
            pending = (before & (slots >= origin)) | (pending & (slots == origin))
        columns = torch.where(pending, slots, self.length).topk(at_most, 1, largest=False).values
        hidden = self.at(self.twice(columns), self.ends)
        place = (pending.cumsum(1) - 1).clamp(0, at_most - 1).gather(1, self._buffers["speaker"])
        return self._select(hidden, (place + self._row * at_most).flatten(), pick)

    def _with_shadow(self, window: TokenWindow, pick: Tensor | None, moment: dict[str, Tensor]) -> Tensor:
        """A forward of all the canvas and of the block's shadow, from which decided positions are read."""
        start, length, width = self._place.start, self.length, window.positions.shape[1]
        columns = start[:, None] + torch.arange(width, dtype=torch.int32, device=start.device)
        columns = self.twice(columns.clamp(max=length - 1))
        positions = window.positions.clamp(min=0)
        decided = ~self.state.is_open.gather(1, positions.long())
        row = torch.where(decided, length + positions - start[:, None], positions).clamp(0, length + width - 1)
        tokens, everywhere = self.tokens(), torch.cat((self.slots, columns), 1).long()
        tokens = torch.cat((tokens, torch.full_like(columns, self.special.mask, dtype=tokens.dtype)), 1)
        kv_range = torch.stack((self.origin, self.ends), 1)
        seen = AttentionWindow(kv_range=kv_range, shadow=columns.contiguous(), rotations=self.rotations)
        hidden = self.run(everywhere, self.positions.gather(1, everywhere), seen, tokens, moment)
        return self._select(hidden, (row + self._row * hidden.shape[1]).flatten(), pick)
