# SPDX-License-Identifier: Apache-2.0
"""Rules that constrain the order of positions and leave everything else to another rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Check, integer
from ..step import Step
from .base import Rule
from .confidence import Threshold


def _rule(name: str, rule: Any) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(f"{name} must be a Rule such as dlmkernels.Threshold(0.95); got {rule!r}")
    is_plain = rule.by_block and rule.slots == "open" and rule.noise == "mask" and not rule.token_ids
    if not is_plain or isinstance(rule, ReasonFirst) or type(rule).act is not Rule.act:
        raise ValueError(
            f"{name} must be a rule that is decoded block by block and only commits tokens, never revising them; got "
            f"{type(rule).__name__}"
        )
    if any(isinstance(getattr(rule, field), tuple) for field in rule.limits):
        raise ValueError(f"{name} must have the same values for every request within ReasonFirst; got {rule!r}")
    return rule


@dataclass(frozen=True)
class ReasonFirst(Rule):
    """Apply another rule, but hold back the answer at the end of a request until everything before it is decided.

    A masked diffusion model that is asked for reasoning followed by an answer is often confident about the answer
    first, and then makes the reasoning fit. With this rule, the last `answer` positions of a request are committed only
    once everything to their left is decided (arXiv:2608.05687).

    Attributes
    ----------
    answer : int
        Length of the answer in positions, counted from the end of the request. If it exceeds the number of decoded
        positions, nothing is held back.
    rule : Rule
        Rule that selects among the positions not held back. It must be decoded block by block, only commit tokens and
        never revise them, and have the same values for every request.
    """

    limits: ClassVar[Mapping[str, Check]] = {"answer": integer(1), "rule": _rule}

    answer: int = 32
    rule: Rule = field(default_factory=lambda: Threshold(0.95))

    def __post_init__(self):
        super().__post_init__()
        rule = self.rule
        for name in ("needs", "draws", "reads_ends", "reads_logits"):
            object.__setattr__(self, name, getattr(rule, name))

    @property
    def ignores(self) -> frozenset[str]:
        return self.rule.ignores

    @property
    def uses_steps(self) -> bool:
        return self.rule.uses_steps

    def max_steps(self, length: int, num_steps: int) -> int:
        return self.rule.max_steps(length, num_steps)

    def temperature(self, index: int, num_steps: int) -> float | None:
        return self.rule.temperature(index, num_steps)

    def time(self, index: int, num_steps: int) -> float | None:
        return self.rule.time(index, num_steps)

    def select(self, step: Step) -> Tensor:
        columns = torch.arange(step.canvas.tokens.shape[1], dtype=torch.int32, device=step.eligible.device)
        first = step.canvas.end - self.answer
        waits = (step.canvas.is_open & (columns < first[:, None])).any(1)
        may_go = ~waits[:, None] | (step.window.positions < first[:, None])
        return self.rule.select(replace(step, eligible=step.eligible & may_go))
