# SPDX-License-Identifier: Apache-2.0
"""Scores: what orders the positions. Larger is committed earlier, ties go to the lowest position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import Check, ComparedByValue, amount, normalize, number
from .step import Step


class Score:
    """Base of all scores; `needs` and `limits` as in `Rule`.

    >>> @dataclass(frozen=True)
    ... class MarginThenPosition(Score):
    ...     needs = frozenset({"margin"})
    ...     def __call__(self, step):
    ...         return step.margin - 0.001 * step.index_in_block
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margin", "entropy"})
    #: what `suppress`ed proposals score: less than any other, and still finite
    lowest: ClassVar[float] = torch.finfo(torch.float32).min
    #: temperature of the Gumbel noise put on the score, if the configuration asks for none
    order_temperature: ClassVar[float] = 0.0
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)

    def __call__(self, step: Step) -> Tensor:
        """Float32 `[B, W]`; -inf and NaN keep a position from being committed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Probability(Score):
    """Probability of the proposal."""

    needs: ClassVar[frozenset[str]] = frozenset()
    lowest: ClassVar[float] = 0.0

    def __call__(self, step: Step) -> Tensor:
        return step.confidence


@dataclass(frozen=True)
class Margin(Score):
    """Gap between the two largest probabilities."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})
    lowest: ClassVar[float] = 0.0

    def __call__(self, step: Step) -> Tensor:
        return step.margin


@dataclass(frozen=True)
class NegativeEntropy(Score):
    """Entropy in nats, the smallest first."""

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __call__(self, step: Step) -> Tensor:
        return -step.entropy


@dataclass(frozen=True)
class Random(Score):
    """Chance: Gumbel noise on equal scores."""

    needs: ClassVar[frozenset[str]] = frozenset()
    order_temperature: ClassVar[float] = 1.0

    def __call__(self, step: Step) -> Tensor:
        return torch.zeros_like(step.confidence)


@dataclass(frozen=True)
class LeftToRight(Score):
    """Position, the leftmost first: the order of autoregressive models."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, step: Step) -> Tensor:
        return -step.index_in_block.float()


def _frequency(name: str, value: Any) -> Tensor | None:
    if value is not None and (not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point()):
        raise ValueError(f"{name} must be a floating-point tensor of one dimension; got {value!r}")
    return value


@dataclass(frozen=True, eq=False)
class PositionWeighted(ComparedByValue, Score):
    """Probability, corrected for frequent tokens and discounted along the block.

    PC-Sampler (Huang et al., arXiv:2508.13021): ``exp(-decay i) min(clip, -p ln(f + 1e-9))`` for the proposal's
    probability p and corpus frequency f at index i of the block.

    Attributes
    ----------
    frequency : Tensor, optional
        float32 `[V]`, relative frequencies of the tokens. None: the correction is left out, and the score is
        ``exp(-decay i) p``.
    decay : float
        0: no preference among positions.
    clip : float
        Largest corrected probability.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    lowest: ClassVar[float] = 0.0
    limits: ClassVar[Mapping[str, Check]] = {"frequency": _frequency, "decay": amount, "clip": amount}

    frequency: Tensor | None = None
    decay: float = 0.25
    clip: float = 10.0

    def __call__(self, step: Step) -> Tensor:
        value = step.confidence
        if self.frequency is not None:
            rarity = -torch.log(self.frequency.to(value.device, torch.float32) + 1e-9)
            corrected = (value * rarity[step.token.clamp(min=0)]).clamp(max=self.clip)
            value = torch.where(value == -torch.inf, value, corrected)
        return value * torch.exp(-self.decay * step.index_in_block)


@dataclass(frozen=True)
class DensityWeighted(Score):
    """Probability times the density of decided positions around.

    The certainty prior of d2Cache (Jiang et al., arXiv:2509.23094): the mean of "is decided" under a Gaussian of
    standard deviation `sigma` positions. What stands left of the canvas counts as decided, what lies behind its end
    like its last position. The Gaussian is cut off at five `sigma`, where its weight is 4e-6 of the largest.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    lowest: ClassVar[float] = 0.0
    limits: ClassVar[Mapping[str, Check]] = {"sigma": number(0, 1000, above=True)}

    sigma: float = 10.0

    def __call__(self, step: Step) -> Tensor:
        return step.confidence * step.at(density(~step.canvas.is_open, step.canvas.end, self.sigma))


def density(decided: Tensor, end: Tensor, sigma: float) -> Tensor:
    """Mean of `decided` bool `[B, T]` around each position, float32 `[B, T]`: see `DensityWeighted`.

    `end` int32 `[B]`: column behind the last of each row, which may be less than T beside longer rows.
    """
    last = (end.long() - 1).clamp(min=0)[:, None]
    columns = torch.arange(decided.shape[1], device=decided.device)
    known = torch.where(columns <= last, decided, decided.gather(1, last)).float()
    length, reach = known.shape[1], math.ceil(5 * sigma)
    padded = torch.cat((known.new_ones(len(known), reach), known, known[:, -1:].expand(-1, reach)), 1)
    weights = [math.exp(-0.5 * ((i - reach) / sigma) ** 2) for i in range(2 * reach + 1)]
    total = torch.zeros_like(known)
    for i, weight in enumerate(weights):  # term by term: a row's sum does not depend on the batch
        total += weight * padded[:, i : i + length]
    return total / sum(weights)


SCORES: dict[str, Score] = {
    "probability": Probability(), "margin": Margin(), "entropy": NegativeEntropy(), "random": Random(),
    "position": LeftToRight(),
}  # fmt: skip


def score_named(score: str | Score) -> Score:
    """A score itself, or the built-in one of that name."""
    return SCORES[score] if isinstance(score, str) else score
