# SPDX-License-Identifier: Apache-2.0
"""`verify_drafts`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices


class VerifiedDrafts(NamedTuple):
    """Result of `verify_drafts`."""

    accepted: Tensor  #: int32 [B], number of accepted drafts
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

    The target model has been run on the drafts, giving W + 1 rows of logits per batch row: row i is the distribution of
    draft i given the drafts before it, and the last row is the distribution of the token after all drafts.
    `token_confidence` on these rows is the only pass over the vocabulary: this op takes the ``token`` and ``logsumexp``
    that it returns.

    **By comparison** (`draft_logits` is None). A draft is accepted if it equals the token that the target drew in that
    row. The first draft that differs is replaced by the target's token, and after the last draft comes the target's own
    next token. So for any drafter, and under any temperature, filter, ban or guidance of `token_confidence`, the tokens
    are those that drawing one token at a time from the target would give. At a positive temperature, a draft s is
    accepted with probability p(s), which is exact acceptance for a draft that was not sampled (an argmax). Drafts
    sampled by `token_confidence` with the same seed, step and position share the target's noise, and are accepted
    nearly as often as by ratio.

    **By ratio** (`draft_logits` is given; rows whose temperature is 0 still compare). With p and q the ``softmax(z /
    T)`` of the target and the drafter, a draft s is accepted with probability ``min(1, p(s) / (leniency * q(s)))``. The
    first draft that is rejected is replaced by a draw from the positive part of ``p - q``. This preserves the target's
    distribution if the drafts were sampled from q and leniency is 1 (Leviathan et al., ICML 2023; Chen et al., arXiv
    2302.01318). I-DLM as served (arXiv 2604.11035) drafts the argmax but still applies the ratio, with a leniency:
    fewer drafts are rejected, but the distribution changes. Logits are used unmodified except for `banned`; use
    comparison for a target with filters, bias or guidance.

    Parameters
    ----------
    drafts : Tensor
        int64 [B, W], contiguous like all tensors except the logits; -1 means that the row has no draft here or later.
    token : Tensor
        int64 [B, W + 1]: the target's choice in each row, ``token_confidence(...).token``; -1 for none.
    logits, draft_logits : Tensor, optional
        float32, bfloat16 or float16 [R, V] and [Q, V] of the same dtype, any row stride: the logits of the target, and
        those that the drafts were drawn from. Pass both, together with both logsumexps, `temperature`, `seed` and
        `position`.
    logsumexp, draft_logsumexp : Tensor, optional
        float32 [B, W + 1] and [B, W], of ``z / T`` without the banned ids: ``token_confidence(...,
        distribution="tempered").logsumexp``.
    row_map, draft_row_map : Tensor, optional
        int32 [B, W + 1] and [B, W]: the rows of `logits` and `draft_logits` that belong to each draft. -1 means that
        there is none, and the draft is compared. By default rows are consecutive, with R = B (W + 1) and Q = B W. The
        row after the last draft is not read.
    banned : Tensor, optional
        int64 [K]: token ids with probability 0 in both distributions, -1 for none.
    temperature : Tensor, optional
        float32, the temperature of both distributions: 0, or finite and at least 1.2e-38. Like `seed` and `step`, it
        holds one value, one per row or one per group of consecutive rows.
    leniency : float
        1 is exact. Values above 1 accept fewer drafts, values below 1 more; 0 accepts every draft that the target could
        produce.
    seed : Tensor, optional
        int64: the request's random key.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [B]: position of the first draft in the row's request. Draws depend only on (seed, position, step).

    Returns
    -------
    VerifiedDrafts
        `accepted` int32 [B], and `tokens` int64 [B, W + 1]: the accepted drafts, then at index `accepted` the target's
        token or the replacement, then -1. These are proposals for `remask_`.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, a negative leniency, or a missing argument that `draft_logits`
        requires; and, on the CPU, for a row, draft, banned id or temperature out of range. The message names the
        argument. On CUDA, where values are not checked, a row out of range counts as missing, a draft outside the
        vocabulary is rejected and a banned id out of range is ignored.

    Notes
    -----
    Probabilities are float32 and bitwise identical on every device; a row's result does not depend on the batch. NaN
    among the logits has probability 0. If p exceeds q nowhere, the target's token replaces the rejected draft.
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
