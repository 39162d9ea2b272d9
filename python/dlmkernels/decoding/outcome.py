# SPDX-License-Identifier: Apache-2.0
"""The end of a decoding: building its result and explaining any remaining masks."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .constrained import Constrained
from .hidden_rows import by_rows
from .output import DecodingOutput
from .rules import Rule
from .state import State
from .step import Step

# Findings of the last step that looked at a position.
NOTHING_SEEN, NO_LOGIT, REFUSED, PROPOSED = range(4)


class Unfinished:
    """Explains why positions stayed open: records what the last step that looked at each position found there."""

    def __init__(self, canvas: State, rule: Rule, constrained: Constrained | None = None):
        self.canvas, self.rule = canvas, rule
        self.constrained = None if constrained is None or constrained.constraint is None else constrained
        self.found = torch.zeros_like(canvas.state)
        self.last: Step | None = None

    def begin(self) -> None:
        """Reset all findings at the start of a decoding."""
        self.found.zero_()
        self.last = None

    def see(self, step: Step) -> None:
        """Note a step after its action has been decided."""
        self.last = step

    def settle(self) -> None:
        """Record the findings of the last step, before a step that may no longer look at the same positions."""
        step = self.last
        if step is None:
            return
        self.last = None
        found = torch.where(step.token >= 0, PROPOSED, NO_LOGIT)
        if self.constrained is not None:
            possible = by_rows(step.raw_logits, lambda logits, _: (logits > -torch.inf).any(1))[step.logit_rows]
            refused = possible & ((step.token < 0) | self.constrained.is_stuck[:, None])
            found = found.masked_fill(refused, REFUSED)
        width = self.found.shape[1]
        column = torch.where(step.used, step.window.positions, width).long()  # unused slots write to an extra column
        wider = torch.nn.functional.pad(self.found, (0, 1))
        self.found = wider.scatter(1, column, found.to(wider.dtype))[:, :width]

    def why(self, is_open: Tensor) -> str:
        """Describe which rows have open positions and why; `is_open` bool `[B, n]` covers the first n columns."""
        self.settle()
        found = self.found[:, : is_open.shape[1]].masked_fill(~is_open, NOTHING_SEEN)
        has = {reason: (found == reason).any(1) for reason in (NO_LOGIT, REFUSED, PROPOSED)}
        # Loops that always accept the model's tokens never revisit a position for which it proposed none.
        has[NO_LOGIT] |= is_open.any(1) & ~torch.stack(list(has.values())).any(0)
        reasons = {
            NO_LOGIT: "the model's logits there were NaN or -inf for every token that may be generated",
            REFUSED: "the constraint refused every token there",
            PROPOSED: f"the model proposed tokens there, but {self.rule!r} selected none of them",
        }
        return "; ".join(
            f"in rows {has[reason].nonzero().flatten().tolist()}: {text}"
            for reason, text in reasons.items()
            if has[reason].any()
        )


def output_of(
    canvas: State, prompt_length: int, end: int, unfinished: Unfinished, length: Tensor | None = None,
    asked: Tensor | None = None, pad: int = 0,
) -> DecodingOutput:  # fmt: skip
    """Build the result from the first `end` columns of a canvas, and warn if masks remain, saying where and why.

    `length` int32 `[B]` is the column at which each row ends; if None, the column after its last token that is not
    padding. Everything from column `asked` int32 `[B]` on was not requested and is replaced by `pad`.
    """
    is_open = canvas.is_open[:, :end]
    complete = ~is_open.any(1)
    if not complete.all():
        warnings.warn(
            f"masks are left {unfinished.why(is_open)} (see `DecodingOutput.complete`)",
            RuntimeWarning,
            stacklevel=6,  # the caller of `generate` or `infill`
        )
    tokens, steps, confidence = (x[:, :end] for x in (canvas.tokens, canvas.commit_step, canvas.confidence))
    if length is None:
        length = canvas.length(end)
    if asked is not None:
        behind = torch.arange(end, device=asked.device) >= asked[:, None]
        tokens, steps = tokens.masked_fill(behind, pad), steps.masked_fill(behind, -1)
        confidence, length = confidence.masked_fill(behind, 0.0), torch.minimum(length, asked)
    return DecodingOutput(tokens, canvas.step, steps, confidence, complete, prompt_length, length, canvas.origin)
