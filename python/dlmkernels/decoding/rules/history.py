# SPDX-License-Identifier: Apache-2.0
"""Rules that look at how the model's mind changes from step to step, or at its logits as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Check, PerRequest, amount, integer, number, several
from ..step import Step
from .base import Action, Rule, row_mean
from .confidence import Quota


@dataclass(frozen=True)
class StableThreshold(Rule):
    """What is more confident than `threshold` and has moved less than `divergence` in each of the last steps.

    KLASS (Kim et al., arXiv:2511.05664): a position is stable when ``KL(p_t || p_{t-1}) < divergence`` nats held in
    each of the last `history` steps. Where none is both, the quota of LLaDA.

    The distributions of the block are kept between steps: 4 V bytes a position. A block has no history when it is
    entered (the authors' program reads all the canvas all the time, and carries it over).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "divergence": PerRequest(number(0)), "history": integer(1),
    }  # fmt: skip

    threshold: float = 0.9
    divergence: float = 0.01
    history: int = 2

    def select(self, step: Step) -> Tensor:
        now = torch.softmax(step.logits(), -1)
        before = step.recall("probabilities", now.shape[2])
        step.keep("probabilities", now)
        moved = (now * ((now + 1e-12).log() - (before + 1e-12).log())).sum(-1, dtype=torch.float64)
        calm = step.recall("calm steps")
        calm = torch.where(moved < self.divergence, calm + 1, torch.zeros_like(calm))
        step.keep("calm steps", calm)
        return step.select(
            "threshold", parameter=self.threshold, strict=True, gate=calm >= self.history, need=1,
            fill=Quota().count(step),
        )  # fmt: skip

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class CreditThreshold(Rule):
    """A threshold on logits to which tokens that have been likeliest before are added.

    Credit decoding of dInfer (Ma et al., arXiv:2510.08666): at every step the credit M of each token at each open
    position shrinks to `decay` M, the likeliest token gains ``max(p) ** exponent``, and proposals are made from
    ``z + weight * ln(1 + M)``.

    Credits are kept for the block (4 V bytes a position) and start at 0 in each.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "weight": amount, "exponent": amount, "decay": amount,
    }  # fmt: skip

    threshold: float = 0.9
    weight: float = 0.7
    exponent: float = 0.2
    decay: float = 0.8

    def act(self, step: Step) -> Action:
        logits = step.logits()
        likeliest = step.stats.argmax.view(step.eligible.shape).clamp(min=0)[..., None]
        best = torch.softmax(logits, -1).gather(2, likeliest)
        credit = step.recall("credit", logits.shape[2]) * self.decay
        credit = credit.scatter_add(2, likeliest, best**self.exponent)
        step.keep("credit", credit)
        fused = step.again(bias=self.weight * torch.log1p(credit))
        commit = fused.select("threshold", parameter=self.threshold, need=1, fill=1)
        return Action(commit, token=fused.token, confidence=fused.confidence)


@dataclass(frozen=True)
class SmoothedThreshold(Rule):
    """A threshold that starts high, over inputs that carry the last step's distributions to the next.

    Iteration smoothing of dInfer (Ma et al., arXiv:2510.08666): at forward i of a block an open position's input is
    the embedding of the mask plus ``min(first_weight + growth i, most_weight)`` times the mean embedding under the
    distribution it had at forward i - 1; the threshold is ``max(1 - fall i, threshold)``. The first forward of a block
    has the mask alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {
        name: amount for name in ("threshold", "fall", "first_weight", "growth", "most_weight")
    }  # fmt: skip

    threshold: float = 0.9
    fall: float = 0.02
    first_weight: float = 0.15
    growth: float = 0.02
    most_weight: float = 0.3

    def act(self, step: Step) -> Action:
        bar, weight = step.planned("smoothing", self._bar_and_weight).float()
        commit = step.select("threshold", parameter=bar[:, 0], need=1, fill=1)
        mean = step.mean_embedding(torch.softmax(step.logits(), -1))
        return Action(
            commit, embeds=step.embed(step.current) + weight[..., None] * mean, embedded=step.eligible & ~commit
        )

    def _bar_and_weight(self, index: int, num_steps: int) -> tuple[float, float]:
        weight = min(self.first_weight + self.growth * (index + 1), self.most_weight)
        return max(1 - self.fall * index, self.threshold), weight


def _span(name: str, value: Any) -> tuple | None:
    """Check of a half-open range that is not empty, or None."""
    span = several(integer(0), 2, optional=True)(name, value)
    if span is not None and span[0] >= span[1]:
        raise ValueError(f"{name} must be a range whose end lies behind its start; got {value!r}")
    return span


@dataclass(frozen=True)
class EarlyAnswer(Rule):
    """LLaDA's quota, until the answer is clear: then everything that is still open is committed at once.

    Prophet (Li et al., arXiv:2508.19982): the answer is clear when the gap between the two largest logits, averaged
    over its positions, reaches `gaps[0]` in the first third of the planned forwards, `gaps[1]` in the second and
    `gaps[2]` in the last. The n-th of N forwards is in the second third from n / N = 0.33 on, in the last from 0.67.

    Attributes
    ----------
    gaps : tuple of float
        In units of logits.
    answer : tuple of int, optional
        Half-open range of generated positions, counted from the end of the prompt. None: all of them.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    slots: ClassVar[str] = "canvas"
    limits: ClassVar[Mapping[str, Check]] = {"gaps": several(number(), 3), "answer": _span}

    gaps: tuple[float, float, float] = (7.5, 5.0, 2.5)
    answer: tuple[int, int] | None = None

    def act(self, step: Step) -> Action:
        commit = step.select("none", fill=Quota().count(step))
        first_gap, second_gap, last_gap = self.gaps
        gap = torch.where(step.progress >= 0.67, last_gap, torch.where(step.progress >= 0.33, second_gap, first_gap))
        first, last = self.answer or (0, step.eligible.shape[1])
        two = step.logits(first, last).topk(2, -1).values
        used = step.window.positions[:, first:last] >= 0
        clear = row_mean(two[..., 0] - two[..., 1], used) >= gap
        return Action(commit | (clear[:, None] & step.is_open))

    @property
    def uses_steps(self) -> bool:
        return True
