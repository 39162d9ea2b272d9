# SPDX-License-Identifier: Apache-2.0
"""`soft_embedding`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients


def soft_embedding(
    logits: Tensor,
    weight: Tensor,
    *,
    row_map: Tensor | None = None,
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    mask_token_id: int = -1,
) -> Tensor:
    """Embed a distribution over tokens: ``softmax(z / T) @ weight``, without a tensor of probabilities.

    Published decoders in these terms: DiffusionGemma's self-conditioning, SSD-LM's and LangFlow's next input are the
    whole distribution; dInfer's iteration smoothing adds it, times a factor, to the mask's embedding. DMax embeds a
    decided position as ``p * E[token] + (1 - p) * E[mask]``: ``top_k=1`` with `mask_token_id`. It then restores the
    norm, which is a call with the norms for a table:
    ``out * soft_embedding(logits, weight.norm(dim=1, keepdim=True), ...) / out.norm(dim=1, keepdim=True)``.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V], V >= 1; stride 1 in the last dimension, any row stride. NaN counts as
        -inf, +inf as the largest finite float.
    weight : Tensor
        float32, bfloat16 or float16 [V, D], the embedding table, finite; strides likewise.
    row_map : Tensor, optional
        int32 [N]: the row of logits that each output row reads, in [-1, R); -1 marks an unused row. Default: output
        row n reads row n, N = R.
    temperature : Tensor, optional
        float32: T, finite and at least 1.2e-38; 0 stands for 1. One value, one a row or one a group of consecutive
        rows, like `top_k`.
    top_k : Tensor, optional
        int32: only logits that are at least the k-th largest have weight, ties included; 0: all. Meant for small k:
        few rows of `weight` are read.
    mask_token_id : int
        With `top_k`: the probability of what is not kept goes to this token's embedding. -1: the kept probabilities
        are renormalised.

    Returns
    -------
    Tensor
        [N, D], dtype of `weight`; zeros in unused rows and where no logit is finite.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, a mask token beyond the vocabulary or without `top_k`; and, on the
        CPU, for a value out of range in `row_map`, `temperature` or `top_k`. The message names the argument. On CUDA,
        where values are not checked, a row out of range is unused.

    Notes
    -----
    Sums are float32. On CUDA, weights are rounded to the dtype of a 16-bit `weight` before they are multiplied with
    it, unless there is a `top_k`. A row's result has the same bits whatever the batch and the number of threads.
    """
    return call(
        native.soft_embedding.default,
        logits,
        weight,
        row_map=row_map,
        temperature=one_value("temperature", temperature, logits),
        top_k=one_value("top_k", top_k, logits),
        mask_token_id=mask_token_id,
    )


@torch.library.register_fake(add_op_namespace_prefix("soft_embedding"))
def _fake(logits, weight, *, row_map=None, **optional):
    check_devices("soft_embedding", {"logits": logits, "weight": weight}, {"row_map": row_map, **optional})
    check_gradients("soft_embedding", logits=logits, weight=weight, **optional)
    return weight.new_empty((logits.shape[0] if row_map is None else row_map.shape[0], weight.shape[1]))
