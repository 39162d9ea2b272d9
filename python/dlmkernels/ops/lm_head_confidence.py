# SPDX-License-Identifier: Apache-2.0
"""`lm_head_confidence`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients
from .token_confidence import TokenConfidence


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    top_p_first: bool = False,
    keep_crossing: bool = True,
    distribution: str = "raw",
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    position: Tensor | None = None,
    redraw: Tensor | int | None = None,
    with_margin: bool = True,
    with_entropy: bool = True,
) -> TokenConfidence:
    """Compute `token_confidence` of ``hidden @ weight.T``, the logits of an LM head, without materializing the logits.

    ``lm_head_confidence(h, head.weight, ...)`` is
    ``token_confidence(torch.nn.functional.linear(h, head.weight), ...)`` in at most 8 MB of memory beyond its arguments
    and results, whatever the number of rows and tokens (for rows of up to about 4,000 elements; wider rows need
    additional memory). At any time only the logits of some rows and one chunk of the vocabulary exist, in a processor
    cache or in the shared memory of a GPU. They are summed in float32 and rounded to the dtype of `hidden`, as the
    linear layer rounds its result. The tokens are therefore the same except for near ties: two programs add in
    different orders, and where a sum lies close to the midpoint between two values of the dtype, they may round it
    differently.

    Parameters
    ----------
    hidden : Tensor
        float32, bfloat16 or float16 [R, d]: the hidden states that the LM head takes; stride 1 in the last dimension,
        any row stride.
    weight : Tensor
        [V, d], dtype of `hidden`, V >= 1: the weights of the head; stride 1 in the last dimension, any row stride. On
        the CPU, bfloat16 weights are read in place if rows start at multiples of 4 bytes and d is even; otherwise they
        are copied first, which is slower. A GPU is fast if all rows of `hidden` and `weight` start at multiples of 16
        bytes and their length in bytes is a multiple of 16.
    row_map : Tensor, optional
        int32 [N]: the row of `hidden` that each output row reads, in [-1, R); -1 marks an unused row. By default,
        output row n reads row n and N = R.
    given : Tensor, optional
        int64 [N]: the token id of each row whose probability to return, -1 for none.
    uncond_hidden : Tensor, optional
        Hidden states of the unconditional pass, for classifier-free guidance; same shape and dtype as `hidden`.
    cfg_scale : Tensor, optional
        float32, the guidance scale. Required with `uncond_hidden`, and allowed only with it.
    bias : Tensor, optional
        float32 [V] or [P, V], added to the rounded logits.
    banned, bitmask : Tensor, optional
        Token ids that must not be chosen, and token ids that are allowed.
    temperature, top_k, top_p, top_p_first, keep_crossing
        Control the distribution that tokens are sampled from. Filters need all logits of a row at once, so fewer rows
        are processed at a time, as many as fit into the memory limit, and `weight` is read once for each such group.
    distribution : str
        The distribution that the statistics describe: "raw", "tempered" or "filtered".
    seed, step, position, redraw : Tensor, optional
        Determine the random numbers.
    with_margin, with_entropy : bool
        Whether to compute the margin and the entropy.

    Parameters shared with `token_confidence` have the meaning, shape and dtype documented there.

    Returns
    -------
    TokenConfidence
        As returned by `token_confidence`.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, an unknown distribution, a missing `seed`, `position`, `cfg_scale`
        or `uncond_hidden`; and, on the CPU, for a value out of range. On CUDA, where values are not checked, a source
        row out of range is treated as unused and an id out of range is ignored, as in `token_confidence`. The message
        names the argument.

    Notes
    -----
    A row's result is bitwise identical whatever the batch and the number of threads. With AVX512_BF16 or AMX, products
    of bfloat16 values treat subnormal numbers as zero.

    On a GPU, tensor cores (`mma.sync`) multiply 16-bit elements, for up to 128 rows at a time (64 with guidance);
    float32 elements are multiplied one by one, for up to 32 rows. Devices add in different orders, so their tokens may
    differ in near ties, as those of any two programs may.
    """
    return TokenConfidence(
        *call(
            native.lm_head_confidence.default,
            hidden,
            weight,
            row_map=row_map,
            given=given,
            uncond_hidden=uncond_hidden,
            cfg_scale=one_value("cfg_scale", cfg_scale, hidden),
            bias=bias,
            banned=banned,
            bitmask=bitmask,
            temperature=one_value("temperature", temperature, hidden),
            top_k=one_value("top_k", top_k, hidden),
            top_p=one_value("top_p", top_p, hidden),
            top_p_first=top_p_first,
            keep_crossing=keep_crossing,
            distribution=distribution,
            seed=one_value("seed", seed, hidden),
            step=one_value("step", step, hidden),
            position=position,
            redraw=one_value("redraw", redraw, hidden),
            with_margin=with_margin,
            with_entropy=with_entropy,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("lm_head_confidence"))
def _fake(hidden, weight, *, row_map=None, with_margin=True, with_entropy=True, **optional):
    check_devices("lm_head_confidence", {"hidden": hidden, "weight": weight}, {"row_map": row_map, **optional})
    check_gradients("lm_head_confidence", hidden=hidden, weight=weight, **optional)
    rows = hidden.shape[0] if row_map is None else row_map.shape[0]
    lengths = [rows, rows, rows, rows if with_margin else 0, rows if with_entropy else 0, rows, rows, rows]
    dtypes = [torch.int64] * 2 + [torch.float32] * 5 + [torch.int32]
    return tuple(hidden.new_empty((n,), dtype=dtype) for n, dtype in zip(lengths, dtypes))
