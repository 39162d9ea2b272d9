# SPDX-License-Identifier: Apache-2.0
"""Samplers of the reverse process: every position by itself, by chance, with the exact probabilities of the model.

Time t falls from 1 to `eps` on an even grid. ``alpha(t) = 1 - t`` is the share of tokens that the forward process has
not replaced at time t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Action, Rule, check_number

if TYPE_CHECKING:
    from ..step import Step


@dataclass(frozen=True)
class TimeGrid(Rule):
    """Base of the rules that walk a time grid.

    Attributes
    ----------
    eps : float
        Where the grid ends.
    denoise : bool
        True: the last forward comes after the grid, and decides what is left. False: it is the grid's last interval,
        in which everything left is decided.
    """

    eps: float = 1e-5
    denoise: bool = True

    def __post_init__(self):
        check_number("eps", self.eps, 0, 1)

    @property
    def uses_steps(self) -> bool:
        return True

    def is_last(self, step: Step) -> bool:
        """Whether this forward decides everything that is left."""
        return step.index >= step.num_steps - 1

    def last_action(self, step: Step) -> Action:
        """Decide everything that is left: the likeliest tokens with `denoise`, else the proposals."""
        everything, nobody = step.eligible, step.everyone(False)
        if not self.denoise:
            return Action(everything, working=nobody)
        return Action(everything, token=step.argmax, confidence=step.argmax_confidence, working=nobody)

    def max_steps(self, length: int, num_steps: int) -> int:
        return num_steps

    def times(self, step: Step) -> tuple[float, float]:
        """Ends t > s of the step's interval."""
        intervals = max(step.num_steps - self.denoise, 1)
        width = (1 - self.eps) / intervals
        t = 1 - width * min(step.index, intervals)
        return t, max(t - width, self.eps)


@dataclass(frozen=True)
class Ancestral(TimeGrid):
    """Each open position is decided with probability ``(alpha(s) - alpha(t)) / (1 - alpha(t)) = 1 - s / t``.

    MDLM (Sahoo et al., arXiv:2406.07524), whose last forward takes the likeliest tokens; with ``denoise=False`` the
    "origin" algorithm of Dream (Ye et al., arXiv:2508.15487), whose last forward draws.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def act(self, step: Step) -> Action:
        if self.is_last(step):
            return self.last_action(step)
        t, s = self.times(step)
        chance = torch.full_like(step.confidence, 1 - s / t)
        return Action(step.select("bernoulli", score=step.confidence, cost=chance))
