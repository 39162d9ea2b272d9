# SPDX-License-Identifier: Apache-2.0
"""`token_confidence`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

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
    """What `token_confidence` returns; a vector of N rows each."""

    token: Tensor  #: int64, the proposed token: sampled, or the argmax where the temperature is 0
    argmax: Tensor  #: int64
    confidence: Tensor  #: float32, probability of `token`
    margin: Tensor  #: float32, the largest probability less the second largest; [0] if not wanted
    entropy: Tensor  #: float32, in nats; [0] if not wanted
    logsumexp: Tensor  #: float32, of the logits of the distribution described
    p_given: Tensor  #: float32, probability of the given token
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
    """Propose a token for each row of logits and say how sure the model is of it, in one pass over the logits.

    A row's result depends on that row and its parameters alone, to the last bit: not on the batch, its order, or the
    number of threads. Everything is float32 from the load on, whatever the dtype of the logits; results are within
    about 1e-6, relative, of float64 arithmetic.

    In this order, each operation rounded by itself: the logits z are guided (``u + (cfg_scale + 1) * (c - u)``), then
    biased; NaN becomes -inf and +inf the largest finite float, both flagged (also where the id is then banned); ids
    that are banned or not allowed become -inf. Then

    - ``argmax`` is the lowest id with the largest z: no noise, no filter.
    - ``token`` is the argmax where the temperature is 0 or absent. Elsewhere it is a sample of ``softmax(z / T)`` over
      the set that top-k and top-p keep, drawn by a race in two levels (exponential races: Maddison, Tarlow and Minka,
      "A* sampling", NeurIPS 2014). With ``x = z * (1/T)`` and standard Gumbel noise g, each chunk of 256 consecutive
      ids has the key ``log(sum of e^x) + g``; then each id of the chunk with the largest key has the key ``x + g``,
      and the largest wins. Of equal keys the first wins; an x that overflows is the largest float with its sign. The
      noise comes from Philox4x32-10 (Salmon et al., SC 2011) with the row's seed as key and (position, step, redraw,
      chunk or id) as counter.
    - the statistics describe the distribution that `distribution` names.

    Filters go by value, so logits that are equal are kept or dropped together. Top-k keeps z_v iff it is at least the
    k-th largest. Top-p adds up probabilities of ``softmax(z / T)``, with T = 1 where the temperature is 0, and keeps
    z_v iff the mass of strictly larger logits is at most p (`keep_crossing`, nucleus sampling as published: the token
    that crosses p stays), or iff the mass of all logits at or above z_v is at most p or z_v is the maximum (without).

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V], V >= 1; stride 1 in the last dimension, any row stride.
    row_map : Tensor, optional
        int32 [N]: the row of logits that each output row reads, in [-1, R), in any order and repetition; -1 marks an
        unused row. Default: output row n reads row n, N = R.
    given : Tensor, optional
        int64 [N]: the ids whose probabilities are wanted, -1 for none.
    uncond_logits : Tensor, optional
        As `logits`, same shape and dtype: logits of the unconditional pass, for classifier-free guidance.
    cfg_scale : Tensor, optional
        float32, the guidance scale s, required by and only with `uncond_logits`; 0 gives back the conditional logits
        up to rounding. Like `temperature`, `top_k`, `top_p`, `seed`, `step` and `redraw` it holds one value, one for
        each row, or one for each group of consecutive rows.
    bias : Tensor, optional
        float32 [V] or [P, V], P a divisor of N: added to the logits; with P rows, each serves N / P consecutive rows.
    banned : Tensor, optional
        int64 [K] or [P, K]: ids that must not be chosen, -1 for none. Meant for a few ids; use `bitmask` for many.
    bitmask : Tensor, optional
        int32 [ceil(V / 32)] or [P, ceil(V / 32)]: bit v % 32 of word v // 32 is 1 where id v is allowed (the layout of
        xgrammar and llguidance).
    temperature : Tensor, optional
        float32, 0 (greedy) or finite and at least 1.2e-38 (so that 1/T is finite). Needs `seed` and `position`.
    top_k : Tensor, optional
        int32, 0: off.
    top_p : Tensor, optional
        float32 in [0, 1], 1: off.
    top_p_first : bool
        False: top-p looks at the distribution that top-k left, renormalised (SDAR, LLaDA2). True: top-p looks at the
        whole distribution (Dream).
    keep_crossing : bool
        See above.
    distribution : str
        What the statistics describe: "raw", ``softmax(z)``; "tempered", ``softmax(z / T)``, T = 1 where the
        temperature is 0; "filtered", the tempered distribution over the kept set, renormalised (also where the
        temperature is 0).
    seed : Tensor, optional
        int64: the request's random key. Needs `position`.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [N]: the rows' positions in their requests.
    redraw : Tensor, optional
        int32, at least 0, default 0: how often the position's draws have been refused in this step. A position that is
        asked again draws from random numbers of its own. Needs `seed`.
    with_margin, with_entropy : bool
        Whether these are wanted. Entropy costs a little; without, the result is an empty tensor.

    Returns
    -------
    TokenConfidence
        In an unused row, and where no id is left (flagged): token and argmax -1, confidence and logsumexp -inf,
        margin, entropy and p_given 0.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, an unknown distribution, a missing `seed`, `position`, `cfg_scale`
        or `uncond_logits`; and, on the CPU, for a value out of range in `row_map`, `given`, `banned`, `temperature`,
        `top_k`, `top_p` or `redraw`. The message names the argument. On CUDA, where values are not checked, a row or an
        id out of range is none, and a temperature or a filter below its range is off.
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
