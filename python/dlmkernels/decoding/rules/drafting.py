# SPDX-License-Identifier: Apache-2.0
"""Rules of causal models that draft tokens and verify them, or read them in another order; each is a program's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import FLOAT32, Check, amount, integer, number
from ..step import Step
from .base import OF_THE_HEAD, Rule


@dataclass(frozen=True)
class Strided(Rule):
    """Up to `stride` tokens a forward: drafts of the last forward are verified, and the next ones drafted, in one.

    I-DLM (arXiv:2604.11035), for strictly causal models whose row i speaks of position i + 1. A forward takes the last
    token, the drafts after it and stride - 1 masks. From the left, a draft is accepted if it is the very token that the
    model chooses in that row; the first that is not is replaced by that token. If none is rejected, one more token is
    taken, and the rows of the masks draft the next ones, with the noise of the forward that will verify them. So at
    temperature 0 the tokens are those of decoding one after another, and at any other, under any filter, they have the
    same distribution. Masks leave nothing in the cache.

    Attributes
    ----------
    stride : int
        At least 2.
    leniency : float, optional
        With a number, drafts are accepted as I-DLM's program does it (at a temperature): the masks draft their most
        likely tokens, a draft x is accepted with probability min(1, p(x) / (leniency q(x))), p and q the unfiltered
        distributions of the forward that verifies and of the one that drafted it, and the first one rejected is
        replaced by a draw from max(0, p - q). More drafts are accepted, of another distribution than the model's.
    """

    decodes: ClassVar[str] = "continuations"
    limits: ClassVar[Mapping[str, Check]] = {
        "stride": integer(2), "leniency": number(0, FLOAT32.max, above=True, optional=True),
    }  # fmt: skip
    by_block: ClassVar[bool] = False

    stride: int = 4
    leniency: float | None = None

    @property
    def ignores(self) -> frozenset[str]:
        names = {"block_length", "sub_block_length", "score", "defer_token_ids", "order_temperature", "seeded"}
        # drafts are then compared under the tempered distribution
        return OF_THE_HEAD | (names if self.leniency is None else names | {"distribution"})

    def select(self, step):
        raise TypeError("Strided has a program of its own and selects nothing of a step")


@dataclass(frozen=True)
class SelfSpeculative(Rule):
    """A block drafted in one forward that sees all of it, and verified in another that reads it from the left.

    The linear self-speculation of Nemotron-Labs-Diffusion (arXiv:2607.05722), for models that are causal in what is
    decided (their row i then speaks of position i + 1) and fill the masks of a block in place. The block begins with
    the last token. Drafts are accepted from the left while they are what the causal model says itself; its own token
    comes after them. So the tokens are those of decoding one after another, drawn ones too: drafts are only compared.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"sub_block_length", "score", "defer_token_ids", "order_temperature"})

    def select(self, step):
        raise TypeError("SelfSpeculative has a program of its own and selects nothing of a step")


@dataclass(frozen=True)
class S2D2(Rule):
    """A block drafted in one forward, and verified in another as though blocks had one position each.

    Self-speculation of S2D2 (arXiv:2603.25702), for block-diffusion models that know no causal attention: with blocks
    of one position such a model decodes one token after another. The first forward fills a block of masks. The second
    takes the drafts, and for each place a mask that sees the text, the drafts before it, and itself. From the left, a
    draft is accepted if it is the very token that the mask in its place says, and the first that is not is replaced by
    that. So the tokens are those of `block_length=1`; at a temperature they have the same distribution. `block_length`
    is how many are drafted.

    The published program goes over to plain diffusion where it expects little of a verification. This one verifies
    always, so that the text is exact.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"sub_block_length", "score", "defer_token_ids", "order_temperature", "seeded"})

    def select(self, step):
        raise TypeError("S2D2 has a program of its own and selects nothing of a step")


@dataclass(frozen=True)
class Reordered(Rule):
    """A window of masks that slides with what is decided before it, all of it read again as if in another order.

    WeDLM (arXiv:2512.22737), for causal models that fill masks in place. A forward takes the decided tokens first, then
    the masks of the window, each seeing those before it in this order, at its own place in the text. So what is decided
    up to the first mask is final, and is appended to the cache. Masks are filled where entropy + `distance_penalty`
    (distance from the first mask) is below `entropy_threshold` nats; at least the least.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    decodes: ClassVar[str] = "continuations"
    limits: ClassVar[Mapping[str, Check]] = {
        "window": integer(1), "entropy_threshold": number(), "distance_penalty": amount,
    }  # fmt: skip
    by_block: ClassVar[bool] = False

    window: int = 16
    entropy_threshold: float = 0.4
    distance_penalty: float = 0.02

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"block_length", "sub_block_length", "score", "defer_token_ids", "seeded"})

    def select(self, step: Step) -> Tensor:
        distance = step.window.positions - step.window.positions[:, :1]  # slots ascend
        score = -(step.entropy + self.distance_penalty * distance)
        return step.select("threshold", score=score, parameter=-self.entropy_threshold, strict=True, need=1, fill=1)
