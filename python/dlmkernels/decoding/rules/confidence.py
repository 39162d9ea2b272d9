# SPDX-License-Identifier: Apache-2.0
"""Rules that use only the confidences of the current step: the best positions in score order, or several such sets."""

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
    """Commit a fixed number of positions per step: n open positions over S steps.

    By default each step commits the best n // S positions, and the first n % S steps one more. This is LLaDA's linear
    schedule (Nie et al., arXiv:2502.09992, `get_num_transfer_tokens`).

    Attributes
    ----------
    of_block : bool
        If True, n is the length of the block, as in SDAR (Cheng et al., arXiv:2510.06303), so that a block that begins
        with given positions takes fewer steps. If False, n is the number of positions open at the start of the block.
    spread : bool
        If True, spread the n % S extra positions over all steps instead of the first ones (linear schedule only). After
        i steps, n - floor(n (S - i) / S) positions are decided, as in RND1 (github.com/RadicalNumerics/RND1,
        `diffusion_sample`).
    schedule : {"linear", "cosine"} or callable or sequence of float or Tensor
        Share of the n positions that is decided after a share r of the steps. "cosine" is ``1 - cos(pi r / 2)``: few
        tokens in early steps, many in late ones (MaskGIT, Chang et al., arXiv:2202.04200). A callable is called with r
        in (0, 1]. A sequence, or a tensor `[K]`, holds the shares after 1/K, 2/K … of the steps, with linear
        interpolation between them. Shares must not decrease, and the last must be 1.
    rounding : {"down", "nearest"}
        How shares become whole numbers. LLaDA's rule above ("linear" with "down") needs no rounding. "down": the number
        of positions left open is rounded down, and each step decides at least one (as in MaskGIT's program). "nearest":
        each step decides its share of the positions left, rounded to the nearest integer (half to even), and steps that
        would decide none are skipped (as in github.com/ZHZisZZ/dllm, `get_num_transfer_tokens`). "linear" is then
        dllm's linear schedule.
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
            raise ValueError(
                "spread=True requires schedule='linear' and rounding='down': other schedules define their own "
                f"distribution over the steps; got schedule={self.schedule!r} and rounding={self.rounding!r}"
            )

    @property
    def is_linear(self) -> bool:
        """Whether the counts are those of LLaDA or RND1, which need no table."""
        return self.schedule == "linear" and self.rounding == "down"

    def count(self, step: Step) -> Tensor:
        """Return the number of positions to commit in this step, int32 `[B]`."""
        n = step.block_length if self.of_block else step.open_at_start
        if not self.is_linear:
            return self._planned(step, n)
        left = step.planned_count("left", self._left)
        if self.spread:
            return n * (left + 1) // step.num_steps - n * left // step.num_steps
        return (n + left) // step.num_steps

    @staticmethod
    def _left(index: int, num_steps: int) -> int:
        """Return the number of steps that follow step `index`."""
        return max(num_steps - 1 - index, 0)

    def _planned(self, step: Step, n: Tensor) -> Tensor:
        """Look up this step's count for `n` int32 `[B]` in a table over all plans, steps and values of n."""
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
    """Commit `floor(n * (1 - t[i+1] / t[i]))` of the n open positions in step i, and all of them in the last step.

    Dream's schedule: `t` decreases linearly from 1 to `eps` (Ye et al., arXiv:2508.15487). n is counted per request;
    the published code uses the batch mean.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"eps": SHARE}

    eps: float = 1e-3

    def select(self, step: Step) -> Tensor:
        width = (1 - self.eps) / step.num_steps.double()
        share = width / (1 - width * step.index)
        # rounding errors must not push a product that is an exact integer in theory below it
        count = (step.open_now.double() * share + 1e-9).int()
        return step.select("none", fill=torch.where(step.index >= step.num_steps - 1, step.open_now, count))

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class Threshold(Rule):
    """Commit every position with a score of at least `threshold`, and always the best position.

    Fast-dLLM (Wu et al., arXiv:2505.22618).

    Attributes
    ----------
    threshold : float or sequence of float
        Minimum score (by default the score is the confidence), one for all requests or one per request.
    strict : bool
        If True, the score must exceed `threshold`.
    tie : float, optional
        If given, also commit every position whose score is within `tie` of the best, however low. dInfer (Ma et al.,
        arXiv:2510.08666) uses 1e-5, so that equal scores are committed together.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
    """Commit the positions with a score above `threshold`, or the best k if those are fewer than the step's quota k.

    "low_confidence_dynamic" of SDAR (Cheng et al., arXiv:2510.06303) and the decoder of LLaDA2.0 (arXiv:2512.15745).
    The quota is that of `Quota(of_block=True)`. With `strict=False`, scores equal to `threshold` count as well.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
    """Commit in score order while the n-th best score c satisfies `(n + 1) * (1 - c) <= factor`; at least one position.

    Fast-dLLM (Wu et al., arXiv:2505.22618). The published code makes an exception for the lowest-ranked open position,
    which it commits even if that one fails the test; this rule does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"factor": PerRequest(number(0))}

    factor: float = 1.0

    def select(self, step: Step) -> Tensor:
        return step.select("factor", parameter=self.factor, need=1, fill=1)


