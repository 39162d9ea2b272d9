# SPDX-License-Identifier: Apache-2.0
"""What a rule sees of one denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..window import TokenWindow
from .config import DecodingConfig


@dataclass(frozen=True)
class RandomState:
    """Counter-based randomness of a batch: int64 `seed` `[B]` and the int32 `step` counter `[B]` of each request."""

    seed: Tensor
    step: Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step: proposals and confidences of the W slots of the window, before anything is committed.

    Attributes
    ----------
    stats : ops.TokenConfidence
        Per-slot results of `token_confidence`, each reshaped to `[B, W]` on access below.
    eligible : Tensor
        bool `[B, W]`: slots that may be committed.
    index : int
        Number of this step within its block, from 0.
    num_steps : int
        Steps planned for the block.
    open_at_start, open_now : Tensor
        int32 `[B]`: open positions of the block when it was entered, and before this step.
    """

    stats: ops.TokenConfidence
    window: TokenWindow
    eligible: Tensor
    index: int
    num_steps: int
    open_at_start: Tensor
    open_now: Tensor
    random: RandomState
    score_name: str
    order_temperature: float

    @classmethod
    def of(
        cls, stats: ops.TokenConfidence, window: TokenWindow, random: RandomState, config: DecodingConfig,
        index: int = 0, num_steps: int = 1, open_at_start: Tensor | None = None, open_now: Tensor | None = None,
    ) -> Step:  # fmt: skip
        """A step on the used slots of a window; without counts, one that commits them all."""
        eligible = window.positions >= 0
        if open_at_start is None or open_now is None:
            open_at_start = open_now = eligible.sum(1, dtype=torch.int32)
        return cls(
            stats, window, eligible, index, num_steps, open_at_start, open_now, random, config.score,
            config.order_temperature,
        )  # fmt: skip

    def _shaped(self, name: str) -> Tensor:
        x = getattr(self.stats, name)
        if x.numel() != self.eligible.numel():
            raise ValueError(f"the rule reads step.{name} but does not name it in `needs`")
        return x.view(self.eligible.shape)

    @property
    def token(self) -> Tensor:
        """Proposed token ids, int64 `[B, W]`."""
        return self._shaped("token")

    @property
    def confidence(self) -> Tensor:
        """Probability of the proposal, float32 `[B, W]`."""
        return self._shaped("confidence")

    @property
    def margin(self) -> Tensor:
        """Gap between the two largest probabilities, float32 `[B, W]`."""
        return self._shaped("margin")

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, float32 `[B, W]`."""
        return self._shaped("entropy")

    @cached_property
    def score(self) -> Tensor:
        """The configured score, float32 `[B, W]`: larger is committed earlier."""
        if self.score_name == "probability":
            return self.confidence
        if self.score_name == "margin":
            return self.margin
        if self.score_name == "entropy":
            return -self.entropy
        return torch.zeros_like(self.confidence)

    def select(
        self,
        rule: str = "none",
        *,
        score: Tensor | None = None,
        parameter: float | Tensor | None = None,
        strict: bool = False,
        cost: Tensor | None = None,
        gate: Tensor | None = None,
        need: int | Tensor | None = None,
        fill: int | Tensor | None = None,
        cap: int | Tensor | None = None,
    ) -> Tensor:
        """A prefix of the eligible slots in score order: `ops.select_tokens` with numbers allowed for tensors."""
        # A random order is Gumbel noise on equal scores.
        temperature = 1.0 if self.score_name == "random" and score is None else self.order_temperature
        noise = {}
        if temperature > 0:
            noise = {
                "order_temperature": self._per_request(temperature, torch.float32),
                "seed": self.random.seed,
                "step": self.random.step,
                "position": self.window.request_positions,
            }
        return ops.select_tokens(
            self.score if score is None else score,
            self.eligible,
            rule,
            parameter=self._per_request(parameter, torch.float32),
            strict=strict,
            cost=cost,
            gate=gate,
            need=self._per_request(need, torch.int32),
            fill=self._per_request(fill, torch.int32),
            cap=self._per_request(cap, torch.int32),
            **noise,
        ).selected

    def _per_request(self, value, dtype: torch.dtype) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.full((1,), value, dtype=dtype, device=self.eligible.device)
