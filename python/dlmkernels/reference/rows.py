# SPDX-License-Identifier: Apache-2.0
"""Parameters that hold one value, one per group of rows or one per row."""

import torch
from torch import Tensor


def per_row(values: Tensor | None, rows: int, absent: float) -> Tensor:
    """Expand a parameter with one value, one per group of consecutive rows, or one per row, to one value per row."""
    if values is None:
        return torch.full((rows,), absent, device="cpu")
    values = values.reshape(-1)
    return values.repeat_interleave(rows // values.numel()) if values.numel() else values
