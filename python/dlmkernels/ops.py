# SPDX-License-Identifier: Apache-2.0
"""The ops, one function each: documentation, defaults, and a call of torch.ops.dlmkernels.

Where an argument may hold one value for all rows, a number of Python or numpy will do: ``temperature=0.7``. No op is
differentiable: where a gradient could be asked for, the call is an error. What an op writes must share no memory with
its other arguments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import ArgumentError as ArgumentError
from .arguments import call, one_value

# --- block_attention -------------------------------------------------------------------------------------------------


class BlockAttention(NamedTuple):
    """What `block_attention` returns."""

    out: Tensor
    lse: Tensor


def block_attention(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None = None,
    kv_range: Tensor | None = None,
    *,
    causal_block: int = 0,
    block_origin: Tensor | int | None = None,
    q_limit: Tensor | None = None,
    k_order: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
) -> BlockAttention:
    """Scatter, then attend: write new K/V rows at given cache slots, then attend over given ranges of the cache.

    Every way to reuse keys and values is a choice of slots and ranges: a full forward without a cache (`k_new` None,
    the fresh keys as the cache), appending a finished block, refreshing a window in the middle of a canvas, attending
    to a prompt and a suffix but not to what lies between them.

    Letters: B batch, Q query rows, H query heads, G key/value heads (H is a multiple of G; query head h reads key
    head h // (H / G)), D head dimension, S cache slots, N ranges. Tensors of floats may have any strides in their
    first three dimensions; index tensors are contiguous. All writing is complete before any row attends.

    Parameters
    ----------
    q : Tensor
        [B, Q, H, D], float32, bfloat16 or float16; D a multiple of 8, at most
        512; on CUDA 64, 128 or 256, or 32 in float32.
    k_new, v_new : Tensor or None
        [B, Q, G, D], dtype of `q`: keys and values of the query rows, to be written into the cache. Both or neither;
        without them nothing is written.
    k_cache, v_cache : Tensor
        [B, S, G, D], dtype of `q`; written at `slots` when `k_new` is given, and then not an expanded tensor. Slots
        that no row sees may hold anything, NaN included.
    slots : Tensor or None
        int32 [B, Q]: the cache slot of each query row. It says where the row's `k_new` and `v_new` go, and is the
        row's own place for `causal_block` and the sliding window. -1: unused row, nothing is written for it, its
        output is zero and its lse -inf. The other slots of a batch row should be distinct; if two rows name one slot,
        the later row is written. None: row i has slot i (then Q <= S).
    kv_range : Tensor or None
        int32 [B, N, 2], or [B, 2] for one range: half-open ranges of attended slots, ascending. A range starts no
        earlier than the ranges before it end, so an overlap counts once; start >= end is an empty range; N >= 1. None:
        [0, S). Left padding of p slots is a range that starts at p.
    causal_block : int
        0: no order between slots. n > 0: block-causal with blocks of n slots, a row sees the slots of its own block and
        of earlier ones; 1 is plain causal.
    block_origin : Tensor or None
        int32, one value or [B]: the slot at which block 0 starts, so that blocks can be counted from the prompt's end.
        Slots before it form one block that sees itself and is seen by all. None: 0.
    q_limit, k_order : Tensor or None
        int32 [B, Q] and [B, S], both or neither: slot j is seen only if ``k_order[b, j] <= q_limit[b, row]``. Any
        nesting of visible sets, in addition to the other conditions.
    window_left, window_right : int
        Sliding window: the row with slot i sees slots i - window_left ... i + window_right. -1: open on that side.
    softcap : float
        Positive: logits become ``softcap * tanh(s / softcap)``. 0: none.
    scale : float or None
        Factor of the logits ``q . k``. None: 1 / sqrt(D).

    Returns
    -------
    BlockAttention
        `out` [B, Q, H, D], contiguous, dtype of `q`: softmax-weighted values. `lse` [B, Q, H], float32: natural
        logarithm of the sum of the exponentials of the visible logits. A row that sees nothing: zeros and -inf.

    Raises
    ------
    ArgumentError
        Wrong device, dtype, shape, stride, or a slot or range outside the cache (checked on CPU only). The message
        names the argument; nothing has been written.

    Notes
    -----
    Arithmetic is float32. A row's result has the same bits whatever the batch, the other query rows and the number of
    threads; on the CPU also whatever the left padding (as `kv_range`), and a block attending to a cache gives the bits
    of the same rows in a full forward. NaN in a row of `q` stays in that row. A visible logit of -inf weighs nothing,
    one of +inf makes its row NaN.

    Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. Query heads that share
    a key head: Ainslie et al., "GQA", 2023. Block-causal order: Arriola et al., "Block Diffusion", 2025.
    """
    return BlockAttention(
        *call(
            torch.ops.dlmkernels.block_attention.default, q, k_new, v_new, k_cache, v_cache, slots, kv_range,
            causal_block=causal_block, block_origin=one_value("block_origin", block_origin, q), q_limit=q_limit,
            k_order=k_order, window_left=window_left, window_right=window_right, softcap=softcap, scale=scale,
        )
    )  # fmt: skip


# --- token_confidence ------------------------------------------------------------------------------------------------

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
      the set that top-k and top-p keep: the lowest id with the largest ``z * (1/T) + g``, where g is standard Gumbel
      noise from Philox4x32-10 (Salmon et al., SC 2011) with the row's seed as key and (position, step, id) as counter.
      (Should z / T overflow to -inf for the whole set, it is the argmax.)
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
        up to rounding. Like `temperature`, `top_k`, `top_p`, `seed` and `step` it holds one value, one for each row,
        or one for each group of consecutive rows.
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
        `top_k` or `top_p`. The message names the argument. On CUDA, where values are not checked, a row or an id out of
        range is none, and a temperature or a filter below its range is off.
    """
    return TokenConfidence(
        *call(
            torch.ops.dlmkernels.token_confidence.default,
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
            with_margin=with_margin,
            with_entropy=with_entropy,
        )
    )


# --- select_tokens ---------------------------------------------------------------------------------------------------


class SelectedTokens(NamedTuple):
    """What `select_tokens` returns."""

    selected: Tensor  #: bool [B, W]
    count: Tensor  # type: ignore[assignment]  #: int32 [B], how many are selected


def select_tokens(
    score: Tensor,
    eligible: Tensor,
    rule: str = "none",
    *,
    parameter: Tensor | float | None = None,
    strict: bool = False,
    gate: Tensor | None = None,
    cost: Tensor | None = None,
    need: Tensor | int | None = None,
    fill: Tensor | int | None = None,
    cap: Tensor | int | None = None,
    order_temperature: Tensor | float | None = None,
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    position: Tensor | None = None,
) -> SelectedTokens:
    """Choose the slots of each row's window to commit (or, with negated scores, to remask).

    Let E be the eligible slots whose score is neither NaN nor -inf. E is ordered by score descending (-0 equals +0),
    then by slot ascending. Let P be those of E that pass `gate` and `rule`. Then

    - if the rule is not "none" and ``|P| >= min(need, |E|)``, the best `cap` of P are selected;
    - otherwise the best ``min(fill, |E|)`` of E are, whatever gate and rule say of them.

    Where E is empty nothing is selected. A row's result depends on that row alone.

    Published decoders in these terms: LLaDA's quota of k a step is rule "none" with ``fill=k``; Fast-dLLM's threshold
    is "threshold" with ``need=fill=1``; SDAR's dynamic remasking is "threshold", strict, with ``need=fill=k``; Dream's
    ``alg_temp`` is ``order_temperature``.

    Parameters
    ----------
    score : Tensor
        float32 [B, W], contiguous; W is at most 4096. +inf is allowed; NaN and -inf are never selected.
    eligible : Tensor
        bool [B, W]: the open slots.
    rule : str
        What P holds, within the gate:

        - "none": nothing.
        - "all": everything.
        - "threshold": every slot with ``score >= parameter``.
        - "factor": in order, the longest prefix in which the score of rank i = 2, 3, … is at least
          ``1 - parameter / (i + 1)``, computed in float32; rank 1 always passes (Fast-dLLM, arXiv 2505.22618, without
          its code's exception for the last masked token).
        - "entropy-bound": the longest prefix with ``sum(cost) - max(cost) <= parameter`` (EB-Sampler, arXiv
          2505.24857).
        - "entropy-sum": the longest prefix with ``sum(cost) < parameter`` (JetEngine).
        - "bernoulli": every slot by itself with probability `cost`; needs `seed` and `position`.
    parameter : Tensor, optional
        float32: threshold, factor or budget of the rules that have one. A NaN lets nothing through but the first of
        "factor" and "entropy-bound". Like `need`, `fill`, `cap`, `order_temperature`, `seed` and `step` it holds one
        value, one for each row, or one for each group of consecutive rows.
    strict : bool
        Compare with > instead of >= in "threshold" and "factor".
    gate : Tensor, optional
        bool [B, W]: only these slots can be in P; ranks and sums count them alone.
    cost : Tensor, optional
        float32 [B, W]: entropies in nats for the entropy rules, which clamp them and the parameter to [0, 2^20] (NaN
        to 2^20) and add them as integers of 2^-32, so that the result is exact on every device; probabilities for
        "bernoulli", where NaN is 0.
    need, fill, cap : Tensor, optional
        int32, see above; default 0, 0 and no limit. A negative value counts as 0.
    order_temperature : Tensor, optional
        float32. In rows where it is positive the order of E is that of ``score * (1 / order_temperature)`` plus
        standard Gumbel noise, which draws slots without replacement from ``softmax(score / order_temperature)``.
        Thresholds still look at the score itself. Needs `seed` and `position`.
    seed : Tensor, optional
        int64: the request's random key.
    step : Tensor, optional
        int32: denoising step, default 0.
    position : Tensor, optional
        int32 [B, W]: the slots' positions in the request. Draws depend on (seed, position, step) alone.

    Returns
    -------
    SelectedTokens
        ``selected`` bool [B, W] and ``count`` int32 [B].

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, W above 4096, an unknown rule, or a missing `parameter`, `cost`,
        `seed` or `position`; the message names the argument.
    """
    return SelectedTokens(
        *call(
            torch.ops.dlmkernels.select_tokens.default,
            score,
            eligible,
            rule,
            parameter=one_value("parameter", parameter, score),
            strict=strict,
            gate=gate,
            cost=cost,
            need=one_value("need", need, score),
            fill=one_value("fill", fill, score),
            cap=one_value("cap", cap, score),
            order_temperature=one_value("order_temperature", order_temperature, score),
            seed=one_value("seed", seed, score),
            step=one_value("step", step, score),
            position=position,
        )
    )


# --- remask_ ---------------------------------------------------------------------------------------------------------

#: Bits of a canvas position's state.
STATE_OPEN, STATE_FROZEN, STATE_EDITED, STATE_DIRTY = 1, 2, 4, 8

#: Columns of the info that `remask_` returns.
INFO_FIELDS = ("open_window", "open", "committed", "edited", "remasked", "changed", "first_eos", "prefix", "done")


def remask_(
    tokens: Tensor,
    state: Tensor,
    position: Tensor,
    proposal: Tensor,
    *,
    commit: Tensor | None = None,
    edit: Tensor | None = None,
    remask: Tensor | None = None,
    renoise: Tensor | None = None,
    confidence: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    step: Tensor | None = None,
    seed: Tensor | int | None = None,
    origin: Tensor | int | None = None,
    end: Tensor | int | None = None,
    mask_token_id: int = -1,
    vocab_size: int = 0,
    eos_token_ids: list[int] | tuple[int, ...] = (),
    eos_policy: str = "none",
    fill_token_id: int = -1,
) -> Tensor:
    """Commit, edit, remask and renoise canvas positions of a batch: one denoising step, in place.

    The state of a position is a sum of bits: ``STATE_OPEN`` (1, still to be decided), ``STATE_FROZEN`` (2, given:
    prompt or infill context; never written, neither open nor decided whatever its other bits), ``STATE_EDITED`` (4, an
    edit has replaced its token), ``STATE_DIRTY`` (8, its token has changed since its keys and values were written;
    whoever writes those clears it). Other bits are kept. Positions from `end` on do not belong to the request: they
    are never written, and are neither open nor decided nor given.

    Of the masks that apply to a slot, only the last of this list acts, and the others leave no trace:

    - `commit`, where the position is open: the token becomes the proposal, the position is decided, and step and
      confidence are recorded;
    - `edit`, where it is decided and holds another token than the proposal: the token becomes the proposal, the edited
      bit is set and the confidence is recorded;
    - `remask`, where it is decided or to be committed in this call: the token becomes `mask_token_id`, the position is
      open, and -1 and 0 are recorded for step and confidence;
    - `renoise`: the token becomes a uniform draw from [0, vocab_size), the position is open, -1 and 0 are recorded.

    A negative proposal is neither committed nor edited in. The end of a request is its first end-of-sequence token at a
    decided position that has nothing given behind it: where something was given, the text goes on there. Afterwards
    `eos_policy` "fill" completes each row in which nothing before its end is open: every position after the end becomes
    `fill_token_id` and decided, and -1 and 0 are recorded. A position whose token is not what it was before the call
    gets the dirty bit. `step` grows by one in rows that have a used slot.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all others; written.
    state : Tensor
        uint8 [B, T]; written.
    position : Tensor
        int32 [B, W]: canvas position of each slot, distinct within a row; -1: the slot is unused. W is at most 4096.
        On CUDA, where values are not checked, a position off the canvas is unused too, and of slots at one position
        only the first is used.
    proposal : Tensor
        int64 [B, W]: token for each slot; negative: none.
    commit, edit, remask, renoise : Tensor, optional
        bool [B, W].
    confidence : Tensor, optional
        float32 [B, W]: what `commit_confidence` records of a commit or an edit.
    commit_step : Tensor, optional
        int32 [B, T]; written: the step in which a position was committed (0 without `step`).
    commit_confidence : Tensor, optional
        float32 [B, T]; written.
    step : Tensor, optional
        int32 [B]; written: the number of steps a row has taken.
    seed : Tensor, optional
        int64, one value, one a row or one a group of rows: random key of `renoise`.
    origin : Tensor, optional
        int32, likewise: canvas position at which the row's request starts, default 0. The draws of `renoise` depend
        on (seed, position - origin, step) alone.
    end : Tensor, optional
        int32, likewise: canvas position after the row's last, from 0 to the default T.
    mask_token_id : int
        Needed by `remask`.
    vocab_size : int
        Needed by `renoise`. If positive, committing or editing in a token id beyond it is an error (on the CPU).
    eos_token_ids : list of int
        The end-of-sequence tokens; may be empty. On CUDA at most 64.
    eos_policy : str
        "none" or "fill".
    fill_token_id : int
        Needed by the policy "fill".

    Returns
    -------
    Tensor
        int32 [B, 9], the columns ``INFO_FIELDS``: open positions among the row's slots; open positions in the row;
        positions committed, edited, and remasked or renoised (each counted once, under what acted on it, even if it was
        filled afterwards); positions whose token changed; canvas position of the end of the request (-1: it has none);
        of the first open position (T: none); 1 if no position is open, else 0. All are as the call leaves them.

    Raises
    ------
    ArgumentError
        Before anything is written: for a wrong device, dtype, shape or stride; an unknown policy; a missing
        `confidence`, `seed`, `mask_token_id`, `vocab_size` or `fill_token_id`; and, on the CPU, a position outside
        [-1, T) or given twice in a row, an end outside [0, T] and a token id beyond the vocabulary. The message names
        the argument.
    """
    return call(
        torch.ops.dlmkernels.remask_.default,
        tokens,
        state,
        position,
        proposal,
        commit=commit,
        edit=edit,
        remask=remask,
        renoise=renoise,
        confidence=confidence,
        commit_step=commit_step,
        commit_confidence=commit_confidence,
        step=step,
        seed=one_value("seed", seed, tokens),
        origin=one_value("origin", origin, tokens),
        end=one_value("end", end, tokens),
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        eos_policy=eos_policy,
        fill_token_id=fill_token_id,
    )


# --- verify_drafts ---------------------------------------------------------------------------------------------------


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
            torch.ops.dlmkernels.verify_drafts.default,
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


# --- splice_ ---------------------------------------------------------------------------------------------------------

#: Columns of the info that `splice_` returns.
SPLICE_FIELDS = ("inserted", "removed", "overflow")


class Spliced(NamedTuple):
    """What `splice_` returns."""

    source: Tensor  #: int32 [B, T], where each position's content was before the call; -1: it is new
    info: Tensor  #: int32 [B, 3], the columns SPLICE_FIELDS


def splice_(
    tokens: Tensor,
    start: Tensor,
    *,
    insert: Tensor | None = None,
    remove: Tensor | None = None,
    length: Tensor | None = None,
    end: Tensor | int | None = None,
    state: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    fill_token_id: int = -1,
    pad_token_id: int = -1,
) -> Spliced:
    """Insert positions into a window of each row and remove others, in place; what lies behind moves along.

    Slot w of row b is canvas position ``start[b] + w``. Before it go ``insert[b, w]`` new positions, and it is itself
    taken out where ``remove[b, w]``; both together replace it. A new position holds `fill_token_id`, is open, and has
    -1 and 0 for step and confidence. All other content keeps its order, and its state and records with it. A row of
    the batch has one of two kinds of room:

    - with `length`, positions ``[0, length[b])`` are live and their number grows and shrinks. The slot at ``length[b]``
      inserts at the end. Positions that become free at the end hold `pad_token_id` and are frozen. A row that would
      need more than T positions is left as it is, and `info` says how many are missing.
    - without, ``[start[b], end[b])`` keeps its size: what is pushed beyond the end is dropped, what becomes free at the
      end is filled like an insertion. Positions from the end on stay as they are.

    Published decoders in these terms: LLaDA2.2 splits and deletes within a block of fixed size (its SPLIT is an
    insertion before the token); DreamOn's expanded masks and deleted ends, and DAEDAL's replacement of a doubtful
    position by eight masks (``insert=7`` before it, itself remasked) or its longer canvas, change the length.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all others; written.
    start : Tensor
        int32 [B]: canvas position of slot 0, -1: nothing happens in this row. Slots beyond the live positions or the
        end are ignored.
    insert : Tensor, optional
        int32 [B, W], W at most 4096: how many positions to insert before each slot. On CUDA, where values are not
        checked, a negative one counts as 0.
    remove : Tensor, optional
        bool [B, W]: the slots to take out. A frozen position stays.
    length : Tensor, optional
        int32 [B], in [0, T]; written.
    end : Tensor, optional
        int32, one value, one a row or one a group of consecutive rows, in [0, T]; default T. Not with `length`.
    state, commit_step, commit_confidence : Tensor, optional
        uint8, int32 and float32 [B, T], as `remask_` keeps them; written. ``STATE_DIRTY`` stays with the position,
        whose keys and values it is about, and is set where the token is not what it was before the call.
    fill_token_id : int
        Needed by `insert`, and by `remove` without `length`: the mask token.
    pad_token_id : int
        Needed by `remove` with `length`.

    Returns
    -------
    Spliced
        `source`, to move anything else that is kept by position: ``x.gather(1, source.clamp(min=0).long())``, new
        where it is -1. `info` int32 [B, 3]: positions inserted (asked for, of those dropped too), removed, and
        positions that found no room: dropped without `length`, missing with it (then nothing was done).

    Raises
    ------
    ArgumentError
        Before anything is written: for a wrong device, dtype, shape or stride, W above 4096, both `length` and `end`,
        a missing token id; and, on the CPU, for a start, length, end or count out of range. The message names the
        argument.
    """
    return Spliced(
        *call(
            torch.ops.dlmkernels.splice_.default,
            tokens,
            start,
            insert=insert,
            remove=remove,
            length=length,
            end=one_value("end", end, tokens),
            state=state,
            commit_step=commit_step,
            commit_confidence=commit_confidence,
            fill_token_id=fill_token_id,
            pad_token_id=pad_token_id,
        )
    )


# --- soft_embedding --------------------------------------------------------------------------------------------------


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
        torch.ops.dlmkernels.soft_embedding.default,
        logits,
        weight,
        row_map=row_map,
        temperature=one_value("temperature", temperature, logits),
        top_k=one_value("top_k", top_k, logits),
        mask_token_id=mask_token_id,
    )
