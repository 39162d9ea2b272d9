# SPDX-License-Identifier: Apache-2.0
"""`top_candidates`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call
from .fakes import check_devices, check_gradients


class TopCandidates(NamedTuple):
    """Result of `top_candidates`: the best tokens of each row, best first."""

    ids: Tensor
    values: Tensor
    logsumexp: Tensor


def top_candidates(
    logits: Tensor,
    k: int,
    *,
    row_map: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> TopCandidates:
    """Return the k tokens with the largest logits of each row, and the logsumexp that yields their log-probabilities.

    ``values - logsumexp[:, None]`` are the log-probabilities of the candidates. Drafters choose among the candidates,
    trees of drafts branch into them, and servers report them. The logits are read once.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V], V >= 1; stride 1 in the last dimension, any row stride. NaN counts as
        -inf, +inf as the largest finite float.
    k : int
        Number of candidates per row, 1 to 64. May exceed V.
    row_map : Tensor, optional
        int32 [N]: the row of logits that each output row reads, in [-1, R); -1 marks an unused row. By default, output
        row n reads row n and N = R.
    banned : Tensor, optional
        int64 [K] or [P, K], P dividing N: token ids to exclude from the candidates and from the logsumexp, such as the
        mask token; -1 for none. Each of the P rows serves N / P consecutive output rows.
    bitmask : Tensor, optional
        int32 [ceil(V / 32)] or [P, ceil(V / 32)]: bit v % 32 of word v // 32 is 1 where token v is allowed, the layout
        that grammar checkers produce.

    Returns
    -------
    TopCandidates
        ids : int64 [N, k], in descending order of their logits, equal logits in ascending order of ids; values :
        float32 [N, k], the logits; logsumexp : float32 [N], over all logits of tokens that are not excluded. If fewer
        than k tokens have a logit above -inf, the remaining ids are -1 and their values -inf. In unused rows this holds
        for all k, and logsumexp is -inf.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, or a k out of range; and, on the CPU, for a value out of range in
        `row_map` or `banned`. The message names the argument. On CUDA, where values are not checked, a row out of range
        is treated as unused and an id out of range is ignored.

    Notes
    -----
    A row's result is bitwise identical whatever the batch and the number of threads.
    """
    return TopCandidates(
        *call(native.top_candidates.default, logits, k, row_map=row_map, banned=banned, bitmask=bitmask)
    )


@torch.library.register_fake(add_op_namespace_prefix("top_candidates"))
def _fake(logits, k, *, row_map=None, **optional):
    check_devices("top_candidates", {"logits": logits}, {"row_map": row_map, **optional})
    check_gradients("top_candidates", logits=logits)
    rows = logits.shape[0] if row_map is None else row_map.shape[0]
    return (
        logits.new_empty((rows, k), dtype=torch.int64),
        logits.new_empty((rows, k), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.float32),
    )
