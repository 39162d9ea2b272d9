# SPDX-License-Identifier: Apache-2.0
"""Specification of `token_confidence` in plain torch."""

import torch
from torch import Tensor

from .race import race
from .rows import per_row

FLAG_NAN, FLAG_POSITIVE_INFINITY, FLAG_NOTHING_ALLOWED = 1, 2, 4


def effective_logits(logits, row, uncond_logits=None, cfg_scale=None, bias=None, banned=None, bitmask=None):
    """Return the logits after guidance, bias, sanitizing and bans, float32 [N, V], and the flags of each row."""
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
        z = z.masked_fill(allowed.flatten(1)[:, :vocabulary] == 0, -torch.inf)
    flags = FLAG_NAN * nan.any(-1) + FLAG_POSITIVE_INFINITY * positive.any(-1)
    return z, flags + FLAG_NOTHING_ALLOWED * (z == -torch.inf).all(-1)


def _kept(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, top_p_first: bool, keep_crossing: bool):
    """Return which tokens top-k and top-p keep. The filters compare values: whatever ties with a kept logit is kept."""
    z = z.double()
    descending = z.sort(-1, descending=True).values
    kth = descending.gather(1, top_k.clamp(1, z.shape[1]).long().unsqueeze(1) - 1)
    in_k = (top_k == 0).unsqueeze(1) | (z >= kth)

    candidates = z if top_p_first else z.masked_fill(~in_k, -torch.inf)
    p = torch.softmax((candidates / temperature.double().unsqueeze(1)).sort(-1, descending=True).values, -1)
    mass = torch.nn.functional.pad(p.cumsum(-1), (1, 0))  # mass of the i largest
    larger = mass.gather(1, torch.searchsorted(-descending, -z))  # mass of the strictly larger logits
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
    redraw: Tensor | None = None,
    with_margin: bool = True,
    with_entropy: bool = True,
) -> tuple[Tensor, ...]:
    """Choose a token for each row, and describe the distribution it comes from.

    Output row n reads logits row m = row_map[n] (n without a map); -1 is an unused row. In float32, with each operation
    rounded separately::

        z = logits[m]                    or   u + (cfg_scale[n] + 1) * (c - u),   c = logits[m], u = uncond_logits[m]
        z = z + bias
        NaN -> -inf (flag 1), then +inf -> largest finite float (flag 2)
        banned ids, and ids whose bit is 0 -> -inf

    With T = temperature[n], or 1 where it is 0 or absent:

    - argmax: the lowest id with the largest z.
    - kept set: top-k keeps v iff z_v >= the k-th largest z. Top-p uses q = softmax(z / T), renormalized over what
      top-k keeps unless top_p_first. With keep_crossing, v is kept iff the mass of strictly larger z is <= p; without,
      iff the mass of all z >= z_v is <= p or z_v is the maximum. Both filters must keep v.
    - token: argmax where the temperature is 0; elsewhere drawn from the kept set by a two-level race (race.py) of
      z * (1/T), in float32.
    - the distribution P: softmax(z), softmax(z / T), or softmax(z / T) over the kept set. confidence = P(token),
      margin = P_1 - P_2 of the two largest (P_2 = 0 if there is no second), entropy = -sum P log P, logsumexp = that
      of the (kept) logits z or z / T, p_given = P(given[n]), 0 where given is -1.
    - where every z is -inf (flag 4) and in unused rows (no flag): token and argmax -1, confidence and logsumexp
      -inf, margin, entropy and p_given 0.

    The statistics are float64 if the logits are, else float32; the masses of top-p are always float64.
    """
    device = logits.device
    row = torch.arange(len(logits), device=device) if row_map is None else row_map.long()
    rows = len(row)
    z, flags = effective_logits(logits, row, uncond_logits, cfg_scale, bias, banned, bitmask)
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
        again = per_row(redraw, rows, 0).long().unsqueeze(1)
        drawn = race(
            z.masked_fill(~kept, -torch.inf), (1.0 / temper).unsqueeze(1), key, position.long().unsqueeze(1), now, again
        )
        token = torch.where(samples & kept.any(1), drawn, argmax)

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
