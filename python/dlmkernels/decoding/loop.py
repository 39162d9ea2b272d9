# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: forward, confidence, selection, commit; block after block.

Everything a step computes stays on the device. The host knows the plan (blocks, planned steps) and polls one count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache
from ..models.adapt import DiffusionModel, EncoderDecoderModel
from ..models.backbone import Backbone, Moment
from ..window import AttentionWindow, TokenWindow
from .canvas import Canvas, Columns
from .config import DecodingConfig, SpecialTokens
from .constraint import Constrained, one_each
from .guidance import Unconditional
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer, StepOptions
from .rules import Action
from .schedule import Block, Grid, plan_blocks


@torch.no_grad()
def decode(
    model: DiffusionModel,
    canvas: Canvas,
    config: DecodingConfig,
    special: SpecialTokens,
    grid: Grid,
    start: int,
    end: int,
    streamer=None,
    prompt_embeds: Tensor | None = None,
) -> DecodingOutput:
    """Decode the open positions of columns `[start, end)`, and those that complete the last block of the grid."""
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    propose = Proposer(model, canvas, config, special)
    rule = config.rule
    constrained = Constrained(config, canvas, start, end, special.mask)
    options = StepOptions(propose, canvas, config, constrained)
    unfinished = Unfinished(canvas, rule, constrained)
    if rule.noise == "uniform":
        if model.vocab_size is None:
            raise ValueError(f"{type(rule).__name__} draws from the vocabulary, whose size the model does not say")
        canvas.renoise(propose.seed, model.vocab_size)
    blocks = plan_blocks(config, grid)
    planned, behind = sum(b.num_steps for b in blocks if b.offset < grid.planned * grid.length), 0
    most_open = torch.stack([_open_in(canvas, _columns(canvas, block)).max() for block in blocks]).tolist()
    # A rule that takes tokens back may also take back an end token: that counts once its block is finished.
    fills_at_once = config.eos_policy == "fill" and rule.slots == "open"
    whole = canvas.columns(torch.full_like(canvas.origin, start), canvas.tokens.shape[1] - start)
    shown = start
    for number, (block, in_block) in enumerate(zip(blocks, most_open)):
        forward.begin_block()
        constrained.begin_block()
        if in_block > 0 and forward.commits_apart and forward.lacks_context(block):
            took_part = forward.append_context(block)
            if config.seeded:
                first = torch.where(took_part, block.outer, canvas.tokens.shape[1])
                window = canvas.window(canvas.columns(first, 1), 1)
                one = torch.ones_like(first)
                step = options.step(model.logits(forward.last_of_context()), window, first, 1, 0, 1, one, one, 0.0, {})
                step, action = constrained.act(step, lambda step: Action(step.used))
                assert action.commit is not None
                commit_tokens(
                    canvas, config, special, window.positions, step.token, action.commit, step.confidence,
                    fills_at_once,
                )  # fmt: skip
                took_part &= window.positions[:, 0] < 0  # the others have been counted
            canvas.step.add_(took_part)
        columns = _columns(canvas, block)
        open_at_start = open_now = _open_in(canvas, columns)
        counts = OpenCount(in_block, sum(most_open[number:]))
        counts.submit(_open_counts(canvas, columns))
        working = open_now > 0
        memory: dict[str, Tensor] = {}
        # What a constraint has kept open when the rule has done its steps gets more, as long as they help.
        for index in range(block.max_steps + constrained.may_leave_open * block.length):
            is_extra = index >= block.max_steps
            capacity, open_at_most = counts.latest()
            if capacity == 0:
                break
            if rule.slots == "open":
                window = canvas.window(columns, capacity)
            else:
                window = canvas.free_window(whole if rule.slots == "canvas" else columns, working)
            if constrained.may_leave_open:
                window = constrained.without_stuck(window, open_now > 0 if is_extra else None)
                if (is_extra or constrained.checks) and not window.used.any():
                    break
            progress = min((behind + index) / planned, 1.0)
            logits = model.logits(forward(block, index, window, open_at_most, progress))
            step = options.step(
                logits, window, block.start, block.length, index, block.num_steps, open_at_start, open_now,
                min((behind + index + 1) / planned, 1.0), memory,
            )  # fmt: skip
            step, action = constrained.act(step, one_each if is_extra else rule.act)
            unfinished.see(step)
            info = canvas.write(
                window.positions, _or(action.token, step.token),
                commit=action.commit, edit=action.edit, remask=action.remask, renoise=action.renoise,
                confidence=_or(action.confidence, step.confidence), step=canvas.step, seed=propose.seed,
                origin=canvas.origin, mask_token_id=special.mask, vocab_size=model.vocab_size or 0,
                eos_token_ids=special.eos, eos_policy="fill" if fills_at_once else "none",
                fill_token_id=special.pad,
            )  # fmt: skip
            if action.insert is not None:
                block_end = (block.start + block.length).clamp(max=canvas.tokens.shape[1])
                ops.splice_(
                    canvas.tokens, torch.where(working, block.start, -1), insert=action.insert,
                    remove=action.remove, end=block_end, state=canvas.state, commit_step=canvas.commit_step,
                    commit_confidence=canvas.confidence, fill_token_id=special.mask,
                )  # fmt: skip
            if action.embeds is not None and action.embedded is not None:
                forward.embed_next(window, action.embeds, action.embedded)
            if model.self_conditions:
                forward.condition_next(window, logits, step.sampling_temperature)
            if rule.slots == "open":
                open_now = info[:, 0].contiguous()
                counts.submit(info[:, :2].amax(0))
            else:
                open_now = _open_in(canvas, columns)
                wanted = open_now > 0 if action.working is None else action.working
                working = working & (wanted | (open_now > 0) if constrained.may_leave_open else wanted)
                open_in_all = info[:, 1] if action.insert is None else canvas.is_open.sum(1)
                counts.submit(torch.stack((working.sum(), open_in_all.amax())))
            if hasattr(streamer, "put_draft"):
                streamer.put_draft(canvas.tokens[0, start:end].cpu())
        unfinished.end_block()
        behind += block.num_steps
        if config.eos_policy != "none" and not fills_at_once:
            canvas.fill_after_eos(special.eos, special.pad)
            counts.submit(_open_counts(canvas, columns))
        if streamer is not None:
            shown = min(block.span[1], end)
            streamer.put(canvas.tokens[0, max(block.span[0], start) : shown].cpu())
        if counts.latest()[1] == 0:
            break
    if streamer is not None:
        if shown < end:  # padding of blocks that have not been entered
            streamer.put(canvas.tokens[0, shown:end].cpu())
        streamer.end()
    return output_of(canvas, start, end, unfinished)


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value


