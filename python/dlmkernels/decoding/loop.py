# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: forward, confidence, selection, commit; block after block.

Everything a step computes stays on the device. The host knows the plan (blocks, planned steps) and polls one count.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache
from ..models.adapt import DiffusionModel
from ..window import AttentionWindow, TokenWindow
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .output import DecodingOutput
from .poll import OpenCount
from .schedule import Block, Grid, plan_blocks
from .step import RandomState, Step


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
    random = RandomState(propose.seed, canvas.step)
    blocks = plan_blocks(config, grid)
    most_open = torch.stack([canvas.open_in(b.start, b.length).sum(1).max() for b in blocks]).tolist()

    def commit(window: TokenWindow, step: Step, chosen: Tensor) -> Tensor:
        return commit_tokens(canvas, config, special, window.positions, step.token, chosen, step.confidence)

    with model.attached():
        for block, in_block in zip(blocks, most_open):
            if in_block == 0:
                continue
            if forward.commits_apart and forward.lacks_context(block):
                took_part = forward.append_context(block)
                if config.seeded:
                    first = torch.where(took_part, block.outer, canvas.tokens.shape[1])
                    window = canvas.window(first, 1, 1)
                    step = Step.of(propose(forward.last_of_context(), window), window, random, config)
                    commit(window, step, step.eligible)
                    took_part &= window.positions[:, 0] < 0  # the others have been counted
                canvas.step.add_(took_part)
            open_at_start = open_now = canvas.open_in(block.start, block.length).sum(1, dtype=torch.int32)
            counts = OpenCount(in_block)
            counts.submit(torch.stack((open_now.amax(), canvas.is_open.sum(1).amax())))
            for index in range(block.max_steps):
                capacity, _ = counts.latest()
                if capacity == 0:
                    break
                window = canvas.window(block.start, block.length, capacity)
                stats = propose(forward(block, index, window), window)
                step = Step.of(stats, window, random, config, index, block.num_steps, open_at_start, open_now)
                info = commit(window, step, config.rule.select(step))
                open_now = info[:, 0].contiguous()
                counts.submit(info[:, :2].amax(0))
                if hasattr(streamer, "put_draft"):
                    streamer.put_draft(canvas.tokens[0, start:end].cpu())
            if streamer is not None:
                streamer.put(canvas.tokens[0, max(block.span[0], start) : min(block.span[1], end)].cpu())
            if counts.latest()[1] == 0:
                break
    if streamer is not None:
        streamer.end()
    return output_of(canvas, start, end)


def commit_tokens(
    canvas: Canvas, config: DecodingConfig, special: SpecialTokens, positions: Tensor, tokens: Tensor, chosen: Tensor,
    confidence: Tensor,
) -> Tensor:  # fmt: skip
    """Write the chosen ones of the tokens `[B, W]` at canvas `positions`; the info of `ops.remask_`."""
    return ops.remask_(
        canvas.tokens, canvas.state, positions, tokens, commit=chosen, confidence=confidence,
        commit_step=canvas.commit_step, commit_confidence=canvas.confidence, step=canvas.step,
        mask_token_id=special.mask, eos_token_ids=special.eos, eos_policy=config.eos_policy, fill_token_id=special.pad,
    )  # fmt: skip


def output_of(canvas: Canvas, prompt_length: int, end: int) -> DecodingOutput:
    """The first `end` columns of a canvas as the result; a warning says where masks are left."""
    complete = ~canvas.is_open[:, :end].any(1)
    if not complete.all():
        rows = (~complete).nonzero().flatten().tolist()
        warnings.warn(
            f"masks are left in rows {rows}: the model's logits there were NaN or -inf throughout (see "
            "`DecodingOutput.complete`)",
            RuntimeWarning,
            stacklevel=4,
        )
    tokens, steps, confidence = (x[:, :end] for x in (canvas.tokens, canvas.commit_step, canvas.confidence))
    return DecodingOutput(tokens, canvas.step, steps, confidence, complete, prompt_length)


