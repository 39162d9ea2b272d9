# SPDX-License-Identifier: Apache-2.0
"""Rules of strictly causal models. Each has a loop of its own, in which rows advance by what they have accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .rules import Rule

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True)
class Strided(Rule):
    """Up to `stride` tokens a forward: drafts of the last forward are verified, and the next ones drafted, in one.

    I-DLM (arXiv:2604.11035), for strictly causal models whose row i speaks of position i + 1. A forward takes the last
    token, the drafts after it and stride - 1 masks. From the left, a draft x is accepted with probability
    min(1, p(x) / (leniency q(x))), p from this forward, q from the one that drafted it; at temperature 0 if it is the
    most likely token. The first one rejected is replaced by a draw from max(0, p - q); if none is, one more token is
    sampled, and the rows of the masks draft the next (their most likely tokens). Masks leave nothing in the cache.

    At temperature 0 the tokens are those of decoding one after another.
    """

    stride: int = 4
    leniency: float = 1.0

    def __post_init__(self):
        if not isinstance(self.stride, int) or self.stride < 2:
            raise ValueError(f"stride must be an integer of at least 2; got {self.stride!r}")
        if not isinstance(self.leniency, (int, float)) or not self.leniency > 0:
            raise ValueError(f"leniency must be a positive number; got {self.leniency!r}")

    def select(self, step):
        raise TypeError("Strided has a loop of its own and selects nothing of a step")


@dataclass(frozen=True)
class Reordered(Rule):
    """A window of masks that slides with what is decided before it, all of it read again as if in another order.

    WeDLM (arXiv:2512.22737), for causal models that fill masks in place. A forward takes the decided tokens first, then
    the masks of the window, each seeing those before it in this order, at its own place in the text. So what is decided
    up to the first mask is final, and is appended to the cache. Masks are filled where entropy + `distance_penalty`
    (distance from the first mask) is below `entropy_threshold` nats; at least the least.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    window: int = 16
    entropy_threshold: float = 0.4
    distance_penalty: float = 0.02

    def __post_init__(self):
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an integer of at least 1; got {self.window!r}")

    def select(self, step: Step) -> Tensor:
        distance = step.window.positions - step.window.positions[:, :1]  # slots ascend
        score = -(step.entropy + self.distance_penalty * distance)
        return step.select("threshold", score=score, parameter=-self.entropy_threshold, strict=True, need=1, fill=1)
