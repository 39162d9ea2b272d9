# SPDX-License-Identifier: Apache-2.0
"""Left-to-right decoding of causal models: one token per forward, or several by verifying the tokens of a drafter."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache import KVCache
from ...models.drafters import Drafter, Tapped
from ...window import AttentionWindow, TokenWindow
from ..forward import Forward
from ..rules import Action, Drafted
from ..standing import Standing
from .base import Program, Task
from .speculative import commit_after_prompt, verified
from .widths import Widths, measured


class CausalProgram(Program):
    """Decodes one token per forward.

    A report is the largest number of open positions in any row, and the number of drafts to verify. A form is that
    number of drafts. Each row has its own last token, which no forward pass has read yet.
    """

    #: maximum number of drafts that a step verifies
    drafts = 0

    def __init__(self, task: Task):
        super().__init__(task)
        if self.config.cfg_scale > 0:
            raise ValueError(
                f"cfg_scale cannot be used with rule {type(self.rule).__name__}; got {self.config.cfg_scale}"
            )
        model = self.listened(self.model)
        self.forward = Forward(model, self.state, self.config, self.special, self.grid, task.prompt_embeds)
        device = self.state.tokens.device
        #: column of each row's last token
        self.last = torch.zeros(len(self.state.tokens), dtype=torch.int32, device=device)
        self.offset = torch.arange(self.drafts + 1, dtype=torch.int32, device=device)
        self._width = torch.full_like(self.last, self.drafts)
        if self.propose.samples:
            # Random draws depend only on a token's position, not on the number of forwards it took to reach it.
            self.propose.options["step"] = torch.zeros_like(self.state.step)

    def listened(self, model):
        """Return the model to run; subclasses may attach a listener to it."""
        return model

    def form(self, report: tuple[int, ...], behind: int) -> int | None:
        if report[0] == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        return self.drafts if behind else report[1]

    def widest(self, form: int) -> int:
        return self.drafts

    def begin(self) -> Tensor:
        """Forward the prompt, and commit the token after it."""
        self.taken = 0
        info = commit_after_prompt(self, self.forward, self.last)
        columns = torch.arange(self.start, dtype=torch.int32, device=self.last.device).expand(len(self.last), -1)
        self.have_read(columns, torch.ones_like(columns, dtype=torch.bool))
        return self.report(info, None)

    def step(self, form: int) -> Tensor:
        state, last, offset = self.state, self.last, self.offset[: form + 1]
        working = state.is_open.any(1) & ~self.constrained.is_stuck
        columns, width = last[:, None] + offset, self.width()
        end = torch.minimum(last + width + 1, self.forward.ends)
        used = working[:, None] & (offset <= width[:, None])
        is_next = used & (columns + 1 < self.forward.ends.clamp(max=self.end)[:, None])
        window = TokenWindow(torch.where(is_next, columns + 1, -1), state.origin)

        anchor = state.tokens.gather(1, last.long()[:, None])
        hidden, drafts = self.read(anchor[:, 0], columns, end, used, window)
        standing = Standing.in_one_block(last + 1, len(offset), state.step)
        step, action = self.decide(
            self.propose.head(hidden.flatten(0, 1)), window, standing,
            lambda step: Action(verified(step, drafts) if form else step.token >= 0), first_alone=True,
        )  # fmt: skip
        assert action.commit is not None
        chosen = action.commit.cumprod(1).bool()
        info = self.commit(window.positions, step.token, chosen, step.confidence)
        taken = chosen.sum(1, dtype=torch.int32)
        last.add_(taken)
        return self.report(info, (taken - 1).clamp(min=0), working)

    def report(self, info: Tensor, accepted: Tensor | None, working: Tensor | None = None) -> Tensor:
        """Return the report of a step, given its `info` and the accepted drafts int32 `[S]` of the `working` rows."""
        return torch.stack((self.still_open(info).amax(), self.width().amax()))

    def width(self) -> Tensor:
        """Return the number of drafts that each row asks for, int32 `[S]`."""
        return self._width

    # --- for subclasses with drafts -----------------------------------------------------------------------------------

    def read(
        self, anchor: Tensor, columns: Tensor, end: Tensor, used: Tensor, window: TokenWindow
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Draft tokens and forward them; return hidden states `[S, W + 1, hidden]` and the drafts `[S, W]`.

        The hidden states are those of each row's last token and of the drafts after it. These are at `columns` int32
        `[S, W + 1]` and see nothing from column `end` int32 `[S]` on. For the other arguments, see `draft`.
        """
        drafts = self.draft(anchor, used, window)
        tokens = torch.cat((anchor[:, None], drafts.clamp(min=0)), 1)
        hidden = self.forward.at(columns, end, used, tokens, causal_block=1)
        self.have_read(columns, used)
        return hidden, drafts

    def draft(self, anchor: Tensor, used: Tensor, window: TokenWindow) -> Tensor:
        """Draft the tokens after the last tokens `anchor` int64 `[S]`: int64 `[S, W]`, -1 for none.

        `window` holds the W positions of the drafts and the position after them. `used` bool `[S, W + 1]` marks the
        last token and as many drafts as the row asks for.
        """
        return anchor[:, None][:, :0]

    def have_read(self, columns: Tensor, used: Tensor) -> None:
        """Called after the model has read the `used` tokens at `columns` int32 `[S, Q]`."""