class CanvasForward:
    """Runs the model on the part of the canvas a step needs, and returns hidden states of the window's slots.

    With cache="block" the rows of a forward differ in the columns they stand in: their blocks begin where their
    request's grid says. What is not in a row's block (nor, when it is appended, in the block before) is an unused slot.
    """

    def __init__(
        self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens, grid: Grid,
        prompt_embeds: Tensor | None = None,
    ):  # fmt: skip
        self.model, self.canvas, self.config, self.special, self.grid = model, canvas, config, special, grid
        self.shift = 1 if config.logit_alignment == "shift" else 0
        #: whether the context of a block is forwarded before the block, and not with it
        self.commits_apart = bool(config.seeded) or (
            config.cache == "block" and (not config.fuse_commit or config.attention == "causal-context")
        )
        self.origin, self.ends = canvas.origin, grid.ends
        self.prompt_embeds = prompt_embeds
        if config.cfg_scale > 0:
            # Guidance doubles the batch: the second half sees masks where tokens were given.
            self.given = ~canvas.is_open
            self.origin, self.ends = self.origin.repeat(2), self.ends.repeat(2)
            if prompt_embeds is not None:
                mask = model.embed(torch.full_like(canvas.tokens[:, :1], special.mask))
                self.prompt_embeds = torch.cat((prompt_embeds, mask.expand_as(prompt_embeds)))
        length = canvas.tokens.shape[1]
        columns = torch.arange(length, device=self.origin.device)
        self.positions = (columns - self.origin[:, None]).clamp(min=0)
        self.slots = columns.int().expand(len(self.origin), length)
        in_part = bool(((self.origin > 0) | (self.ends < length)).any())
        self.kv_range = torch.stack((self.origin, self.ends), 1) if in_part else None
        self.cache = KVCache(length) if config.cache != "none" else None
        # What is final and need not be forwarded again: how far it reaches right of the grid's first block, and its
        # last hidden state.
        self.done = -grid.depth
        self.carried: Tensor | None = None

    def __call__(self, block: Block, index: int, window: TokenWindow) -> Tensor:
        """Hidden states `[N, hidden]`, N = B * W (2 * B * W under guidance, conditional half first)."""
        if self.config.cache == "block":
            return self._in_block(block, window)
        first, last = self._columns(block, index)
        hidden = self._forward_columns(block, first, last)
        # Position 0 has no row before it and keeps its own.
        return self._pick(hidden, window.positions - (first + self.shift))

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

    def _in_block(self, block: Block, window: TokenWindow) -> Tensor:
        """A forward of each row's block alone, or of what comes before it too if that is not in the cache yet."""
        outer, before = self._twice(block.outer), 0
        if not self.commits_apart and self.lacks_context(block):
            before = block.offset - self.done
        hidden = self._forward_rows(block, outer - before, before + block.outer_length)
        if before > 0:
            self.carried = hidden[:, before - 1]
            self.done = block.offset
            hidden = hidden[:, before:]
        row = window.positions - block.outer[:, None]
        if not self.shift:
            return self._pick(hidden, row)
        # The row before the block's first comes from the context; without one the first row stands for itself.
        head = hidden[:, 0] if self.carried is None else self.carried
        return self._pick(torch.cat((head[:, None], hidden), 1), row)

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
        window = AttentionWindow(slots, torch.stack((self.origin, end), 1), self.cache, **visibility)
        return self.model.hidden(tokens, self.positions.gather(1, inside), window, self._embeds(tokens, inside))

    def _forward_columns(self, block: Block, first: int, last: int) -> Tensor:
        """Hidden states of the columns `[first, last)` of every row."""
        tokens = self._tokens()[:, first:last]
        window = AttentionWindow(
            self.slots[:, first:last].contiguous(), self.kv_range, self.cache, **self._visibility(block, False)
        )
        columns = self.slots[:, first:last].long() if self.prompt_embeds is not None else self.slots
        return self.model.hidden(tokens, self.positions[:, first:last], window, self._embeds(tokens, columns))

    def _columns(self, block: Block, index: int) -> tuple[int, int]:
        """Canvas columns to forward, for caches of models with full attention."""
        length = self.canvas.tokens.shape[1]
        if self.config.cache == "none" or index == 0:
            return 0, length
        first, last = block.span
        return max(first - self.shift, 0), last if self.config.cache == "dual" else length

    def _visibility(self, block: Block, decided: bool) -> dict[str, Any]:
        """What the rows of a forward see of each other, as arguments of `AttentionWindow`."""
        attention = self.config.attention
        if attention == "block":
            origin = self.origin
            if self.config.block_grid != "absolute":
                first = self._twice(self.grid.first)
                origin = first if self.config.block_grid == "prompt" else first % self.grid.length
            return {"causal_block": self.grid.length, "block_origin": origin}
        if attention == "causal" or (attention == "causal-context" and decided):
            return {"causal_block": 1}
        if attention == "causal-context" and self.cache is None:
            # what is decided is causal; the block sees itself and what stands left of it
            start = self._twice(block.outer)[:, None]
            end = start + block.outer_length
            order = torch.where((self.slots < start) | (self.slots >= end), self.slots, end - 1).contiguous()
            return {"q_limit": order, "k_order": order}
        if attention == "reordered":
            order = self.reading_order()
            return {"q_limit": order, "k_order": order}
        return {}

    def reading_order(self) -> Tensor:
        """Place of every column if what is decided were read before what is open: int32 `[B, T]`."""
        is_open = self._twice(self.canvas.is_open)
        return torch.where(is_open, self.slots + self.slots.shape[1], self.slots).contiguous()

    def _tokens(self) -> Tensor:
        tokens = self.canvas.tokens
        if self.config.cfg_scale > 0:
            tokens = torch.cat((tokens, tokens.masked_fill(self.given, self.special.mask)))
        return tokens

    def _embeds(self, tokens: Tensor, columns: Tensor) -> Tensor | None:
        """Input embeddings, those of the prompt where it was given as embeddings; None if it was not."""
        if self.prompt_embeds is None:
            return None
        length = self.prompt_embeds.shape[1]
        given = self.prompt_embeds.gather(
            1, columns.clamp(max=length - 1)[:, :, None].expand(-1, -1, self.prompt_embeds.shape[2])
        )
        return torch.where((columns < length)[:, :, None], given, self.model.embed(tokens))

    def _pick(self, hidden: Tensor, row: Tensor) -> Tensor:
        """Rows `row` `[B, W]` of `hidden` `[B or 2B, Q, hidden]`, one below another."""
        row = self._twice(row.clamp(min=0))
        row = row + torch.arange(len(row), device=row.device)[:, None] * hidden.shape[1]
        return hidden.flatten(0, 1).index_select(0, row.flatten())

    def _twice(self, x: Tensor) -> Tensor:
        return torch.cat((x, x)) if self.config.cfg_scale > 0 else x


