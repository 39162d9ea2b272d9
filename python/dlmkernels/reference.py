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
    """32 random bits (int64) an element: Philox4x32-10, key = seed, counter = (position, step, stream, index / 4).

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
        p = p * f + torch.tensor(c, dtype=torch.float32, device="cpu")
    p = (p * f) * z
    e = exponent.to(torch.float32)
    p = p + e * torch.tensor(-2.12194440e-4, dtype=torch.float32, device="cpu")
    p = p - 0.5 * z
    return (f + p) + e * 0.693359375


def _plain_exp(x: Tensor) -> Tensor:
    """Exponentials of float32 values up to 0, with one rounding an operation (Cephes' expf); 0 below -87.33654."""

    def c(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    normal = x >= c(-87.33654)
    x = torch.where(normal, x, 0.0)
    n = (x * c(1.44269504) + 12582912.0) - 12582912.0
    r = n * c(-0.693359375) + x
    r = n * c(2.12194440e-4) + r
    p = torch.full_like(r, 1.9875691500e-4)
    for a in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c(a)
    p = (p * (r * r) + r) + 1.0
    return torch.where(normal, p * ((n.to(torch.int32) + 127) << 23).view(torch.float32), 0.0)


def exponential(bits: Tensor) -> Tensor:
    """Standard exponential variates (float32) from 32 random bits; the same bits as the kernels give."""
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    y = 1.0 - u
    lost = (1.0 - y) - u
    return -(_plain_log(y) + lost / y)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel variates (float32) from 32 random bits; the same bits as the kernels give."""
    return -_plain_log(exponential(bits))


def bernoulli(bits: Tensor, p: Tensor) -> Tensor:
    """True with probability p."""
    return bits.double() < p.double() * 2.0**32


def uniform_below(bits: Tensor, n: int) -> Tensor:
    """Uniform integers in [0, n)."""
    return _multiply32(n, bits)[0] if n <= _LOW32 else bits


def per_row(values: Tensor | None, rows: int, absent: float) -> Tensor:
    """Expand a parameter given once, once a group of consecutive rows, or once a row, to one value a row."""
    if values is None:
        return torch.full((rows,), absent, device="cpu")
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
    if q_limit is not None and k_order is not None:
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
    if k_new is not None and v_new is not None:
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


# --- token_confidence ------------------------------------------------------------------------------------------------

FLAG_NAN, FLAG_POSITIVE_INFINITY, FLAG_NOTHING_ALLOWED = 1, 2, 4


def _effective_logits(logits, row, uncond_logits, cfg_scale, bias, banned, bitmask):
    """Logits that everything is computed from, float32 [N, V], and flags: guided, biased, sanitised, banned."""
    rows, vocabulary = len(row), logits.shape[1]

    def gathered(table: Tensor) -> Tensor:
        return torch.nn.functional.pad(table, (0, 0, 0, 1))[row].float()  # row -1 reads the padding

    def shared(table: Tensor) -> Tensor:
        table = table.unsqueeze(0) if table.dim() == 1 else table
        return table.repeat_interleave(rows // max(len(table), 1), 0) if len(table) else table

    z = gathered(logits)
    if uncond_logits is not None:
        uncond = gathered(uncond_logits)
        z = uncond + (per_row(cfg_scale, rows, 0.0) + 1.0).unsqueeze(1) * (z - uncond)
    if bias is not None:
        z = z + shared(bias)
    nan, positive = z.isnan(), z == torch.inf
    z = z.masked_fill(nan, -torch.inf).clamp(max=torch.finfo(torch.float32).max)
    if banned is not None:
        ids = shared(banned)
        hit = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=z.device)
        z = z.masked_fill(hit.scatter(1, torch.where(ids < 0, vocabulary, ids), True)[:, :vocabulary], -torch.inf)
    if bitmask is not None:
        words = shared(bitmask).unsqueeze(-1)
        allowed = (words >> torch.arange(32, dtype=torch.int32, device=z.device)) & 1
        z = z.masked_fill(allowed.reshape(rows, -1)[:, :vocabulary] == 0, -torch.inf)
    flags = FLAG_NAN * nan.any(-1) + FLAG_POSITIVE_INFINITY * positive.any(-1)
    return z, flags + FLAG_NOTHING_ALLOWED * (z == -torch.inf).all(-1)


def _kept(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, top_p_first: bool, keep_crossing: bool):
    """Top-k and top-p as rules on values: whatever ties with a kept logit is kept."""
    z = z.double()
    descending = z.sort(-1, descending=True).values
    kth = descending.gather(1, top_k.clamp(1, z.shape[1]).long().unsqueeze(1) - 1)
    in_k = (top_k == 0).unsqueeze(1) | (z >= kth)

    candidates = z if top_p_first else z.masked_fill(~in_k, -torch.inf)
    p = torch.softmax((candidates / temperature.double().unsqueeze(1)).sort(-1, descending=True).values, -1)
    mass = torch.nn.functional.pad(p.cumsum(-1), (1, 0))  # of the i largest
    larger = mass.gather(1, torch.searchsorted(-descending, -z))  # of the strictly larger logits
    at_least = mass.gather(1, torch.searchsorted(-descending, -z, right=True))
    limit = top_p.double().unsqueeze(1)
    in_p = larger <= limit if keep_crossing else (at_least <= limit) | (z == descending[:, :1])
    return in_k & (in_p | (limit >= 1)) & (z > -torch.inf)


def token_confidence(
    logits: Tensor,
    *,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond_logits: Tensor | None = None,
    cfg_scale: Tensor | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    top_p_first: bool = False,
    keep_crossing: bool = True,
    distribution: str = "raw",
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
    with_margin: bool = True,
    with_entropy: bool = True,
) -> tuple[Tensor, ...]:
    """Choose a token for each row, and describe the distribution it comes from.

    Output row n reads logits row m = row_map[n] (n without a map); -1 is an unused row. In float32, each operation
    rounded by itself::

        z = logits[m]                    or   u + (cfg_scale[n] + 1) * (c - u),   c = logits[m], u = uncond_logits[m]
        z = z + bias
        NaN -> -inf (flag 1), then +inf -> largest finite float (flag 2)
        banned ids, and ids whose bit is 0 -> -inf

    With T = temperature[n], or 1 where it is 0 or absent:

    - argmax: the lowest id with the largest z.
    - kept set: top-k keeps v iff z_v >= the k-th largest z. Top-p looks at q = softmax(z / T), renormalised over what
      top-k keeps unless top_p_first. With keep_crossing v is kept iff the mass of strictly larger z is <= p; without,
      iff the mass of all z >= z_v is <= p or z_v is the maximum. Both filters must keep v.
    - token: argmax where temperature is 0; else the lowest id with the largest z_v * (1/T) + gumbel(v), in float32,
      of the kept set. If that is -inf for all of them (overflow): argmax.
    - the distribution P: softmax(z), softmax(z / T), or softmax(z / T) over the kept set. confidence = P(token),
      margin = P_1 - P_2 of the two largest (P_2 = 0 if there is no second), entropy = -sum P log P, logsumexp = that
      of the (kept) logits z or z / T, p_given = P(given[n]), 0 where given is -1.
    - where every z is -inf (flag 4) and in unused rows (no flag): token and argmax -1, confidence and logsumexp
      -inf, margin, entropy and p_given 0.

    The statistics have the dtype float64 if logits have, else float32; masses of top-p are always float64.
    """
    vocabulary, device = logits.shape[1], logits.device
    row = torch.arange(len(logits), device=device) if row_map is None else row_map.long()
    rows = len(row)
    z, flags = _effective_logits(logits, row, uncond_logits, cfg_scale, bias, banned, bitmask)
    empty = (flags & FLAG_NOTHING_ALLOWED != 0) | (row < 0)

    asked = per_row(temperature, rows, 0.0).to(device)
    samples = asked > 0
    temper = torch.where(samples, asked, 1.0)
    k, p = per_row(top_k, rows, 0).to(device), per_row(top_p, rows, 1.0).to(device)
    kept = _kept(z, temper, k, p, top_p_first, keep_crossing)

    argmax = z.argmax(-1)  # the first one
    token = argmax
    if temperature is not None and position is not None:
        key, now = per_row(seed, rows, 0).unsqueeze(1), per_row(step, rows, 0).long().unsqueeze(1)
        index = torch.arange(vocabulary, device=device)
        noise = gumbel(philox(key, position.long().unsqueeze(1), now, "token", index))
        perturbed = (z * (1.0 / temper).unsqueeze(1) + noise).masked_fill(~kept, -torch.inf)
        best = perturbed.max(-1).values
        token = torch.where(samples & (best > -torch.inf), perturbed.argmax(-1), argmax)

    y = z.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if distribution != "raw":
        y = y / temper.to(y).unsqueeze(1)
    if distribution == "filtered":
        y = y.masked_fill(~kept, -torch.inf)
    probability = torch.softmax(y, -1)
    top = torch.nn.functional.pad(probability, (0, 1)).topk(2, -1).values
    chosen = torch.full_like(token, -1) if given is None else given
    p_given = probability.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(chosen < 0, 0.0)

    def unless_empty(values: Tensor, otherwise: float) -> Tensor:
        return torch.where(empty, torch.full_like(values, otherwise), values)

    none = y.new_empty(0)
    return (
        unless_empty(token, -1),
        unless_empty(argmax, -1),
        unless_empty(probability.gather(1, token.unsqueeze(1)).squeeze(1), -torch.inf),
        unless_empty(top[:, 0] - top[:, 1], 0.0) if with_margin else none,
        unless_empty(torch.special.entr(probability).sum(-1), 0.0) if with_entropy else none,
        unless_empty(y.logsumexp(-1), -torch.inf),
        unless_empty(p_given, 0.0),
        flags.masked_fill(row < 0, 0).to(torch.int32),
    )


# --- select_tokens ---------------------------------------------------------------------------------------------------

_MAX_COST = 2.0**20


def _fixed_point(costs: Tensor, if_nan: float) -> Tensor:
    """Costs as int64 with 32 fractional bits (csrc/common/fixed_point.h): their sums are exact in any order."""
    clamped = costs.double().nan_to_num(if_nan).clamp(0.0, _MAX_COST)
    return (clamped * 2.0**32 + 0.5).floor().long()


def _longest_prefix(holds: Tensor) -> Tensor:
    """True up to, not including, the first False."""
    return holds.long().cumprod(-1).bool()


def _rule_passes(rule: str, score: Tensor, parameter: Tensor, strict: bool, cost: Tensor, bits: Tensor) -> Tensor:
    """Which slots pass, given one row's E within the gate in order, best first."""
    n = score.numel()
    if rule in ("threshold", "factor"):
        if rule == "factor":
            rank = torch.arange(1, n + 1, device=score.device).to(score.dtype)
            parameter = 1 - parameter / (rank + 1)
        reaches = score > parameter if strict else score >= parameter
        if rule == "threshold":
            return reaches
        return _longest_prefix(reaches | (rank == 1))
    if rule in ("entropy-bound", "entropy-sum"):
        cost, budget = _fixed_point(cost, _MAX_COST), _fixed_point(parameter, 0.0)
        total = cost.cumsum(-1)  # may overflow, but only beyond the first that exceeds the budget
        if rule == "entropy-sum":
            return _longest_prefix(total < budget)
        largest = cost.cummax(-1).values if n else cost
        return _longest_prefix(total - largest <= budget)
    if rule == "bernoulli":
        return bernoulli(bits, cost)
    return torch.full((n,), rule == "all", device=score.device)


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    rule: str = "none",
    *,
    parameter: Tensor | None = None,
    strict: bool = False,
    gate: Tensor | None = None,
    cost: Tensor | None = None,
    need: Tensor | None = None,
    fill: Tensor | None = None,
    cap: Tensor | None = None,
    order_temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose slots of a window by score.

    E is the eligible slots whose score is neither NaN nor -inf. The order of E is: score descending (-0 equals +0),
    then slot ascending; where `order_temperature` is positive it is instead score / temperature + Gumbel noise
    descending (NaN last, like -inf), which draws from softmax(score / temperature) without replacement. P is what the
    gate and the rule leave of E:

    - "none": nothing. "all": everything within the gate.
    - "threshold": score >= parameter (strict: >).
    - "factor": in order, the longest prefix of E within the gate whose score of rank i is >= 1 - parameter / (i + 1)
      (strict: >); rank 1 always.
    - "entropy-bound": the longest prefix with sum(cost) - max(cost) <= parameter.
    - "entropy-sum": the longest prefix with sum(cost) < parameter. Costs and parameter of both entropy rules are
      clamped to [0, 2^20] (a NaN cost to 2^20, a NaN parameter to 0) and taken as integers of 2^-32.
    - "bernoulli": each slot by itself with probability `cost`.

    If the rule is not "none" and P has at least min(need, |E|) slots, its best `cap` are selected; otherwise the best
    `fill` of E, whatever the gate. Negative need, fill and cap count as 0.
    """
    B, W = score.shape
    selected = torch.zeros_like(eligible)
    parameter = per_row(parameter, B, 0.0).to(score)
    need, fill, cap = per_row(need, B, 0), per_row(fill, B, 0), per_row(cap, B, W)
    temperature = per_row(order_temperature, B, 0.0).to(score)
    seed, step = (per_row(x, B, 0).long().unsqueeze(1).to(score.device) for x in (seed, step))

    def bits(stream: str) -> Tensor:
        zero = torch.zeros_like(score, dtype=torch.long)
        return philox(seed, position.long(), step, stream, zero) if position is not None else zero

    noise, coin = gumbel(bits("order")), bits("bernoulli")
    for b in range(B):
        value = score[b]
        if temperature[b] > 0:
            value = (value * (1 / temperature[b]) + noise[b]).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        slots = (eligible[b] & (score[b] > -torch.inf)).nonzero().flatten()
        slots = slots[value[slots].argsort(descending=True, stable=True)]
        inside = slots[gate[b, slots]] if gate is not None else slots
        costs = cost[b, inside] if cost is not None else score[b, inside]
        passed = inside[_rule_passes(rule, score[b, inside], parameter[b], strict, costs, coin[b, inside])]
        if rule != "none" and len(passed) >= min(int(need[b]), len(slots)):
            chosen = passed[: max(int(cap[b]), 0)]
        else:
            chosen = slots[: max(int(fill[b]), 0)]
        selected[b, chosen] = True
    return selected, selected.sum(-1, dtype=torch.int32)


# --- remask_ ---------------------------------------------------------------------------------------------------------

_OPEN, _FROZEN, _EDITED, _DIRTY = 1, 2, 4, 8  # bits of a position's state (csrc/common/params.h)


def remask_(
    tokens: Tensor,
    state: Tensor,
    position: Tensor,
    proposal: Tensor,
    *,
    commit: Tensor | None = None,
    edit: Tensor | None = None,
    remask: Tensor | None = None,
    renoise: Tensor | None = None,
    confidence: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    step: Tensor | None = None,
    seed: Tensor | None = None,
    origin: Tensor | None = None,
    end: Tensor | None = None,
    mask_token_id: int = -1,
    vocab_size: int = 0,
    eos_token_ids: list[int] | tuple[int, ...] = (),
    eos_policy: str = "none",
    fill_token_id: int = -1,
) -> Tensor:
    """Write one denoising step into tokens, state and the records, in place; return the info of every row.

    A frozen position has been given: it is neither open nor decided and is never written. What stands from `end` on
    is not the request's: it is neither open, decided nor given, and is never written. Of the masks that apply to a slot
    the last one of commit, edit, remask, renoise acts, and the others leave no trace:

    - commit (open, proposal >= 0): the proposal; the position is decided; step and confidence are recorded.
    - edit (decided, proposal >= 0 and another token): the proposal; marked as edited; confidence is recorded.
    - remask (decided, or to be committed in this call): the mask token; open; records -1 and 0.
    - renoise: a uniform token; open; records -1 and 0.

    The end of a request is the first end-of-sequence token at a decided position with nothing given behind it. Then,
    with eos_policy "fill", a row in which nothing before its end is open gets `fill_token_id` in all positions after
    it; they are decided, with records -1 and 0. Positions whose token is not what it was before the call are marked
    dirty. The step of rows with a used slot grows by one.
    """
    B, T = tokens.shape
    row, slot = (position >= 0).nonzero(as_tuple=True)
    at = (row, position[row, slot].long())
    before, token, bits, proposed = tokens.clone(), tokens[at], state[at], proposal[row, slot]
    now = step.clone() if step is not None else torch.zeros(B, dtype=torch.int32, device=tokens.device)

    index = torch.arange(T, device=tokens.device)
    inside = index < per_row(end, B, T).to(tokens.device)[:, None]
    may_write = inside[at] & (bits & _FROZEN == 0)

    def asked(mask: Tensor | None) -> Tensor:
        return mask[row, slot] & may_write if mask is not None else torch.zeros_like(row, dtype=torch.bool)

    is_open = bits & _OPEN != 0
    commits = asked(commit) & is_open & (proposed >= 0)
    edits = asked(edit) & ~is_open & (proposed >= 0) & (proposed != token)
    renoises = asked(renoise)
    remasks = asked(remask) & (~is_open | commits) & ~renoises
    commits &= ~remasks & ~renoises
    edits &= ~remasks & ~renoises

    token = torch.where(commits | edits, proposed, token).masked_fill(remasks, mask_token_id)
    if renoise is not None:
        key, start = per_row(seed, B, 0)[row], per_row(origin, B, 0)[row]
        drawn = philox(key, at[1] - start, now[row].long(), "renoise", torch.zeros_like(row))
        token = torch.where(renoises, uniform_below(drawn, vocab_size), token)
    bits = torch.where(commits, bits & ~_OPEN, bits)
    bits = torch.where(edits, bits | _EDITED, bits)
    bits = torch.where(remasks | renoises, bits | _OPEN, bits)
    tokens[at], state[at] = token, bits

    if commit_step is not None:
        recorded = torch.where(commits, now[row], commit_step[at])
        commit_step[at] = recorded.masked_fill(remasks | renoises, -1)
    if commit_confidence is not None:
        recorded = commit_confidence[at]
        if confidence is not None:
            recorded = torch.where(commits | edits, confidence[row, slot], recorded)
        commit_confidence[at] = recorded.masked_fill(remasks | renoises, 0.0)
    if step is not None:
        step += (position >= 0).any(-1)

    def first(where: Tensor) -> Tensor:
        """Index of the first True of each row, or T."""
        return torch.where(where, index, T).amin(1) if T else torch.zeros(B, dtype=torch.long, device=tokens.device)

    def opens() -> Tensor:
        return inside & (state & (_OPEN | _FROZEN) == _OPEN)

    given = inside & (state & _FROZEN != 0)
    given_behind = given.flip(1).cumsum(1).flip(1) > 0
    decided = inside & (state & (_OPEN | _FROZEN) == 0)
    is_eos = torch.isin(tokens, torch.tensor(eos_token_ids, dtype=torch.long, device=tokens.device))
    eos = first(decided & ~given_behind & is_eos)
    if eos_policy == "fill":
        ends = (eos < T) & (first(opens()) > eos)
        tail = ends[:, None] & (index > eos[:, None]) & inside
        tokens.masked_fill_(tail, fill_token_id)
        state.copy_(torch.where(tail, state & ~_OPEN, state))
        if commit_step is not None:
            commit_step.masked_fill_(tail, -1)
        if commit_confidence is not None:
            commit_confidence.masked_fill_(tail, 0.0)
    changed = tokens != before
    state.copy_(torch.where(changed, state | _DIRTY, state))

    def per_request(slots: Tensor) -> Tensor:
        return torch.zeros(B, dtype=torch.long, device=tokens.device).index_add_(0, row, slots.long())

    open_after = opens()
    columns = (
        per_request(open_after[at]),
        open_after.sum(1),
        per_request(commits),
        per_request(edits),
        per_request(remasks | renoises),
        changed.sum(1),
        torch.where(eos < T, eos, -1),
        first(open_after),
        ~open_after.any(1),
    )
    return torch.stack([column.to(torch.int32) for column in columns], 1)


# --- verify_drafts ---------------------------------------------------------------------------------------------------


def _tempered_probabilities(z: Tensor, temperature: Tensor, logsumexp: Tensor, banned: Tensor | None) -> Tensor:
    """softmax(z / T) of one row of logits, float32, given its logsumexp; 0 where z is NaN and where an id is banned."""
    z = z.float().clamp(max=torch.finfo(torch.float32).max)
    p = _plain_exp((z * (1.0 / temperature) - logsumexp).clamp(max=0.0))
    return p if banned is None else p.index_fill(0, banned[banned >= 0], 0.0)


def verify_drafts(
    drafts: Tensor,
    token: Tensor,
    *,
    logits: Tensor | None = None,
    logsumexp: Tensor | None = None,
    row_map: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    draft_row_map: Tensor | None = None,
    banned: Tensor | None = None,
    temperature: Tensor | None = None,
    leniency: float = 1.0,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of each row's drafts and find the token after it.

    A row's drafts end at its first -1. Left to right, until one fails:

    - without draft logits, at temperature 0 and where one of the two rows is -1, draft i passes iff it is token[i];
      when it fails, token[i] takes its place;
    - else, with p and q = exp(z / T - logsumexp) in float32 (at most 1; 0 for NaN and for banned ids) of the target's
      and the draft's row, it passes with probability min(1, p(s) / (leniency * q(s))), 0 / 0 being 0, by the bits
      (position + i, step, "verify", 0); when it fails, the lowest id with the largest max(p - q, 0) / e takes its
      place, e being exponential noise of the stream "residual", and token[i] where p exceeds q nowhere.

    After the last draft comes token[i] of the row after it. Results: the number of drafts accepted, and the accepted
    drafts, the token after them, and -1 to the end.
    """
    B, W = drafts.shape
    tokens = torch.full_like(token, -1)
    accepted = torch.zeros(B, dtype=torch.int32, device=drafts.device)
    T = per_row(temperature, B, 0.0)
    key, now = per_row(seed, B, 0).long(), per_row(step, B, 0).long()
    for b in range(B):
        i = 0
        for i in range(W + 1):
            following = token[b, i]
            if i == W or drafts[b, i] < 0:
                break
            draft = int(drafts[b, i])
            row = int(row_map[b, i]) if row_map is not None else b * (W + 1) + i
            draft_row = int(draft_row_map[b, i]) if draft_row_map is not None else b * W + i
            if draft_logits is None or T[b] == 0 or row < 0 or draft_row < 0:
                if draft != following:
                    break
            else:
                assert logits is not None and logsumexp is not None and draft_logsumexp is not None
                assert position is not None
                p = _tempered_probabilities(logits[row], T[b], logsumexp[b, i], banned)
                q = _tempered_probabilities(draft_logits[draft_row], T[b], draft_logsumexp[b, i], banned)
                at, zero = position[b].long() + i, torch.zeros((), dtype=torch.long, device=drafts.device)
                bits = philox(key[b], at, now[b], "verify", zero)
                lenient = torch.tensor(leniency, dtype=torch.float32, device=q.device)
                if not bernoulli(bits, p[draft] / (lenient * q[draft])):
                    index = torch.arange(len(p), device=p.device)
                    rest = (p - q).clamp(min=0.0) / exponential(philox(key[b], at, now[b], "residual", index))
                    following = rest.argmax() if rest.max() > 0 else following
                    break
            tokens[b, i] = draft
        tokens[b, i] = following
        accepted[b] = i
    return accepted, tokens


# --- splice_ ---------------------------------------------------------------------------------------------------------

_INT32_MAX = torch.iinfo(torch.int32).max


def splice_(
    tokens: Tensor,
    start: Tensor,
    *,
    insert: Tensor | None = None,
    remove: Tensor | None = None,
    length: Tensor | None = None,
    end: Tensor | None = None,
    state: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    fill_token_id: int = -1,
    pad_token_id: int = -1,
) -> tuple[Tensor, Tensor]:
    """Insert positions before the slots of a window, and remove others.

    Slot w is position start + w; a start of -1 leaves the row alone. Slots below n = length (or end, by default T)
    are positions; the slot at n can only be inserted at; slots above are ignored, and a frozen position is not removed.
    The content of [start, n), spliced, is written from start on:

    - with length, all of it; the length becomes n + inserted - removed, and positions from there to n are padding:
      `pad_token_id`, frozen. If it exceeds T, nothing is done and the excess is reported.
    - else as much as [start, n) holds; the rest is dropped and its number reported, or the span is filled up with new
      positions.

    A new position holds `fill_token_id` and is open; new positions and padding have step -1 and confidence 0. Other
    content takes its state and records along, but for the dirty bit: a position is dirty if it was before or if its
    token changed.
    """
    B, T = tokens.shape
    before = tokens.clone()
    companions = [
        (values, values.clone(), new, padding)
        for values, new, padding in (
            (tokens, fill_token_id, pad_token_id),
            (state, _OPEN, _FROZEN),
            (commit_step, -1, -1),
            (commit_confidence, 0.0, 0.0),
        )
        if values is not None
    ]
    given_end = per_row(end, B, T)
    source = torch.arange(T, dtype=torch.int32, device=tokens.device).repeat(B, 1)
    info = torch.zeros(B, 3, dtype=torch.int32, device=tokens.device)
    for b in range(B):
        first, n = int(start[b]), int(length[b] if length is not None else given_end[b])
        if first < 0 or first > n:
            continue
        content: list[int] = []  # positions before the call, -1 for a new one
        inserted = removed = 0
        window = insert if insert is not None else remove
        for t in range(first, n + 1):
            w = t - first
            inside = window is not None and w < window.shape[1]
            count = int(insert[b, w]) if inside and insert is not None else 0
            content += [-1] * min(count, T + 1)
            inserted += count
            if t == n:
                break
            frozen = state is not None and bool(state[b, t] & _FROZEN)
            if inside and remove is not None and remove[b, w] and not frozen:
                removed += 1
            else:
                content.append(t)
        total = n + inserted - removed
        if length is not None and total > T:
            info[b, 2] = min(total - T, _INT32_MAX)
            continue
        info[b, 0], info[b, 1] = min(inserted, _INT32_MAX), removed
        if length is not None:
            length[b] = total
            content += [-2] * (n - total)
        else:
            info[b, 2] = min(max(total - n, 0), _INT32_MAX)
            content = (content + [-1] * (n - total))[: n - first]
        now = torch.tensor(content, dtype=torch.long, device=tokens.device)
        span = slice(first, first + len(content))
        for values, old, new, padding in companions:
            moved = old[b, now.clamp(min=0)] if T else old[b, :0]
            moved = torch.where(now == -1, torch.full_like(moved, new), moved)
            values[b, span] = torch.where(now == -2, torch.full_like(moved, padding), moved)
            if values is state:
                changed = (tokens[b, span] != before[b, span]) | (old[b, span] & _DIRTY != 0)
                state[b, span] = (state[b, span] & ~_DIRTY) | changed * _DIRTY
        source[b, span] = now.clamp(min=-1).int()
    return source, info


# --- soft_embedding --------------------------------------------------------------------------------------------------


def soft_embedding(
    logits: Tensor,
    weight: Tensor,
    *,
    row_map: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    mask_token_id: int = -1,
) -> Tensor:
    """The embedding of a distribution: sum over v of P(v) * weight[v].

    z = logits[row_map[n]], NaN being -inf and +inf the largest finite float32; P = softmax(z / T), T = 1 where the
    temperature is 0. With top_k[n] > 0 only logits at or above the k-th largest keep their probability; the others'
    goes to `mask_token_id`, or if that is -1 the kept ones are divided by their sum. Rows with nothing but -inf, and
    those with row_map -1, give zeros.

    The result has the dtype of `weight`; the arithmetic is float64 if `weight` is, else float32.
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
