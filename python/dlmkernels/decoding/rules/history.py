# SPDX-License-Identifier: Apache-2.0
"""Rules based on how the model's predictions change from step to step, or on its full logits."""

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
    """Commit positions with a score above `threshold` whose distribution has changed little in recent steps.

    KLASS (Kim et al., arXiv:2511.05664): a position is stable if ``KL(p_t || p_{t-1}) < divergence`` nats in each of
    the last `history` steps. If no position is both stable and above `threshold`, LLaDA's quota is committed (`Quota`).

    The distributions of the block are kept between steps, at 4 V bytes per position, where V is the vocabulary size. A
    block starts without history. (The authors' program reads the whole canvas in every step and carries the history
    over.)
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
    """Commit by a threshold after raising the logits of tokens that were the most likely in earlier steps.

    Credit decoding of dInfer (Ma et al., arXiv:2510.08666). At every step, the credit M of each token at each open
    position decays to `decay` M, and the most likely token gains ``max(p) ** exponent``. Proposals are made from
    ``z + weight * ln(1 + M)``, where z are the logits. Positions with a score of at least `threshold` are committed,
    and always the best one.

    Credits are kept for the block, at 4 V bytes per position (V is the vocabulary size), and start at 0 in each block.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
    """Commit by a threshold that starts high and falls, feeding the last step's distributions into the next inputs.

    Iteration smoothing of dInfer (Ma et al., arXiv:2510.08666). In forward pass i = 0, 1, … of a block, the input of an
    open position is the embedding of the mask token plus ``min(first_weight + growth i, most_weight)`` times the mean
    embedding under the position's distribution in forward pass i - 1. The first forward pass has the mask alone. The
    threshold is ``max(1 - fall i, threshold)``; the best position is always committed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
    """Check that a value is None or a non-empty half-open range."""
    span = several(integer(0), 2, optional=True)(name, value)
    if span is not None and span[0] >= span[1]:
        raise ValueError(f"{name} must be a range (start, end) with start < end; got {value!r}")
    return span


@dataclass(frozen=True)
class EarlyAnswer(Rule):
    """Commit LLaDA's quota until the answer is clear, and then everything still open at once.

    Prophet (Li et al., arXiv:2508.19982): the answer is clear when the gap between the two largest logits, averaged
    over the answer's positions, reaches `gaps[0]` in the first third of the planned forward passes, `gaps[1]` in the
    second, and `gaps[2]` in the last. Forward pass n of N belongs to the second third from n / N = 0.33 on, and to the
    last from 0.67 on.

    Attributes
    ----------
    gaps : tuple of float
        Required mean gaps for the three thirds, in units of logits.
    answer : tuple of int, optional
        Positions of the answer, as a half-open range of generated positions counted from the end of the prompt. If
        None, all of them.
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
