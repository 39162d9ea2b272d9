# SPDX-License-Identifier: Apache-2.0
"""S2D2: a block-diffusion model drafts a block, then verifies it as if every position were a block of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache import KVCache
from ...window import AttentionWindow, TokenWindow
from ..config import DecodingConfig
from ..forward import Forward
from ..rules import Action
from ..standing import Standing
from .base import Program, Task
from .speculative import verified


class SelfVerifiedProgram(Program):
    """Drafts and verifies a block in two forward passes per step; each row advances by the tokens it accepts.

    The first forward pass drafts: it takes the last token, as a block of its own, followed by a block of masks. The
    second verifies: it takes the drafts, each as a block of its own, and one extra mask per position, in slots behind
    the canvas. Each of these masks sees the text, the drafts before its position, and itself, so it predicts what the
    model would predict there when decoding one token at a time.

    A report is the largest number of open positions in any row. All steps have the same form, True.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        _check(self.config, self.grid.length)
        if self.start == 0:
            raise ValueError("input_ids must hold at least one token with rule S2D2, which drafts from the last token")
        self.forward = Forward(self.model, self.state, self.config, self.special, self.grid, task.prompt_embeds)
        self.width, device = self.grid.length, self.state.tokens.device
        self.forward.cache = KVCache(self.forward.length + self.width + 1, len(self.state.tokens))
        #: column of each row's last token
        self.last = torch.zeros(len(self.state.tokens), dtype=torch.int32, device=device)
        self.offset = torch.arange(self.width + 1, dtype=torch.int32, device=device)
        self._drafting, self._verifying = (x.to(device) for x in visibilities(self.width))
        if self.propose.samples:
            # Random draws depend only on a token's position, so drafts and their verification use the same noise.
            self.propose.options["step"] = torch.zeros_like(self.state.step)

    def form(self, report: tuple[int, ...], behind: int) -> bool | None:
        if report[0] == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        return True

    def begin(self) -> Tensor:
        """Forward the prompt: as a single block if blocks are counted from its end, else with one block per token."""
        self.taken = 0
        self.forward.begin()
        self.last.fill_(self.start - 1)
        self.constrained.enter(torch.ones_like(self.last, dtype=torch.bool))
        columns = torch.arange(self.start, dtype=torch.int32, device=self.last.device).expand(len(self.last), -1)
        self.forward.at(columns, self.last + 1, causal_block=0 if self.config.block_grid == "prompt" else 1)
        return self.state.is_open.sum(1, dtype=torch.int32).amax().view(1)

    def step(self, form: bool) -> Tensor:
        state, last, width = self.state, self.last, self.width
        working = state.is_open.any(1) & ~self.constrained.is_stuck
        columns = last[:, None] + self.offset  # the last token and the drafts
        end = torch.minimum(last + width + 1, self.forward.ends.clamp(max=self.end))
        used = working[:, None] & (columns < end[:, None])
        places = torch.where(used[:, 1:], columns[:, 1:], -1).contiguous()

        tokens = torch.full_like(columns, self.special.mask, dtype=torch.int64)
        tokens[:, 0] = state.tokens.gather(1, last.long()[:, None])[:, 0]
        slots = torch.where(used, columns, -1)
        hidden = self._forward(columns, slots, tokens, end, torch.zeros_like(end), self._drafting)
        window = TokenWindow(places, state.origin)
        drafts = self.propose(self.propose.head(hidden[:, 1:].flatten(0, 1)), window).token.view(len(last), -1)

        masks = tokens.new_full((len(last), width), self.special.mask)
        behind = (self.forward.length + self.offset[:width]).expand_as(places)
        hidden = self._forward(
            torch.cat((columns[:, 1:], columns[:, 1:]), 1),
            torch.cat((places, torch.where(used[:, 1:], behind, -1)), 1),
            torch.cat((drafts.clamp(min=0), masks), 1), end, used[:, 1:].sum(1, dtype=torch.int32), self._verifying,
        )  # fmt: skip
        standing = Standing.in_one_block(last + 1, width, state.step)
        step, action = self.decide(
            self.propose.head(hidden[:, width:].flatten(0, 1)), window, standing,
            lambda step: Action(verified(step, drafts[:, :-1].contiguous())), first_alone=True,
        )  # fmt: skip
        state.step.add_(working)  # a step has two forwards; the commit below counts the other
        assert action.commit is not None
        chosen = action.commit.cumprod(1).bool()
        info = self.commit(window.positions, step.token, chosen, step.confidence)
        last.add_(chosen.sum(1, dtype=torch.int32))
        return self.still_open(info).amax().view(1)

    def _forward(
        self, columns: Tensor, slots: Tensor, tokens: Tensor, end: Tensor, masks: Tensor, visible: Tensor
    ) -> Tensor:
        """Return hidden states of tokens at canvas columns int32 `[S, Q]`, with keys and values in `slots` `[S, Q]`.

        They see the text from its start to column `end` int32 `[S]`, and the first `masks` int32 `[S]` slots behind the
        canvas. Among themselves, they see what the bitmask `visible` int32 `[Q, words]` allows.
        """
        forward = self.forward
        inside = columns.clamp(0, forward.length - 1).long()
        behind = torch.stack((torch.zeros_like(masks), masks), 1) + forward.length
        window = AttentionWindow(
            slots.contiguous(), torch.stack((torch.stack((forward.origin, end), 1), behind), 1), forward.cache,
            visible=visible.expand(len(columns), -1, -1).contiguous(), rotations=forward.rotations,
        )  # fmt: skip
        return forward.run(inside, forward.positions.gather(1, inside), window, tokens)


def visibilities(width: int) -> tuple[Tensor, Tensor]:
    """Build the visibility bitmasks among new rows for the two forward passes of a step.

    Both are int32 `[Q, words]`, as taken by `ops.block_attention`. In the first, the last token sees only itself, and
    the masks see all rows. In the second, a draft sees the drafts up to and including itself, and the mask at its
    position sees the drafts before that position, and itself.
    """
    drafting = torch.ones(width + 1, width + 1, dtype=torch.bool, device="cpu")
    drafting[0, 1:] = False
    before = torch.ones(width, width, dtype=torch.bool, device="cpu").tril(-1)
    itself, nothing = torch.eye(width, dtype=torch.bool, device="cpu"), torch.zeros_like(before)
    verifying = torch.cat((torch.cat((before | itself, nothing), 1), torch.cat((before, itself), 1)))
    return bits(drafting), bits(verifying)


def bits(rows: Tensor) -> Tensor:
    """Pack bool `[…, K]` into int32 words `[…, ceil(K / 32)]`: column i becomes bit i % 32 of word i // 32."""
    padded = torch.nn.functional.pad(rows.long(), (0, -rows.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (padded << torch.arange(32, device=rows.device)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def _check(config: DecodingConfig, block_length: int) -> None:
    if config.attention != "block" or config.cache != "block" or config.logit_alignment != "same":
        raise ValueError(
            "rule S2D2 needs attention='block', cache='block' and logit_alignment='same'; got "
            f"attention={config.attention!r}, cache={config.cache!r} and logit_alignment={config.logit_alignment!r}"
        )
    if config.cfg_scale > 0:
        raise ValueError(f"cfg_scale cannot be used with rule S2D2; got {config.cfg_scale}")
    if block_length < 2:
        raise ValueError(f"block_length must be at least 2 with rule S2D2; got {block_length}")
