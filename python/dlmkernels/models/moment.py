# SPDX-License-Identifier: Apache-2.0
"""Where a decoding stands when it forwards a model that is conditioned on the time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """Where a decoding stands when it forwards the model.

    Attributes
    ----------
    masked : Tensor
        float32 `[B]`: share of what is to be decoded that is still open, from 1 to 0.
    step, num_steps : Tensor, optional
        int32 `[B]`: number of the step within the row's block, from 0, and how many are planned for the block. None
        with rules that do not go block after block.
    progress : Tensor, optional
        float32 `[B]`: share of the steps planned for the whole generation that lies behind, from 0 to 1; None as above.
    time : Tensor, optional
        float32 `[B]`: diffusion time, from 1 (noise) to 0, of rules that walk a time grid; None with the others.
    """

    masked: Tensor
    step: Tensor | None = None
    num_steps: Tensor | None = None
    progress: Tensor | None = None
    time: Tensor | None = None
