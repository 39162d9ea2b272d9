# SPDX-License-Identifier: Apache-2.0
"""Introspective strided decoding: strictly causal models draft with masks and verify what they drafted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, commit_tokens
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer
from .schedule import Grid
from .streaming import Stream
from .streams import Strided


@torch.no_grad()
def decode_strided(
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
    rule = config.rule
    assert isinstance(rule, Strided)
    if config.attention != "causal" or config.logit_alignment != "shift" or config.cache != "block":
        raise ValueError(
            "rule Strided needs attention='causal', logit_alignment='shift' and cache='block'; got "
            f"{config.attention!r}, {config.logit_alignment!r} and {config.cache!r}"
        )
    if config.cfg_scale > 0:
        raise ValueError("cfg_scale cannot be used with rule Strided")
    if config.logit_bias is not None and rule.leniency is not None and config.temperature > 0:
        raise ValueError("logit_bias cannot be used with rule Strided where drafts are tested by a ratio (leniency)")
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    drafts_at_most, batch = rule.stride - 1, len(canvas.tokens)
    device = canvas.tokens.device
    verifier = Verifier(canvas, config, Proposer(model, canvas, config, special))
    last = torch.full((batch,), start - 1, dtype=torch.int32, device=device)  # column of the last token
    drafts = canvas.tokens.new_full((batch, drafts_at_most), -1)  # what is drafted after it, in some rows nothing
    before = start - 1  # columns of the prompt, in the first forward
    stream = Stream(streamer, canvas, start)
    offset = torch.arange(2 * rule.stride - 1, dtype=torch.int32, device=device)
    counts = OpenCount(end - start, end - start)
    counts.submit(torch.stack((canvas.is_open.sum(1).amax(),) * 2))
    for _ in range(end - start):
        if counts.latest()[1] == 0:
            break
        # Last token, drafts, masks: as many rows as this request has a use for.
        inside = (last[:, None] + offset).clamp(max=canvas.tokens.shape[1] - 1).long()
        tokens = torch.full_like(inside, special.mask)
        tokens[:, 0] = canvas.tokens.gather(1, inside[:, :1])[:, 0]
        drafted = (drafts >= 0).int().cumprod(1).sum(1, dtype=torch.int32)
        tokens[:, 1 : rule.stride] = torch.where(offset[:drafts_at_most] < drafted[:, None], drafts, special.mask)
        used = (offset < rule.stride + drafted[:, None]) & canvas.is_open.any(1, keepdim=True)
        columns = last[:, None] + offset
        if before:
            of_prompt = torch.arange(before, dtype=torch.int32, device=device).expand(batch, -1)
            columns = torch.cat((of_prompt, columns), 1)
            tokens = torch.cat((canvas.tokens[:, :before], tokens), 1)
            used = torch.cat((used[:, :1].expand(-1, before), used), 1)
        hidden = forward.at(columns, forward.ends, used, tokens, causal_block=1)[:, before:]
        before = 0
        accepted, token, p, next_drafts = verifier(model.logits(hidden), drafts, drafted, last)
        count = accepted + 1
        window = last[:, None] + 1 + offset[: rule.stride]
        is_open = canvas.is_open.gather(1, window.clamp(max=canvas.tokens.shape[1] - 1).long())
        is_new = (offset[: rule.stride] < count[:, None]) & is_open & (window < end)
        info = commit_tokens(canvas, config, special, torch.where(is_new, window, -1), token, is_new, p)
        counts.submit(info[:, 1].amax().expand(2))
        # The masks stood behind all drafts: what they draft follows if none was rejected.
        drafts = torch.where((accepted == drafted)[:, None], next_drafts, -1)
        last = (last + count).clamp(max=end - 1)
        stream.step(end)
    stream.finish(end)
    return output_of(canvas, start, end, Unfinished(canvas, rule))


class Verifier:
    """Accepts a prefix of the drafts, finds the token after it, and drafts the next ones: `ops.verify_drafts`."""

    def __init__(self, canvas: Canvas, config: DecodingConfig, propose: Proposer):
        assert isinstance(config.rule, Strided)
        self.canvas, self.rule, self.propose = canvas, config.rule, propose
        self.by_ratio = config.rule.leniency is not None and config.temperature > 0
        self.draft_logits: Tensor | None = None  # those of the drafts, and their logsumexp, when they are compared
        self.draft_logsumexp: Tensor | None = None

    def __call__(
        self, logits: Tensor, drafts: Tensor, drafted: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number of accepted drafts int32 `[B]`; the accepted and the next token int64 `[B, stride]`, -1 behind it,
        with their probabilities; and the most likely tokens, or draws, of the masks' rows, int64 `[B, stride - 1]`.

        `logits` `[B, 2 stride - 1, V]` are of the last token, the `drafted` ones of the `drafts` (-1 behind them) and
        the masks.
        """
        batch, rows = logits.shape[:2]
        verified, number = self.rule.stride, torch.arange(rows, dtype=torch.int32, device=logits.device)
        # the rows of the last token and of the drafts, as many as there might be; then those of the masks
        row = torch.where(number < verified, number, number - verified + 1 + drafted[:, None])
        row_map = row + rows * torch.arange(batch, dtype=torch.int32, device=logits.device)[:, None]
        first = (last - self.canvas.origin + 1).contiguous()
        options: dict[str, Any] = dict(self.propose.options)
        if "seed" in options:
            # A draft is drawn with the noise that its verification will use.
            options["position"] = (first[:, None] + row).flatten()
            options["step"] = (self.canvas.step[:, None] + (number >= verified).int()).flatten()
        if self.by_ratio:
            options["distribution"] = "tempered"
        flat = logits.flatten(0, 1)
        stats = ops.token_confidence(flat, row_map=row_map.flatten(), **options)
        token, best, p, logsumexp = (
            x.view(batch, rows) for x in (stats.token, stats.argmax, stats.confidence, stats.logsumexp)
        )
        target, following = token[:, :verified].contiguous(), token[:, verified:]
        if not self.by_ratio:
            accepted, tokens = ops.verify_drafts(drafts, target)
            return accepted, tokens, p[:, :verified].contiguous(), following

        sums, compared = logsumexp[:, :verified].contiguous(), {}
        if self.draft_logits is not None:
            compared = {
                "logits": flat, "logsumexp": sums, "row_map": row_map[:, :verified].contiguous(),
                "draft_logits": self.draft_logits, "draft_logsumexp": self.draft_logsumexp,
                "banned": options["banned"], "temperature": options["temperature"], "leniency": self.rule.leniency,
                "seed": self.propose.seed, "step": self.canvas.step, "position": first,
            }  # fmt: skip
        accepted, tokens = ops.verify_drafts(drafts, target, **compared)
        z = logits[:, :verified].gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0].float()
        p = (z * (1 / options["temperature"]) - sums).exp()
        masks = row_map[:, verified:].flatten()
        self.draft_logits, self.draft_logsumexp = flat[masks.long()], logsumexp[:, verified:].contiguous()
        return accepted, tokens, p, best[:, verified:].contiguous()
