# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: draft a block with bidirectional attention, then verify it from left to right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...window import TokenWindow
from ..config import DecodingConfig
from ..forward import Forward
from ..rules import Action
from ..standing import Standing
from ..step import Step
from .base import Program, Task


class SpeculativeProgram(Program):
    """Drafts and verifies a block in two forward passes per step; each row advances by the tokens it accepts.

    A report is the largest number of open positions in any row, twice. All steps have the same form, True.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        _check(self.config, self.grid.length)
        self.forward = Forward(self.model, self.state, self.config, self.special, self.grid, task.prompt_embeds)
        device = self.state.tokens.device
        #: column of each row's last token
        self.last = torch.zeros(len(self.state.tokens), dtype=torch.int32, device=device)
        self.offset = torch.arange(self.grid.length, dtype=torch.int32, device=device)

    def form(self, report: tuple[int, ...], behind: int) -> bool | None:
        if report[1] == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        return True

    def begin(self) -> Tensor:
        """Forward the prompt, and commit the token after it."""
        self.taken = 0
        return self.still_open(commit_after_prompt(self, self.forward, self.last)).amax().expand(2)

    def step(self, form: bool) -> Tensor:
        state, last, mask = self.state, self.last, self.special.mask
        working = state.is_open.any(1) & ~self.constrained.is_stuck
        columns, next_columns = last[:, None] + self.offset, last[:, None] + 1 + self.offset
        block_end = torch.minimum(last + self.grid.length, self.forward.ends)
        block: dict[str, Any] = {"columns": columns, "end": block_end, "used": working[:, None].expand_as(columns)}
        is_next = working[:, None] & (next_columns < self.forward.ends.clamp(max=self.end)[:, None])
        window = TokenWindow(torch.where(is_next, next_columns, -1), state.origin)

        tokens = torch.full_like(columns, mask, dtype=torch.int64)
        tokens[:, 0] = state.tokens.gather(1, last.long()[:, None])[:, 0]
        hidden = self.forward.at(**block, tokens=tokens, context_end=last)
        masks = TokenWindow(window.positions[:, :-1].contiguous(), state.origin)
        drafts = self.propose(self.propose.head(hidden[:, 1:].flatten(0, 1)), masks).token.view(len(last), -1)
        tokens[:, 1:] = torch.where(drafts < 0, mask, drafts)

        hidden = self.forward.at(**block, tokens=tokens, causal_block=1)
        # the same step number as the drafts, so that both are drawn with the same noise
        standing = Standing.in_one_block(last + 1, self.grid.length, state.step)
        step, action = self.decide(
            self.propose.head(hidden.flatten(0, 1)), window, standing, lambda step: Action(verified(step, drafts)),
            first_alone=True,
        )  # fmt: skip
        state.step.add_(working)
        assert action.commit is not None
        chosen = action.commit.cumprod(1).bool()
        info = self.commit(window.positions, step.token, chosen, step.confidence)
        last.add_(chosen.sum(1, dtype=torch.int32))
        return self.still_open(info).amax().expand(2)


def commit_after_prompt(program: Program, forward: Forward, last: Tensor) -> Tensor:
    """Forward the prompts, commit the token after each, and store its column in `last` int32 `[S]`.

    Returns the info of `ops.remask_`.
    """
    forward.begin()
    last.fill_(program.start)
    program.constrained.enter(torch.ones_like(last, dtype=torch.bool))
    columns = torch.arange(program.start, dtype=torch.int32, device=last.device).expand(len(last), -1)
    hidden = forward.at(columns, last, causal_block=1)
    window = TokenWindow(last[:, None].clone(), program.state.origin)
    standing = Standing.in_one_block(last, 1, program.state.step)
    step, action = program.decide(
        program.propose.head(hidden[:, -1]), window, standing, lambda step: Action(step.token >= 0)
    )  # fmt: skip
    assert action.commit is not None
    return program.commit(window.positions, step.token, action.commit, step.confidence)


def verified(step: Step, drafts: Tensor) -> Tensor:
    """Return which tokens of the step are accepted, bool `[B, W + 1]`.

    These are the tokens up to and including the first that differs from its draft int64 `[B, W]`.
    """
    return (ops.verify_drafts(drafts, step.token.contiguous()).tokens >= 0) & step.used


def _check(config: DecodingConfig, block_length: int) -> None:
    if config.attention != "causal-context" or config.cache != "block" or not config.seeded:
        raise ValueError(
            "rule SelfSpeculative needs attention='causal-context', cache='block' and seeded=True; got "
            f"attention={config.attention!r}, cache={config.cache!r} and seeded={config.seeded!r}"
        )
    if config.logit_alignment != "same":
        raise ValueError(f"rule SelfSpeculative needs logit_alignment='same'; got {config.logit_alignment!r}")
    if config.cfg_scale > 0:
        raise ValueError(f"cfg_scale cannot be used with rule SelfSpeculative; got {config.cfg_scale}")
    if block_length < 2:
        raise ValueError(f"block_length must be at least 2 with rule SelfSpeculative; got {block_length}")
