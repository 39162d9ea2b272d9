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
from .schedule import Block, plan_blocks
from .scores import score_named
from .step import RandomState, Step


@torch.no_grad()
def decode(
    model: DiffusionModel,
    canvas: Canvas,
    config: DecodingConfig,
    special: SpecialTokens,
    start: int,
    end: int,
    streamer=None,
) -> DecodingOutput:
    """Decode the open positions of columns `[start, end)`."""
    forward = CanvasForward(model, canvas, config, special)
    propose = Proposer(model, canvas, config, special)
    rule = config.rule
    options = StepOptions(propose, canvas, config)
    if rule.noise == "uniform":
        if model.vocab_size is None:
            raise ValueError(f"{type(rule).__name__} draws from the vocabulary, whose size the model does not say")
        canvas.renoise(propose.seed, model.vocab_size)
    blocks = plan_blocks(config, start, end)
    planned, behind = sum(b.num_steps for b in blocks), 0
    most_open = torch.stack([canvas.is_open[:, b.start : b.end].sum(1).max() for b in blocks]).tolist()
    # A rule that takes tokens back may also take back an end token: that counts once its block is finished.
    fills_at_once = config.eos_policy == "fill" and rule.slots == "open"
    with model.attached():
        for block, in_block in zip(blocks, most_open):
            counts = OpenCount(in_block)
            counts.submit(_open_counts(canvas, block))
            open_at_start = open_now = canvas.is_open[:, block.start : block.end].sum(1, dtype=torch.int32)
            working, forward.embeds = open_now > 0, None
            memory: dict[str, Tensor] = {}
            for index in range(block.max_steps):
                capacity, _ = counts.latest()
                if capacity == 0:
                    break
                if rule.slots == "open":
                    window = canvas.window(block.start, block.end, capacity)
                else:
                    first, last = (start, end) if rule.slots == "canvas" else (block.start, block.end)
                    window = canvas.free_window(first, last, working)
                logits = model.logits(forward(block, index, window))
                progress = (behind + index) / planned
                step = options.step(logits, window, block, index, open_at_start, open_now, progress, memory)
                action = rule.act(step)
                info = ops.remask_(
                    canvas.tokens, canvas.state, window.positions, _or(action.token, step.token),
                    commit=action.commit, edit=action.edit, remask=action.remask, renoise=action.renoise,
                    confidence=_or(action.confidence, step.confidence), commit_step=canvas.commit_step,
                    commit_confidence=canvas.confidence, step=canvas.step, seed=propose.seed, origin=canvas.origin,
                    mask_token_id=special.mask, vocab_size=model.vocab_size or 0, eos_token_ids=special.eos,
                    eos_policy="fill" if fills_at_once else "none", fill_token_id=special.pad,
                )  # fmt: skip
                if action.embeds is not None and action.embedded is not None:
                    forward.embed_next(window, action.embeds, action.embedded)
                if rule.slots == "open":
                    open_now = info[:, 0].contiguous()
                    counts.submit(info[:, :2].amax(0))
                else:
                    open_now = canvas.is_open[:, block.start : block.end].sum(1, dtype=torch.int32)
                    working = working & (open_now > 0 if action.working is None else action.working)
                    counts.submit(torch.stack((working.sum(), info[:, 1].amax())))
                if hasattr(streamer, "put_draft"):
                    streamer.put_draft(canvas.tokens[0, start:end].cpu())
            behind += block.num_steps
            if config.eos_policy != "none" and not fills_at_once:
                canvas.fill_after_eos(special.eos, special.pad)
                counts.submit(_open_counts(canvas, block))
            if streamer is not None:
                streamer.put(canvas.tokens[0, block.start : block.end].cpu())
            if counts.latest()[1] == 0:
                break
    if streamer is not None:
        streamer.end()
    return _output(canvas, start)


