# SPDX-License-Identifier: Apache-2.0
"""`select_tokens`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices


class SelectedTokens(NamedTuple):
    """Result of `select_tokens`."""

    selected: Tensor  #: bool [B, W]
    count: Tensor  # type: ignore[assignment]  #: int32 [B], number of selected slots


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    rule: str = "none",
    *,
    parameter: Tensor | float | None = None,
    strict: bool = False,
    gate: Tensor | None = None,
    cost: Tensor | None = None,
    need: Tensor | int | None = None,
    fill: Tensor | int | None = None,
    cap: Tensor | int | None = None,
    order_temperature: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    position: Tensor | None = None,
) -> SelectedTokens:
    """Choose the slots of each row's window to commit (or, with negated scores, to remask).

    Let E be the eligible slots whose score is neither NaN nor -inf. E is ordered by score, descending (-0 equals +0),
    then by slot, ascending. Let P be the slots of E that pass both `gate` and `rule`. Then

    - if the rule is not "none" and ``|P| >= min(need, |E|)``, the best `cap` slots of P are selected;
    - otherwise the best ``min(fill, |E|)`` slots of E are selected, regardless of gate and rule.

    If E is empty, nothing is selected. A row's result depends only on that row.

    Published decoders in these terms: LLaDA's quota of k tokens per step is rule "none" with ``fill=k``; Fast-dLLM's
    threshold is "threshold" with ``need=fill=1``; SDAR's dynamic remasking is "threshold", strict, with
    ``need=fill=k``; Dream's ``alg_temp`` is ``order_temperature``.

    Parameters
    ----------
    score : Tensor
        float32 [B, W], contiguous; W is at most 4096. +inf is allowed; NaN and -inf are never selected.
    eligible : Tensor
        bool [B, W]: the slots that may be selected, such as the open ones.
    rule : str
        Determines which slots, of those that pass the gate, are in P:

        - "none": no slot.
        - "all": every slot.
        - "threshold": every slot with ``score >= parameter``.
        - "factor": in order, the longest prefix in which the score at rank i = 2, 3, … is at least
          ``1 - parameter / (i + 1)``, computed in float32; rank 1 always passes (Fast-dLLM, arXiv 2505.22618, without
          the exception that its code makes for the last masked token).
        - "entropy-bound": the longest prefix with ``sum(cost) - max(cost) <= parameter`` (EB-Sampler, arXiv
          2505.24857).
        - "entropy-sum": the longest prefix with ``sum(cost) < parameter`` (JetEngine).
        - "bernoulli": each slot independently with probability `cost`; needs `seed` and `position`.
    parameter : Tensor, optional
        float32: the threshold, factor or budget, for the rules that have one. With a NaN nothing passes except the
        first slot of "factor" and "entropy-bound". Like `need`, `fill`, `cap`, `order_temperature`, `seed` and `step`,
        it holds one value, one per row, or one per group of consecutive rows.
    strict : bool
        Compare with > instead of >= in "threshold" and "factor".
    gate : Tensor, optional
        bool [B, W]: only these slots can be in P; ranks and sums count only them.
    cost : Tensor, optional
        float32 [B, W]. For the entropy rules, entropies in nats: costs and parameter are clamped to [0, 2^20] (a NaN
        cost to 2^20) and summed as integer multiples of 2^-32, so that the result is exact on every device. For
        "bernoulli", probabilities, with NaN as 0.
    need, fill, cap : Tensor, optional
        int32, see above; default 0, 0 and no limit. A negative value counts as 0.
    order_temperature : Tensor, optional
        float32. In rows where it is positive, E is ordered by ``score * (1 / order_temperature)`` plus standard Gumbel
        noise, which draws slots without replacement from ``softmax(score / order_temperature)``. Thresholds still
        compare the score itself. Needs `seed` and `position`.
    seed : Tensor, optional
        int64: the request's random key.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [B, W]: the slots' positions in the request. Draws depend only on (seed, position, step).

    Returns
    -------
    SelectedTokens
        ``selected`` bool [B, W] and ``count`` int32 [B].

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, W above 4096, an unknown rule, or a missing `parameter`, `cost`,
        `seed` or `position`; the message names the argument.
    """
    return SelectedTokens(
        *call(
            native.select_tokens.default,
            score,
            eligible,
            rule,
            parameter=one_value("parameter", parameter, score),
            strict=strict,
            gate=gate,
            cost=cost,
            need=one_value("need", need, score),
            fill=one_value("fill", fill, score),
            cap=one_value("cap", cap, score),
            order_temperature=one_value("order_temperature", order_temperature, score),
            seed=one_value("seed", seed, score),
            step=one_value("step", step, score),
            position=position,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("select_tokens"))
def _fake(score, eligible, rule="none", **optional):
    check_devices("select_tokens", {"score": score, "eligible": eligible}, optional)
    return score.new_empty(score.shape, dtype=torch.bool), score.new_empty(score.shape[:1], dtype=torch.int32)
