# SPDX-License-Identifier: Apache-2.0
"""`select_tokens`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices


class SelectedTokens(NamedTuple):
    """What `select_tokens` returns."""

    selected: Tensor  #: bool [B, W]
    count: Tensor  # type: ignore[assignment]  #: int32 [B], how many are selected


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

    Let E be the eligible slots whose score is neither NaN nor -inf. E is ordered by score descending (-0 equals +0),
    then by slot ascending. Let P be those of E that pass `gate` and `rule`. Then

    - if the rule is not "none" and ``|P| >= min(need, |E|)``, the best `cap` of P are selected;
    - otherwise the best ``min(fill, |E|)`` of E are, whatever gate and rule say of them.

    Where E is empty nothing is selected. A row's result depends on that row alone.

    Published decoders in these terms: LLaDA's quota of k a step is rule "none" with ``fill=k``; Fast-dLLM's threshold
    is "threshold" with ``need=fill=1``; SDAR's dynamic remasking is "threshold", strict, with ``need=fill=k``; Dream's
    ``alg_temp`` is ``order_temperature``.

    Parameters
    ----------
    score : Tensor
        float32 [B, W], contiguous; W is at most 4096. +inf is allowed; NaN and -inf are never selected.
    eligible : Tensor
        bool [B, W]: the open slots.
    rule : str
        What P holds, within the gate:

        - "none": nothing.
        - "all": everything.
        - "threshold": every slot with ``score >= parameter``.
        - "factor": in order, the longest prefix in which the score of rank i = 2, 3, … is at least
          ``1 - parameter / (i + 1)``, computed in float32; rank 1 always passes (Fast-dLLM, arXiv 2505.22618, without
          its code's exception for the last masked token).
        - "entropy-bound": the longest prefix with ``sum(cost) - max(cost) <= parameter`` (EB-Sampler, arXiv
          2505.24857).
        - "entropy-sum": the longest prefix with ``sum(cost) < parameter`` (JetEngine).
        - "bernoulli": every slot by itself with probability `cost`; needs `seed` and `position`.
    parameter : Tensor, optional
        float32: threshold, factor or budget of the rules that have one. A NaN lets nothing through but the first of
        "factor" and "entropy-bound". Like `need`, `fill`, `cap`, `order_temperature`, `seed` and `step` it holds one
        value, one for each row, or one for each group of consecutive rows.
    strict : bool
        Compare with > instead of >= in "threshold" and "factor".
    gate : Tensor, optional
        bool [B, W]: only these slots can be in P; ranks and sums count them alone.
    cost : Tensor, optional
        float32 [B, W]: entropies in nats for the entropy rules, which clamp them and the parameter to [0, 2^20] (NaN
        to 2^20) and add them as integers of 2^-32, so that the result is exact on every device; probabilities for
        "bernoulli", where NaN is 0.
    need, fill, cap : Tensor, optional
        int32, see above; default 0, 0 and no limit. A negative value counts as 0.
    order_temperature : Tensor, optional
        float32. In rows where it is positive the order of E is that of ``score * (1 / order_temperature)`` plus
        standard Gumbel noise, which draws slots without replacement from ``softmax(score / order_temperature)``.
        Thresholds still look at the score itself. Needs `seed` and `position`.
    seed : Tensor, optional
        int64: the request's random key.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [B, W]: the slots' positions in the request. Draws depend on (seed, position, step) alone.

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
