# SPDX-License-Identifier: Apache-2.0
"""Specification of `lm_head_candidates` in plain torch."""

import torch
from torch import Tensor

from .top_candidates import top_candidates


def lm_head_candidates(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    row_map: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `top_candidates` of the logits ``hidden @ weight.T``.

    Products are summed in float32 (float64 if `hidden` is float64), in any order, and logits are rounded to the dtype
    of `hidden`.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden.to(wide) @ weight.to(wide).t()).to(hidden.dtype)
    return top_candidates(logits, k, row_map=row_map, banned=banned, bitmask=bitmask)
