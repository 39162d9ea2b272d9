# SPDX-License-Identifier: Apache-2.0
"""Progress of a decoding, as input for models that are conditioned on time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """Progress of a decoding at one forward pass, for each of the B batch rows.

    Attributes
    ----------
    masked : Tensor
        float32 `[B]`: fraction of the positions to be decoded that are not yet committed, from 1 to 0.
    step, num_steps : Tensor, optional
        int32 `[B]`: index of the step within the row's current block, from 0, and number of steps planned for that
        block. None if decoding does not go block by block.
    progress : Tensor, optional
        float32 `[B]`: fraction of the steps planned for the whole generation that are done, from 0 to 1. None if
        decoding does not go block by block.
    time : Tensor, optional
        float32 `[B]`: diffusion time, from 1 (noise) to 0, for rules that follow a time grid. None for other rules.
    """

    masked: Tensor
    step: Tensor | None = None
    num_steps: Tensor | None = None
    progress: Tensor | None = None
    time: Tensor | None = None
