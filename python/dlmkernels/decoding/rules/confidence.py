# SPDX-License-Identifier: Apache-2.0
"""Rules that look at one step's confidences: a prefix of the confidence order, or a few prefixes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Check, PerRequest, flag, integer, number, one_of
from ..shares import ROUNDINGS, Schedule, check_schedule, counts, shares_after
from ..step import Step
from .base import SHARE, Rule


@dataclass(frozen=True)
class Quota(Rule):
    """A fixed number a step: n open positions over S steps.

    By default n // S each and one more in the first n % S: LLaDA's linear schedule (Nie et al., arXiv:2502.09992,
    `get_num_transfer_tokens`).

    Attributes
    ----------
    of_block : bool
        n is the length of the block, as in SDAR (Cheng et al., arXiv:2510.06303), so that a block whose first positions
        are given takes fewer steps.
    spread : bool
        With the linear schedule: the n % S are not the first steps' but spread over all. After i steps
        n - floor(n (S - i) / S) are decided, as in RND1 (github.com/RadicalNumerics/RND1, `diffusion_sample`).
    schedule : {"linear", "cosine"} or callable or sequence of float or Tensor
        Which share of the n is decided after which share of the steps. cosine: ``1 - cos(pi r / 2)`` after the share r,
        so that few tokens go first and many last (MaskGIT, Chang et al., arXiv:2202.04200). A callable gives that share
        for r in (0, 1]. A sequence, or a tensor `[K]`, holds the shares after 1/K, 2/K … of the steps; between these
        it is a straight line. Shares must not fall, and the last must be 1.
    rounding : {"down", "nearest"}
        How shares become whole numbers, for all but LLaDA's rule. down: what is left open is rounded down, and each
        step decides one at least (MaskGIT's program). nearest: each step decides the nearest number to its share of
        what is left, a half going to the even number, and steps without a token are left out (the rule of
        github.com/ZHZisZZ/dllm, `get_num_transfer_tokens`). With it "linear" is dllm's linear schedule, not LLaDA's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {
        "of_block": flag,
        "spread": flag,
        "schedule": check_schedule,
        "rounding": one_of(*ROUNDINGS),
    }

    of_block: bool = False
    spread: bool = False
    schedule: Schedule | Sequence[float] | Tensor = "linear"
    rounding: str = "down"

    def __post_init__(self):
        super().__post_init__()
        if self.spread and not self.is_linear:
            raise ValueError("spread is for schedule='linear' with rounding='down'; the others spread by themselves")

    @property
    def is_linear(self) -> bool:
        """Whether the numbers are those of LLaDA or RND1, which need no table."""
        return self.schedule == "linear" and self.rounding == "down"

    def count(self, step: Step) -> Tensor:
        """This step's share, int32 `[B]`."""
        n = step.block_length if self.of_block else step.open_at_start
        if not self.is_linear:
            return self._planned(step, n)
        left = step.planned_count("left", self._left)
        if self.spread:
            return n * (left + 1) // step.num_steps - n * left // step.num_steps
        return (n + left) // step.num_steps

    @staticmethod
    def _left(index: int, num_steps: int) -> int:
        """How many steps come after one."""
        return max(num_steps - 1 - index, 0)

    def _planned(self, step: Step, n: Tensor) -> Tensor:
        """The same from a table of all numbers of positions, plans and steps."""
        tables, numbers = step.standing.tables, torch.arange(step.standing.width + 1, device="cpu")

        def make() -> Tensor:
            taken = [
                counts(numbers, shares_after(self.schedule, s), self.rounding)  # type: ignore[arg-type]
                for s in tables.plans
            ]
            at = torch.arange(tables.steps + 1, device="cpu")
            return torch.cat([table[:, at.clamp(max=table.shape[1] - 1)].T for table in taken])

        lines = tables.made("quota", make).index_select(0, tables.first + step.standing.step)
        return lines.gather(1, n.long()[:, None])[:, 0]

    def select(self, step: Step) -> Tensor:
        return step.select("none", fill=self.count(step))

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class TimeQuota(Rule):
    """Dream's schedule: step i commits `floor(n * (1 - t[i+1] / t[i]))` of the n still open, the last step all of them.

    `t` falls linearly from 1 to `eps` (Ye et al., arXiv:2508.15487). n is counted for each request; the published code
    takes the batch mean.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"eps": SHARE}

    eps: float = 1e-3

    def select(self, step: Step) -> Tensor:
        width = (1 - self.eps) / step.num_steps.double()
        share = width / (1 - width * step.index)
        # a product that is a whole number on paper must not fall short of it
        count = (step.open_now.double() * share + 1e-9).int()
        return step.select("none", fill=torch.where(step.index >= step.num_steps - 1, step.open_now, count))

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class Threshold(Rule):
    """Everything at least as confident as `threshold` (`strict`: more), and always the best position.

    Fast-dLLM (Wu et al., arXiv:2505.22618).

    Attributes
    ----------
    tie : float, optional
        Everything within `tie` of the best score is committed too, however unsure (1e-5 in dInfer, Ma et al.,
        arXiv:2510.08666, so that equals go together).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "strict": flag, "tie": number(0, optional=True),
    }  # fmt: skip

    threshold: float = 0.9
    strict: bool = False
    tie: float | None = None

    def select(self, step: Step) -> Tensor:
        threshold: float | Tensor = self.threshold
        if self.tie is not None:
            threshold = (step.candidates.amax(1, keepdim=True) - self.tie).clamp(max=threshold)
        return step.select("threshold", parameter=threshold, strict=self.strict, need=1, fill=1)