class Proposer:
    """Language-model head and `token_confidence` on the slots of a window."""

    def __init__(self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens):
        self.model, self.canvas, self.config = model, canvas, config
        device, batch = canvas.tokens.device, canvas.tokens.shape[0]

        def scalar(value, dtype, wanted):
            return torch.full((1,), value, dtype=dtype, device=device) if wanted else None

        self.seed = _seeds(config.seed, batch, device)
        sampled = config.temperature > 0
        self.options: dict[str, Any] = {
            "cfg_scale": scalar(config.cfg_scale, torch.float32, config.cfg_scale > 0),
            "banned": torch.tensor(special.banned, device=device),
            "temperature": scalar(config.temperature, torch.float32, sampled),
            "top_k": scalar(config.top_k, torch.int32, config.top_k > 0),
            "top_p": scalar(config.top_p, torch.float32, config.top_p < 1),
            "top_p_first": config.top_p_first,
            "keep_crossing": config.keep_crossing,
            "distribution": config.distribution,
            "with_margin": config.score == "margin" or "margin" in config.rule.needs,
            "with_entropy": config.score == "entropy" or "entropy" in config.rule.needs,
        }
        if sampled:
            self.options |= {"seed": self.seed, "step": canvas.step}

    def __call__(self, hidden: Tensor, window: TokenWindow) -> ops.TokenConfidence:
        """Statistics of the N = B * W slots, in the window's order."""
        logits = self.model.logits(hidden)
        rows = window.positions.numel()
        uncond = logits[rows:] if self.config.cfg_scale > 0 else None
        numbers = torch.arange(rows, dtype=torch.int32, device=logits.device)
        options = self.options
        if "seed" in options:
            options = options | {"position": window.request_positions.flatten()}
        row_map = torch.where(window.positions.flatten() >= 0, numbers, -1)
        return ops.token_confidence(logits[:rows], row_map=row_map, uncond_logits=uncond, **options)


def _seeds(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (batch,)).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(f"seed must be int64 of shape [{batch}]; got {seed.dtype} of shape {list(seed.shape)}")
        return seed.to(device)
    return torch.full((batch,), seed, dtype=torch.int64, device=device)