class DraftedProgram(CausalProgram):
    """Decodes with drafts. The drafter's cache holds features of the model's layers for the text read so far.

    Rejected drafts are overwritten in both caches, because the next block starts in their place.
    """

    def __init__(self, task: Task):
        rule = task.config.rule
        assert isinstance(rule, Drafted)
        drafter: Drafter = rule.drafter
        _check(drafter, task)
        is_fixed = isinstance(rule.width, int)
        self.drafter, self.drafts = drafter, rule.width if isinstance(rule.width, int) else drafter.form.drafts
        super().__init__(task)
        self.cache = KVCache(self.forward.length, len(self.state.tokens))
        self.widths: Widths | None = None
        if not is_fixed and rule.width is not None:
            costs = measured(self.tapped.model, drafter, len(self.state.tokens), self.drafts)
            self.widths = Widths(len(self.state.tokens), costs)

    def listened(self, model):
        self.tapped = Tapped(model, self.drafter.form.taps)
        return self.tapped.model

    def have_read(self, columns: Tensor, used: Tensor) -> None:
        slots, positions = self._places(columns, used)
        self.drafter.inject(self.tapped.take(), slots, positions, self.cache)

    def begin(self) -> Tensor:
        if self.widths is not None:
            self.widths.begin()
        return super().begin()

    def width(self) -> Tensor:
        return self._width if self.widths is None else self.widths.now

    def report(self, info: Tensor, accepted: Tensor | None, working: Tensor | None = None) -> Tensor:
        if self.widths is not None and accepted is not None and working is not None:
            self.widths.see(accepted, working)
        return super().report(info, accepted, working)

    def draft(self, anchor: Tensor, used: Tensor, window: TokenWindow) -> Tensor:
        if used.shape[1] == 1:
            return anchor[:, None][:, :0]
        hidden = self.block(anchor, used)
        logits = self.drafter.logits(hidden.flatten(0, 1))
        # one draft for each used slot, and none at the position after the drafts
        asked = torch.where(self.offset[: hidden.shape[1]] < self.width()[:, None], window.positions[:, :-1], -1)
        places = TokenWindow(asked.contiguous(), window.origin)
        if not self.drafter.is_sequential:
            return self.propose(self.drafter.of_all(logits), places).token.view(hidden.shape[:2])
        return self._one_after_another(anchor, hidden, logits.unflatten(0, hidden.shape[:2]), places)

    def block(self, anchor: Tensor, used: Tensor) -> Tensor:
        """Run the drafter on a block that starts at the last tokens; return its hidden states `[S, W, d]`.

        `anchor` and `used` are those of `draft`.
        """
        # a drafter whose positions predict the next token (`from_anchor`) needs one position less
        shorter = int(self.drafter.form.from_anchor)
        used = used[:, shorter:]
        columns = self.last[:, None] + self.offset[: used.shape[1]]
        slots, positions = self._places(columns, used)
        end = torch.minimum(self.last + self.width() + 1 - shorter, self.forward.ends)
        seen = AttentionWindow(slots, torch.stack((self.forward.origin, end), 1), self.cache)
        hidden = self.drafter.hidden(anchor, positions, seen)
        return hidden if self.drafter.form.from_anchor else hidden[:, 1:]

    def _one_after_another(self, before: Tensor, hidden: Tensor, logits: Tensor, places: TokenWindow) -> Tensor:
        """Sample the drafts one after another, each conditioned on the one before, int64 `[S, W]`."""
        drafts, memory = [], None
        for i in range(hidden.shape[1]):
            given, memory = self.drafter.given(logits[:, i], hidden[:, i], before, memory)
            place = TokenWindow(places.positions[:, i : i + 1].contiguous(), places.origin)
            drafts.append(self.propose(given, place).token)
            before = drafts[-1].clamp(min=0)
        return torch.stack(drafts, 1)

    def _places(self, columns: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drafter's cache slots (int32, -1 if unused or outside the request) and positions (int64)."""
        forward = self.forward
        outside = (columns < forward.origin[:, None]) | (columns >= forward.ends[:, None]) | ~used
        inside = columns.clamp(0, forward.length - 1).long()
        return torch.where(outside, -1, columns).contiguous(), forward.positions.gather(1, inside)


def _check(drafter: Drafter, task: Task) -> None:
    model = task.model
    if not isinstance(drafter, Drafter):
        raise TypeError(f"drafter must be a Drafter returned by load_drafter; got {type(drafter).__name__}")
    if drafter.target is not model.model:
        raise ValueError(
            "drafter was loaded for another model, whose embeddings and head it uses: load it for this model with "
            "load_drafter(path, model)"
        )
    if model.is_compiled:
        raise ValueError("drafter cannot be used with a compiled model, because it needs the outputs of its layers")
