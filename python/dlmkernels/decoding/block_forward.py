# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a decoding that goes block by block: which columns each computes, with and without a cache.

Everything that depends only on the block (columns, slots, which hidden state predicts which slot) is written into
buffers when the block is entered, so that steps only read it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..window import AttentionWindow, Rows, TokenWindow
from .forward import Forward, rows_at
from .schedule import Block
from .standing import Place, Standing
from .step import Step

#: Phases: what a row needs from its next forward pass. APPEND: append its context to the cache. WHOLE: compute all of
#: the canvas (with cache="block", all of the block). REST: compute only what the cache does not hold.
APPEND, WHOLE, REST = range(3)


class BlockForward(Forward):
    """The forward passes of one decoding. The columns that a pass computes are named by its `part`:

    - "whole": the whole canvas;
    - "part": what cache="prefix" and "dual" do not keep: the block and its vicinity, or everything from there on;
    - "open": with cache="delayed", the positions that were open before the last step;
    - "block": with cache="block", the block of the grid;
    - "append": "block", preceded by decided columns that are not in the cache yet;
    - "inner": with sub_block_cache, only the current part of the block.

    For the `counted` parts, the form gives the number of columns per row, which is at most `most_columns`.
    """

    counted: frozenset[str] = frozenset({"append", "open"})
    #: whether a forward pass may predict fewer positions than requested: see `spoken_of`
    narrows: ClassVar[bool] = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        config = self.config
        self._longest = config.sub_block_length or self.grid.length
        #: whether the context of a block is computed in a forward pass of its own, before the block
        self.commits_apart = bool(config.seeded) or (
            config.cache == "block"
            and (not config.fuse_commit or config.attention == "causal-context" or self.reach is not None)
        )
        self._carried: Tensor | None = None  # hidden state of the last context column, [S, hidden]
        #: with cache="block": column up to which the cache holds decided columns, -1 if it holds none, int32 [S]
        self.kept = torch.full_like(self.state.origin, -1)
        #: with cache="delayed": positions that were open before the last step, bool [S, T]
        self.was_open = self.state.is_open
        # buffers for the forward passes of the current block, and those for blocks of all lengths so far
        self._buffers: dict[str, Tensor] = {}
        self._all_buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._windows: dict[str, AttentionWindow] = {}
        self._spread: dict[str, int] = {}  # hidden states per row if all columns of a part are computed
        self._before: dict[str, int] = {}  # hidden states of the context put before those of a part
        self._place: Place
        self._row = torch.arange(len(self.state.tokens), device=self.origin.device)[:, None]
        #: whether a forward pass may compute only some of the batch rows
        self.takes_rows = False
        #: positions that the next forward pass may predict, bool [S, T]; None: all
        self.readable: Tensor | None = None
        self.most_columns = self.length

    def _keep(self, name: str, value: Tensor) -> Tensor:
        """Copy `value` into the buffer of that name and shape, and return the buffer."""
        key = name, tuple(value.shape)
        if key not in self._all_buffers:
            self._all_buffers[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
        self._buffers[name] = self._all_buffers[key]
        return self._buffers[name].copy_(value)

    def _keep_place(self, part: str, row: Tensor, width: int) -> None:
        """Store which of a row's `width` hidden states predicts each slot: its index in the row, and in the batch."""
        self._spread[part] = width
        self._keep(f"{part} rows", row)
        self._keep(f"{part} index", (row + self._row * width).flatten())

    def begin(self) -> None:
        super().begin()
        self.was_open.copy_(self.state.is_open)
        self.kept.fill_(-1)

    def renew(self, rows: Tensor) -> None:
        """Start over in rows bool `[S]`, which hold new requests now."""
        self.look(rows)
        self.forget(rows)
        self.was_open.copy_(torch.where(rows[:, None], self.state.is_open, self.was_open))
        self.kept.masked_fill_(rows, -1)

    def look(self, rows: Tensor | None = None) -> None:
        super().look(rows)
        plain = not self.config.rule.shadow and self.config.attention != "reordered"
        self.takes_rows = plain and self.rotations is None and self._given_embeds is None

    # --- what rows need, if each advances by itself -------------------------------------------------------------------

    @property
    def usual_phase(self) -> int:
        """Phase of rows in the middle of a block."""
        cache = self.config.cache
        return WHOLE if cache == "none" or (cache == "block" and not self.config.sub_block_cache) else REST

    def takes_canvas(self, phase: int) -> bool:
        """Return whether a forward pass in this phase computes the canvas, up to the end of its longest row."""
        return phase == WHOLE

    def part_of(self, phase: int) -> str:
        """Return the part that is computed for rows in this phase."""
        cache = self.config.cache
        rest = "open" if cache == "delayed" else "inner" if cache == "block" else "part"
        return {APPEND: "append", WHOLE: "block" if cache == "block" else "whole", REST: rest}[phase]

    def phases(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's phase, and its number of columns to append or still open, int32 `[S]` each.

        The latter is the column count of the parts "append" (besides the block's own columns) and "open". `index` int32
        `[S]`: number of the row's next step within its block.
        """
        config, nothing = self.config, torch.zeros_like(index)
        phase = nothing + WHOLE
        if self.usual_phase == REST:
            is_first = index < config.warmup
            if config.refresh_interval is not None:
                is_first = is_first | (index % config.refresh_interval == 0)
            phase = torch.where(is_first, WHOLE, REST).int()
        if config.cache == "delayed":
            return phase, torch.where(phase == REST, self.was_open.sum(1, dtype=torch.int32), nothing)
        if config.cache != "block" and not self.commits_apart:
            return phase, nothing
        lowest = self.state.origin
        if self.unconditional is not None:
            lowest = torch.minimum(lowest, self.unconditional.origin)
        pending = (self._place.outer - torch.where(self.kept < 0, lowest, self.kept)).clamp(min=0)
        return torch.where(pending > 0, APPEND, phase).int(), pending

    # --- entering a block ---------------------------------------------------------------------------------------------

    def enter(self, place: Place, block: Block | None) -> None:
        """Prepare the buffers for a block's steps. `block`: the block that all rows are in, None if they differ."""
        self._place = place
        speaker = torch.maximum(place.window - self.shift, self.state.origin[:, None]).clamp(min=0).long()
        self._keep_place("whole", speaker, self.length)
        self._windows["whole"] = AttentionWindow(
            self.slots.contiguous() if "whole" not in self._windows else self._windows["whole"].slots,
            self.kv_range, self.cache, rotations=self.rotations, **self._visibility(False),
        )  # fmt: skip
        cache, columns = self.config.cache, self.columns_of(block)
        if cache == "delayed":
            self._keep("speaker", speaker)
        elif cache in ("prefix", "dual"):
            lead = max(self.config.vicinity[0], self.shift)
            stop = place.start + place.length + self.config.vicinity[1] if cache == "dual" else None
            self._prepare("part", speaker, place.start - lead, columns[0], self.kv_range, stop=stop)
        elif cache == "block":
            end = torch.minimum(self.twice(place.outer + place.outer_length), self.ends)
            whole = self.twice(place.outer + place.outer_length)
            kv_range = self._keep("kv range", torch.stack((self.seen_from(whole), end), 1))
            self._prepare("block", speaker, place.outer, columns[0], kv_range, self.shift)
            if self.config.sub_block_cache:
                lead, stop = columns[2], place.start + place.length
                self._prepare("inner", speaker, place.start - lead, columns[1], kv_range, self.shift - lead, stop)

    def columns_of(self, block: Block | None) -> tuple[int, ...]:
        """Return how many columns are computed for `block`, or at most for any block if None; depends on the cache.

        With "prefix" and "dual": the columns of "part". With "block", and without a cache: those of "block", those of
        "inner", and how many of the latter are left of the part.
        """
        cache, (left, right) = self.config.cache, self.config.vicinity
        if cache == "delayed":
            return ()
        start, length, outer_length = 0, self._longest, self.grid.length
        if block is not None:
            start, length, outer_length = block.start, block.length, block.outer_length
        if cache in ("none", "block"):
            lead = self.shift if block is None or block.start > block.outer else 0
            return outer_length, lead + length, lead
        lead = max(left, self.shift)
        if cache == "dual":
            return (lead + length + right,)
        return (self.length - (self.grid.span[0] + start - lead),)

    def _prepare(
        self, part: str, speaker: Tensor, first: Tensor, width: int, kv_range: Tensor | None, before: int = 0,
        stop: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Prepare buffers for forward passes of `width` columns starting at `first` int32 `[S]`.

        `before` hidden states of the context are put before the result. Columns from `stop` int32 `[S]` on are unused.
        """
        self._before[part] = before
        row = (speaker - first[:, None] + before).clamp(0, width + before - 1)
        self._keep_place(part, row, width + before)
        columns = self.twice(first)[:, None] + torch.arange(width, dtype=torch.int32, device=first.device)
        ends = self.ends if stop is None else torch.minimum(self.ends, self.twice(stop))
        outside = (columns < self.origin[:, None]) | (columns >= ends[:, None])
        index = self._keep(f"{part} columns", columns.clamp(0, self.length - 1).long())
        self._keep(f"{part} positions", self.positions.gather(1, index))
        slots = self._keep(f"{part} slots", torch.where(outside, -1, columns))
        self._windows[part] = AttentionWindow(
            slots, kv_range, self.cache, rotations=self.rotations, **self._visibility(False)
        )

    def _visibility(self, decided: bool) -> dict[str, Any]:
        """Return which columns of a forward pass attend to which, as arguments of `AttentionWindow`."""
        attention = self.config.attention
        if attention == "block":
            seen = self.block_causal()
            # with guidance it is a new tensor each time, but a captured step keeps reading the first one
            return seen | {"block_origin": self._keep("block origin", seen["block_origin"])} if self.is_guided else seen
        if attention == "causal" or (attention == "causal-context" and decided):
            return {"causal_block": 1}
        if attention == "causal-context" and self.cache is None:
            # decided columns are causal; the block attends to itself and everything left of it
            start = self.twice(self._place.outer)[:, None]
            end = start + self.twice(self._place.outer_length)[:, None]
            order = torch.where((self.slots < start) | (self.slots >= end), self.slots, end - 1)
            order = self._keep("order", order)
            return {"q_limit": order, "k_order": order}
        if attention == "causal-context":
            return {"context_end": self._keep("context end", self.twice(self._place.outer))}
        return {}

    def spoken_of(self, window: TokenWindow) -> TokenWindow:
        """Return the slots of the window that the last forward pass predicted."""
        return window

    def learn(self, step: Step, rows: Rows | None) -> None:
        """Update this object after a step has been written in `rows` (None: in all rows)."""

    # --- steps --------------------------------------------------------------------------------------------------------

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the model, and return hidden states `[R, hidden]` (with guidance, 2 R rows) for the window's slots.

        `pick` `[R]` selects slots; None returns all. `pending`: with "append", the maximum number of columns before the
        block to append; with "open", the number of columns to compute per row. `width`: with "whole", the number of
        columns; None: all. `rows`: the batch rows to compute, out of S; None: all.
        """
        moment = self.moment_of(standing)
        both = rows.twice() if rows is not None and self.is_guided else rows
        if part == "open":
            return self._in_part(pending, pick, rows, both)
        if self.config.cache == "delayed":
            self._note_open(rows)
        if part == "append":
            hidden = self._append_with_block(pending, moment, rows, both)
            part = "block"
        elif part == "whole":
            hidden = self._whole(moment, width, both)
        else:
            columns, positions = self._buffers[f"{part} columns"], self._buffers[f"{part} positions"]
            hidden = self.run(columns, positions, self._windows[part], moment=moment, rows=both)
        if self._before.get(part):
            if self._carried is None:  # first block, without a context: it is never read
                self._carried = hidden.new_zeros(len(self.origin), hidden.shape[2])
            before = self._carried if both is None else both.of(self._carried)
            hidden = torch.cat((before[:, None], hidden), 1)
        return self._select(hidden, part, pick, rows)

    def _select(self, hidden: Tensor, place: Tensor | str, pick: Tensor | None, rows: Rows | None) -> Tensor:
        """Select the hidden states that predict the slots: `hidden` `[n, Q, hidden]` at `place` int64 `[S, W]`.

        With guidance, those of the unconditional half follow. `place` may be the name of a part.
        """
        count = len(self._row) if rows is None else len(rows.index)
        if isinstance(place, str) and rows is None and hidden.shape[1] == self._spread[place]:
            index = self._buffers[f"{place} index"]
        else:
            place = self._buffers[f"{place} rows"] if isinstance(place, str) else place
            row = self._row if rows is None else rows.place[:, None]
            index = (place.clamp(max=hidden.shape[1] - 1) + row * hidden.shape[1]).flatten()
        if pick is not None:
            index = index.index_select(0, pick)
        if self.is_guided:
            index = torch.cat((index, index + count * hidden.shape[1]))
        return hidden.flatten(0, 1).index_select(0, index)

    def _whole(
        self, moment: dict[str, Tensor] | None = None, width: int | None = None, both: Rows | None = None
    ) -> Tensor:  # fmt: skip
        window = self._windows["whole"]
        if self.config.attention == "reordered":
            order = self.reading_order()
            window = AttentionWindow(
                self.slots.contiguous(), self.kv_range, self.cache, rotations=self.rotations, q_limit=order,
                k_order=order,
            )  # fmt: skip
        if width is None or width >= self.length:
            return self.run(None, self.positions, window, moment=moment, rows=both)
        assert window.slots is not None and window.kv_range is not None
        slots = window.slots[:, :width].contiguous()
        narrow = replace(window, slots=slots, kv_range=window.kv_range.clamp(max=width))
        if self.cache is None and window.k_order is not None and window.q_limit is not None:
            narrow = replace(narrow, **{x: getattr(window, x)[:, :width].contiguous() for x in ("k_order", "q_limit")})
        columns = self._columns[:width].expand(len(self.positions), width)
        return self.run(columns, self.positions[:, :width].contiguous(), narrow, moment=moment, rows=both)

    def _note_open(self, rows: Rows | None) -> None:
        now = self.state.is_open
        self.was_open.copy_(now if rows is None else torch.where(rows.taken[:, None], now, self.was_open))

    def _carry(self, hidden: Tensor, both: Rows | None) -> None:
        """Store hidden states `[n, hidden]` of the last context column of each row."""
        if self._carried is None:
            self._carried = hidden.new_zeros(len(self.origin), hidden.shape[1])
        if both is None:
            self._carried.copy_(hidden)
        else:
            both.write(self._carried, hidden)

    def _append_with_block(
        self, pending: int, moment: dict[str, Tensor], rows: Rows | None, both: Rows | None
    ) -> Tensor:  # fmt: skip
        """Compute the block and the decided columns before it that are not cached yet; return the block's states."""
        first = self.twice(self._place.outer) - pending
        hidden = self._rows(first, pending + self._buffers["block columns"].shape[1], False, rows, both)
        if pending:
            self._carry(hidden[:, pending - 1], both)
        return hidden[:, pending:]

    def append_context(self, pending: int, rows: Rows | None = None) -> Tensor:
        """Compute the decided columns left of the block that are not cached yet; return which rows have a context.

        The result is bool `[S]`. `pending` and `rows` are as in `__call__`.
        """
        outer = self.twice(self._place.outer)
        both = rows.twice() if rows is not None and self.is_guided else rows
        if self.cache is not None:
            self._carry(self._rows(outer - pending, pending, True, rows, both)[:, -1], both)
        else:
            last = (outer - 1)[:, None] if both is None else both.of(outer - 1)[:, None]
            self._carry(rows_at(self._whole(both=both), last)[:, 0], both)
            self._keep_up(rows)
        has_some = self._place.outer > self.state.origin
        return has_some if rows is None else has_some & rows.taken

    def last_of_context(self) -> Tensor:
        """Return hidden states `[S, hidden]` (2 S with guidance) of the last column that `append_context` appended."""
        assert self._carried is not None
        return self._carried

    def _rows(self, first: Tensor, width: int, decided: bool, rows: Rows | None, both: Rows | None) -> Tensor:
        columns = first[:, None] + torch.arange(width, dtype=torch.int32, device=first.device)
        is_new = None
        if rows is not None:
            is_new = columns >= self.twice(self.kept)[:, None]
            self._keep_up(rows)
        # nothing has been written beyond the block
        visibility = self._visibility(decided)
        if decided and self.limit is not None:
            limit = self.limit.gather(1, columns.clamp(0, self.length - 1).long())
            visibility = {"q_limit": limit, "k_order": self.slots.contiguous()}
        return self.at(
            columns, self._buffers["kv range"][:, 1], is_new, rows=both, start=self.seen_from(first + width),
            **visibility,
        )  # fmt: skip

    def _keep_up(self, rows: Rows | None) -> None:
        """Record that everything left of the block has been computed in these rows."""
        if rows is not None:
            self.kept.copy_(torch.where(rows.taken, self._place.outer, self.kept))

    def _in_part(self, at_most: int, pick: Tensor | None, rows: Rows | None, both: Rows | None) -> Tensor:
        """Compute the positions that were open before the last step, at most `at_most` per request."""
        pending = self.was_open.clone()
        self._note_open(rows)
        slots, origin = self.slots[: len(pending)], self.state.origin[:, None]
        if self.shift:
            before = torch.nn.functional.pad(pending[:, 1:], (0, 1))
            pending = (before & (slots >= origin)) | (pending & (slots == origin))
        columns = torch.where(pending, slots, self.length).topk(at_most, 1, largest=False).values
        hidden = self.at(self.twice(columns), self.ends, rows=both)
        place = (pending.cumsum(1) - 1).clamp(0, at_most - 1).gather(1, self._buffers["speaker"])
        return self._select(hidden, place, pick, rows)
