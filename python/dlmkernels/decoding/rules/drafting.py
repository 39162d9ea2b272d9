# SPDX-License-Identifier: Apache-2.0
"""Rules for models that draft tokens and verify them, or read them in another order. Each has its own program."""

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
    """Generate up to `stride` tokens per forward pass: each verifies the previous drafts and makes the next ones.

    I-DLM (arXiv:2604.11035), for strictly causal models whose output at position i predicts position i + 1. A forward
    pass takes the last token, the drafts after it and stride - 1 masks. From left to right, a draft is accepted if it
    is the token that the model itself chooses at that position. The first draft that differs is replaced by the model's
    token. If none is rejected, one more token is committed, and the outputs at the masks draft the next tokens, sampled
    with the noise that the next forward pass will verify them with. At temperature 0, the tokens are those of decoding
    one by one; at any other temperature and with any filter, they have the same distribution. Masks leave nothing in
    the KV cache.

    Attributes
    ----------
    stride : int
        Maximum number of tokens per forward pass, at least 2.
    leniency : float, optional
        If given, drafts are accepted as in I-DLM's program (at temperatures above 0). The masks draft their most likely
        tokens, and a draft x is accepted with probability min(1, p(x) / (leniency q(x))), where p and q are the
        unfiltered distributions of the forward pass that verifies it and of the one that drafted it. The first draft
        rejected is replaced by a draw from max(0, p - q). This accepts more drafts, but the text no longer follows the
        model's distribution.
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
        # with leniency, drafts are compared under the tempered distribution, whatever `distribution` is
        return OF_THE_HEAD | (names if self.leniency is None else names | {"distribution"})

    def select(self, step):
        raise TypeError("Strided has its own decoding program and does not implement select")


@dataclass(frozen=True)
class SelfSpeculative(Rule):
    """Draft a block in one forward pass that sees all of it, and verify it in a second, causal one.

    Linear self-speculation of Nemotron-Labs-Diffusion (arXiv:2607.05722), for models that decode causally (their output
    at position i then predicts position i + 1) and can also fill in the masks of a block in place. The block begins
    with the last token. Drafts are accepted from the left as long as they are the tokens that the causal model itself
    chooses; the model's own next token follows them. Since drafts are only compared with the model's choices, the
    tokens are those of decoding one by one, even if they are sampled.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"sub_block_length", "score", "defer_token_ids", "order_temperature"})

    def select(self, step):
        raise TypeError("SelfSpeculative has its own decoding program and does not implement select")


@dataclass(frozen=True)
class S2D2(Rule):
    """Draft a block in one forward pass, and verify it in a second one that acts as if blocks had length one.

    Self-speculation of S2D2 (arXiv:2603.25702), for block-diffusion models without causal attention. With blocks of one
    position, such a model decodes one token after another. The first forward pass fills in a block of `block_length`
    masks. The second takes the drafts, plus one mask per position that sees the text, the drafts before it, and itself.
    From left to right, a draft is accepted if it is the token predicted by the mask at its position; the first draft
    that differs is replaced by that token. The tokens are therefore those of `block_length=1`, or have the same
    distribution at temperatures above 0.

    The published program falls back to plain diffusion where verification promises little. This one always verifies, so
    that the text is exact.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"sub_block_length", "score", "defer_token_ids", "order_temperature", "seeded"})

    def select(self, step):
        raise TypeError("S2D2 has its own decoding program and does not implement select")


@dataclass(frozen=True)
class Reordered(Rule):
    """Fill a window of masks that slides along with the decided text, reading decided tokens first.

    WeDLM (arXiv:2512.22737), for causal models that fill in masks in place. A forward pass reads the decided tokens
    first and then the masks of the window. Each sees what precedes it in this order, but keeps its own position in the
    text. Tokens before the first mask are therefore final and are appended to the KV cache. A mask is filled if its
    entropy + `distance_penalty` * (distance from the first mask) is below `entropy_threshold` nats. At least the one
    with the smallest sum is filled.
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
        distance = step.window.positions - step.window.positions[:, :1]  # positions ascend, so the first is the minimum
        score = -(step.entropy + self.distance_penalty * distance)
        return step.select("threshold", score=score, parameter=-self.entropy_threshold, strict=True, need=1, fill=1)
