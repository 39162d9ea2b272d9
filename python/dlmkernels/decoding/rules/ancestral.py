# SPDX-License-Identifier: Apache-2.0
"""Samplers of the reverse process: every position by itself, by chance, with the exact probabilities of the model.

Time t falls from 1 to `eps` on an even grid. ``alpha(t) = 1 - t`` is the share of tokens that the forward process has
not replaced at time t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..checks import Check, flag, one_of
from .base import SHARE, Action, Rule

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

    draws: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {"eps": SHARE, "denoise": flag}

    eps: float = 1e-5
    denoise: bool = True

    @property
    def uses_steps(self) -> bool:
        return True

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids", "order_temperature"})

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
        """Ends t > s of the step's interval.

        Rounded, so that a time which is a boundary of a rule on paper is that very number.
        """
        intervals = max(step.num_steps - self.denoise, 1)
        index = min(step.index, intervals)
        t, s = (1 - (1 - self.eps) * i / intervals for i in (index, index + 1))
        return round(t, 12), round(max(s, self.eps), 12)


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


@dataclass(frozen=True)
class ScoreAncestral(TimeGrid):
    """The reverse process of a model that predicts ratios: logits are ``ln s``, s the concrete score of each token.

    SEDD with an absorbing state (Lou et al., arXiv:2310.16834), its analytic sampler. With the log-linear noise
    ``sigma(t) = -ln(1 - (1 - noise_eps) t)`` an open position is decided with probability
    ``(exp(sigma(t) - sigma(s)) - 1) sum(s)``, at most 1, and takes each token in proportion to its score. The last
    forward draws what is left.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {**TimeGrid.limits, "noise_eps": SHARE}

    noise_eps: float = 1e-3

    def act(self, step: Step) -> Action:
        if self.is_last(step):
            return Action(step.eligible)
        t, s = self.times(step)
        left_t, left_s = (1 - (1 - self.noise_eps) * x for x in (t, s))
        rate = left_s / left_t - 1 if left_t > 0 else math.inf
        chance = (rate * step.logsumexp.exp()).clamp(max=1)
        return Action(step.select("bernoulli", score=step.confidence, cost=chance))


@dataclass(frozen=True)
class UniformState(TimeGrid):
    """The reverse process whose noise is other tokens: each position stays, takes a sample, or takes noise again.

    Duo and other uniform-state diffusion models (Sahoo et al., arXiv:2506.10892). For a token with probability p of the
    V that there are, ``alpha(t) = 1 - (1 - noise_eps) t``, a = alpha(t), b = alpha(s) and ``Z = a V p + 1 - a``, the
    posterior is a mixture: it stays with probability ``(a V p + a / b - a) / Z``, takes a sample of the model's
    distribution with ``(b - a) / Z``, and a uniform token with ``(1 - a / b)(1 - b) / Z``. The last forward takes the
    likeliest tokens; without `denoise`, the last interval ends without noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_current"})
    slots: ClassVar[str] = "block"
    noise: ClassVar[str] = "uniform"
    limits: ClassVar[Mapping[str, Check]] = {**TimeGrid.limits, "noise_eps": SHARE}

    noise_eps: float = 1e-3

    def act(self, step: Step) -> Action:
        is_last = self.is_last(step)
        if is_last and self.denoise:
            return Action(
                step.is_open, step.decided, token=step.argmax, confidence=step.argmax_confidence,
                working=step.everyone(False),
            )  # fmt: skip
        t, s = self.times(step)
        a, b = self.alpha(t), self.alpha(0.0 if is_last else s)
        kappa = self.posterior_share(t, a, b)
        total = a * step.vocab_size * step.p_current + 1 - a
        noise = kappa * (1 - a / b) * (1 - b) / total + (1 - kappa) * (1 - b)
        draw = (kappa * (b - a) + (1 - kappa) * b * (1 - a)) / total
        # One and the same uniform number for both: below `noise`, or below their sum; noise acts where both apply.
        renoise = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=noise)
        drawn = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=noise + draw)
        return Action(
            (drawn | is_last) & step.is_open, drawn & step.decided, renoise=renoise,
            token=torch.where(drawn, step.token, step.current),
            confidence=torch.where(drawn, step.confidence, step.p_current), working=step.everyone(not is_last),
        )  # fmt: skip

    def alpha(self, t: float) -> float:
        """Share of tokens that the forward process leaves at time t."""
        return 1 - (1 - self.noise_eps) * t

    def posterior_share(self, t: float, a: float, b: float) -> float:
        """Share of the posterior in the step from alpha a, at time t, to alpha b; the rest is the corrector's."""
        return 1.0


@dataclass(frozen=True)
class PredictorCorrector(UniformState):
    """`UniformState` that takes some of its tokens back: each position samples the posterior, or a corrector.

    The Ψ-samplers of Deschenaux, Gulcehre and Sahoo (arXiv:2602.21185). The corrector samples the end of the process,
    where a token stays with probability ``a V p / Z`` and takes a sample with ``(1 - a) / Z``, and puts noise on it as
    the forward process does until alpha is b. With kappa, the posterior's share, the mixture is that of `UniformState`
    with other weights: noise has ``kappa (1 - a / b)(1 - b) / Z + (1 - kappa)(1 - b)``, a sample
    ``(kappa (b - a) + (1 - kappa) b (1 - a)) / Z``, and staying the rest. With ``kappa = 1 - sigma / (1 - b)``, at
    least 0, and the sigma of ReMDM (`AncestralRemask`, which is what this is where noise is a mask), `strategy` is

    - "cap": ``sigma = min(eta, (1 - b) / a)``;
    - "rescale": ``sigma = eta min(1, (1 - b) / a)``;
    - "loop": sigma = eta while ``t_off < t <= t_on``, where alpha rests at `alpha_on`; before, alpha rises to it in
      proportion; afterwards from it to 1; and kappa is 1 there;
    - "constant": kappa is `kappa` while ``t_off < t <= t_on``, and 1 elsewhere.
    """

    limits: ClassVar[Mapping[str, Check]] = {
        **UniformState.limits, "strategy": one_of("cap", "rescale", "loop", "constant"),
        **{name: SHARE for name in ("eta", "kappa", "t_on", "t_off", "alpha_on")},
    }  # fmt: skip

    strategy: str = "cap"
    eta: float = 0.01
    kappa: float = 0.95
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def alpha(self, t: float) -> float:
        if self.strategy == "loop":
            off = 1 - self.alpha_on
            if t > self.t_on:
                t = off + (1 - off) * (t - self.t_on) / (1 - self.t_on)
            else:
                t = off if t > self.t_off else off * t / self.t_off
        return super().alpha(t)

    def posterior_share(self, t: float, a: float, b: float) -> float:
        is_on = self.t_off < t <= self.t_on
        if self.strategy == "constant":
            return self.kappa if is_on else 1.0
        if b >= 1 or (self.strategy == "loop" and not is_on):
            return 1.0
        sigma, most = self.eta, (1 - b) / a if a > 0 else math.inf
        if self.strategy == "cap":
            sigma = min(self.eta, most)
        elif self.strategy == "rescale":
            sigma = self.eta * min(1.0, most)
        return max(1 - sigma / (1 - b), 0.0)
