# SPDX-License-Identifier: Apache-2.0
"""Unmasking rules: which open positions a step commits.

Every rule commits a prefix of the confidence order (score descending, position ascending); they differ in how long the
prefix is. A rule is a small dataclass with one method, `select`, that asks the step for such a prefix:

>>> @dataclass(frozen=True)
... class HalfOfTheRest(Rule):
...     def select(self, step):
...         return step.select("none", fill=(step.open_now + 1) // 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .step import Step


class Rule:
    """Base of all rules.

    `needs` names the statistics beyond the confidence that `select` reads; a rule that leaves it alone gets them all.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margin", "entropy"})

    def select(self, step: Step) -> Tensor:
        """Positions to commit: bool `[B, W]`, a subset of `step.eligible`."""
        raise NotImplementedError

    @property
    def uses_steps(self) -> bool:
        """Whether the number of forwards is the configured `steps`, and not decided by the confidences."""
        return False


@dataclass(frozen=True)
class Quota(Rule):
    """A fixed number a step: n open positions over S steps, n // S each and one more in the first n % S.

    LLaDA's linear schedule (Nie et al., arXiv:2502.09992, `get_num_transfer_tokens`).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def select(self, step: Step) -> Tensor:
        left_over = max(step.num_steps - 1 - step.index, 0)
        return step.select("none", fill=(step.open_at_start + left_over) // step.num_steps)

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

    eps: float = 1e-3

    def select(self, step: Step) -> Tensor:
        if step.index >= step.num_steps - 1:
            return step.select("none", fill=step.open_now)
        width = (1 - self.eps) / step.num_steps
        t = 1 - width * step.index
        return step.select("none", fill=(step.open_now * (1 - (t - width) / t)).int())

    @property
    def uses_steps(self) -> bool:
        return True


@dataclass(frozen=True)
class Threshold(Rule):
    """Everything at least as confident as `threshold` (`strict`: more), and always the best position.

    Fast-dLLM (Wu et al., arXiv:2505.22618).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    threshold: float = 0.9
    strict: bool = False

    def __post_init__(self):
        _check_number("threshold", self.threshold)

    def select(self, step: Step) -> Tensor:
        return step.select("threshold", parameter=self.threshold, strict=self.strict, need=1, fill=1)


@dataclass(frozen=True)
class Factor(Rule):
    """The longest prefix whose n-th best confidence c satisfies `(n + 1) * (1 - c) <= factor`; at least one.

    Fast-dLLM (Wu et al., arXiv:2505.22618). The published code also commits a last position that fails; this does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    factor: float = 1.0

    def __post_init__(self):
        _check_number("factor", self.factor)

    def select(self, step: Step) -> Tensor:
        return step.select("factor", parameter=self.factor, need=1, fill=1)


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Positions in order of entropy while the entropies before the last sum to at most `bound` nats; at least one.

    EB-Sampler (Ben-Hamu et al., arXiv:2505.24857). Always ordered by entropy, whatever the configured score.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    bound: float = 0.1

    def __post_init__(self):
        _check_number("bound", self.bound)

    def select(self, step: Step) -> Tensor:
        return step.select(
            "entropy-bound", score=-step.entropy, cost=step.entropy, parameter=self.bound, need=1, fill=1
        )


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} must be a number; got {value!r}")