@dataclass(frozen=True)
class DynamicThreshold(Rule):
    """Everything more confident than `threshold` if that is at least the step's quota, else the quota.

    "low_confidence_dynamic" of SDAR (Cheng et al., arXiv:2510.06303) and the decoder of LLaDA2.0 (arXiv:2512.15745).
    The quota is that of `Quota(of_block=True)`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"threshold": PerRequest(number()), "strict": flag}

    threshold: float = 0.9
    strict: bool = True

    def select(self, step: Step) -> Tensor:
        quota = Quota(of_block=True).count(step)
        return step.select("threshold", parameter=self.threshold, strict=self.strict, need=quota, fill=quota)

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class Factor(Rule):
    """The longest prefix whose n-th best confidence c satisfies `(n + 1) * (1 - c) <= factor`; at least one.

    Fast-dLLM (Wu et al., arXiv:2505.22618). The published code also commits a last position that fails; this does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"factor": PerRequest(number(0))}

    factor: float = 1.0

    def select(self, step: Step) -> Tensor:
        return step.select("factor", parameter=self.factor, need=1, fill=1)


@dataclass(frozen=True)
class Frechet(Rule):
    """The longest prefix of which all may be right together, and stay so, with more than `delta`; at least one.

    Whatever their dependence, tokens of confidences c are all right with a probability of at least the Fréchet bound
    ``sum(c) - (n - 1)``. The n best are committed as long as that exceeds `delta` by what the n-th lacks of certainty:
    ``sum(c) - (n - 1) - (1 - c_n) > delta``. Of equal confidences as many as under `Factor(1 - delta)`; of different
    ones more, since each counts with its own. Fast-dLLM++ (arXiv:2606.02955).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"delta": PerRequest(number(0, 1))}

    delta: float = 0.25

    def select(self, step: Step) -> Tensor:
        best = step.candidates.sort(1, descending=True).values
        # what each lacks of certainty, in integers of 2^-32, whose sums are exact in any order
        lacks = ((1 - best.double()).clamp(0, 2.0**18) * 2.0**32).round().long()
        delta: float | Tensor = self.delta
        most = (1 - (delta.double() if isinstance(delta, Tensor) else delta)) * 2.0**32
        holds = ((lacks.cumsum(1) + lacks).double() < most).long().cumprod(1)
        return step.select("none", fill=holds.sum(1).clamp(min=1))


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Positions in order of entropy while the entropies before the last sum to at most `bound` nats; at least one.

    EB-Sampler (Ben-Hamu et al., arXiv:2505.24857). Always ordered by entropy, whatever the configured score.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    limits: ClassVar[Mapping[str, Check]] = {"bound": PerRequest(number(0))}

    bound: float = 0.1

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids"})

    def select(self, step: Step) -> Tensor:
        return step.select(
            "entropy-bound", score=-step.entropy, cost=step.entropy, parameter=self.bound, need=1, fill=1
        )


@dataclass(frozen=True)
class EntropySum(Rule):
    """Positions in order of entropy while the entropies, the last included, sum to less than `budget`; at least one.

    "entropy_bounded" of JetEngine, which serves SDAR (Cheng et al., arXiv:2510.06303). Not the rule of EB-Sampler,
    which leaves the largest entropy out of the sum: see `EntropyBound`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    limits: ClassVar[Mapping[str, Check]] = {"budget": PerRequest(number(0))}

    budget: float = 0.35

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids"})

    def select(self, step: Step) -> Tensor:
        return step.select("entropy-sum", score=-step.entropy, cost=step.entropy, parameter=self.budget, need=1, fill=1)


