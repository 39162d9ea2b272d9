# SPDX-License-Identifier: Apache-2.0
"""Specification of `select_tokens` in plain torch."""

import torch
from torch import Tensor

from .randomness import bernoulli, gumbel, philox
from .rows import per_row

_MAX_COST = 2.0**20


def _fixed_point(costs: Tensor, if_nan: float) -> Tensor:
    """Convert costs to int64 with 32 fractional bits (csrc/common/fixed_point.h), whose sums are exact in any order."""
    clamped = costs.double().nan_to_num(if_nan).clamp(0.0, _MAX_COST)
    return (clamped * 2.0**32 + 0.5).floor().long()


def _longest_prefix(holds: Tensor) -> Tensor:
    """Return True up to, but not including, the first False."""
    return holds.long().cumprod(-1).bool()


def _rule_passes(rule: str, score: Tensor, parameter: Tensor, strict: bool, cost: Tensor, bits: Tensor) -> Tensor:
    """Return which slots pass the rule, given the slots of one row's E that pass the gate, best first."""
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
        total = cost.cumsum(-1)  # may overflow, but only after the first one that exceeds the budget
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

    E is the set of eligible slots whose score is neither NaN nor -inf. E is ordered by score, descending (-0 equals
    +0), then by slot, ascending. Where `order_temperature` is positive, it is ordered by score / temperature + Gumbel
    noise instead, descending (NaN last, like -inf), which draws from softmax(score / temperature) without replacement.
    P is the subset of E that passes the gate and the rule:

    - "none": nothing. "all": everything that passes the gate.
    - "threshold": score >= parameter (strict: >).
    - "factor": in order, the longest prefix of E within the gate whose score at rank i is >= 1 - parameter / (i + 1)
      (strict: >); rank 1 always passes.
    - "entropy-bound": the longest prefix with sum(cost) - max(cost) <= parameter.
    - "entropy-sum": the longest prefix with sum(cost) < parameter. For both entropy rules, costs and parameter are
      clamped to [0, 2^20] (a NaN cost to 2^20, a NaN parameter to 0) and rounded to integer multiples of 2^-32.
    - "bernoulli": each slot independently with probability `cost`.

    If the rule is not "none" and P has at least min(need, |E|) slots, its best `cap` are selected; otherwise the best
    `fill` of E, regardless of the gate. Negative need, fill and cap count as 0.
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