def _columns(canvas: Canvas, block: Block) -> Columns:
    return canvas.columns(block.start, block.length)


def _open_in(canvas: Canvas, columns: Columns) -> Tensor:
    return canvas.open_in(columns).sum(1, dtype=torch.int32)


def _open_counts(canvas: Canvas, columns: Columns) -> Tensor:
    return torch.stack((_open_in(canvas, columns).amax(), canvas.is_open.sum(1).amax()))


def commit_tokens(
    canvas: Canvas, config: DecodingConfig, special: SpecialTokens, positions: Tensor, tokens: Tensor, chosen: Tensor,
    confidence: Tensor, fills: bool = True,
) -> Tensor:  # fmt: skip
    """Write the chosen ones of the tokens `[B, W]` at canvas `positions`; the info of `ops.remask_`.

    `fills`: whether an end token among them is final.
    """
    policy = "fill" if fills and config.eos_policy != "none" else "none"
    return canvas.write(
        positions, tokens, commit=chosen, confidence=confidence, step=canvas.step, mask_token_id=special.mask,
        eos_token_ids=special.eos, eos_policy=policy, fill_token_id=special.pad,
    )  # fmt: skip


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """`values` `[B, T, hidden]` at columns `[B, Q]`, the nearest that there is: `[B, Q, hidden]`."""
    inside = columns.clamp(0, values.shape[1] - 1).long()
    return values.gather(1, inside[:, :, None].expand(-1, -1, values.shape[2]))


