# SPDX-License-Identifier: Apache-2.0
"""The specification of `top_candidates` in plain torch."""

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
    """The k largest logits of each row: ids, values and the row's logsumexp.

    Output row n reads logits row m = row_map[n]; -1 is an unused row. z is logits[m] in float32 with NaN as -inf and
    +inf as the largest finite float, banned ids and ids whose bit is 0 being -inf. Ids are in descending order of z,
    equal ones in ascending order of ids. What has z = -inf is no candidate: where fewer than k are left, and in unused
    rows, ids are -1 and values -inf. logsumexp is that of z, float64 if logits are, else float32; -inf where all of z
    is.
    """
    row = torch.arange(len(logits), device=logits.device) if row_map is None else row_map.long()
    z, _ = effective_logits(logits, row, banned=banned, bitmask=bitmask)
    z = z.masked_fill((row < 0).unsqueeze(1), -torch.inf)
    z = torch.nn.functional.pad(z, (0, max(k - z.shape[1], 0)), value=-torch.inf)
    values, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    values, ids = values[:, :k], ids[:, :k]
    logsumexp = z.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).logsumexp(-1)
    return ids.masked_fill(values == -torch.inf, -1), values, logsumexp
