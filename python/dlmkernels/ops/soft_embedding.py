# SPDX-License-Identifier: Apache-2.0
"""`soft_embedding`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

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
    """Embed a distribution over tokens: ``softmax(z / T) @ weight``, without materializing the probabilities.

    Published decoders in these terms: the self-conditioning of DiffusionGemma and the next input of SSD-LM and LangFlow
    use the whole distribution; dInfer's iteration smoothing adds it, times a factor, to the embedding of the mask
    token. DMax embeds a decided position as ``p * E[token] + (1 - p) * E[mask]``, which is ``top_k=1`` with
    `mask_token_id`. It then restores the norm, which is another call with the norms as the table:
    ``out * soft_embedding(logits, weight.norm(dim=1, keepdim=True), ...) / out.norm(dim=1, keepdim=True)``.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V], V >= 1; stride 1 in the last dimension, any row stride. NaN counts as
        -inf, +inf as the largest finite float.
    weight : Tensor
        float32, bfloat16 or float16 [V, D], the embedding table, with finite values; stride 1 in the last dimension,
        any row stride.
    row_map : Tensor, optional
        int32 [N]: the row of logits that each output row reads, in [-1, R); -1 marks an unused row. By default, output
        row n reads row n and N = R.
    temperature : Tensor, optional
        float32: T, finite and at least 1.2e-38; 0 is treated as 1. One value, one per row or one per group of
        consecutive rows, like `top_k`.
    top_k : Tensor, optional
        int32: only logits at or above the k-th largest keep their probability, ties included. 0 keeps all. Intended for
        small k, for which only a few rows of `weight` are read.
    mask_token_id : int
        With `top_k`: the token whose embedding receives the probability of everything that is not kept. -1 renormalizes
        the kept probabilities instead.

    Returns
    -------
    Tensor
        [N, D], dtype of `weight`; zeros in unused rows and where no logit is finite.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, a mask token outside the vocabulary or without `top_k`; and, on the
        CPU, for a value out of range in `row_map`, `temperature` or `top_k`. The message names the argument. On CUDA,
        where values are not checked, a row out of range is treated as unused.

    Notes
    -----
    Sums are float32. On CUDA, unless `top_k` is given, probabilities are rounded to the dtype of a 16-bit `weight`
    before they are multiplied with it. A row's result is bitwise identical whatever the batch and the number of
    threads.
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
