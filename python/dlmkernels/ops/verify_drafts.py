# SPDX-License-Identifier: Apache-2.0
"""`verify_drafts`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices


class VerifiedDrafts(NamedTuple):
    """What `verify_drafts` returns."""

    accepted: Tensor  #: int32 [B], how many drafts are accepted
    tokens: Tensor  #: int64 [B, W + 1], the accepted drafts, the token after them, then -1


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
    temperature: Tensor | float | None = None,
    leniency: float = 1.0,
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    position: Tensor | None = None,
) -> VerifiedDrafts:
    """Accept the longest prefix of each row's drafts that the target model agrees with, and add one token.

    The target model has been run on the drafts: its logits row i, of W + 1, is the distribution of the i-th draft
    given the drafts before it, and the last row that of the token after all of them. `token_confidence` on these rows
    is the only pass over the vocabulary: what it returns as ``token`` and ``logsumexp`` is what this op takes.

    **By comparison** (`draft_logits` None). A draft is accepted if it is the very token that the target drew in that
    row; the first that is not is replaced by that token, and after the last comes the target's own. So whatever
    drafted, and under any temperature, filter, ban or guidance of `token_confidence`, the tokens are those that
    drawing one token at a time from the target gives. At a temperature, a draft s is accepted with probability p(s),
    which is exact acceptance of a draft that was not drawn (an argmax); drafts drawn by `token_confidence` with the
    same seed, step and position share the target's noise, and are accepted nearly as often as by ratio.

    **By ratio** (with `draft_logits`; rows whose temperature is 0 compare). With p and q the target's and the
    drafter's ``softmax(z / T)``, a draft s passes with probability ``min(1, p(s) / (leniency * q(s)))``; the first
    that fails is replaced by a draw from the positive part of ``p - q``. This leaves the target's distribution as it
    is if drafts were drawn from q and leniency is 1 (Leviathan et al., ICML 2023; Chen et al., arXiv 2302.01318).
    I-DLM as served (arXiv 2604.11035) takes the argmax for draft and the ratio nevertheless, with a leniency: fewer
    rejections, and another distribution. Logits are taken as they are, but for `banned`; use comparison for a target
    that is filtered, biased or guided.

    Parameters
    ----------
    drafts : Tensor
        int64 [B, W], contiguous like all but the logits; -1: the row has no draft here and after.
    token : Tensor
        int64 [B, W + 1]: the target's choice in each row, ``token_confidence(...).token``; -1: none.
    logits, draft_logits : Tensor, optional
        float32, bfloat16 or float16 [R, V] and [Q, V] of one dtype, any row stride: the target's logits and those
        that the drafts came from. Together, and with both logsumexps, `temperature`, `seed` and `position`.
    logsumexp, draft_logsumexp : Tensor, optional
        float32 [B, W + 1] and [B, W], of ``z / T`` without the banned ids: ``token_confidence(...,
        distribution="tempered").logsumexp``.
    row_map, draft_row_map : Tensor, optional
        int32 [B, W + 1] and [B, W]: the rows of `logits` and `draft_logits` that belong to each draft. -1: there is
        none, the draft is compared. Default: one after another, R = B (W + 1) and Q = B W. The row after the last
        draft is not read.
    banned : Tensor, optional
        int64 [K]: ids that neither distribution has, -1 for none.
    temperature : Tensor, optional
        float32, that of both distributions: 0, or finite and at least 1.2e-38. Like `seed` and `step` it holds one
        value, one a row or one a group of consecutive rows.
    leniency : float
        Above 1: accept fewer drafts; below 1: more; 0: all that the target can draw.
    seed : Tensor, optional
        int64: the request's random key.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [B]: position of the first draft in the row's request. Draws depend on (seed, position, step) alone.

    Returns
    -------
    VerifiedDrafts
        `accepted` int32 [B], and `tokens` int64 [B, W + 1]: accepted drafts, at index `accepted` the target's token
        or the replacement, then -1: proposals for `remask_`.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, a negative leniency, a missing companion of `draft_logits`; and, on
        the CPU, for a row, draft, banned id or temperature out of range. The message names the argument. On CUDA,
        where values are not checked, a row out of range is none, a draft beyond the vocabulary fails and a banned id
        out of range bans nothing.

    Notes
    -----
    Probabilities are float32, of the same bits on every device; a row's result does not depend on the batch. NaN
    among the logits has probability 0. Where p exceeds q nowhere, the target's token stands in for the draw.
    """
    return VerifiedDrafts(
        *call(
            native.verify_drafts.default,
            drafts,
            token,
            logits=logits,
            logsumexp=logsumexp,
            row_map=row_map,
            draft_logits=draft_logits,
            draft_logsumexp=draft_logsumexp,
            draft_row_map=draft_row_map,
            banned=banned,
            temperature=one_value("temperature", temperature, drafts),
            leniency=leniency,
            seed=one_value("seed", seed, drafts),
            step=one_value("step", step, drafts),
            position=position,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("verify_drafts"))
def _fake(drafts, token, **optional):
    check_devices("verify_drafts", {"drafts": drafts, "token": token}, optional)
    return drafts.new_empty(drafts.shape[:1], dtype=torch.int32), token.new_empty(token.shape)
