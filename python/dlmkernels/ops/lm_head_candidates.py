# SPDX-License-Identifier: Apache-2.0
"""`lm_head_candidates`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

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
    """Compute `top_candidates` of ``hidden @ weight.T``, the logits of an LM head, without materializing the logits.

    Needs at most 8 MB of memory beyond its arguments and results, whatever the number of rows and tokens (for rows of
    up to about 4,000 elements). Logits are summed in float32 and rounded to the dtype of `hidden`, as a linear layer
    rounds its result. Results differ from `top_candidates` of such a layer's logits only in near ties.

    Parameters
    ----------
    hidden : Tensor
        float32, bfloat16 or float16 [R, d]: the hidden states that the LM head takes; stride 1 in the last dimension,
        any row stride.
    weight : Tensor
        [V, d], dtype of `hidden`, V >= 1: the weights of the head; stride 1 in the last dimension, any row stride.
    k : int
        Number of candidates per row, 1 to 64.
    row_map : Tensor, optional
        int32 [N]: the row of `hidden` that each output row reads, in [-1, R); -1 marks an unused row. By default,
        output row n reads row n and N = R.
    banned, bitmask : Tensor, optional
        Token ids to exclude, and token ids that are allowed, as in `top_candidates`.

    Returns
    -------
    TopCandidates
        As returned by `top_candidates`.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride; and, on the CPU, for a value out of range. On CUDA, where values are
        not checked, a source row out of range is treated as unused and an id out of range is ignored. The message names
        the argument.

    Notes
    -----
    A row's result is bitwise identical whatever the batch and the number of threads. On a GPU, logits are computed for
    as many rows at a time as fit into 8 MB (14 rows of 262,144 bfloat16 logits), and `weight` is read once for each
    such group of rows.
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
