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
    random = RandomState(propose.seed, canvas.step)
    blocks = plan_blocks(config, start, end)
    most_open = torch.stack([canvas.is_open[:, b.start : b.end].sum(1).max() for b in blocks]).tolist()
    with model.attached():
        for block, in_block in zip(blocks, most_open):
            counts = OpenCount(in_block)
            counts.submit(_open_counts(canvas, block))
            open_at_start = open_now = canvas.is_open[:, block.start : block.end].sum(1, dtype=torch.int32)
            for index in range(block.max_steps):
                capacity, _ = counts.latest()
                if capacity == 0:
                    break
                window = canvas.window(block.start, block.end, capacity)
                stats = propose(forward(block, index, window), window)
                step = Step(
                    stats, window, window.positions >= 0, index, block.num_steps, open_at_start, open_now, random,
                    config.score, config.order_temperature,
                )  # fmt: skip
                info = ops.remask_(
                    canvas.tokens, canvas.state, window.positions, step.token, commit=config.rule.select(step),
                    confidence=step.confidence, commit_step=canvas.commit_step, commit_confidence=canvas.confidence,
                    step=canvas.step, mask_token_id=special.mask, eos_token_ids=special.eos,
                    eos_policy=config.eos_policy, fill_token_id=special.pad,
                )  # fmt: skip
                open_now = info[:, 0].contiguous()
                counts.submit(info[:, :2].amax(0))
                if hasattr(streamer, "put_draft"):
                    streamer.put_draft(canvas.tokens[0, start:end].cpu())
            if streamer is not None:
                streamer.put(canvas.tokens[0, block.start : block.end].cpu())
            if counts.latest()[1] == 0:
                break
    if streamer is not None:
        streamer.end()
    return _output(canvas, start)


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