@dataclass(frozen=True)
class Frechet(Rule):
    """Commit the best positions whose tokens are jointly right with probability above `delta`; at least one position.

    Whatever the dependence between them, n tokens with confidences c are all right with a probability of at least the
    Fréchet bound ``sum(c) - (n - 1)``. Positions are committed in score order while this bound exceeds `delta` by more
    than the uncertainty of the n-th: ``sum(c) - (n - 1) - (1 - c_n) > delta``. If the confidences are equal, these are
    as many positions as with `Factor(1 - delta)`. If they differ, there are more, since each position counts with its
    own confidence. Fast-dLLM++ (arXiv:2606.02955).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"delta": PerRequest(number(0, 1))}

    delta: float = 0.25

    def select(self, step: Step) -> Tensor:
        best = step.candidates.sort(1, descending=True).values
        # uncertainties 1 - c as integer multiples of 2^-32, whose sums are exact in any order
        lacks = ((1 - best.double()).clamp(0, 2.0**18) * 2.0**32).round().long()
        delta: float | Tensor = self.delta
        most = (1 - (delta.double() if isinstance(delta, Tensor) else delta)) * 2.0**32
        holds = ((lacks.cumsum(1) + lacks).double() < most).long().cumprod(1)
        return step.select("none", fill=holds.sum(1).clamp(min=1))


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Commit the positions of lowest entropy while all entropies but the largest sum to at most `bound` nats.

    At least one position is committed. EB-Sampler (Ben-Hamu et al., arXiv:2505.24857). Positions are always ordered by
    entropy, whatever the configured score.
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
    """Commit the positions of lowest entropy while their entropies sum to less than `budget` nats; at least one.

    "entropy_bounded" of JetEngine, which serves SDAR (Cheng et al., arXiv:2510.06303). Not the same as the EB-Sampler
    (`EntropyBound`), which leaves the largest entropy out of the sum.
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
    """Commit positions with a score above `threshold`, and the best of each run of open neighbors if above `low`.

    At least the best position is committed. Hierarchical decoding of dInfer (Ma et al., arXiv:2510.08666): decided
    positions divide a block into runs, and positions that are far apart depend little on each other.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    thresholds: ClassVar[tuple[str, ...]] = ("threshold", "low")
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
        first = torch.where(score == best, slots, len(slots))  # ties go to the leftmost
        first = torch.full_like(run, len(slots)).scatter_reduce(1, run, first, "amin").gather(1, run)
        winners = (slots == first) & (score > self.low)
        # The overall best wins its run, so it is missing only if no score is above `low`; `fill` then commits it.
        return step.select("all", gate=winners | (score > self.threshold), need=1, fill=1)


@dataclass(frozen=True)
class LocalThreshold(Rule):
    """Commit anchors (score at least `threshold`), and positions near an anchor whose score is at least `relaxed`.

    "Near" means at most `radius` positions away. At least the best position is committed. LocalLeap (Kong et al.,
    arXiv:2510.07081).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    thresholds: ClassVar[tuple[str, ...]] = ("threshold", "relaxed")
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
    """Commit every ``length // base**t``-th position of the block in step t = 1, 2, …, to keep neighbors apart.

    DUS (Luxembourg et al., arXiv:2506.19037). A block takes about ``log(length) / log(base)`` forward passes, whatever
    the model predicts. If none of a step's positions is open, the step commits the best open position instead.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    limits: ClassVar[Mapping[str, Check]] = {"base": integer(2)}

    base: int = 2

    def select(self, step: Step) -> Tensor:
        power = self.base ** (step.index + 1).clamp(max=30).double()  # exceeds any length in any base
        stride = torch.floor(step.block_length / power).clamp(min=1).int()
        return step.select("all", gate=step.index_in_block % stride[:, None] == 0, need=1, fill=1)
