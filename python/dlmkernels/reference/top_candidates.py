# SPDX-License-Identifier: Apache-2.0
"""Specification of `top_candidates` in plain torch."""

import torch
from torch import Tensor

from .token_confidence import effective_logits


def top_candidates(
    logits: Tensor,
    k: int,
    *,
    row_map: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest logits of each row: ids, values and the row's logsumexp.

    Output row n reads logits row m = row_map[n]; -1 is an unused row. z is logits[m] in float32, with NaN as -inf, +inf
    as the largest finite float, and -inf for banned ids and ids whose bit is 0. Ids are in descending order of z, with
    equal z in ascending order of ids. Ids with z = -inf are not candidates: where fewer than k remain, and in unused
    rows, the missing ids are -1 and their values -inf. logsumexp is that of z, float64 if the logits are, else float32;
    it is -inf if all of z is.
    """
    row = torch.arange(len(logits), device=logits.device) if row_map is None else row_map.long()
    z, _ = effective_logits(logits, row, banned=banned, bitmask=bitmask)
    z = z.masked_fill((row < 0).unsqueeze(1), -torch.inf)
    z = torch.nn.functional.pad(z, (0, max(k - z.shape[1], 0)), value=-torch.inf)
    values, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    values, ids = values[:, :k], ids[:, :k]
    logsumexp = z.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).logsumexp(-1)
    return ids.masked_fill(values == -torch.inf, -1), values, logsumexp
