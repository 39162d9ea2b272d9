# SPDX-License-Identifier: Apache-2.0
"""The specification of every op in plain torch: any device, no regard for speed.

A kernel is right when it agrees with the function of the same name here: ids, masks and counts exactly, floats within
the tolerance policy of the tests.
"""

import torch
from torch import Tensor

# --- randomness (csrc/common/philox.h) -------------------------------------------------------------------------------

STREAMS = {"token": 0, "order": 1, "bernoulli": 2, "renoise": 3, "verify": 4, "residual": 5}
_LOW32 = 0xFFFFFFFF


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, position: Tensor, step: Tensor, stream: str, index: Tensor) -> Tensor:
    """32 random bits (as int64) for each element: Philox4x32-10, key = seed, counter = (position, step, stream, index/4).

    Parameters
    ----------
    seed, position, step, index : Tensor
        int64, broadcast against each other; `index` is the vocabulary index (0 where a position needs one draw).
    stream : str
        A key of `STREAMS`.
    """
    seed, position, step, index = torch.broadcast_tensors(seed, position, step, index)
    c0, c1 = position & _LOW32, step & _LOW32
    c2, c3 = torch.full_like(c0, STREAMS[stream]), (index // 4) & _LOW32
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return torch.stack((c0, c1, c2, c3), -1).gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)


def _plain_log(x: Tensor) -> Tensor:
    """Logarithm of positive normal float32 values with one rounding an operation (Cephes' logf polynomial)."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    z = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + torch.tensor(c, dtype=torch.float32)
    p = (p * f) * z
    e = exponent.to(torch.float32)
    p = p + e * torch.tensor(-2.12194440e-4, dtype=torch.float32)
    p = p - 0.5 * z
    return (f + p) + e * 0.693359375


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel variates (float32) from 32 random bits; the same bits as the kernels give."""
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    y = 1.0 - u
    lost = (1.0 - y) - u
    return -_plain_log(-(_plain_log(y) + lost / y))


def bernoulli(bits: Tensor, p: Tensor) -> Tensor:
    """True with probability p."""
    return bits.double() < p.double() * 2.0**32


def uniform_below(bits: Tensor, n: int) -> Tensor:
    """Uniform integers in [0, n)."""
    return _multiply32(n, bits)[0] if n <= _LOW32 else bits


def per_row(values: Tensor | None, rows: int, absent: float) -> Tensor:
    """Expand a parameter given once, once a group of consecutive rows, or once a row, to one value a row."""
    if values is None:
        return torch.full((rows,), absent)
    values = values.reshape(-1)
    return values.repeat_interleave(rows // values.numel()) if values.numel() else values


# --- block_attention -------------------------------------------------------------------------------------------------


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
) -> Tensor:
    """Which cache slot each query row sees: bool [B, Q, S]."""
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
    visible = in_range.unsqueeze(1) & (i >= 0)
    if causal_block > 0:
        origin = per_row(block_origin, B, 0).long().view(B, 1, 1)
        block_i, block_j = (torch.where(x < origin, -1, (x - origin) // causal_block) for x in (i, j))
        visible = visible & (block_j <= block_i)
    if q_limit is not None:
        visible = visible & (k_order.unsqueeze(1) <= q_limit.unsqueeze(2))
    if window_left >= 0:
        visible = visible & (j >= i - window_left)
    if window_right >= 0:
        visible = visible & (j <= i + window_right)
    return visible


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
) -> tuple[Tensor, Tensor]:
    """Scatter, then attend: write the new K/V rows into the cache, then let every query row attend to what it sees.

    1. Row (b, i) has the cache slot ``slots[b, i]`` (default: i). If it is not -1 and new rows are given,
       ``k_new[b, i]`` and ``v_new[b, i]`` are written there; of rows with the same slot the highest i wins.
    2. The query in slot i sees slot j when all of these hold:
       - j lies in one of the half-open ranges ``kv_range[b]`` (default [0, S)); a range starts no earlier than the
         ranges before it end;
       - ``causal_block`` is 0 or block(j) <= block(i), block(x) = -1 before ``block_origin[b]`` (default 0) and
         (x - origin) // causal_block from there on;
       - ``k_order[b, j] <= q_limit[b, row]``, where these are given;
       - i - window_left <= j <= i + window_right, a side of -1 being open.
    3. s = scale * q.k over the visible slots (scale: 1/sqrt(D)), then softcap * tanh(s / softcap) if softcap > 0;
       out = softmax(s) . v, lse = log sum exp(s). A row that sees nothing (but logits of -inf), or has slot -1: zeros
       and -inf. What it does not see has no influence, NaN included.
    """
    (B, Q, H, D), (S, G) = q.shape, k_cache.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale
    if slots is None:
        slots = torch.arange(Q, device=q.device).expand(B, Q)
    if k_new is not None:
        for b in range(B):
            for row, slot in enumerate(slots[b].tolist()):
                if slot >= 0:
                    k_cache[b, slot], v_cache[b, slot] = k_new[b, row], v_new[b, row]

    visible = block_attention_mask(
        B, Q, S, slots, kv_range, causal_block=causal_block, block_origin=block_origin, q_limit=q_limit,
        k_order=k_order, window_left=window_left, window_right=window_right,
    )  # fmt: skip
    out = torch.zeros(B, Q, H, D, dtype=q.dtype, device=q.device)
    lse = torch.full((B, Q, H), -torch.inf, dtype=wide, device=q.device)
    for b in range(B):
        for row in range(Q):
            seen = visible[b, row].nonzero().flatten()
            if seen.numel() == 0:
                continue
            k = k_cache[b, seen].to(wide).repeat_interleave(H // G, dim=1)
            v = v_cache[b, seen].to(wide).repeat_interleave(H // G, dim=1)
            s = scale * torch.einsum("hd,nhd->hn", q[b, row].to(wide), k)
            if softcap > 0:
                s = softcap * torch.tanh(s / softcap)
            total = torch.logsumexp(s, dim=1)
            weights = torch.exp(s - torch.where(total == -torch.inf, 0, total).unsqueeze(1))
            lse[b, row] = total
            out[b, row] = torch.einsum("hn,nhd->hd", weights, v).to(q.dtype)
    return out, lse
