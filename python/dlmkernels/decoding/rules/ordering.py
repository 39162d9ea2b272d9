# SPDX-License-Identifier: Apache-2.0
"""Rules that say what must be decided before what, and leave the rest to another rule."""

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
            f"{name} must be one that is decoded block by block, commits, and never takes back; got "
            f"{type(rule).__name__}"
        )
    if any(isinstance(getattr(rule, field), tuple) for field in rule.limits):
        raise ValueError(f"{name} must say the same for every request within ReasonFirst; got {rule!r}")
    return rule


@dataclass(frozen=True)
class ReasonFirst(Rule):
    """Another rule, under which the answer at a request's end waits for all that stands before it.

    A masked model that is asked for its reasoning and an answer is often sure of the answer's tokens first, and the
    reasoning is then made to fit. The last `answer` positions of a request are not committed before everything left of
    them is decided (arXiv:2608.05687).

    Attributes
    ----------
    answer : int
        How many positions the answer has, counted from the end of the request. Where that is longer than what is
        decoded, nothing waits.
    rule : Rule
        What is committed of the positions that do not wait: any rule that is decoded block by block, commits and never
        takes back, and says the same for every request.
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