@dataclass(frozen=True)
class HierarchicalThreshold(Rule):
    """The best of every run of neighbouring open positions if above `low`, everything above `threshold`, the best.

    Hierarchical decoding of dInfer (Ma et al., arXiv:2510.08666): committed positions divide a block, and far-apart
    ones depend little on each other.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"threshold": PerRequest(number()), "low": PerRequest(number())}

    threshold: float = 0.9
    low: float = 0.4

    def select(self, step: Step) -> Tensor:
        score = step.candidates
        position, slots = step.window.positions, torch.arange(score.shape[1], device=score.device)
        follows = torch.zeros_like(step.eligible)
        follows[:, 1:] = (position[:, 1:] == position[:, :-1] + 1) & step.eligible[:, :-1] & step.eligible[:, 1:]
        run = (~follows).cumsum(1) - 1
        best = torch.full_like(score, -torch.inf).scatter_reduce(1, run, score, "amax").gather(1, run)
        first = torch.where(score == best, slots, len(slots))  # equals: the leftmost
        first = torch.full_like(run, len(slots)).scatter_reduce(1, run, first, "amin").gather(1, run)
        winners = (slots == first) & (score > self.low)
        # The best of all wins its run, so that it is missing only where nothing at all is above `low`.
        return step.select("all", gate=winners | (score > self.threshold), need=1, fill=1)


@dataclass(frozen=True)
class LocalThreshold(Rule):
    """Anchors, of at least `threshold`, and what is at least `relaxed` within `radius` of one; at least the best.

    LocalLeap (Kong et al., arXiv:2510.07081).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": PerRequest(number()), "relaxed": PerRequest(number()), "radius": integer(0),
    }  # fmt: skip

    threshold: float = 0.9
    relaxed: float = 0.75
    radius: int = 4

    def select(self, step: Step) -> Tensor:
        position, far = step.window.positions.long(), 2**31
        anchor = step.candidates >= self.threshold
        left = torch.where(anchor, position, -far).cummax(1).values
        right = torch.where(anchor, position, far).flip(1).cummin(1).values.flip(1)
        near = torch.minimum(position - left, right - position) <= self.radius
        return step.select("all", gate=anchor | (near & (step.score >= self.relaxed)), need=1, fill=1)


@dataclass(frozen=True)
class DilatedSchedule(Rule):
    """Step t = 1, 2, … takes every ``length // base**t``-th position of the block, so that few neighbours go together.

    DUS (Luxembourg et al., arXiv:2506.19037): about ``log(length) / log(base)`` forwards a block, whatever the model
    says. A step whose positions are all given takes the best one.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"base": integer(2)}

    base: int = 2

    def select(self, step: Step) -> Tensor:
        power = self.base ** (step.index + 1).clamp(max=30).double()  # beyond any length in any base
        stride = torch.floor(step.block_length / power).clamp(min=1).int()
        return step.select("all", gate=step.index_in_block % stride[:, None] == 0, need=1, fill=1)
