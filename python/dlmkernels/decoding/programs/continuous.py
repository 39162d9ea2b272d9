# SPDX-License-Identifier: Apache-2.0
"""The program of continuous models: noisy vectors walk to what the model makes of them, and tokens come at the end."""

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

#: Numbers the draws before the first step, which has 0.
BEFORE_THE_FIRST = -1


class ContinuousProgram(Program):
    """All rows walk together. A report is the largest number of open positions of any row.

    A form is "step", or "last" for the forward that decides. In between the canvas holds the tokens that are likeliest
    so far, still open. Given tokens are vectors, too: theirs are known, with as much noise as the others have, or with
    none where the rule or the model wants it so.

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
        #: the vectors of given tokens, and which are given, `[S, T, 1]`
        self.given, self.is_given = torch.zeros_like(self.z), torch.zeros_like(state.is_open)[..., None]
        #: what the last forward said, `[S, T, width]`
        self.opinion = torch.zeros_like(self.z)
        #: the likeliest tokens of the columns so far, and since which forward
        self.draft = torch.full_like(state.tokens, -1)
        self.since = torch.zeros_like(state.commit_step)
        self.walk = rule.walk(model.gamma, self.steps, state.tokens.device)
        #: whether given tokens have no noise: the rule's way, or how the model was trained
        self.clean_context = rule.clean_context or getattr(self.model.config, "clean_context", False)
        self.is_random = bool(self.walk.weights[:, 2].any())
        self.levels, self.weights = model.told(self.walk.time).float(), self.walk.weights.float()
        # of the nearest vector e of a token, e . x - |e|^2 / 2 is largest
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
        """Normal numbers float32 `[S, T, width]` of a step int64 `[S]`, by request and place in it."""
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
        """The vectors of tokens `[N, width]` that are nearest, the first of them where several are."""
        nearest = (vectors.float() @ self.table.T - self.half_squares).argmax(1)
        return self.table.index_select(0, nearest)

    def _cleaned(self, logits: Tensor) -> Tensor:
        """The logits with what the configuration adds and excludes."""
        if self.config.logit_bias is None and not self.special.banned:
            return logits
        return self.propose.clean(logits, torch.arange(len(logits), device=logits.device))

    def _draft(self, logits: Tensor) -> None:
        """Put the likeliest tokens at the open positions, and take notice of those that are new."""
        here = slice(self.start, self.end)
        likeliest = logits.argmax(1).view(len(self.z), -1)
        is_new = likeliest != self.draft[:, here]
        self.since[:, here] = torch.where(is_new, self.state.step[:, None], self.since[:, here])
        self.draft[:, here] = likeliest
        self.state.tokens[:, here] = torch.where(self.is_given[:, here, 0], self.state.tokens[:, here], likeliest)

    def _move(self, mean: Tensor, now: Tensor) -> None:
        """Take the vectors to the next noise level, by what the model says that they come from, `[N, width]`."""
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
        """Commit the likeliest tokens, with the forwards since which they have been that."""
        state = self.state
        first = torch.full_like(state.origin, self.start)
        window = state.window(state.columns(first, self.end - self.start), self.end - self.start)
        step = self.propose.step(logits, window, Standing.in_one_block(first, self.end - self.start, state.step))
        self.unfinished.see(step)
        info = self.commit(window.positions, step.token, step.used, step.confidence)
        state.commit_step.copy_(torch.where(state.commit_step >= 0, self.since, state.commit_step))
        return info[:, 1].amax().view(1)
