# SPDX-License-Identifier: Apache-2.0
"""Introspective strided decoding: strictly causal models draft with masks and verify what they drafted."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..models.adapt import DiffusionModel
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, Proposer, commit_tokens, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .schedule import Grid
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
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    drafts_at_most, batch = rule.stride - 1, len(canvas.tokens)
    device = canvas.tokens.device
    verify = Verifier(canvas, config, Proposer(model, canvas, config, special))
    last = torch.full((batch,), start - 1, dtype=torch.int32, device=device)  # column of the last token
    drafted = torch.zeros_like(last)  # how many drafts stand after it
    drafts = canvas.tokens.new_full((batch, drafts_at_most), special.mask)
    draft_logits: Tensor | None = None
    before = start - 1  # columns of the prompt, in the first forward
    shown = start
    offset = torch.arange(2 * rule.stride - 1, dtype=torch.int32, device=device)
    counts = OpenCount(end - start, end - start)
    counts.submit(torch.stack((canvas.is_open.sum(1).amax(),) * 2))
    with model.attached():
        for _ in range(end - start):
            if counts.latest()[1] == 0:
                break
            # Last token, drafts, masks: as many rows as this request has a use for.
            inside = (last[:, None] + offset).clamp(max=canvas.tokens.shape[1] - 1).long()
            tokens = torch.full_like(inside, special.mask)
            tokens[:, 0] = canvas.tokens.gather(1, inside[:, :1])[:, 0]
            tokens[:, 1 : rule.stride] = torch.where(offset[:drafts_at_most] < drafted[:, None], drafts, special.mask)
            used = (offset < rule.stride + drafted[:, None]) & canvas.is_open.any(1, keepdim=True)
            columns = last[:, None] + offset
            if before:
                columns = torch.cat((offset.new_zeros(batch, before) + torch.arange(before).to(columns), columns), 1)
                tokens = torch.cat((canvas.tokens[:, :before], tokens), 1)
                used = torch.cat((used[:, :1].expand(-1, before), used), 1)
            hidden = forward.at(columns, forward.ends, used, tokens, causal_block=1)[:, before:]
            before = 0
            logits = model.logits(hidden)

            accepted, token, p = verify(logits, drafts, draft_logits, drafted, last)
            count = accepted + 1
            window = last[:, None] + 1 + offset[: rule.stride]
            is_open = canvas.is_open.gather(1, window.clamp(max=canvas.tokens.shape[1] - 1).long())
            is_new = (offset[: rule.stride] < count[:, None]) & is_open & (window < end)
            info = commit_tokens(canvas, config, special, torch.where(is_new, window, -1), token, is_new, p)
            counts.submit(info[:, 1].amax().expand(2))

            first_mask = (drafted + 1).long()[:, None] + torch.arange(drafts_at_most, device=device)
            draft_logits = logits.gather(1, first_mask[:, :, None].expand(-1, -1, logits.shape[2]))
            drafts = verify.most_likely(draft_logits)
            drafted = torch.where(accepted == drafted, drafts_at_most, 0).int()
            last = (last + count).clamp(max=end - 1)
            if streamer is not None:
                reached = int(last[0]) + 1
                if reached > shown:
                    streamer.put(canvas.tokens[0, shown:reached].cpu())
                shown = reached
    if streamer is not None:
        if shown < end:
            streamer.put(canvas.tokens[0, shown:end].cpu())
        streamer.end()
    return output_of(canvas, start, end)


class Verifier:
    """Accepts a prefix of the drafts and finds the token after it."""

    def __init__(self, canvas: Canvas, config: DecodingConfig, propose: Proposer):
        self.canvas, self.config, self.propose = canvas, config, propose
        assert isinstance(config.rule, Strided)
        self.rule = config.rule

    def __call__(
        self, logits: Tensor, drafts: Tensor, draft_logits: Tensor | None, drafted: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Number of accepted drafts int32 `[B]`; the accepted and the next token int64 `[B, stride]`, with their
        probabilities. `logits` `[B, 2 stride - 1, V]` are of the last token, the drafts and the masks."""
        most = drafts.shape[1]
        number = torch.arange(most, dtype=torch.int32, device=drafts.device)
        p = self._probability(logits[:, :most], drafts)
        if self.config.temperature == 0:
            passed = self.most_likely(logits[:, :most]) == drafts
        elif draft_logits is None:
            passed = torch.zeros_like(drafts, dtype=torch.bool)
        else:
            q = self._probability(draft_logits, drafts)
            position = (last - self.canvas.origin)[:, None] + 1 + number
            bits = reference.philox(
                self.propose.seed[:, None], position.long(), self.canvas.step[:, None].long(), "verify",
                torch.zeros_like(drafts),
            )  # fmt: skip
            passed = reference.bernoulli(bits, p / (self.rule.leniency * q))
        accepted = (passed & (number < drafted[:, None])).int().cumprod(1).sum(1, dtype=torch.int32)

        row = accepted.long()[:, None, None].expand(-1, 1, logits.shape[2])
        z = logits.gather(1, row)[:, 0]
        position = last - self.canvas.origin + 1 + accepted
        options = self.propose.options | ({"position": position} if "seed" in self.propose.options else {})
        stats = ops.token_confidence(z, **options)
        following, probability = stats.token, stats.confidence
        if self.config.temperature > 0 and draft_logits is not None:
            wrong = draft_logits.gather(1, row.clamp(max=most - 1))[:, 0]
            rest = (self._softmax(z) - self._softmax(wrong)).clamp(min=0)
            drawn = ops.token_confidence(
                rest.log(), temperature=torch.ones(1, device=z.device), seed=self.propose.seed, step=self.canvas.step,
                position=position,
            )  # fmt: skip
            is_rest = (accepted < drafted) & (rest.sum(1) > 0)
            following = torch.where(is_rest, drawn.token, following)
            probability = torch.where(is_rest, drawn.confidence, probability)
        at = torch.arange(most + 1, device=drafts.device) == accepted[:, None]
        token = torch.where(at, following[:, None], torch.cat((drafts, following[:, None]), 1))
        return accepted, token, torch.where(at, probability[:, None], torch.cat((p, probability[:, None]), 1))

    def most_likely(self, logits: Tensor) -> Tensor:
        """int64 `[B, N]` of logits `[B, N, V]`."""
        banned = self.propose.options["banned"]
        return ops.token_confidence(logits.flatten(0, 1), banned=banned).token.view(logits.shape[:2])

    def _probability(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Of the tokens `[B, N]`, at the temperature of the decoding and without filters, float32 `[B, N]`."""
        options = {"banned": self.propose.options["banned"], "given": tokens.flatten(), "distribution": "tempered"}
        if self.config.temperature > 0:
            options |= {name: self.propose.options[name] for name in ("temperature", "seed", "step")}
            options["position"] = torch.zeros_like(tokens, dtype=torch.int32).flatten()
        return ops.token_confidence(logits.flatten(0, 1), **options).p_given.view(tokens.shape)

    def _softmax(self, logits: Tensor) -> Tensor:
        z = logits.float().index_fill(-1, self.propose.options["banned"], -torch.inf)
        return torch.softmax(z / self.config.temperature, -1)
