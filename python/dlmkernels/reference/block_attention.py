# SPDX-License-Identifier: Apache-2.0
"""Specification of `block_attention` in plain torch."""

import torch
from torch import Tensor

from .rows import per_row


def block_attention_mask(
    B: int,
    Q: int,
    S: int,
    slots: Tensor,
    kv_range: Tensor | None = None,
    *,
    causal_block: int = 0,
    block_origin: Tensor | None = None,
    q_limit: Tensor | None = None,
    k_order: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    k_slots: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return which cache slots each query row sees: bool [B, Q, S].

    `k_slots` holds the slots of the new rows, to which `visible` refers.
    """
    i = slots.long().unsqueeze(-1)
    j = torch.arange(S, device=slots.device)
    in_range = torch.ones(B, S, dtype=torch.bool, device=slots.device)
    if kv_range is not None:
        in_range[:] = False
        reached = torch.zeros(B, 1, dtype=torch.long, device=slots.device)
        ranges = kv_range.long() if kv_range.dim() == 3 else kv_range.long().unsqueeze(1)
        for one_range in ranges.unbind(1):
            start, end = one_range[:, :1], one_range[:, 1:]
            in_range |= (j >= torch.maximum(start, reached)) & (j < end)
            reached = torch.maximum(reached, end)
    seen = in_range.unsqueeze(1) & (i >= 0)
    if causal_block > 0:
        origin = per_row(block_origin, B, 0).long().view(B, 1, 1)
        block_i, block_j = (torch.where(x < origin, -1, (x - origin) // causal_block) for x in (i, j))
        seen = seen & (block_j <= block_i)
    if q_limit is not None and k_order is not None:
        seen = seen & (k_order.unsqueeze(1) <= q_limit.unsqueeze(2))
    if window_left >= 0:
        seen = seen & (j >= i - window_left)
    if window_right >= 0:
        seen = seen & (j <= i + window_right)
    if visible is not None:
        new_slots = (slots if k_slots is None else k_slots).tolist()
        for b, of_row in enumerate(new_slots):
            for row, slot in enumerate(of_row):
                if slot >= 0:
                    seen[b, :, slot] &= (visible[b, :, row // 32] >> row % 32 & 1).bool()
    return seen


def block_attention(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None = None,
    kv_range: Tensor | None = None,
    *,
    causal_block: int = 0,
    block_origin: Tensor | None = None,
    q_limit: Tensor | None = None,
    k_order: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
    cache_rows: Tensor | None = None,
    k_slots: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the new K/V rows into the cache, then let every query row attend to the slots that it sees.

    Batch row b reads and writes row c = ``cache_rows[b]`` of the caches (default: b). If ``cache_rows[b]`` is -1, all
    slots of the batch row count as -1.

    1. Row (b, i) has the cache slot ``slots[b, i]`` (default: i), and new row (b, i) the slot ``k_slots[b, i]``
       (default: ``slots[b, i]``). If the new row's slot is not -1, ``k_new[b, i]`` and ``v_new[b, i]`` are written
       there, in row c; of new rows with the same slot, the one with the highest i wins.
    2. The query in slot i sees slot j if all of these conditions hold:
       - j lies in one of the half-open ranges ``kv_range[b]`` (default [0, S)); a range starts no earlier than the
         ranges before it end;
       - ``causal_block`` is 0 or block(j) <= block(i), where block(x) is -1 before ``block_origin[b]`` (default 0) and
         (x - origin) // causal_block from there on;
       - ``k_order[b, j] <= q_limit[b, row]``, if these are given;
       - i - window_left <= j <= i + window_right, where -1 leaves that side unbounded;
       - the bit in ``visible[b, row]``, if given, is 1 for all new rows whose slot is j.
    3. s = scale * q.k over the visible slots (scale: 1/sqrt(D)), then softcap * tanh(s / softcap) if softcap > 0;
       out = softmax(s) . v, lse = log sum exp(s). A row with slot -1, or one that sees nothing (or only logits of
       -inf), has zeros and -inf. Slots that a row does not see have no influence on it, even if they hold NaN.
    """
    (B, Q, H, D), (S, G) = q.shape, k_cache.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale
    if slots is None:
        slots = torch.arange(Q, device=q.device).expand(B, Q)
    rows = list(range(B)) if cache_rows is None else cache_rows.tolist()
    unused = torch.tensor(rows, device=q.device)[:, None] < 0
    slots = slots.masked_fill(unused, -1)
    new_slots = slots if k_slots is None else k_slots.masked_fill(unused, -1)
    if k_new is not None and v_new is not None:
        for b in range(B):
            for row, slot in enumerate(new_slots[b].tolist()):
                if slot >= 0:
                    k_cache[rows[b], slot], v_cache[rows[b], slot] = k_new[b, row], v_new[b, row]

    sees = block_attention_mask(
        B, Q, S, slots, kv_range, causal_block=causal_block, block_origin=block_origin, q_limit=q_limit,
        k_order=k_order, window_left=window_left, window_right=window_right, k_slots=new_slots, visible=visible,
    )  # fmt: skip
    out = torch.zeros(B, Q, H, D, dtype=q.dtype, device=q.device)
    lse = torch.full((B, Q, H), -torch.inf, dtype=wide, device=q.device)
    for b in range(B):
        for row in range(Q):
            seen = sees[b, row].nonzero().flatten()
            if seen.numel() == 0:
                continue
            k = k_cache[rows[b], seen].to(wide).repeat_interleave(H // G, dim=1)
            v = v_cache[rows[b], seen].to(wide).repeat_interleave(H // G, dim=1)
            s = scale * torch.einsum("hd,nhd->hn", q[b, row].to(wide), k)
            if softcap > 0:
                s = softcap * torch.tanh(s / softcap)
            total = torch.logsumexp(s, dim=1)
            weights = torch.exp(s - torch.where(total == -torch.inf, 0, total).unsqueeze(1))
            lse[b, row] = total
            out[b, row] = torch.einsum("hn,nhd->hd", weights, v).to(q.dtype)
    return out, lse
