# SPDX-License-Identifier: Apache-2.0
"""Rules that revise decided tokens: they edit them, mask them again, or replace them with noise.

Their windows hold all positions of the block that are not given, because they need the model's predictions for decided
positions too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Check, PerRequest, amount, flag, integer, number, one_of, ordered, temperature
from ..step import Step
from .ancestral import TimeGrid
from .base import SHARE, Action, Rule, row_mean


@dataclass(frozen=True)
class TokenEditing(Rule):
    """Commit tokens above one threshold and replace decided ones above another, even once the block is complete.

    LLaDA2.1 (arXiv:2602.08676), "joint threshold". Open positions with a score above `threshold` are committed, and at
    least the best. Decided positions whose proposal is a different token with a confidence above `edit_threshold` are
    replaced. A complete block gets up to `max_post_steps` more forward passes, until one of them edits nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "edit_threshold": PerRequest(number()), "max_post_steps": integer(0),
    }  # fmt: skip

    threshold: float = 0.95
    edit_threshold: float = 0.9
    max_post_steps: int = 16

    def act(self, step: Step) -> Action:
        commit = step.select("threshold", parameter=self.threshold, strict=True, need=1, fill=1)
        edit = step.decided & (step.confidence > self.edit_threshold) & (step.token != step.current)
        was_complete = step.open_now == 0
        post_steps = step.recall("post steps", otherwise=torch.zeros_like(step.open_now), by_row=True) + was_complete
        step.keep("post steps", post_steps, by_row=True)
        may_go_on = (post_steps < self.max_post_steps) & (edit.any(1) | ~was_complete)
        return Action(commit, edit, working=(step.open_now > commit.sum(1)) | may_go_on)

    def max_steps(self, length: int, num_steps: int) -> int:
        return length + self.max_post_steps


