# SPDX-License-Identifier: Apache-2.0
"""The program of SSD-LM: block after block, denoise vectors over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...models.ssd_lm import kept_power
from ...reference import normals
from ...window import AttentionWindow, TokenWindow
from ..forward import Forward
from ..rules.continuous import SimplexDenoising
from ..standing import Standing
from .base import Program, Task


@dataclass(frozen=True)
class Form:
    """Columns `[start, end)` of the block, and the number of steps `left` in it, counting down to 1."""

    start: int
    end: int
    left: int
    is_first: bool


class SimplexProgram(Program):
    """Denoises all rows together, block after block; each block sees everything before it.

    A report is the largest number of open positions in any row.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        config, model = self.config, self.model
        rule = self.rule
        assert isinstance(rule, SimplexDenoising)
        rule.check_task(config, task.prompt_embeds)
        if not hasattr(model.model, "simplex_table"):
            raise ValueError(
                f"rule {type(rule).__name__} needs a model that reads distributions over tokens (SSD-LM); got "
                f"{type(model.model).__name__}"
            )
        self.nucleus, self.draws_token = rule.nucleus, rule.draw
        self.forward = Forward(model, self.state, config, self.special, self.grid)
        self.length = min(config.block_length or model.block_length or self.end, self.end - self.start)
        self.starts = list(range(self.start, self.end, self.length))
        self.steps = max((config.steps or self.end - self.start) // len(self.starts), 1)
        raw: Any = model.model
        self.raw, self.scale = raw, float(raw.config.simplex_scale)
        self.table = raw.simplex_table()
        self.kept = kept_power(self.steps, self.table.device)
        rows = len(self.state.tokens)
        self.z = torch.zeros(rows, self.length, self.table.shape[0], device=self.table.device)
        self.draft = torch.full_like(self.state.tokens, -1)
        self.since = torch.zeros_like(self.state.commit_step)

    def form(self, report: tuple[int, ...], behind: int) -> Form | None:
        number, index = divmod(self.taken, self.steps)
        if report[0] == 0 or number == len(self.starts):
            return None
        self.taken += 1
        start = self.starts[number]
        return Form(start, min(start + self.length, self.end), self.steps - index, index == 0)

    def begin(self) -> Tensor:
        self.taken = 0
        self.forward.begin()
        self.draft.fill_(-1)
        self.since.zero_()
        return self.state.is_open.sum(1, dtype=torch.int32).amax().view(1)

    def step(self, form: Form) -> Tensor:
        state, here = self.state, slice(form.start, form.end)
        if form.is_first:
            self._renoise(form, 0)
        is_open = state.is_open[:, here]
        logits = self._cleaned(self._logits(form, is_open))
        self._draft(logits, here, is_open)
        if form.left == 1:
            return self._decide(logits, form, is_open)
        state.step.add_(1)
        kept = self.kept[form.left - 1].float()
        is_clean = self._drawn(logits, form) if self.draws_token else self._nucleus(logits)
        clean = is_clean * (2 * self.scale) - self.scale
        self._renoise(form, kept, clean.view(self.z[:, : form.end - form.start].shape))
        return state.is_open.sum(1, dtype=torch.int32).amax().view(1)

    def _renoise(self, form: Form, kept: Tensor | float, clean: Tensor | None = None) -> None:
        """Set the vectors to the noise of the next forward, mixed with `clean`, which makes up `kept` of the power."""
        width = form.end - form.start
        position = torch.arange(form.start, form.end, device=self.z.device) - self.state.origin[:, None]
        step = self.state.step[:, None].long()
        noise = self.scale * normals(self.state.seed[:, None], position, step, self.z.shape[2])
        if clean is not None:
            share = torch.as_tensor(kept, device="cpu")
            noise = share**0.5 * clean + (1 - share) ** 0.5 * noise
        self.z[:, :width] = noise

    def _logits(self, form: Form, is_open: Tensor) -> Tensor:
        """Compute logits `[S * width, V]` of the block from everything before it and its noisy vectors."""
        state, forward, width = self.state, self.forward, form.end - form.start
        embeds = self.model.embed(state.tokens[:, : form.end]).clone()
        noisy = ops.soft_embedding(self.z[:, :width].flatten(0, 1), self.table).view(len(embeds), width, -1)
        progress = torch.full((1, 1), form.left / self.steps, device=noisy.device)
        noisy = noisy + self.raw.time_embedding(progress)
        embeds[:, form.start :] = torch.where(is_open[..., None], noisy, embeds[:, form.start :])
        kv_range = torch.stack((forward.origin, torch.full_like(forward.origin, form.end)), 1)
        window = AttentionWindow(
            forward.slots[:, : form.end].contiguous(), kv_range, rotations=forward.rotations
        )  # fmt: skip
        positions = forward.positions[:, : form.end]
        hidden = self.model.hidden(state.tokens[:, : form.end], positions, window, embeds)
        return self.model.logits(hidden[:, form.start :].flatten(0, 1))

    def _cleaned(self, logits: Tensor) -> Tensor:
        if self.config.logit_bias is None and not self.special.banned:
            return logits
        return self.propose.clean(logits, torch.arange(len(logits), device=logits.device))

    def _draft(self, logits: Tensor, here: slice, is_open: Tensor) -> None:
        """Write the most likely tokens to the open positions, and note which of them have changed."""
        likeliest = logits.argmax(1).view(is_open.shape)
        is_new = likeliest != self.draft[:, here]
        self.since[:, here] = torch.where(is_new, self.state.step[:, None], self.since[:, here])
        self.draft[:, here] = likeliest
        self.state.tokens[:, here] = torch.where(is_open, likeliest, self.state.tokens[:, here])

    def _drawn(self, logits: Tensor, form: Form) -> Tensor:
        """Draw one token of the nucleus per position, with the random numbers of the next forward: bool `[N, V]`."""
        state = self.state
        columns = torch.arange(form.start, form.end, dtype=torch.int32, device=logits.device)
        one = torch.ones(1, device=logits.device)
        token = ops.token_confidence(
            logits, temperature=one, top_p=one * self.nucleus, seed=state.seed, step=state.step,
            position=(columns - state.origin[:, None]).flatten(), with_margin=False, with_entropy=False,
        ).token  # fmt: skip
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, token[:, None], True)

    def _nucleus(self, logits: Tensor) -> Tensor:
        """Return the tokens of the nucleus, including the one that crosses its threshold: bool `[N, V]`."""
        p, order = logits.float().softmax(-1).sort(-1, descending=True)
        before = p.cumsum(-1) - p
        inside = torch.cat((torch.ones_like(order[:, :1], dtype=torch.bool), before[:, 1:] < self.nucleus), 1)
        return torch.zeros_like(inside).scatter(1, order, inside)

    def _decide(self, logits: Tensor, form: Form, is_open: Tensor) -> Tensor:
        """Commit the most likely tokens of the block.

        The commit step is the forward pass since which each token has been most likely.
        """
        state = self.state
        columns = torch.arange(form.start, form.end, dtype=torch.int32, device=logits.device)
        window = TokenWindow(torch.where(is_open, columns, -1), state.origin)
        first = torch.full_like(state.origin, form.start)
        step = self.propose.step(logits, window, Standing.in_one_block(first, form.end - form.start, state.step))
        self.unfinished.see(step)
        was_open = state.is_open
        info = self.commit(window.positions, step.token, step.used, step.confidence)
        is_new = was_open & (state.commit_step >= 0)
        state.commit_step.copy_(torch.where(is_new, self.since, state.commit_step))
        return info[:, 1].amax().view(1)