class CanvasForward:
    """Runs the model on the part of the canvas a step needs, and returns hidden states of the window's slots.

    With cache="block" the rows of a forward differ in the columns they stand in: their blocks begin where their
    request's grid says. What is not in a row's block (nor, when it is appended, in the block before) is an unused slot.
    """

    def __init__(
        self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens, grid: Grid,
        prompt_embeds: Tensor | None = None, ends: Tensor | None = None,
    ):  # fmt: skip
        """`ends` int32 `[B]`: how far each request may reach where that is less than the grid's end."""
        self.model, self.canvas, self.config, self.special, self.grid = model, canvas, config, special, grid
        self.shift = 1 if config.logit_alignment == "shift" else 0
        #: whether the context of a block is forwarded before the block, and not with it
        self.commits_apart = bool(config.seeded) or (
            config.cache == "block" and (not config.fuse_commit or config.attention == "causal-context")
        )
        self.origin, self.ends = canvas.origin, grid.ends
        self.prompt_embeds = prompt_embeds
        depth = grid.depth
        self.unconditional: Unconditional | None = None
        if config.cfg_scale > 0:
            # Guidance doubles the batch: the second half sees something else where tokens were given.
            other = self.unconditional = Unconditional(canvas, special.mask)
            self.origin, self.ends = torch.cat((self.origin, other.origin)), self.ends.repeat(2)
            if canvas.negative is not None:
                depth = max(depth, int((grid.first - other.origin).max()))
            if prompt_embeds is not None:
                blind = model.embed(other.tokens[:, : prompt_embeds.shape[1]])
                self.prompt_embeds = torch.cat((prompt_embeds, blind))
        #: for models whose rotary embedding depends on the length: that of a request is its canvas's
        self.rotations = model.rotations((self.ends if ends is None else self._twice(ends)) - self.origin)
        length = canvas.tokens.shape[1]
        columns = torch.arange(length, device=self.origin.device)
        self.positions = (columns - self.origin[:, None]).clamp(min=0)
        self.slots = columns.int().expand(len(self.origin), length)
        self.part = (0, 0)  # the columns of the last forward of the same columns in all rows
        in_part = bool(((self.origin > 0) | (self.ends < length)).any())
        self.kv_range = torch.stack((self.origin, self.ends), 1) if in_part else None
        self.cache = KVCache(length) if config.cache != "none" else None
        # What is final and need not be forwarded again: how far it reaches right of the grid's first block, and its
        # last hidden state.
        self.done = -depth
        self.carried: Tensor | None = None
        #: with cache="delayed": what was open at the last forward, bool `[B, T]`, at most so many of a row
        self.was_open, self.was_open_at_most = canvas.is_open, length
        #: input embeddings of all the canvas, where a rule has set some
        self.embeds: Tensor | None = None
        #: what the last forward of the block said of all the canvas, for models with self-conditioning
        self.opinion: Tensor | None = None
        #: where in its plan the decoding stands, as arguments of `Moment`; and what was open when it began
        self.planned: dict[str, Any] = {}
        self.to_decode = canvas.is_open.sum(1).clamp(min=1)

    def begin_block(self) -> None:
        """Forget what was set for the next forward of the block before."""
        self.embeds = self.opinion = None

    def condition_next(self, window: TokenWindow, logits: Tensor, temperature: float) -> None:
        """In the next forward, let the model know the distributions of the window's slots, of logits `[N or 2N, V]`."""
        assert isinstance(self.model, EncoderDecoderModel)
        positions, length = self._twice(window.positions), self.canvas.tokens.shape[1]
        soft = self.model.mean_embedding(logits, temperature).unflatten(0, positions.shape)
        column = torch.where(positions >= 0, positions, length).long()[..., None].expand_as(soft)
        nothing = soft.new_zeros(len(soft), length + 1, soft.shape[2])  # one more column, for the other slots
        self.opinion = nothing.scatter(1, column, soft)[:, :-1]

    def embed_next(self, window: TokenWindow, embeds: Tensor, where: Tensor) -> None:
        """In the next forward, let `embeds` `[B, W, hidden]` stand in for the tokens' where `where` says so."""
        if not self.model.embeds_by_token:
            raise ValueError(
                f"rule {type(self.config.rule).__name__} cannot be used with this model: what it embeds a token as "
                "depends on the whole row"
            )
        tokens = self.canvas.tokens
        own = torch.nn.functional.pad(self.model.embed(tokens), (0, 0, 0, 1))  # one more column, for the other slots
        column = torch.where(where, window.positions, tokens.shape[1]).long()[..., None].expand_as(embeds)
        self.embeds = own.scatter(1, column, embeds.to(own.dtype))[:, :-1]
        if (other := self.unconditional) is not None:
            blind = self.model.embed(other.tokens)
            self.embeds = torch.cat((self.embeds, torch.where(other.replaced[..., None], blind, self.embeds)))

    def __call__(
        self, block: Block, index: int, window: TokenWindow, open_at_most: int, progress: float
    ) -> Tensor:  # fmt: skip
        """Hidden states `[N, hidden]`, N = B * W (2 * B * W under guidance, conditional half first).

        No request has more than `open_at_most` open positions; `progress` is `Step.progress`.
        """
        self.planned = {"step": index, "num_steps": block.num_steps, "progress": progress}
        interval = self.config.refresh_interval
        whole = index < self.config.warmup or (interval is not None and index % interval == 0)
        if self.config.cache == "block":
            return self._in_block(block, window, whole or not self.config.sub_block_cache)
        if self.config.rule.shadow:
            return self._with_shadow(block, window)
        if self.config.cache == "delayed":
            pending, at_most = self.was_open, self.was_open_at_most
            self.was_open, self.was_open_at_most = self.canvas.is_open, open_at_most
            if not whole:
                return self._in_part(pending, at_most, window)
        first, last = self._columns(block, whole)
        hidden = self._forward_columns(block, first, last)
        return self._pick(hidden, self.speaker_of(window.positions) - first)

    def speaker_of(self, positions: Tensor) -> Tensor:
        """Columns whose rows speak of canvas positions int32 `[B, W]`, none below 0.

        A request's first position has no row before it and keeps its own.
        """
        return torch.maximum(positions - self.shift, self.canvas.origin[:, None])

    def lacks_context(self, block: Block) -> bool:
        """Whether something left of the block has not been forwarded since it was decided."""
        return block.offset > self.done

    def append_context(self, block: Block) -> Tensor:
        """Forward what is decided left of the block and not in the cache; bool `[B]`: in which open requests."""
        outer = self._twice(block.outer)
        if self.cache is not None:
            pending = block.offset - self.done
            hidden = self._forward_rows(block, outer - pending, pending, decided=True)
            self.carried = hidden[:, -1]
        else:
            hidden = self._forward_columns(block, 0, self.canvas.tokens.shape[1])
            last = (outer - 1).clamp(min=0).long()[:, None, None].expand(-1, 1, hidden.shape[2])
            self.carried = hidden.gather(1, last)[:, 0]
        self.done = block.offset
        return (block.outer > self.canvas.origin) & self.canvas.is_open.any(1)

    def last_of_context(self) -> Tensor:
        """Hidden states `[B, hidden]` (twice under guidance) of the last row of what `append_context` has appended."""
        assert self.carried is not None
        return self.carried

    def _in_block(self, block: Block, window: TokenWindow, whole: bool) -> Tensor:
        """A forward of each row's block alone, or of what comes before it too if that is not in the cache yet.

        Where it need not be `whole`, of the part of the block that is being decoded.
        """
        first, length, before = block.outer, block.outer_length, 0
        if not whole:
            inner = block.span[0] - self.grid.span[0] - block.offset  # columns of the block left of the part
            first, length = block.start, block.length
            if inner > 0:
                before = self.shift  # the row that speaks of the part's first position
        elif not self.commits_apart and self.lacks_context(block):
            before = block.offset - self.done
        hidden = self._forward_rows(block, self._twice(first) - before, before + length)
        head = hidden[:, 0] if self.carried is None else self.carried
        if before > 0:
            head, hidden = hidden[:, before - 1], hidden[:, before:]
            if whole:
                self.carried, self.done = head, block.offset
        row = self.speaker_of(window.positions) - first[:, None]
        if not self.shift:
            return self._pick(hidden, row)
        # The row before the block's first comes from the context; without one the first row stands for itself.
        return self._pick(torch.cat((head[:, None], hidden), 1), row + 1)

    def _with_shadow(self, block: Block, window: TokenWindow) -> Tensor:
        """A forward of all the canvas and of the block's shadow, from which decided positions are read."""
        length = self.canvas.tokens.shape[1]
        columns = block.start[:, None] + torch.arange(block.length, dtype=torch.int32, device=block.start.device)
        decided = ~self.canvas.is_open.gather(1, window.positions.clamp(min=0).long())
        row = torch.where(decided, length + window.positions - block.start[:, None], window.positions)
        columns = self._twice(columns)
        tokens, everywhere = self._tokens(), torch.cat((self.slots, columns), 1)
        tokens = torch.cat((tokens, torch.full_like(tokens[:, : block.length], self.special.mask)), 1)
        kv_range = torch.stack((self.origin, self.ends), 1)
        seen = AttentionWindow(kv_range=kv_range, shadow=columns.contiguous(), rotations=self.rotations)
        positions = self.positions.gather(1, everywhere.long())
        return self._pick(self._hidden(tokens, positions, seen, self._embeds(tokens, everywhere)), row)

    def _in_part(self, pending: Tensor, at_most: int, window: TokenWindow) -> Tensor:
        """A forward for the `pending` positions bool `[B, T]` alone, of which no request has more than `at_most`."""
        slots, origin = self.slots[: len(pending)], self.canvas.origin[:, None]
        if self.shift:
            before = torch.nn.functional.pad(pending[:, 1:], (0, 1))
            pending = (before & (slots >= origin)) | (pending & (slots == origin))
        columns = torch.where(pending, slots, slots.shape[1]).sort(1).values[:, :at_most]
        hidden = self.at(self._twice(columns), self.ends)
        place = pending.cumsum(1) - 1
        return self._pick(hidden, place.gather(1, self.speaker_of(window.positions).long()))

    def _forward_rows(self, block: Block, start: Tensor, length: int, decided: bool = False) -> Tensor:
        """Hidden states of `length` columns of each row from `start` on, as far as they are to be forwarded."""
        columns = start[:, None] + torch.arange(length, dtype=torch.int32, device=start.device)
        # beyond the block nothing has been written
        end = torch.minimum(self._twice(block.outer) + block.outer_length, self.ends)
        return self.at(columns, end, **self._visibility(block, decided))

    def at(
        self, columns: Tensor, end: Tensor, used: Tensor | None = None, tokens: Tensor | None = None, **visibility: Any
    ) -> Tensor:
        """Hidden states `[B, Q, hidden]` of the canvas columns int32 `[B, Q]`, which see nothing from `end` `[B]` on.

        Columns outside of the request, and those not `used` bool `[B, Q]`, are unused slots. `tokens` int64 `[B, Q]`
        stand in for what the canvas holds there.
        """
        outside = (columns < self.origin[:, None]) | (columns >= self.ends[:, None])
        inside = columns.clamp(0, self.canvas.tokens.shape[1] - 1).long()
        if tokens is None:
            tokens = self._tokens().gather(1, inside)
        slots = torch.where(outside if used is None else outside | ~used, -1, columns)
        kv_range = torch.stack((self.origin, end), 1)
        window = AttentionWindow(slots, kv_range, self.cache, rotations=self.rotations, **visibility)
        positions, embeds = self.positions.gather(1, inside), self._embeds(tokens, inside)
        opinion = None if self.opinion is None else _at(self.opinion, inside)
        return self._hidden(tokens, positions, window, embeds, opinion)

    def _forward_columns(self, block: Block, first: int, last: int) -> Tensor:
        """Hidden states of the columns `[first, last)` of every row."""
        if (first, last) != self.part:
            self.part = first, last
            self.slots_of_part = self.slots[:, first:last].contiguous()
            self.positions_of_part = self.positions[:, first:last]
        tokens = self._tokens()[:, first:last]
        visibility = self._visibility(block, False)
        window = AttentionWindow(self.slots_of_part, self.kv_range, self.cache, rotations=self.rotations, **visibility)
        embeds = self._embeds(tokens, self.slots_of_part)
        return self._hidden(tokens, self.positions_of_part, window, embeds)

    def _hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`DiffusionModel.hidden`; a backbone that may take the time is told what it is."""
        if not isinstance(self.model, Backbone):
            return self.model.hidden(tokens, positions, window, embeds, opinion)
        masked = (self.canvas.is_open.sum(1) / self.to_decode).clamp(max=1)
        moment = Moment(self._twice(masked), **self.planned)
        return self.model.hidden(tokens, positions, window, embeds, opinion, moment)

    def _columns(self, block: Block, whole: bool) -> tuple[int, int]:
        """Canvas columns to forward, for caches of models with full attention."""
        length = self.canvas.tokens.shape[1]
        if self.config.cache == "none" or whole:
            return 0, length
        first, last = block.span
        left, right = self.config.vicinity
        return max(first - max(left, self.shift), 0), min(
            last + right, length
        ) if self.config.cache == "dual" else length

    def _visibility(self, block: Block, decided: bool) -> dict[str, Any]:
        """What the rows of a forward see of each other, as arguments of `AttentionWindow`."""
        attention = self.config.attention
        if attention == "block":
            return self.block_causal()
        if attention == "causal" or (attention == "causal-context" and decided):
            return {"causal_block": 1}
        if attention == "causal-context" and self.cache is None:
            # what is decided is causal; the block sees itself and what stands left of it
            start = self._twice(block.outer)[:, None]
            end = start + block.outer_length
            order = torch.where((self.slots < start) | (self.slots >= end), self.slots, end - 1).contiguous()
            return {"q_limit": order, "k_order": order}
        if attention == "causal-context":
            return {"context_end": self._twice(block.outer)}
        if attention == "reordered":
            order = self.reading_order()
            return {"q_limit": order, "k_order": order}
        return {}

    def block_causal(self) -> dict[str, Any]:
        """Arguments of `AttentionWindow` with which the blocks of the grid see themselves and what stands left."""
        first = self._twice(self.grid.first)
        if self.config.block_grid == "absolute" and self.canvas.negative is None:
            origin = self.origin
        elif self.config.block_grid == "prompt":
            origin = first
        else:  # a negative prompt is cut into blocks from its end: what is decoded must be one block in both halves
            origin = first % self.grid.length
        return {"causal_block": self.grid.length, "block_origin": origin}

    def reading_order(self) -> Tensor:
        """Place of every column if what is decided were read before what is open: int32 `[B, T]`."""
        is_open = self._twice(self.canvas.is_open)
        return torch.where(is_open, self.slots + self.slots.shape[1], self.slots).contiguous()

    def _tokens(self) -> Tensor:
        tokens = self.canvas.tokens
        return tokens if self.unconditional is None else torch.cat((tokens, self.unconditional.see(tokens)))

    def _embeds(self, tokens: Tensor, columns: Tensor) -> Tensor | None:
        """Input embeddings at canvas columns `[B, Q]`, those of the prompt and of the rule where they gave some.

        None if neither did.
        """
        if self.prompt_embeds is None:
            return None if self.embeds is None else _at(self.embeds, columns)
        embeds = self.model.embed(tokens) if self.embeds is None else _at(self.embeds, columns)
        given = (columns < self.prompt_embeds.shape[1])[:, :, None]
        return torch.where(given, _at(self.prompt_embeds, columns), embeds)

    def _pick(self, hidden: Tensor, row: Tensor) -> Tensor:
        """Rows `row` `[B, W]` of `hidden` `[B or 2B, Q, hidden]`, one below another."""
        row = self._twice(row.clamp(0, hidden.shape[1] - 1))
        if len(row) > 1:
            row = row + torch.arange(len(row), device=row.device)[:, None] * hidden.shape[1]
        return hidden.flatten(0, 1).index_select(0, row.flatten())

    def _twice(self, x: Tensor) -> Tensor:
        return torch.cat((x, x)) if self.config.cfg_scale > 0 else x