@dataclass(frozen=True)
class RunEditing(Rule):
    """Commit the leading run of confident open positions, and overwrite every decided token in each step.

    DMax (Chen et al., arXiv:2604.08302). Open positions are committed from the left as long as their score is at least
    `threshold`, and at least one. Every decided position takes its proposal. In the next forward pass, a decided
    position's embedding reflects its confidence p (with `soft`): it is ``p E[token] + (1 - p) E[mask]``, rescaled to
    the norm ``p |E[token]| + (1 - p) |E[mask]|``. A block ends when nothing is open and either nothing has changed or
    all confidences are at least `sure`, and at the latest after twice as many forward passes as it has positions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "sure": PerRequest(number()), "soft": flag,
    }  # fmt: skip

    threshold: float = 0.5
    sure: float = 0.9
    soft: bool = True

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"order_temperature"})

    def act(self, step: Step) -> Action:
        score = step.candidates
        possible = score > -torch.inf
        run = (~possible | (score >= self.threshold)).cumprod(1).bool()
        commit = possible & (run | (possible.cumsum(1) == 1))
        edit = step.decided & (step.token != step.current)
        is_sure = (~step.used | (step.confidence >= self.sure)).all(1)
        changed = (commit | edit).any(1)
        working = (step.open_now > commit.sum(1)) | (changed & ~is_sure)
        if not self.soft:
            return Action(commit, edit, working=working)
        where = (step.decided | commit) & (step.token >= 0)
        return Action(commit, edit, embeds=self._soft_embedding(step), embedded=where, working=working)

    def _soft_embedding(self, step: Step) -> Tensor:
        token, mask = step.embed(step.token.clamp(min=0)), step.embed(torch.full_like(step.token, step.mask_token))
        p = step.confidence.clamp(0, 1)[..., None]
        mix = p * token + (1 - p) * mask
        length = p * token.norm(dim=-1, keepdim=True) + (1 - p) * mask.norm(dim=-1, keepdim=True)
        return mix * (length / mix.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def max_steps(self, length: int, num_steps: int) -> int:
        return 2 * length


@dataclass(frozen=True)
class Backtracking(Rule):
    """Commit positions more confident than past commits were on average, and remask those that have gained least.

    Saber (Dong et al., arXiv:2510.18165). A step commits the open positions whose score exceeds the mean confidence
    with which the decided tokens were committed, or the best `count` if those are fewer. Then, unless the block is
    complete, ``min(max(count // 2, ceil(committed / 8)), committed - 1)`` decided positions, new ones included, are
    masked again: those whose confidence has grown least since the previous step.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {"count": integer(1)}

    count: int = 2

    def act(self, step: Step) -> Action:
        decided_before = step.canvas.commit_step >= 0
        mean = row_mean(step.canvas.confidence, decided_before)
        bar = torch.where(decided_before.any(1), mean, torch.ones_like(mean))
        commit = step.select("threshold", parameter=bar, strict=True, need=self.count, fill=self.count)
        committed = commit.sum(1)
        back = torch.minimum(((committed + 7) // 8).clamp(min=self.count // 2), committed - 1)
        back = back.masked_fill(step.open_now == committed, 0)
        gain = step.confidence - step.recall("confidence")
        step.keep("confidence", step.confidence)
        remask = step.select("none", score=-gain, eligible=step.decided | commit, fill=back)
        return Action(commit, remask=remask)


@dataclass(frozen=True)
class WideInNarrowOut(Rule):
    """Commit generously, and remask tokens that the model would not predict again without seeing them.

    WINO (Hong et al., arXiv:2507.18578). With n open positions, a step commits those with a score above `threshold`, at
    most ``min(max(0.7 n, 5), 20)`` and at least the best. If it commits more than one, decided positions whose token
    has a probability below `back_threshold`, given everything except the token itself, are masked again: the least
    likely ones, and fewer than the previous step committed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_current"})
    slots: ClassVar[str] = "block"
    shadow: ClassVar[bool] = True
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
    limits: ClassVar[Mapping[str, Check]] = {
        name: PerRequest(number()) for name in ("threshold", "back_threshold")
    }  # fmt: skip

    threshold: float = 0.6
    back_threshold: float = 0.9

    def act(self, step: Step) -> Action:
        most = (step.open_now * 7 // 10).clamp(5, 20)
        commit = step.select("threshold", parameter=self.threshold, strict=True, need=1, fill=1, cap=most)
        committed = commit.sum(1)
        back = step.recall("committed", otherwise=torch.full_like(committed, 30), by_row=True) - 1
        step.keep("committed", committed, by_row=True)
        remask = step.select(
            "threshold", score=-step.p_current, eligible=step.decided, parameter=-self.back_threshold, strict=True,
            need=0, fill=0, cap=back.masked_fill(committed < 2, 0),
        )  # fmt: skip
        return Action(commit, remask=remask)


@dataclass(frozen=True)
class PathPlanning(Rule):
    """Keep a growing share of all positions, those of highest confidence, and mask the rest again.

    P2 (Peng et al., arXiv:2502.03540), self-planning. In step i = 0, 1, … of S, of all n positions the
    ``n (S - 1 - i) // S`` with the lowest ``ln p(proposal)`` become or stay masked. All other open positions take their
    proposals. At decided positions, the logarithm is multiplied by `stickiness`: above 1, they are remasked more
    readily; at 0, never.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {"stickiness": PerRequest(amount)}

    stickiness: float = 1.0

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids"})

    def act(self, step: Step) -> Action:
        left = (step.num_steps - 1 - step.index).clamp(min=0)
        score = step.confidence.log()
        score = torch.where(step.decided, self.stickiness * score, score)
        masked = step.used.sum(1) * left // step.num_steps
        low = step.select("none", score=-score, eligible=step.used, fill=masked)
        return Action(step.is_open & ~low, remask=step.decided & low, working=left > 0)

    @property
    def uses_steps(self) -> bool:
        return True

    def max_steps(self, length: int, num_steps: int) -> int:
        return num_steps


@dataclass(frozen=True)
class AncestralRemask(TimeGrid):
    """Reverse process with remasking: decided positions are masked again with probability sigma.

    ReMDM (Wang et al., arXiv:2503.00307). With ``alpha(t) = 1 - t`` and a step from time t to s, an open position is
    decided with probability ``(alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t))``, which keeps the marginals of the
    forward process. Let ``most = (1 - alpha(s)) / alpha(t)`` be the largest possible sigma. `strategy` is one of

    - "cap": ``sigma = min(eta, most)``;
    - "rescale": ``sigma = eta min(1, most)``;
    - "conf": ``sigma = min(1, most)``, distributed over the decided positions in proportion to ``exp(-p)``, where p is
      the confidence with which a token was committed;
    - "loop": as "cap" while ``t_off < t <= t_on``, where alpha is held at `alpha_on`. Before that, alpha rises linearly
      to `alpha_on`, and afterwards from there to 1, with ``sigma = 0`` in both phases.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {
        **TimeGrid.limits, "strategy": one_of("cap", "rescale", "conf", "loop"),
        **{name: SHARE for name in ("eta", "t_on", "t_off", "alpha_on")},
    }  # fmt: skip

    strategy: str = "cap"
    eta: float = 0.008
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.strategy == "loop":
            ordered(self, "t_off", "t_on", strict=True)

    def act(self, step: Step) -> Action:
        most, sigma, keeps, takes = step.planned("shares", self.shares)
        decide = ((keeps + sigma * takes) / (1 - takes)).float()
        remask = sigma.float()
        if self.strategy == "conf":
            doubt = torch.where(step.decided, -step.at(step.canvas.confidence), -torch.inf)
            remask = most.float() * torch.softmax(doubt, 1).nan_to_num(0.0)
        chance = torch.where(step.is_open, decide, remask)
        flips = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=chance)
        return self.finishing(step, Action(flips & step.is_open, remask=flips & step.decided))

    def shares(self, index: int, num_steps: int) -> tuple[float, float, float, float]:
        """Return min(1, largest sigma), the sigma of all positions, ``alpha(s) - alpha(t)``, and alpha(t)."""
        t, s = self.times(index, num_steps)
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        most = (1 - alpha_s) / alpha_t if alpha_t > 0 else math.inf
        sigma = 0.0 if self.strategy == "conf" else self._sigma(t, most)
        return min(1.0, most), sigma, alpha_s - alpha_t, alpha_t

    def alpha(self, t: float) -> float:
        """Return the share of tokens that the forward process has not replaced by time t."""
        if self.strategy != "loop":
            return 1 - t
        if t > self.t_on:
            return (1 - t) / (1 - self.t_on) * self.alpha_on
        return self.alpha_on if t > self.t_off else 1 - t / self.t_off * (1 - self.alpha_on)

    def _sigma(self, t: float, most: float) -> float:
        if self.strategy == "rescale":
            return self.eta * min(1.0, most)
        if self.strategy == "loop" and not self.t_off < t <= self.t_on:
            return 0.0
        return min(self.eta, most)


@dataclass(frozen=True)
class RenoisedEntropyBound(Rule):
    """In every step, sample new tokens at the positions of lowest entropy and put new noise everywhere else.

    The sampler of DiffusionGemma, a model without a mask token. In step i = 0, 1, … of a block's N = `steps`, the
    temperature is ``t_min + (t_max - t_min) (N - i) / N``. All positions, whatever they hold, are ordered by the
    entropy of the tempered distribution. Those that `EntropyBound` would commit take their samples, and all others take
    a token drawn uniformly. A block ends with the most likely tokens: after N steps, or once these have not changed for
    `stability` steps and the mean entropy is below `entropy` nats.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    slots: ClassVar[str] = "block"
    noise: ClassVar[str] = "uniform"
    draws: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {
        "bound": PerRequest(number(0)), "entropy": number(0), "t_min": temperature, "t_max": temperature,
        "stability": integer(0), "steps": integer(1),
    }  # fmt: skip

    bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability: int = 1
    entropy: float = 0.005
    steps: int = 48

    def __post_init__(self):
        super().__post_init__()
        ordered(self, "t_min", "t_max")

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids", "temperature"})

    def temperature(self, index: int, num_steps: int) -> float:
        return self.t_min + (self.t_max - self.t_min) * (self.steps - index) / self.steps

    def act(self, step: Step) -> Action:
        accept = step.select(
            "entropy-bound", score=-step.entropy, eligible=step.used, cost=step.entropy, parameter=self.bound,
            need=1, fill=1,
        )  # fmt: skip
        before = step.recall("likeliest", step.argmax.shape[1], otherwise=torch.full_like(step.argmax, -2), by_row=True)
        unchanged = (~step.used | (step.argmax == before)).all(1) & ~step.is_first
        same = step.recall("unchanged steps", otherwise=torch.zeros_like(step.open_now), by_row=True)
        same = ((same + 1) * unchanged).int()
        step.keep("likeliest", step.argmax, by_row=True)
        step.keep("unchanged steps", same, by_row=True)
        ends = (same >= self.stability) & (row_mean(step.entropy, step.used) < self.entropy)
        ends = ends | (step.index >= self.steps - 1)
        take = accept | ends[:, None]
        return Action(
            take & step.is_open, take & step.decided, renoise=step.used & ~take, working=~ends,
            token=torch.where(ends[:, None], step.argmax, step.token),
            confidence=torch.where(ends[:, None], step.argmax_confidence, step.confidence),
        )  # fmt: skip

    def max_steps(self, length: int, num_steps: int) -> int:
        return self.steps
