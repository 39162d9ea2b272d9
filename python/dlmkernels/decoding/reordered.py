# SPDX-License-Identifier: Apache-2.0
"""The loop of WeDLM: a causal model reads what is decided before what is not, wherever that stands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, commit_tokens
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer, StepOptions
from .schedule import Grid
from .streaming import Stream
from .streams import Reordered


@torch.no_grad()
def decode_reordered(
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
    """Decode columns `[start, end)`. Each row's window slides by what it has decided."""
    rule = config.rule
    assert isinstance(rule, Reordered)
    if config.attention != "reordered" or config.logit_alignment != "same" or config.cache != "block":
        raise ValueError(
            "rule Reordered needs attention='reordered', logit_alignment='same' and cache='block'; got "
            f"{config.attention!r}, {config.logit_alignment!r} and {config.cache!r}"
        )
    if config.cfg_scale > 0:
        raise ValueError("cfg_scale cannot be used with rule Reordered")
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    propose = Proposer(model, canvas, config, special)
    options = StepOptions(propose, canvas, config)
    width = canvas.tokens.shape[1]
    final = torch.zeros_like(canvas.origin)  # columns of each row that are in the cache for good
    length = start + rule.window  # columns to forward: the prompt and the first window
    stream, unfinished = Stream(streamer, canvas, start), Unfinished(canvas, rule)
    counts = OpenCount(end - start, end - start)
    counts.submit(torch.stack((canvas.is_open.sum(1).amax(),) * 2))
    for _ in range(end - start):
        if counts.latest()[1] == 0:
            break
        is_open = canvas.is_open
        any_open = is_open.any(1)
        first = torch.where(any_open, is_open.int().argmax(1), end).int()
        columns = final[:, None] + torch.arange(length, dtype=torch.int32, device=final.device)
        used = (columns < first[:, None] + rule.window) & any_open[:, None]
        order = forward.reading_order()
        limit = order.gather(1, columns.clamp(max=width - 1).long())
        hidden = forward.at(columns, forward.ends, used, q_limit=limit, k_order=order)
        window = canvas.window(canvas.columns(first, rule.window), rule.window)
        row = (window.positions - final[:, None]).clamp(min=0).long()
        picked = hidden.gather(1, row[:, :, None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)
        count = window.used.sum(1, dtype=torch.int32)
        step = options.step(model.logits(picked), window, first, rule.window, 0, 1, count, count, 0.0, {})
        unfinished.see(step)
        info = commit_tokens(canvas, config, special, window.positions, step.token, rule.select(step), step.confidence)
        counts.submit(info[:, 1].amax().expand(2))
        final, length = first, 2 * rule.window
        stream.step(end)
    stream.finish(end)
    return output_of(canvas, start, end, unfinished)
