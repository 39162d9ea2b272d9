# SPDX-License-Identifier: Apache-2.0
"""The program of continuous models: denoise vectors step by step, and read the tokens from them at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...reference import normals
from ...window import AttentionWindow
from ..forward import Forward
from ..rules.continuous import ContinuousRule
from ..standing import Standing
from .base import Program, Task

#: Step number of the random draws before the first step, which has number 0.
BEFORE_THE_FIRST = -1


class ContinuousProgram(Program):
    """Denoises the vectors of all rows together, one noise level per step.

    A report is the largest number of open positions in any row. A form is "step", or "last" for the forward pass that
    decides. Until then, the canvas holds the currently most likely tokens, still open. Given tokens are vectors as
    well: their clean vectors are known, and have the same noise as the others, or none if the rule or the model
    requires that.

    Attributes
    ----------
    z : Tensor
        float32 `[S, T, width]`: the noisy vectors.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        config, state, rule = self.config, self.state, self.rule
        assert isinstance(rule, ContinuousRule)
        rule.check_task(config, task.prompt_embeds)
        if not hasattr(self.model, "latent_table"):
            raise ValueError(
                f"rule {type(rule).__name__} needs a model whose noise is on embeddings (LangFlow, Plaid, "
                f"Diffusion-LM); got {type(self.model.model).__name__}"
            )
        self.forward = Forward(self.model, state, config, self.special, self.grid)
        self.steps = config.steps or self.end - self.start
        rows, columns = state.tokens.shape
        model: Any = self.model
        self.table: Tensor = model.latent_table()
        self.z = torch.zeros(rows, columns, self.table.shape[1], device=state.tokens.device)
        #: clean vectors of given tokens, `[S, T, width]`, and which tokens are given, `[S, T, 1]`
        self.given, self.is_given = torch.zeros_like(self.z), torch.zeros_like(state.is_open)[..., None]
        #: clean vectors predicted by the last forward pass (for self-conditioning), `[S, T, width]`
        self.opinion = torch.zeros_like(self.z)
        #: currently most likely token of each column, and the forward pass since which it has been
        self.draft = torch.full_like(state.tokens, -1)
        self.since = torch.zeros_like(state.commit_step)
        self.walk = rule.walk(model.gamma, self.steps, state.tokens.device)
        #: whether given tokens have no noise, because of the rule or because the model was trained that way
        self.clean_context = rule.clean_context or getattr(self.model.config, "clean_context", False)
        self.is_random = bool(self.walk.weights[:, 2].any())
        self.levels, self.weights = model.told(self.walk.time).float(), self.walk.weights.float()
        # the token vector e nearest to x maximizes e . x - |e|^2 / 2
        self.half_squares = self.table.pow(2).sum(1) / 2

    def form(self, report: tuple[int, ...], behind: int) -> str | None:
        if self.taken == self.steps or report[0] == 0:
            return None
        self.taken += 1
        return "last" if self.taken == self.steps else "step"

    def begin(self) -> Tensor:
        state = self.state
        self.taken = 0
        self.forward.begin()
        self.given.copy_(self.table[state.tokens])
        self.is_given.copy_(~state.is_open[..., None])
        noise = self._normals(torch.full_like(state.seed, BEFORE_THE_FIRST))
        signal, spread = self.walk.first.float().unbind()
        given = self.given if self.clean_context else signal * self.given + spread * noise
        self.z.copy_(torch.where(self.is_given, given, noise))
        self.opinion.zero_()
        self.draft.fill_(-1)
        self.since.zero_()
        return state.is_open.sum(1, dtype=torch.int32).amax().view(1)

    def _normals(self, step: Tensor) -> Tensor:
        """Draw normal numbers float32 `[S, T, width]` for a step int64 `[S]`, keyed by the request and the position."""
        position = torch.arange(self.z.shape[1], device=step.device) - self.state.origin[:, None]
        return normals(self.state.seed[:, None], position, step[:, None], self.z.shape[2])

    def step(self, form: str) -> Tensor:
        state, forward = self.state, self.forward
        now = state.step.long()
        window = AttentionWindow(forward.slots.contiguous(), forward.kv_range, rotations=forward.rotations)
        model: Any = self.model
        said = model.hidden(
            state.tokens, forward.positions, window, self.z, self.opinion, level=self.levels.index_select(0, now)
        )[:, self.start : self.end].flatten(0, 1)  # fmt: skip
        mean: Tensor | None = None
        if model.says_vectors:
            said = mean = self._clamped(said) if self.rule.clamps else said  # type: ignore[attr-defined]
        logits = self._cleaned(model.logits(said))
        self._draft(logits)
        if form == "step":
            self._move(ops.soft_embedding(logits, self.table) if mean is None else mean, now)
            state.step.add_(1)
            return state.is_open.sum(1, dtype=torch.int32).amax().view(1)
        return self._decide(logits)

    def _clamped(self, vectors: Tensor) -> Tensor:
        """Return the nearest token vectors `[N, width]`; on ties, that of the smallest token id."""
        nearest = (vectors.float() @ self.table.T - self.half_squares).argmax(1)
        return self.table.index_select(0, nearest)

    def _cleaned(self, logits: Tensor) -> Tensor:
        """Return the logits with the configured bias added and banned tokens excluded."""
        if self.config.logit_bias is None and not self.special.banned:
            return logits
        return self.propose.clean(logits, torch.arange(len(logits), device=logits.device))

    def _draft(self, logits: Tensor) -> None:
        """Write the most likely tokens to the open positions, and note which of them have changed."""
        here = slice(self.start, self.end)
        likeliest = logits.argmax(1).view(len(self.z), -1)
        is_new = likeliest != self.draft[:, here]
        self.since[:, here] = torch.where(is_new, self.state.step[:, None], self.since[:, here])
        self.draft[:, here] = likeliest
        self.state.tokens[:, here] = torch.where(self.is_given[:, here, 0], self.state.tokens[:, here], likeliest)

    def _move(self, mean: Tensor, now: Tensor) -> None:
        """Move the vectors to the next noise level, given the predicted clean vectors `mean` `[N, width]`."""
        self.opinion[:, self.start : self.end] = mean.view(len(self.z), -1, self.z.shape[2]).float()
        self.opinion.copy_(torch.where(self.is_given, self.given, self.opinion))
        a, b, c = self.weights.index_select(0, now).T[..., None, None]
        z = a * self.z + b * self.opinion
        if self.is_random:
            z = z + c * self._normals(now)
        if self.clean_context:
            z = torch.where(self.is_given, self.given, z)
        self.z.copy_(z)

    def _decide(self, logits: Tensor) -> Tensor:
        """Commit the most likely tokens; the commit step is the forward pass since which each has been most likely."""
        state = self.state
        first = torch.full_like(state.origin, self.start)
        window = state.window(state.columns(first, self.end - self.start), self.end - self.start)
        step = self.propose.step(logits, window, Standing.in_one_block(first, self.end - self.start, state.step))
        self.unfinished.see(step)
        info = self.commit(window.positions, step.token, step.used, step.confidence)
        state.commit_step.copy_(torch.where(state.commit_step >= 0, self.since, state.commit_step))
        return info[:, 1].amax().view(1)
