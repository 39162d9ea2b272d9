# SPDX-License-Identifier: Apache-2.0
"""Ancestral samplers: simulate the reverse diffusion process with the model's exact probabilities.

Each position is treated independently and at random. Time t decreases from 1 to `eps` on an even grid.
``alpha(t) = 1 - t`` is the share of tokens that the forward process has not replaced by time t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Check, flag, one_of, ordered
from ..step import Step
from .base import SHARE, Action, Rule


@dataclass(frozen=True)
class TimeGrid(Rule):
    """Base class of the rules that step through a grid of diffusion times.

    Attributes
    ----------
    eps : float
        Last time of the grid.
    denoise : bool
        If True, the last forward pass comes after the grid and decides everything left. If False, the last forward pass
        is the grid's last interval, in which everything left is decided.
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

    def is_last(self, step: Step) -> Tensor:
        """Return the rows whose current forward pass decides everything left, bool `[B, 1]`."""
        return (step.index >= step.num_steps - 1)[:, None]

    def finishing(self, step: Step, action: Action) -> Action:
        """Return `action`, changed to decide everything left in rows at their last forward pass.

        These positions take their most likely tokens with `denoise`, and the step's proposals otherwise.
        """
        last = self.is_last(step)
        assert action.commit is not None
        commit, remask = torch.where(last, step.eligible, action.commit), action.remask
        if remask is not None:
            remask = remask & ~last
        if not self.denoise:
            return Action(commit, remask=remask, working=~last[:, 0])
        return Action(
            commit, remask=remask, working=~last[:, 0], token=torch.where(last, step.argmax, step.token),
            confidence=torch.where(last, step.argmax_confidence, step.confidence),
        )  # fmt: skip

    def max_steps(self, length: int, num_steps: int) -> int:
        return num_steps

    def times(self, index: int, num_steps: int) -> tuple[float, float]:
        """Return the start t and the end s < t of a step's time interval.

        Both are rounded, so that a time that should equal a boundary of a rule does so exactly.
        """
        intervals = max(num_steps - self.denoise, 1)
        index = min(index, intervals)
        t, s = (1 - (1 - self.eps) * i / intervals for i in (index, index + 1))
        return round(t, 12), round(max(s, self.eps), 12)

    def time(self, index: int, num_steps: int) -> float:
        return self.times(index, num_steps)[0]


@dataclass(frozen=True)
class Ancestral(TimeGrid):
    """Decide each open position with probability ``(alpha(s) - alpha(t)) / (1 - alpha(t)) = 1 - s / t``.

    t > s are the ends of the step's time interval. MDLM (Sahoo et al., arXiv:2406.07524), whose last forward pass takes
    the most likely tokens. With ``denoise=False``, it is the "origin" algorithm of Dream (Ye et al., arXiv:2508.15487),
    whose last forward pass samples.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def act(self, step: Step) -> Action:
        (chance,) = step.planned("chance", self.chance).float()
        chance = chance.expand_as(step.confidence).contiguous()
        return self.finishing(step, Action(step.select("bernoulli", score=step.confidence, cost=chance)))

    def chance(self, index: int, num_steps: int) -> tuple[float]:
        """Return the probability with which a step decides a position."""
        t, s = self.times(index, num_steps)
        return (1 - s / t if t > 0 else 1.0,)


@dataclass(frozen=True)
class ScoreAncestral(TimeGrid):
    """Reverse process of a model that predicts ratios: its logits are ``ln s``, s being each token's concrete score.

    The analytic sampler of SEDD with an absorbing state (Lou et al., arXiv:2310.16834). With the log-linear noise
    ``sigma(t) = -ln(1 - (1 - noise_eps) t)``, an open position is decided with probability
    ``min(1, (exp(sigma(t) - sigma(s)) - 1) sum(s))``, where the sum runs over the tokens' scores, and takes each token
    in proportion to its score. The last forward pass samples everything left.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {**TimeGrid.limits, "noise_eps": SHARE}

    noise_eps: float = 1e-3

    def act(self, step: Step) -> Action:
        (rate,) = step.planned("rate", self.rate).float()
        chance = (rate * step.logsumexp.exp()).clamp(max=1)
        commit = step.select("bernoulli", score=step.confidence, cost=chance)
        return Action(torch.where(self.is_last(step), step.eligible, commit))

    def rate(self, index: int, num_steps: int) -> tuple[float]:
        """Return the factor by which the sum of a position's scores is multiplied."""
        t, s = self.times(index, num_steps)
        left_t, left_s = (1 - (1 - self.noise_eps) * x for x in (t, s))
        return (left_s / left_t - 1 if left_t > 0 else math.inf,)


