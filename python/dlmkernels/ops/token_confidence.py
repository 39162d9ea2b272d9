# SPDX-License-Identifier: Apache-2.0
"""`token_confidence`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients

#: Bits of `TokenConfidence.flags`.
FLAG_NAN, FLAG_POSITIVE_INFINITY, FLAG_NOTHING_ALLOWED = 1, 2, 4


class TokenConfidence(NamedTuple):
    """Result of `token_confidence`: vectors of N rows."""

    token: Tensor  #: int64, the proposed token: sampled, or the argmax where the temperature is 0
    argmax: Tensor  #: int64
    confidence: Tensor  #: float32, probability of `token`
    margin: Tensor  #: float32, largest probability minus second largest; shape [0] if not requested
    entropy: Tensor  #: float32, in nats; shape [0] if not requested
    logsumexp: Tensor  #: float32, logsumexp of the logits of the distribution described
    p_given: Tensor  #: float32, probability of `given`
    flags: Tensor  #: int32, sum of FLAG_NAN, FLAG_POSITIVE_INFINITY, FLAG_NOTHING_ALLOWED


def token_confidence(
    logits: Tensor,
    *,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond_logits: Tensor | None = None,
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
    """Propose a token for each row of logits and measure the model's confidence in it, in one pass over the logits.

    A row's result depends only on that row and its parameters, to the last bit: not on the batch, its order, or the
    number of threads. All arithmetic is float32, whatever the dtype of the logits; results agree with float64
    arithmetic to a relative error of about 1e-6.

    The logits z are processed in the following order, with each operation rounded separately. Guidance is applied
    (``u + (cfg_scale + 1) * (c - u)``), then the bias is added. NaN becomes -inf and +inf the largest finite float;
    both are flagged (even where the id is banned afterwards). The logits of ids that are banned or not allowed become
    -inf. Then

    - ``argmax`` is the lowest id with the largest z, without noise or filters.
    - ``token`` is the argmax where the temperature is 0 or absent. Otherwise it is a sample of ``softmax(z / T)`` over
      the set that top-k and top-p keep, drawn by a two-level race (exponential races: Maddison, Tarlow and Minka,
      "A* sampling", NeurIPS 2014). With ``x = z * (1/T)`` and standard Gumbel noise g, each chunk of 256 consecutive
      ids has the key ``log(sum of e^x) + g``; within the chunk with the largest key, each id has the key ``x + g``,
      and the largest key wins. Of equal keys the first wins; an x that overflows becomes the largest float of its sign.
      The noise comes from Philox4x32-10 (Salmon et al., SC 2011) with the row's seed as key and (position, step,
      redraw, chunk or id) as counter.
    - the statistics describe the distribution selected by `distribution`.

    Filters compare values, so equal logits are kept or dropped together. Top-k keeps z_v iff it is at least the k-th
    largest logit. Top-p sums probabilities of ``softmax(z / T)``, with T = 1 where the temperature is 0. With
    `keep_crossing` it keeps z_v iff the mass of strictly larger logits is at most p (nucleus sampling as published: the
    token that crosses p is kept). Without `keep_crossing` it keeps z_v iff the mass of all logits at or above z_v is at
    most p, or z_v is the maximum.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V], V >= 1; stride 1 in the last dimension, any row stride.
    row_map : Tensor, optional
        int32 [N]: the row of logits that each output row reads, in [-1, R), in any order and with repetitions allowed;
        -1 marks an unused row. By default, output row n reads row n and N = R.
    given : Tensor, optional
        int64 [N]: the token id of each row whose probability to return, -1 for none.
    uncond_logits : Tensor, optional
        Logits of the unconditional pass, for classifier-free guidance; same shape and dtype as `logits`.
    cfg_scale : Tensor, optional
        float32, the guidance scale s. Required with `uncond_logits`, and allowed only with it. 0 reproduces the
        conditional logits up to rounding. Like `temperature`, `top_k`, `top_p`, `seed`, `step` and `redraw`, it holds
        one value, one per row, or one per group of consecutive rows.
    bias : Tensor, optional
        float32 [V] or [P, V], added to the logits. P divides N, and each of the P rows serves N / P consecutive output
        rows.
    banned : Tensor, optional
        int64 [K] or [P, K]: token ids that must not be chosen, -1 for none. Intended for a few ids; use `bitmask` for
        many.
    bitmask : Tensor, optional
        int32 [ceil(V / 32)] or [P, ceil(V / 32)]: bit v % 32 of word v // 32 is 1 where id v is allowed (the layout of
        xgrammar and llguidance).
    temperature : Tensor, optional
        float32, 0 (greedy) or finite and at least 1.2e-38 (so that 1/T is finite). Needs `seed` and `position`.
    top_k : Tensor, optional
        int32; 0 disables the filter.
    top_p : Tensor, optional
        float32 in [0, 1]; 1 disables the filter.
    top_p_first : bool
        If False, top-p is computed on the distribution left by top-k, renormalized (SDAR, LLaDA2). If True, top-p is
        computed on the whole distribution (Dream).
    keep_crossing : bool
        Whether top-p keeps the token that crosses p; see above.
    distribution : str
        The distribution that the statistics describe: "raw", ``softmax(z)``; "tempered", ``softmax(z / T)``, T = 1
        where the temperature is 0; "filtered", the tempered distribution over the kept set, renormalized (also where
        the temperature is 0).
    seed : Tensor, optional
        int64: the request's random key. Needs `position`.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [N]: the rows' positions in their requests.
    redraw : Tensor, optional
        int32, at least 0, default 0: how many times a token drawn for this position has been rejected in this step.
        Each redraw of a position uses fresh random numbers. Needs `seed`.
    with_margin, with_entropy : bool
        Whether to compute the margin and the entropy. The entropy costs some time. A statistic that is not computed is
        returned as an empty tensor.

    Returns
    -------
    TokenConfidence
        In an unused row, and where no id is left (which is flagged), token and argmax are -1, confidence and logsumexp
        -inf, and margin, entropy and p_given 0.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, an unknown distribution, a missing `seed`, `position`, `cfg_scale`
        or `uncond_logits`; and, on the CPU, for a value out of range in `row_map`, `given`, `banned`, `temperature`,
        `top_k`, `top_p` or `redraw`. The message names the argument. On CUDA, where values are not checked, a row out
        of range is treated as unused, an id out of range is ignored, and a temperature or a filter below its range is
        off.
    """
    return TokenConfidence(
        *call(
            native.token_confidence.default,
            logits,
            row_map=row_map,
            given=given,
            uncond_logits=uncond_logits,
            cfg_scale=one_value("cfg_scale", cfg_scale, logits),
            bias=bias,
            banned=banned,
            bitmask=bitmask,
            temperature=one_value("temperature", temperature, logits),
            top_k=one_value("top_k", top_k, logits),
            top_p=one_value("top_p", top_p, logits),
            top_p_first=top_p_first,
            keep_crossing=keep_crossing,
            distribution=distribution,
            seed=one_value("seed", seed, logits),
            step=one_value("step", step, logits),
            position=position,
            redraw=one_value("redraw", redraw, logits),
            with_margin=with_margin,
            with_entropy=with_entropy,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("token_confidence"))
def _fake(logits, *, row_map=None, with_margin=True, with_entropy=True, **optional):
    check_devices("token_confidence", {"logits": logits}, {"row_map": row_map, **optional})
    check_gradients("token_confidence", logits=logits, **optional)
    rows = logits.shape[0] if row_map is None else row_map.shape[0]

    def empty(length, dtype=torch.float32):
        return logits.new_empty((length,), dtype=dtype)

    return (
        empty(rows, torch.int64),
        empty(rows, torch.int64),
        empty(rows),
        empty(rows if with_margin else 0),
        empty(rows if with_entropy else 0),
        empty(rows),
        empty(rows),
        empty(rows, torch.int32),
    )
