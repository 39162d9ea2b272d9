# SPDX-License-Identifier: Apache-2.0
"""Parameters that hold one value, one a group of rows or one a row."""

import torch
from torch import Tensor


def per_row(values: Tensor | None, rows: int, absent: float) -> Tensor:
    """Expand a parameter given once, once a group of consecutive rows, or once a row, to one value a row."""
    if values is None:
        return torch.full((rows,), absent, device="cpu")
    values = values.reshape(-1)
    return values.repeat_interleave(rows // values.numel()) if values.numel() else values
