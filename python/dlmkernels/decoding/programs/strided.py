# SPDX-License-Identifier: Apache-2.0
"""Introspective strided decoding: strictly causal models draft tokens with masks and verify their own drafts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...window import TokenWindow
from ..config import DecodingConfig
from ..forward import Forward
from ..propose import Proposer
from ..rules import Action, Strided
from ..standing import Standing
from ..state import State
from .base import Program, Task
from .speculative import verified


class StridedProgram(Program):
    """Verifies the last drafts and drafts the next ones, in one forward pass per step.

    Each row advances by the tokens it accepts.
    A report is the largest number of open positions in any row, twice. A form is the number of prompt columns that are
    forwarded as well: all but the last in the first forward pass, then 0.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        rule, config, state = self.rule, self.config, self.state
        assert isinstance(rule, Strided)
        if config.attention != "causal" or config.logit_alignment != "shift" or config.cache != "block":
            raise ValueError(
                "rule Strided needs attention='causal', logit_alignment='shift' and cache='block'; got "
                f"attention={config.attention!r}, logit_alignment={config.logit_alignment!r} and cache={config.cache!r}"
            )
        if config.cfg_scale > 0:
            raise ValueError(f"cfg_scale cannot be used with rule Strided; got {config.cfg_scale}")
        if config.logit_bias is not None and rule.leniency is not None and self.propose.samples:
            raise ValueError(
                "logit_bias cannot be used with rule Strided if leniency is set, because drafts are then accepted by a "
                f"probability ratio; got leniency={rule.leniency}"
            )
        if config.constraint is not None and rule.leniency is not None and self.propose.samples:
            raise ValueError(
                "constraint cannot be used with rule Strided if leniency is set, because drafts are then accepted by a "
                f"probability ratio; got leniency={rule.leniency}"
            )
        self.stride = rule.stride
        self.forward = Forward(self.model, state, config, self.special, self.grid, task.prompt_embeds)
        self.verify = Verifier(state, config, self.propose)
        batch, device = len(state.tokens), state.tokens.device
        #: column of each row's last token; and the drafts after it, -1 for none
        self.last = torch.zeros(batch, dtype=torch.int32, device=device)
        self.drafts = state.tokens.new_zeros(batch, rule.stride - 1)
        self.offset = torch.arange(2 * rule.stride - 1, dtype=torch.int32, device=device)
        self.prompt = torch.arange(self.start - 1, dtype=torch.int32, device=device).expand(batch, -1)

    def form(self, report: tuple[int, ...], behind: int) -> int | None:
        if report[1] == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        return self.start - 1 if self.taken == 1 else 0

    def begin(self) -> Tensor:
        self.taken = 0
        self.forward.begin()
        self.last.fill_(self.start - 1)
        self.drafts.fill_(-1)
        self.constrained.enter(torch.ones_like(self.last, dtype=torch.bool))
        return self.state.is_open.sum(1, dtype=torch.int32).amax().expand(2)

    def step(self, form: int) -> Tensor:
        state, offset, last, stride = self.state, self.offset, self.last, self.stride
        # Last token, drafts, masks: as many columns as each request can use.
        inside = (last[:, None] + offset).clamp(max=state.tokens.shape[1] - 1).long()
        drafted = (self.drafts >= 0).int().cumprod(1).sum(1, dtype=torch.int32)
        tokens = torch.full_like(inside, self.special.mask)
        tokens[:, 0] = state.tokens.gather(1, inside[:, :1])[:, 0]
        is_draft = offset[: stride - 1] < drafted[:, None]
        tokens[:, 1:stride] = torch.where(is_draft, self.drafts, self.special.mask)
        works = state.is_open.any(1) & ~self.constrained.is_stuck
        used = (offset < stride + drafted[:, None]) & works[:, None]
        columns = last[:, None] + offset
        if form:
            columns = torch.cat((self.prompt, columns), 1)
            tokens = torch.cat((state.tokens[:, :form], tokens), 1)
            used = torch.cat((used[:, :1].expand(-1, form), used), 1)
        hidden = self.forward.at(columns, self.forward.ends, used, tokens, causal_block=1)[:, form:]
        logits = self.model.logits(hidden)
        accepted, token, p, next_drafts = self.verify(logits, self.drafts, drafted, last)
        window = last[:, None] + 1 + offset[:stride]
        is_open = state.is_open.gather(1, window.clamp(max=state.tokens.shape[1] - 1).long())
        may_come = is_open & (window < self.end) & works[:, None]
        if self.constrained.constraint is not None:
            token, p, accepted = self._constrained(logits, torch.where(may_come, window, -1), drafted)
        count = accepted + 1
        is_new = (offset[:stride] < count[:, None]) & may_come
        info = self.commit(torch.where(is_new, window, -1), token, is_new, p)
        # The masks came after all drafts, so their drafts are only valid if no draft was rejected.
        self.drafts.copy_(torch.where((accepted == drafted)[:, None], next_drafts, -1))
        last.add_(count).clamp_(max=self.end - 1)
        return self.still_open(info).amax().expand(2)

    def _constrained(self, logits: Tensor, window: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose tokens at the `window` int32 `[S, stride]` under a constraint.

        Returns tokens int64 and probabilities float32 `[S, stride]`, and the number of consecutive tokens committed,
        minus one, int32 `[S]`.
        """
        state, stride = self.state, self.stride
        has_row = self.offset[:stride] <= drafted[:, None]
        positions = TokenWindow(torch.where(has_row, window, -1), state.origin)
        rows = logits.shape[1] * torch.arange(len(window), dtype=torch.int32, device=window.device)[:, None]
        step, action = self.decide(
            logits.flatten(0, 1), positions, Standing.in_one_block(self.last + 1, stride, state.step),
            lambda step: Action(verified(step, self.drafts)), (rows + self.offset[:stride]).flatten(), first_alone=True,
        )  # fmt: skip
        assert action.commit is not None
        return step.token, step.confidence, action.commit.cumprod(1).sum(1, dtype=torch.int32) - 1


class Verifier:
    """Accepts a prefix of the drafts, chooses the token after it, and drafts the next tokens (`ops.verify_drafts`)."""

    def __init__(self, canvas: State, config: DecodingConfig, propose: Proposer):
        assert isinstance(config.rule, Strided)
        self.canvas, self.rule, self.propose = canvas, config.rule, propose
        self.by_ratio = config.rule.leniency is not None and propose.samples
        self.draft_logits: Tensor | None = None  # logits of the drafts, and their logsumexp, for the ratio test
        self.draft_logsumexp: Tensor | None = None

    def __call__(
        self, logits: Tensor, drafts: Tensor, drafted: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Verify the drafts and draft the next tokens.

        Parameters
        ----------
        logits : Tensor
            `[B, 2 stride - 1, V]`: logits of the last token, of the drafts and of the masks.
        drafts : Tensor
            int64 `[B, stride - 1]`: the drafts, -1 after the last of them.
        drafted : Tensor
            int32 `[B]`: number of drafts.
        last : Tensor
            int32 `[B]`: column of the last token.

        Returns
        -------
        tuple of Tensor
            Number of accepted drafts, int32 `[B]`; the accepted tokens and the one after them, int64 `[B, stride]`, -1
            in the remaining places; their probabilities, float32 `[B, stride]`; and the next drafts, int64
            `[B, stride - 1]`: the most likely or sampled tokens of the masks.
        """
        batch, rows = logits.shape[:2]
        verified, number = self.rule.stride, torch.arange(rows, dtype=torch.int32, device=logits.device)
        # logit rows of the last token and of the maximum number of drafts, followed by those of the masks
        row = torch.where(number < verified, number, number - verified + 1 + drafted[:, None])
        row_map = row + rows * torch.arange(batch, dtype=torch.int32, device=logits.device)[:, None]
        first = (last - self.canvas.origin + 1).contiguous()
        options: dict[str, Any] = dict(self.propose.options)
        if "seed" in options:
            # Each draft is sampled with the same noise that its verification will use.
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
                "seed": self.canvas.seed, "step": self.canvas.step, "position": first,
            }  # fmt: skip
        accepted, tokens = ops.verify_drafts(drafts, target, **compared)
        z = logits[:, :verified].gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0].float()
        temperature = options["temperature"]
        p = (z / torch.where(temperature > 0, temperature, 1.0)[:, None] - sums).exp()
        masks = row_map[:, verified:].flatten()
        self._remember(flat[masks.long()], logsumexp[:, verified:])
        return accepted, tokens, p, best[:, verified:].contiguous()

    def _remember(self, logits: Tensor, logsumexp: Tensor) -> None:
        """Keep the logits of the drafts for the ratio test in the next forward pass."""
        if self.draft_logits is None or self.draft_logsumexp is None:
            self.draft_logits = torch.empty_like(logits)
            self.draft_logsumexp = torch.empty_like(logsumexp, memory_format=torch.contiguous_format)
        self.draft_logits.copy_(logits)
        self.draft_logsumexp.copy_(logsumexp)
