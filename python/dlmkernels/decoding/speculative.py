# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: a block drafted with all of itself in view, and verified one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel
from ..window import TokenWindow
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, commit_tokens
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer
from .schedule import Grid
from .streaming import Stream


@torch.no_grad()
def decode_speculative(
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
    """Decode columns `[start, end)`. Each row of the batch advances by what it has accepted."""
    _check(config, grid.length)
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    propose = Proposer(model, canvas, config, special)
    batch, device = len(canvas.tokens), canvas.tokens.device
    columns = torch.arange(start, dtype=torch.int32, device=device).expand(batch, start)
    last = torch.full((batch,), start, dtype=torch.int32, device=device)  # column of the last token
    offset = torch.arange(grid.length, dtype=torch.int32, device=device)
    counts, stream = OpenCount(end - start, end - start), Stream(streamer, canvas, start)
    # the prompt, and the token after it
    hidden = forward.at(columns, last, causal_block=1)
    window = TokenWindow(last[:, None], canvas.origin)
    stats = propose(model.logits(hidden[:, -1]), window)
    info = commit_tokens(
        canvas, config, special, window.positions, stats.token[:, None], stats.token[:, None] >= 0,
        stats.confidence[:, None],
    )  # fmt: skip
    counts.submit(info[:, 1].amax().expand(2))
    for _ in range(end - start):
        if counts.latest()[1] == 0:
            break
        working = canvas.is_open.any(1)
        columns, next_columns = last[:, None] + offset, last[:, None] + 1 + offset
        block_end = torch.minimum(last + grid.length, forward.ends)
        block = {"columns": columns, "end": block_end, "used": working[:, None].expand_as(columns)}
        is_next = working[:, None] & (next_columns < end)
        window = TokenWindow(torch.where(is_next, next_columns, -1), canvas.origin)

        tokens = torch.full_like(columns, special.mask, dtype=torch.int64)
        tokens[:, 0] = canvas.tokens.gather(1, last.long()[:, None])[:, 0]
        hidden = forward.at(**block, tokens=tokens, context_end=last)
        masks = TokenWindow(window.positions[:, :-1].contiguous(), canvas.origin)
        drafts = propose(model.logits(hidden[:, 1:].flatten(0, 1)), masks).token.view(batch, -1)
        tokens[:, 1:] = torch.where(drafts < 0, special.mask, drafts)

        hidden = forward.at(**block, tokens=tokens, causal_block=1)
        # of the same step as the drafts: where something is drawn, from the same noise
        stats = propose(model.logits(hidden.flatten(0, 1)), window)
        verified = ops.verify_drafts(drafts, stats.token.view(batch, -1))
        canvas.step.add_(working)
        chosen = (verified.tokens >= 0) & is_next
        confidence = stats.confidence.view(batch, -1)
        info = commit_tokens(canvas, config, special, window.positions, verified.tokens, chosen, confidence)
        counts.submit(info[:, 1].amax().expand(2))
        last = last + chosen.sum(1, dtype=torch.int32)
        stream.step(end)
    stream.finish(end)
    return output_of(canvas, start, end, Unfinished(canvas, config.rule))


def _check(config: DecodingConfig, block_length: int) -> None:
    if config.attention != "causal-context" or config.cache != "block" or not config.seeded:
        raise ValueError(
            "rule SelfSpeculative needs attention='causal-context', cache='block' and seeded; got "
            f"{config.attention!r}, {config.cache!r} and {config.seeded!r}"
        )
    if config.logit_alignment != "same":
        raise ValueError(f"rule SelfSpeculative needs logit_alignment='same'; got {config.logit_alignment!r}")
    if config.cfg_scale > 0:
        raise ValueError("cfg_scale cannot be used with rule SelfSpeculative")
    if block_length < 2:
        raise ValueError(f"block_length must be at least 2 with rule SelfSpeculative; got {block_length}")
