# SPDX-License-Identifier: Apache-2.0
"""Specification of `soft_embedding` in plain torch."""

import torch
from torch import Tensor

from .rows import per_row


def soft_embedding(
    logits: Tensor,
    weight: Tensor,
    *,
    row_map: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    mask_token_id: int = -1,
) -> Tensor:
    """Embed a distribution over tokens: the sum over v of P(v) * weight[v].

    z = logits[row_map[n]], with NaN as -inf and +inf as the largest finite float32; P = softmax(z / T), with T = 1
    where the temperature is 0. With top_k[n] > 0, only logits at or above the k-th largest keep their probability. The
    probability of the others goes to `mask_token_id`, or, if that is -1, the kept probabilities are divided by their
    sum. Rows that hold only -inf, and rows with row_map -1, give zeros.

    The result has the dtype of `weight`; arithmetic is float64 if `weight` is, else float32.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    row = torch.arange(len(logits), device=logits.device) if row_map is None else row_map.long()
    rows, vocabulary = len(row), logits.shape[1]
    z = torch.nn.functional.pad(logits.to(wide), (0, 0, 0, 1), value=-torch.inf)[row]  # row -1 reads the padding
    z = z.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    asked = per_row(temperature, rows, 0.0).to(z)
    p = torch.softmax(z / torch.where(asked > 0, asked, 1.0).unsqueeze(1), -1)
    if top_k is not None:
        k = per_row(top_k, rows, 0).to(z.device).long()
        descending = z.sort(-1, descending=True).values
        kth = descending.gather(1, k.clamp(1, vocabulary).unsqueeze(1) - 1)
        kept = torch.where((k == 0).unsqueeze(1) | (z >= kth), p, 0.0)
        if mask_token_id >= 0:
            p = kept.index_add(1, torch.tensor([mask_token_id], device=p.device), (p - kept).sum(1, keepdim=True))
        else:
            p = kept / kept.sum(1, keepdim=True)
    p = p.masked_fill((z == -torch.inf).all(-1, keepdim=True), 0.0)
    return (p @ weight.to(wide)).to(weight.dtype)