def _or(value: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if value is None else value


def _open_counts(canvas: Canvas, block: Block) -> Tensor:
    is_open = canvas.is_open
    return torch.stack((is_open[:, block.start : block.end].sum(1).amax(), is_open.sum(1).amax()))


def _output(canvas: Canvas, prompt_length: int) -> DecodingOutput:
    complete = ~canvas.is_open.any(1)
    if not complete.all():
        rows = (~complete).nonzero().flatten().tolist()
        warnings.warn(
            f"masks are left in rows {rows}: the model's logits there were NaN or -inf throughout (see "
            "`DecodingOutput.complete`)",
            RuntimeWarning,
            stacklevel=4,
        )
    return DecodingOutput(canvas.tokens, canvas.step, canvas.commit_step, canvas.confidence, complete, prompt_length)


class CanvasForward:
    """Runs the model on the part of the canvas a step needs, and returns hidden states of the window's slots."""

    def __init__(self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens):
        self.model, self.canvas, self.config, self.special = model, canvas, config, special
        length = canvas.tokens.shape[1]
        origin = canvas.origin
        if config.cfg_scale > 0:
            # Guidance doubles the batch: the second half sees masks where tokens were given.
            self.given = ~canvas.is_open
            origin = origin.repeat(2)
        columns = torch.arange(length, device=origin.device)
        self.positions = (columns - origin[:, None]).clamp(min=0)
        self.slots = columns.int().expand(len(origin), length)
        is_padded = bool(origin.any())
        self.kv_range = torch.stack((origin, torch.full_like(origin, length)), 1) if is_padded else None
        self.cache = KVCache(length) if config.cache != "none" else None
        self.embeds: Tensor | None = None

    def embed_next(self, window: TokenWindow, embeds: Tensor, where: Tensor) -> None:
        """In the next forward, let `embeds` `[B, W, hidden]` stand in for the tokens' where `where` says so."""
        tokens = self.canvas.tokens
        own = torch.nn.functional.pad(self.model.embed(tokens), (0, 0, 0, 1))  # one more column, for the other slots
        column = torch.where(where, window.positions, tokens.shape[1]).long()[..., None].expand_as(embeds)
        self.embeds = own.scatter(1, column, embeds.to(own.dtype))[:, :-1]
        if self.config.cfg_scale > 0:
            blind = self.model.embed(torch.full_like(tokens, self.special.mask))
            self.embeds = torch.cat((self.embeds, torch.where(self.given[..., None], blind, self.embeds)))

    def __call__(self, block: Block, index: int, window: TokenWindow) -> Tensor:
        """Hidden states `[N, hidden]`, N = B * W (2 * B * W under guidance, conditional half first)."""
        shift = 1 if self.config.logit_alignment == "shift" else 0
        first, last = self._columns(block, index, shift)
        tokens = self.canvas.tokens
        if self.config.cfg_scale > 0:
            tokens = torch.cat((tokens, tokens.masked_fill(self.given, self.special.mask)))
        hidden = self.model.hidden(
            tokens[:, first:last], self.positions[:, first:last],
            AttentionWindow(self.slots[:, first:last].contiguous(), self.kv_range, self.cache),
            None if self.embeds is None else self.embeds[:, first:last],
        )  # fmt: skip
        # Position 0 has no row before it and keeps its own.
        row = (window.positions - (first + shift)).clamp(min=0)
        if self.config.cfg_scale > 0:
            row = row.repeat(2, 1)
        row = row + torch.arange(len(row), device=row.device)[:, None] * (last - first)
        return hidden.flatten(0, 1).index_select(0, row.flatten())

    def _columns(self, block: Block, index: int, shift: int) -> tuple[int, int]:
        """Canvas columns to forward."""
        length = self.canvas.tokens.shape[1]
        if self.config.cache == "none" or index == 0:
            return 0, length
        return max(block.start - shift, 0), block.end if self.config.cache == "dual" else length


class Proposer:
    """Language-model head and `token_confidence` on the slots of a window."""

    def __init__(self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens):
        self.model, self.canvas, self.config, self.special = model, canvas, config, special
        device, batch = canvas.tokens.device, canvas.tokens.shape[0]

        def scalar(value, dtype, wanted):
            return torch.full((1,), value, dtype=dtype, device=device) if wanted else None

        self.seed = _seeds(config.seed, batch, device)
        needs = config.rule.needs | score_named(config.score).needs
        banned = [i for i in (special.mask, *config.suppress_token_ids) if i >= 0]
        self.never = torch.tensor(banned, dtype=torch.int64, device=device)
        sampled = config.temperature > 0 or config.rule.temperature(0, 1) is not None
        self.options: dict[str, Any] = {
            "cfg_scale": scalar(config.cfg_scale, torch.float32, config.cfg_scale > 0),
            "banned": self.never if banned else None,
            "temperature": scalar(config.temperature, torch.float32, sampled),
            "top_k": scalar(config.top_k, torch.int32, config.top_k > 0),
            "top_p": scalar(config.top_p, torch.float32, config.top_p < 1),
            "top_p_first": config.top_p_first,
            "keep_crossing": config.keep_crossing,
            "distribution": config.distribution,
            "with_margin": "margin" in needs,
            "with_entropy": "entropy" in needs,
        }
        if sampled:
            self.options |= {"seed": self.seed, "step": canvas.step}
        self.reads_current = "p_current" in needs

    def __call__(
        self, logits: Tensor, window: TokenWindow, bias: Tensor | None = None, temperature: float | None = None
    ) -> ops.TokenConfidence:
        """Statistics of the N = B * W slots, in the window's order, from logits `[N or 2N, V]`."""
        rows = window.positions.numel()
        uncond = logits[rows:] if self.config.cfg_scale > 0 else None
        numbers = torch.arange(rows, dtype=torch.int32, device=logits.device)
        is_used = window.positions.flatten() >= 0
        options = self.options | {"bias": bias}
        if temperature is not None:
            options["temperature"] = torch.full((1,), temperature, device=logits.device)
        if "seed" in options:
            options["position"] = window.request_positions.flatten()
        if self.reads_current:
            current = self.canvas.tokens.gather(1, window.positions.clamp(min=0).long()).flatten()
            options["given"] = torch.where(is_used, current, -1)
        row_map = torch.where(is_used, numbers, -1)
        return ops.token_confidence(logits[:rows], row_map=row_map, uncond_logits=uncond, **options)

    def clean(self, logits: Tensor, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of some rows as `token_confidence` sees them before bias and temperature.

        Float32 `[n, V]`, or `[n]` those of one token each, which is not a banned one.
        """

        def pick(rows: Tensor) -> Tensor:
            return (logits[rows] if ids is None else logits[rows, ids]).float()

        z = pick(rows)
        if self.config.cfg_scale > 0:
            blind = pick(rows + len(logits) // 2)
            z = blind + (self.config.cfg_scale + 1) * (z - blind)
        z = z.nan_to_num(-torch.inf, torch.finfo(torch.float32).max, -torch.inf)
        return z.index_fill(1, self.never, -torch.inf) if ids is None else z


class StepOptions:
    """What all steps of a decoding have in common."""

    def __init__(self, propose: Proposer, canvas: Canvas, config: DecodingConfig):
        self.propose, self.canvas, self.rule = propose, canvas, config.rule
        deferred = list(config.defer_token_ids)
        self.common: dict[str, Any] = {
            "random": RandomState(propose.seed, canvas.step),
            "score_of": score_named(config.score),
            "order_temperature": config.order_temperature,
            "deferred": torch.tensor(deferred, device=canvas.tokens.device) if deferred else None,
            "canvas": canvas,
            "proposer": propose,
        }

    def step(
        self, logits: Tensor, window: TokenWindow, block: Block, index: int, open_at_start: Tensor, open_now: Tensor,
        progress: float, memory: dict[str, Tensor],
    ) -> Step:  # fmt: skip
        """The step that these logits `[N or 2N, V]` make."""
        start = torch.full_like(self.canvas.origin, block.start)
        eligible = window.positions >= 0
        if self.rule.slots != "open":
            is_open = self.canvas.is_open.gather(1, window.positions.clamp(min=0).long())
            eligible = eligible & is_open & (window.positions >= block.start) & (window.positions < block.end)
        temperature = self.rule.temperature(index, block.num_steps)
        stats = self.propose(logits, window, temperature=temperature)
        return Step(
            stats=stats, window=window, eligible=eligible, index=index, num_steps=block.num_steps,
            open_at_start=open_at_start, open_now=open_now, block_start=start, block_length=block.end - block.start,
            progress=progress, memory=memory, raw_logits=logits,
            sampling_temperature=self.propose.config.temperature if temperature is None else temperature,
            **self.common,
        )  # fmt: skip


def _seeds(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (batch,)).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(f"seed must be int64 of shape [{batch}]; got {seed.dtype} of shape {list(seed.shape)}")
        return seed.to(device)
    return torch.full((batch,), seed, dtype=torch.int64, device=device)
