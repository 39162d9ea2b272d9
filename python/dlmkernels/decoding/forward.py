# SPDX-License-Identifier: Apache-2.0
"""Forward passes over a canvas: the model's inputs for each row, and which columns may attend to which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..models.adapt import DiffusionModel, EncoderDecoderModel
from ..models.moment import Moment
from ..window import AttentionWindow, Rows, TokenWindow
from .config import DecodingConfig, SpecialTokens
from .guidance import Unconditional
from .hidden_rows import Logits, by_rows
from .schedule import Grid
from .standing import Standing
from .state import State, put


class Forward:
    """Runs the model on columns of the canvas. Guidance doubles the batch, with the conditional half first.

    With guidance, the attributes have 2 S rows.

    Attributes
    ----------
    shift : int
        1 if row i of the logits predicts position i + 1, else 0.
    origin, ends : Tensor
        int32 `[S]`: first column of each row, and the column at which it must end.
    slots, positions : Tensor
        int32 and int64 `[S, T]`: the number of every column, and its position within the request.
    kv_range : Tensor, optional
        int32 `[S, 2]`: the range of columns that belongs to each row; None: all of the canvas.
    """

    def __init__(
        self, model: DiffusionModel, state: State, config: DecodingConfig, special: SpecialTokens, grid: Grid,
        prompt_embeds: Tensor | None = None, ends: Tensor | None = None, rows_change: bool = False,
        prompt_limit: Tensor | None = None,
    ):  # fmt: skip
        """`ends` int32 `[S]`: where each request ends, if before the end of the grid. `rows_change`: whether rows are
        given new requests while others are decoded. `prompt_limit` int32 `[S, P]`: the last column that each prompt
        column attends to if the context is causal; None: itself.
        """  # fmt: skip
        self.model, self.state, self.config, self.special, self.grid = model, state, config, special, grid
        self.shift = 1 if config.logit_alignment == "shift" else 0
        self.is_guided = config.cfg_scale > 0
        self._given_embeds, self._given_ends = prompt_embeds, ends
        self.origin, self.ends, self.prompt_embeds = state.origin, grid.ends, prompt_embeds
        rows = 2 * len(state.origin) if self.is_guided else len(state.origin)
        self._columns = torch.arange(self.length, device=self.origin.device)
        self.slots = self._columns.int().expand(rows, self.length)
        self.positions = torch.zeros(rows, self.length, dtype=torch.int64, device=self.origin.device)
        self.kv_range: Tensor | None = None
        self._to_decode = torch.ones_like(self.origin)  # number of positions of each row that are open at first
        self.cache = KVCache(self.length, rows) if config.cache != "none" else None
        self.rows_change = rows_change
        #: number of columns that a block attends to, itself included, if the canvas is longer; None: all
        self.reach = model.reach if config.cache == "block" and self.length > (model.reach or 0) else None
        #: `prompt_limit`, extended to all columns of the canvas, int32 `[S, T]`
        self.limit: Tensor | None = None
        if prompt_limit is not None:
            self.limit = self.slots.clone()
            self.limit[:, : prompt_limit.shape[1]] = prompt_limit
        #: whether the model takes the time, that is, the progress of the decoding, as input
        self.takes_time = model.takes_time
        # with guidance, the second half of the batch sees other tokens in place of the given ones
        self.unconditional: Unconditional | None = None
        #: input embeddings set by a rule, `[S, T, hidden]` (2 S with guidance), and which columns have some, `[S, T]`
        self.embeds: Tensor | None = None
        self.embedded: Tensor | None = None
        #: mean embeddings of the last predictions, `[S, T, hidden]` (2 S with guidance), for self-conditioning models
        self.opinion: Tensor | None = None

    def begin(self) -> None:
        """Start decoding the requests that the state holds."""
        self.look()
        self.forget(torch.ones_like(self.state.origin, dtype=torch.bool))

    def look(self, rows: Tensor | None = None) -> None:
        """Read the positions of the requests from the state. Rows bool `[S]` hold new requests; None: all do."""
        state, grid = self.state, self.grid
        #: largest number of columns that any row has before its first block; if rows change, that any may have
        self.depth = grid.span[1] if self.rows_change else max(int((grid.first - state.origin).max()), 0)
        if self.is_guided:
            if self.unconditional is None:
                self.unconditional = Unconditional(state, self.special.mask)
                self.origin, self.ends = self.origin.repeat(2), grid.ends.repeat(2)
            other = self.unconditional
            other.look(rows)
            self.origin.copy_(torch.cat((state.origin, other.origin)))
            self.ends.copy_(torch.cat((grid.ends, grid.ends)))
            if not self.rows_change:
                self.depth = max(self.depth, int((grid.first - other.origin).max()))
            if self._given_embeds is not None:
                blind = self.model.embed(other.tokens[:, : self._given_embeds.shape[1]])
                self.prompt_embeds = torch.cat((self._given_embeds, blind))
        # for models whose rotary embedding depends on a request's length, which is that of its canvas
        ends = self.ends if self._given_ends is None else self.twice(self._given_ends)
        self.rotations = self.model.rotations(ends - self.origin)
        self.positions.copy_((self._columns - self.origin[:, None]).clamp(min=0))
        if self.rows_change or bool(((self.origin > 0) | (self.ends < self.length)).any()):
            kv_range = torch.stack((self.origin, self.ends), 1)
            self.kv_range = kv_range if self.kv_range is None else self.kv_range.copy_(kv_range)
        else:
            self.kv_range = None
        put(self._to_decode, state.is_open.sum(1, dtype=torch.int32).clamp(min=1), rows)

    @torch.no_grad()
    def reserve(self) -> None:
        """Allocate the KV cache now instead of in the first forward pass that uses it.

        This runs a forward pass over one column per row, which writes nothing.
        """
        if self.cache is None:
            return
        column = torch.zeros_like(self.slots[:, :1])
        self.at(column, self.ends, torch.zeros_like(column, dtype=torch.bool))

    @property
    def length(self) -> int:
        """T, the number of columns of the canvas."""
        return self.state.tokens.shape[1]

    def twice(self, x: Tensor) -> Tensor:
        """Repeat `x` `[S, …]` for both halves of the batch with guidance; return it as it is without."""
        return torch.cat((x, x)) if self.is_guided else x

    # --- inputs of the next forward pass beyond the tokens ------------------------------------------------------------

    def forget(self, rows: Tensor) -> None:
        """Discard what was set for the next forward pass in rows bool `[S]`, which enter another block."""
        if self.embedded is not None:
            self.embedded.masked_fill_(self.twice(rows)[:, None], False)
        if self.opinion is not None:
            self.opinion.masked_fill_(self.twice(rows)[:, None, None], 0)

    def condition_next(
        self, window: TokenWindow, logits: Logits, temperature: float | Tensor, rows: Tensor | None = None
    ) -> None:
        """Condition the next forward pass on the distributions of the window's slots, from logits `[N or 2N, V]`.

        `rows` bool `[S]` (None: all): the rows to set. Other rows keep what was set for them.
        """
        assert isinstance(self.model, EncoderDecoderModel)
        positions = self.twice(window.positions)
        if isinstance(temperature, Tensor):  # one per row of the logits
            temperature = self.twice(temperature).repeat_interleave(len(logits) // len(positions))
        model = self.model

        def mean(z: Tensor, rows: slice) -> Tensor:
            at = temperature[rows].contiguous() if isinstance(temperature, Tensor) else temperature
            return model.mean_embedding(z, at)

        soft = by_rows(logits, mean).unflatten(0, positions.shape)
        column = torch.where(positions >= 0, positions, self.length).long()[..., None].expand_as(soft)
        nothing = soft.new_zeros(len(soft), self.length + 1, soft.shape[2])  # one extra column, for the other slots
        opinion = nothing.scatter(1, column, soft)[:, :-1]
        if self.opinion is None:
            self.opinion = torch.zeros_like(opinion)
        put(self.opinion, opinion, rows if rows is None else self.twice(rows))

    def embed_next(self, window: TokenWindow, embeds: Tensor, where: Tensor, rows: Tensor | None = None) -> None:
        """In the next forward pass, embed the slots `where` bool `[S, W]` as `embeds` `[S, W, hidden]`."""
        if not self.model.embeds_by_token:
            raise ValueError(
                f"rule {type(self.config.rule).__name__} cannot be used with this model: its embedding of a token "
                "depends on the whole sequence"
            )
        column = torch.where(where, window.positions, self.length).long()
        # one extra column, for the other slots
        embedded = torch.zeros_like(self.state.is_open[:, :1]).repeat(1, self.length + 1).scatter(1, column, True)
        own = embeds.new_zeros(len(embeds), self.length + 1, embeds.shape[2])
        own = self.twice(own.scatter(1, column[..., None].expand_as(embeds), embeds)[:, :-1])
        embedded = self.twice(embedded[:, :-1])
        if (other := self.unconditional) is not None:
            embedded = embedded & ~torch.cat((torch.zeros_like(other.replaced), other.replaced))
        if self.embeds is None or self.embedded is None:
            self.embeds, self.embedded = torch.zeros_like(own), torch.zeros_like(embedded)
        rows = rows if rows is None else self.twice(rows)
        put(self.embeds, own, rows)
        put(self.embedded, embedded, rows)

    # --- forward passes -----------------------------------------------------------------------------------------------

    def at(
        self, columns: Tensor, end: Tensor, used: Tensor | None = None, tokens: Tensor | None = None,
        rows: Rows | None = None, start: Tensor | None = None, **visibility: Any,
    ) -> Tensor:  # fmt: skip
        """Compute hidden states `[S, Q, hidden]` of canvas columns int32 `[S, Q]`, which attend to `[start, end)`.

        `start` and `end` are int32 `[S]`; if `start` is None, the request's first column. Columns outside of the
        request, and those not `used` bool `[S, Q]`, become unused slots. `tokens` int64 `[S, Q]` replace those of the
        canvas. `rows`: see `run`.
        """
        outside = (columns < self.origin[:, None]) | (columns >= self.ends[:, None])
        inside = columns.clamp(0, self.length - 1).long()
        slots = torch.where(outside if used is None else outside | ~used, -1, columns)
        window = AttentionWindow(
            slots, torch.stack((self.origin if start is None else start, end), 1), self.cache,
            rotations=self.rotations, **visibility,
        )  # fmt: skip
        return self.run(inside, self.positions.gather(1, inside), window, tokens, rows=rows)

    def run(
        self, columns: Tensor | None, positions: Tensor, window: AttentionWindow, tokens: Tensor | None = None,
        moment: dict[str, Tensor] | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute hidden states `[S, Q, hidden]` of columns int64 `[S, Q]` (None: all) at `positions` `[S, Q]`.

        `moment`: arguments of `Moment`, for models that take the time. `rows`: the batch rows to compute (with
        guidance, of both halves); the result then holds only these, `[n, Q, hidden]`. None: all.
        """
        if tokens is None:
            tokens = self.tokens()
            if columns is not None:
                tokens = tokens.gather(1, columns)
        embeds = self._embeds(tokens, columns)
        opinion = None if self.opinion is None else _at(self.opinion, columns)
        told = {}
        if self.takes_time:
            masked = (self.state.is_open.sum(1) / self._to_decode).clamp(max=1)
            told = {name: self.twice(value) for name, value in {"masked": masked, **(moment or {})}.items()}
        if rows is not None:
            tokens, positions, window = rows.of(tokens), rows.of(positions), window.of(rows)
            embeds, opinion = (None if x is None else rows.of(x) for x in (embeds, opinion))
            told = {name: rows.of(value) for name, value in told.items()}
        if not self.takes_time:
            return self.model.hidden(tokens, positions, window, embeds, opinion)
        return self.model.hidden(tokens, positions, window, embeds, opinion, Moment(**told))  # type: ignore[call-arg]

    def moment_of(self, standing: Standing) -> dict[str, Tensor]:
        """Return what a model that takes the time is told about a step, as arguments of `Moment`."""
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

    def tokens(self) -> Tensor:
        """Return the tokens of the canvas, int64 `[S, T]`; with guidance, for both halves."""
        tokens = self.state.tokens
        return tokens if self.unconditional is None else torch.cat((tokens, self.unconditional.see(tokens)))

    def _embeds(self, tokens: Tensor, columns: Tensor | None) -> Tensor | None:
        """Return input embeddings at the columns, or None if tokens suffice.

        They are the prompt's or the rule's where these are given, else those of the tokens.
        """
        if self.prompt_embeds is None and self.embeds is None:
            return None
        embeds = self.model.embed(tokens)
        if self.embeds is not None and self.embedded is not None:
            set_by_rule = self.embedded if columns is None else self.embedded.gather(1, columns)
            embeds = torch.where(set_by_rule[..., None], _at(self.embeds, columns).to(embeds.dtype), embeds)
        if self.prompt_embeds is None:
            return embeds
        columns = self.slots.long() if columns is None else columns
        given = (columns < self.prompt_embeds.shape[1])[:, :, None]
        return torch.where(given, _at(self.prompt_embeds, columns), embeds)

    # --- attention patterns, as arguments of AttentionWindow ----------------------------------------------------------

    def block_causal(self) -> dict[str, Any]:
        """Let each block of the grid attend to itself and to everything left of it."""
        first = self.twice(self.grid.first)
        if self.config.block_grid == "absolute" and self.state.negative is None:
            origin = self.origin
        elif self.config.block_grid == "prompt":
            origin = first
        else:  # count blocks of a negative prompt from its end, so that the answer has the same blocks in both halves
            origin = first % self.grid.length
        return {"causal_block": self.grid.length, "block_origin": origin}

    def seen_from(self, end: Tensor) -> Tensor:
        """Return the first column that a block ending before column `end` attends to, int32 `[S]`."""
        return self.origin if self.reach is None else torch.maximum(self.origin, end - self.reach)

    def reading_order(self) -> Tensor:
        """Return each column's place in an order with all decided columns before all open ones, int32 `[S, T]`."""
        return torch.where(self.twice(self.state.is_open), self.slots + self.length, self.slots).contiguous()


def _at(values: Tensor, columns: Tensor | None) -> Tensor:
    """Gather `values` `[S, T, hidden]` at columns int64 `[S, Q]`, clamped to the last one: `[S, Q, hidden]`."""
    if columns is None:
        return values
    inside = columns.clamp(max=values.shape[1] - 1)
    return values.gather(1, inside[:, :, None].expand(-1, -1, values.shape[2]))


def rows_at(hidden: Tensor, row: Tensor) -> Tensor:
    """Gather `hidden` `[S, Q, hidden]` at indices `row` `[S, W]`, clamped to the valid range: `[S, W, hidden]`."""
    inside = row.clamp(0, hidden.shape[1] - 1).long()
    return hidden.gather(1, inside[:, :, None].expand(-1, -1, hidden.shape[2]))
