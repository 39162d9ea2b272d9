# SPDX-License-Identifier: Apache-2.0
"""Uniform and normal random numbers from the same counters as every other draw: they depend only on the request.

No kernel generates these. A program that needs them computes them here, on whatever device its tensors are.
"""

import math

import torch
from torch import Tensor

from .randomness import philox


def uniforms(seed: Tensor, position: Tensor, step: Tensor, stream: str, index: Tensor) -> Tensor:
    """Return float64 numbers strictly between 0 and 1, one per element of the broadcast int64 arguments of `philox`."""
    nothing = torch.zeros((), dtype=torch.int64, device=seed.device)  # no redraw; a number would come from the host
    return (philox(seed, position, step, stream, index, nothing).double() + 0.5) * 2.0**-32


def normals(seed: Tensor, position: Tensor, step: Tensor, width: int) -> Tensor:
    """Return standard normal float32 numbers: `width` per element of the int64 arguments, in a new last dimension.

    Uses the Box-Muller transform on the stream "normal": words 2 i and 2 i + 1 give elements 2 i and 2 i + 1.

    Parameters
    ----------
    seed, position, step : Tensor
        int64, broadcast against each other.
    width : int
        Size of the last dimension of the result.
    """
    pairs = torch.arange((width + 1) // 2, device=seed.device)
    seed, position, step = (x.unsqueeze(-1) for x in torch.broadcast_tensors(seed, position, step))
    radius = (-2 * uniforms(seed, position, step, "normal", 2 * pairs).log()).sqrt()
    angle = 2 * math.pi * uniforms(seed, position, step, "normal", 2 * pairs + 1)
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return both.flatten(-2)[..., :width].float()
