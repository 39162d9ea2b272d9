# SPDX-License-Identifier: Apache-2.0
"""What a decoding returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..trace import Trace


@dataclass(frozen=True)
class DecodingOutput:
    """Result of `generate` and `infill`.

    Attributes
    ----------
    sequences : Tensor
        int64 `[B, T]`: prompt and decoded tokens; left padding is kept.
    num_forwards : Tensor
        int32 `[B]`: model forwards each request took part in before it was finished.
    commit_step : Tensor
        int32 `[B, T]`: forward (from 0) at which a token was committed; -1 for given tokens, masks that are left, and
        padding, after an end token too, whatever was committed there before.
    confidence : Tensor
        float32 `[B, T]`: probability a token had when it was committed, 0 where `commit_step` is -1.
    complete : Tensor
        bool `[B]`: False where masks were left because their logits held no finite value, because the constraint
        refused every token, or because the rule selected nothing. A warning says which.
    prompt_length : int
        Columns before the first generated one (0 for `infill`).
    length : Tensor
        int32 `[B]`: column at which each row ends. What stands behind it is padding, in decodings that change the
        length; in all others it is T.
    """

    sequences: Tensor
    num_forwards: Tensor
    commit_step: Tensor
    confidence: Tensor
    complete: Tensor
    prompt_length: int
    length: Tensor

    @property
    def generated(self) -> Tensor:
        """`sequences` without the prompt."""
        return self.sequences[:, self.prompt_length :]

    @property
    def decoded(self) -> Tensor:
        """Which tokens the decoding has chosen, bool `[B, T]`.

        False for what was given, for masks that are left, and for padding: before the prompt, after an end token, and
        behind `length`. So padding is told apart from the same id among the decoded tokens.
        """
        return self.commit_step >= 0

    @property
    def tokens_per_forward(self) -> Tensor:
        """Decoded tokens over forwards, float32 `[B]`; 0 where there was nothing to decode."""
        return self.decoded.sum(1) / self.num_forwards.clamp(min=1)

    @property
    def log_probability(self) -> Tensor:
        """Logarithm of `confidence`, float32 `[B, T]`: what each token's probability was when it was committed.

        From the distribution the configuration names (`distribution`, by default the model's own); 0 where `decoded`
        is False. Their sum over a row is the logarithm of the product of the steps' choices, not of the row's
        likelihood: see `log_likelihood`.
        """
        return torch.where(self.decoded, self.confidence.log(), 0.0)

    @property
    def trace(self) -> Trace:
        """Which token was committed when, with pictures."""
        return Trace(self.sequences, self.commit_step, self.confidence, self.prompt_length)
