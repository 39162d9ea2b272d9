# SPDX-License-Identifier: Apache-2.0
"""The program of WeDLM: a causal model that reads all decided tokens before the masks, whatever their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward import Forward, rows_at
from ..rules import Reordered
from ..standing import Standing
from .base import Program, Task


class ReorderedProgram(Program):
    """Decodes in a window of each row that slides past the decided tokens.

    A report is the largest number of open positions in any row, twice. A form is the number of columns to forward:
    first the prompt plus one window, later two windows.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        rule, config = self.rule, self.config
        assert isinstance(rule, Reordered)
        if config.attention != "reordered" or config.logit_alignment != "same" or config.cache != "block":
            raise ValueError(
                "rule Reordered needs attention='reordered', logit_alignment='same' and cache='block'; got "
                f"attention={config.attention!r}, logit_alignment={config.logit_alignment!r} and cache={config.cache!r}"
            )
        if config.cfg_scale > 0:
            raise ValueError(f"cfg_scale cannot be used with rule Reordered; got {config.cfg_scale}")
        self.width = rule.window
        self.forward = Forward(self.model, self.state, config, self.special, self.grid, task.prompt_embeds)
        #: number of columns of each row that are final in the cache
        self.final = torch.zeros_like(self.state.origin)

    def form(self, report: tuple[int, ...], behind: int) -> int | None:
        if report[1] == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        return self.start + self.width if self.taken == 1 else 2 * self.width

    def begin(self) -> Tensor:
        self.taken = 0
        self.forward.begin()
        self.final.fill_(0)
        self.constrained.enter(torch.ones_like(self.state.origin, dtype=torch.bool))
        return self.state.is_open.sum(1, dtype=torch.int32).amax().expand(2)

    def step(self, form: int) -> Tensor:
        state, final, width = self.state, self.final, self.width
        is_open = state.is_open
        any_open = is_open.any(1) & ~self.constrained.is_stuck
        first = torch.where(any_open, is_open.int().argmax(1), self.end).int()
        columns = final[:, None] + torch.arange(form, dtype=torch.int32, device=final.device)
        used = (columns < first[:, None] + width) & any_open[:, None]
        order = self.forward.reading_order()
        limit = order.gather(1, columns.clamp(max=self.forward.length - 1).long())
        hidden = self.forward.at(columns, self.forward.ends, used, q_limit=limit, k_order=order)
        window = state.window(state.columns(first, width), width)
        picked = rows_at(hidden, window.positions - final[:, None]).flatten(0, 1)
        standing = Standing.in_one_block(first, width, state.step)
        step, action = self.decide(self.propose.head(picked), window, standing, self.rule.act)
        assert action.commit is not None
        info = self.commit(window.positions, step.token, action.commit, step.confidence)
        final.copy_(first)
        return self.still_open(info).amax().expand(2)
