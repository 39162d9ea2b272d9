# SPDX-License-Identifier: Apache-2.0
"""Scores, which order the open positions. Larger scores are committed earlier; ties go to the lowest position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import Check, ComparedByValue, amount, check_readable, normalize, number
from .step import Step


class Score:
    """Base class of all scores. `needs` and `limits` are as in `Rule`.

    >>> @dataclass(frozen=True)
    ... class MarginThenPosition(Score):
    ...     needs = frozenset({"margin"})
    ...     def __call__(self, step):
    ...         return step.margin - 0.001 * step.index_in_block
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margin", "entropy"})
    #: score of proposals in `defer_token_ids`: not above any other score, and still finite
    lowest: ClassVar[float] = torch.finfo(torch.float32).min
    #: no score is above this; a threshold beyond it is an error
    highest: ClassVar[float] = math.inf
    #: temperature of the Gumbel noise added to the score, if the configuration sets none
    order_temperature: ClassVar[float] = 0.0
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)

    def __call__(self, step: Step) -> Tensor:
        """Return the scores, float32 `[B, W]`. Positions with -inf or NaN are not committed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Probability(Score):
    """Probability of the proposed token."""

    needs: ClassVar[frozenset[str]] = frozenset()
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0

    def __call__(self, step: Step) -> Tensor:
        return step.confidence


@dataclass(frozen=True)
class Margin(Score):
    """Difference between the two largest probabilities."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0

    def __call__(self, step: Step) -> Tensor:
        return step.margin


@dataclass(frozen=True)
class NegativeEntropy(Score):
    """Negative entropy in nats: the lowest entropy comes first."""

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    highest: ClassVar[float] = 0.0

    def __call__(self, step: Step) -> Tensor:
        return -step.entropy


@dataclass(frozen=True)
class Random(Score):
    """Random order: Gumbel noise on equal scores."""

    needs: ClassVar[frozenset[str]] = frozenset()
    highest: ClassVar[float] = 0.0
    order_temperature: ClassVar[float] = 1.0

    def __call__(self, step: Step) -> Tensor:
        return torch.zeros_like(step.confidence)


@dataclass(frozen=True)
class LeftToRight(Score):
    """Order from left to right, as in autoregressive models."""

    needs: ClassVar[frozenset[str]] = frozenset()
    highest: ClassVar[float] = 0.0

    def __call__(self, step: Step) -> Tensor:
        return -step.index_in_block.float()


def _frequency(name: str, value: Any) -> Tensor | None:
    if value is not None and (not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point()):
        raise ValueError(f"{name} must be a floating-point tensor of one dimension; got {value!r}")
    check_readable(name, value)
    if value is not None and not bool(((value >= 0) & (value < torch.inf)).all()):
        raise ValueError(f"{name} must hold finite numbers of at least 0; got {value!r}")
    return value


@dataclass(frozen=True, eq=False)
class PositionWeighted(ComparedByValue, Score):
    """Probability, corrected for frequent tokens and discounted along the block.

    PC-Sampler (Huang et al., arXiv:2508.13021): ``exp(-decay i) min(clip, -p ln(f + 1e-9))``, where p is the
    probability of the proposed token, f its frequency in a corpus, and i its index in the block.

    Attributes
    ----------
    frequency : Tensor, optional
        float32 `[V]`: relative frequencies of the tokens. If None, the score is ``exp(-decay i) p``.
    decay : float
        Rate of the discount per position. 0 prefers no position.
    clip : float
        Upper limit of the corrected probability.
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
            if len(self.frequency) != step.vocab_size:
                raise ValueError(
                    f"frequency must have one value for each of the {step.vocab_size} tokens of the model; got "
                    f"{len(self.frequency)}"
                )
            rarity = -torch.log(self.frequency.to(value.device, torch.float32) + 1e-9)
            corrected = (value * rarity[step.token.clamp(min=0)]).clamp(max=self.clip)
            value = torch.where(value == -torch.inf, value, corrected)
        return value * torch.exp(-self.decay * step.index_in_block)


@dataclass(frozen=True)
class DensityWeighted(Score):
    """Probability times the density of decided positions in the neighborhood.

    The density is the certainty prior of d2Cache (Jiang et al., arXiv:2509.23094): the mean of "is decided" under a
    Gaussian with a standard deviation of `sigma` positions. Positions left of the canvas (prompt and answer) count as
    decided; positions after its end count like its last one. The Gaussian is cut off at five `sigma`, where its weight
    is 4e-6 of the maximum.

    Attributes
    ----------
    sigma : float
        Standard deviation in positions; above 0, at most 1000.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    limits: ClassVar[Mapping[str, Check]] = {"sigma": number(0, 1000, above=True)}

    sigma: float = 10.0

    def __call__(self, step: Step) -> Tensor:
        return step.confidence * step.at(density(~step.canvas.is_open, step.canvas.end, self.sigma))


def density(decided: Tensor, end: Tensor, sigma: float) -> Tensor:
    """Return the weighted mean of `decided` bool `[B, T]` around each position, float32 `[B, T]`.

    See `DensityWeighted`. `end` int32 `[B]` is the column after the last one of each row; rows may be shorter than T.
    """
    last = (end.long() - 1).clamp(min=0)[:, None]
    columns = torch.arange(decided.shape[1], device=decided.device)
    known = torch.where(columns <= last, decided, decided.gather(1, last)).float()
    length, reach = known.shape[1], math.ceil(5 * sigma)
    padded = torch.cat((known.new_ones(len(known), reach), known, known[:, -1:].expand(-1, reach)), 1)
    weights = [math.exp(-0.5 * ((i - reach) / sigma) ** 2) for i in range(2 * reach + 1)]
    total = torch.zeros_like(known)
    for i, weight in enumerate(weights):  # term by term, so that a row's sum does not depend on the batch
        total += weight * padded[:, i : i + length]
    return total / sum(weights)


SCORES: dict[str, Score] = {
    "probability": Probability(), "margin": Margin(), "entropy": NegativeEntropy(), "random": Random(),
    "position": LeftToRight(),
}  # fmt: skip


def score_named(score: str | Score) -> Score:
    """Return a score as it is, or the built-in score of that name."""
    return SCORES[score] if isinstance(score, str) else score