@dataclass(frozen=True)
class UniformState(TimeGrid):
    """Reverse process whose noise is random tokens: each position keeps its token, takes a sample, or takes new noise.

    For Duo and other uniform-state diffusion models (Sahoo et al., arXiv:2506.10892). Consider a token with probability
    p, in a vocabulary of V tokens, and let ``alpha(t) = 1 - (1 - noise_eps) t``, a = alpha(t), b = alpha(s) and
    ``Z = a V p + 1 - a``. The posterior is a mixture: the token stays with probability ``(a V p + a / b - a) / Z``, is
    replaced by a sample of the model's distribution with ``(b - a) / Z``, and by a uniformly drawn token with
    ``(1 - a / b)(1 - b) / Z``. The last forward pass takes the most likely tokens. Without `denoise`, the last interval
    ends without noise instead.

    Attributes
    ----------
    draw_last : bool
        With `denoise`: whether the last forward pass samples as well, from the posterior of a last step that ends
        without noise. This is Duo's "ancestral" ending; its distilled models use "greedy", the default here.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_current"})
    slots: ClassVar[str] = "block"
    noise: ClassVar[str] = "uniform"
    limits: ClassVar[Mapping[str, Check]] = {**TimeGrid.limits, "noise_eps": SHARE, "draw_last": flag}

    noise_eps: float = 1e-3
    draw_last: bool = field(default=False, kw_only=True)

    def act(self, step: Step) -> Action:
        is_last = self.is_last(step)
        stays, renews, draws, shrinks = step.planned("mixture", self.mixture)
        a = stays.float()
        total = (stays * step.vocab_size).float() * step.p_current + 1 - a
        noise = renews.float() / total + shrinks.float()
        draw = draws.float() / total
        # Both draws use the same uniform number, compared with `noise` and with the sum; where both apply, noise wins.
        renoise = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=noise)
        drawn = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=noise + draw)
        token = torch.where(drawn, step.token, step.current)
        confidence = torch.where(drawn, step.confidence, step.p_current)
        commit, edit = (drawn | is_last) & step.is_open, drawn & step.decided
        if self.denoise and not self.draw_last:
            edit, renoise = torch.where(is_last, step.decided, edit), renoise & ~is_last
            token = torch.where(is_last, step.argmax, token)
            confidence = torch.where(is_last, step.argmax_confidence, confidence)
        return Action(
            commit, edit, renoise=renoise, token=token, confidence=confidence, working=~is_last[:, 0]
        )  # fmt: skip

    def mixture(self, index: int, num_steps: int) -> tuple[float, float, float, float]:
        """Return alpha(t), the numerators over Z of noise and of a sample, and the part of noise that is not over Z."""
        t, s = self.times(index, num_steps)
        a, b = self.alpha(t), self.alpha(0.0 if index >= num_steps - 1 else s)
        kappa = self.posterior_share(t, a, b)
        renews = kappa * (1 - a / b) * (1 - b)
        return a, renews, kappa * (b - a) + (1 - kappa) * b * (1 - a), (1 - kappa) * (1 - b)

    def alpha(self, t: float) -> float:
        """Return the share of tokens that the forward process has not replaced by time t."""
        return 1 - (1 - self.noise_eps) * t

    def time(self, index: int, num_steps: int) -> float:
        """Return the time at which the log-linear process has the step's alpha."""
        t = super().time(index, num_steps)
        return t if self.noise_eps == 1 else (1 - self.alpha(t)) / (1 - self.noise_eps)

    def posterior_share(self, t: float, a: float, b: float) -> float:
        """Return the posterior's share in the step from alpha a, at time t, to alpha b. The rest is the corrector's."""
        return 1.0


@dataclass(frozen=True)
class PredictorCorrector(UniformState):
    """`UniformState` with a corrector: each position samples from a mixture of the posterior and the corrector.

    The corrector can turn tokens back into noise. These are the Ψ-samplers of Deschenaux, Gulcehre and Sahoo
    (arXiv:2602.21185). The corrector samples the end of the process, where a token stays with probability ``a V p / Z``
    and is replaced by a sample with ``(1 - a) / Z``. It then adds noise as the forward process does until alpha is b.
    Let kappa be the posterior's share. The result is the mixture of `UniformState` with other weights: noise has
    ``kappa (1 - a / b)(1 - b) / Z + (1 - kappa)(1 - b)``, a sample
    ``(kappa (b - a) + (1 - kappa) b (1 - a)) / Z``, and keeping the token has the rest.

    ``kappa = max(0, 1 - sigma / (1 - b))``, with sigma as in ReMDM (`AncestralRemask`, the counterpart of this rule for
    models whose noise is a mask). `strategy` is one of

    - "cap": ``sigma = min(eta, (1 - b) / a)``;
    - "rescale": ``sigma = eta min(1, (1 - b) / a)``;
    - "loop": ``sigma = eta`` while ``t_off < t <= t_on``, where alpha is held at `alpha_on`. Before that, alpha rises
      linearly to `alpha_on`, and afterwards from there to 1, with ``kappa = 1`` in both phases;
    - "constant": kappa is the field `kappa` while ``t_off < t <= t_on``, and 1 otherwise.
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

    def __post_init__(self):
        super().__post_init__()
        if self.strategy in ("loop", "constant"):
            ordered(self, "t_off", "t_on", strict=True)

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
