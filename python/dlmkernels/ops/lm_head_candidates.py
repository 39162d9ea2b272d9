# SPDX-License-Identifier: Apache-2.0
"""`lm_head_candidates`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call
from .fakes import check_devices, check_gradients
from .top_candidates import TopCandidates


def lm_head_candidates(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    row_map: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> TopCandidates:
    """`top_candidates` of ``hidden @ weight.T``, the logits of an LM head, without the logits in memory.

    Works in at most 8 MB beyond its arguments and results, whatever the number of rows and tokens (for up to some 4,000
    elements a row). Logits are summed in float32 and rounded to the dtype of `hidden`, as a linear layer rounds its
    result; what differs from top_candidates of such a layer's logits are near ties.

    Parameters
    ----------
    hidden : Tensor
        float32, bfloat16 or float16 [R, d]: the hidden states that the LM head takes; stride 1 in the last dimension,
        any row stride.
    weight : Tensor
        [V, d], dtype of `hidden`, V >= 1: the head's weights; strides likewise.
    k : int
        Candidates of a row, 1 to 64.
    row_map : Tensor, optional
        int32 [N]: the row of `hidden` that each output row takes, in [-1, R); -1 marks an unused row. Default: output
        row n takes row n, N = R.
    banned, bitmask : Tensor, optional
        Ids that are no candidates, and which may be: as in `top_candidates`.

    Returns
    -------
    TopCandidates
        As `top_candidates` returns it.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride; and, on the CPU, for a value out of range. Elsewhere a source row or
        an id out of range is none. The message names the argument.

    Notes
    -----
    A row's result has the same bits whatever the batch and the number of threads. On a GPU the logits of as many rows
    as 8 MB have room for (14 of 262,144 bfloat16) are made at a time, and `weight` is read once for as many.
    """
    return TopCandidates(
        *call(
            native.lm_head_candidates.default,
            hidden,
            weight,
            k,
            row_map=row_map,
            banned=banned,
            bitmask=bitmask,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("lm_head_candidates"))
def _fake(hidden, weight, k, *, row_map=None, **optional):
    check_devices("lm_head_candidates", {"hidden": hidden, "weight": weight}, {"row_map": row_map, **optional})
    check_gradients("lm_head_candidates", hidden=hidden, weight=weight)
    rows = hidden.shape[0] if row_map is None else row_map.shape[0]
    return (
        hidden.new_empty((rows, k), dtype=torch.int64),
        hidden.new_empty((rows, k), dtype=torch.float32),
        hidden.new_empty((rows,), dtype=torch.float32),
    )
