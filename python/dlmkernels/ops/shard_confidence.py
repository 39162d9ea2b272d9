# SPDX-License-Identifier: Apache-2.0
"""`shard_confidence`: documentation, call and fake implementation; and `combine_shards`, which merges its results."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import ArgumentError, call, one_value
from .fakes import check_devices, check_gradients
from .token_confidence import FLAG_NAN, FLAG_NOTHING_ALLOWED, FLAG_POSITIVE_INFINITY, TokenConfidence

#: Number of int64 words per row and shard.
SHARD_WORDS = 23
# Indices of the words; see csrc/common/shard.h.
_ARGMAX, _TOKEN, _FLAGS, _LARGEST, _WEIGHT, _EXPONENT, _DRAWN, _GIVEN, _WEIGHTS, _EXPONENTS = *range(9), 15
_UNUSED = 8
_FAR = 2.0**32


def shard_confidence(
    logits: Tensor,
    first: int,
    *,
    weight: Tensor | None = None,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond: Tensor | None = None,
    cfg_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | float | None = None,
    distribution: str = "raw",
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    position: Tensor | None = None,
    redraw: Tensor | int | None = None,
    with_entropy: bool = True,
) -> Tensor:
    """Summarize the logits of one shard of the vocabulary for each row, for `combine_shards` to merge.

    When an LM head is divided among ranks, each rank has the logits of some of the tokens. The ranks need not exchange
    logits: 184 bytes per row and rank are enough for everything that `token_confidence` returns. The combined result is
    bitwise identical however the vocabulary is divided. Token ids equal those of `token_confidence` on all logits, and
    statistics agree up to rounding (`token_confidence` sums in floating point, while sums over shards are exact).

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 [R, V]: the logits of tokens [first, first + V) of the vocabulary; with `weight`,
        hidden states [R, d] instead. Stride 1 in the last dimension, any row stride.
    first : int
        First token of the shard, a multiple of 256. Hence every shard except the last one of a vocabulary holds a
        multiple of 256 tokens.
    weight : Tensor, optional
        [V, d], dtype of `logits`: the shard's rows of an LM head. The logits are then never materialized, as in
        `lm_head_confidence`.
    row_map : Tensor, optional
        int32 [N]: the row that each output row reads; -1 marks an unused row. By default, output row n reads row n and
        N = R.
    given : Tensor, optional
        int64 [N]: the token id of each row whose probability to return, counted in the whole vocabulary; -1 for none.
    uncond : Tensor, optional
        Logits of the unconditional pass, for classifier-free guidance (with `weight`, hidden states); same shape and
        dtype as `logits`.
    cfg_scale : Tensor, optional
        float32, the guidance scale. Required with `uncond`, and allowed only with it.
    bias, bitmask : Tensor, optional
        The shard's part of the arguments of `token_confidence`: [V] or [P, V], and [ceil(V / 32)] or [P, ceil(V / 32)].
    banned : Tensor, optional
        int64 [K] or [P, K]: token ids that must not be chosen, counted in the whole vocabulary; -1 for none.
    temperature, seed, step, position, redraw : Tensor, optional
        Sampling parameters, as in `token_confidence`. Must be equal on all ranks.
    distribution : {"raw", "tempered", "filtered"}
        The distribution that the statistics describe. No filter is applied here, so "tempered" and "filtered" are
        equivalent. Top-k and top-p depend on a whole row; to use them, gather the logits.
    with_entropy : bool
        Whether to compute the entropy.

    Returns
    -------
    Tensor
        int64 [N, 23]: words whose meaning is documented in `reference.shard_confidence` and csrc/common/shard.h.

    Raises
    ------
    ArgumentError
        For a wrong device, dtype, shape or stride, a `first` that is not a multiple of 256, a missing `seed`,
        `position`, `cfg_scale` or `uncond`; and, on the CPU, for a value out of range. On CUDA, where values are not
        checked, a source row out of range is treated as unused and an id out of range is ignored. The message names the
        argument.

    Notes
    -----
    On the CPU the words equal those of the specification bit for bit. A GPU sums the exponentials of a chunk in its own
    order: combined results are bitwise identical however the vocabulary is divided among GPUs of the same kind, and the
    token ids are those that the CPU gives for the same logits.
    """
    return call(
        native.shard_confidence.default,
        logits,
        first,
        weight=weight,
        row_map=row_map,
        given=given,
        uncond=uncond,
        cfg_scale=one_value("cfg_scale", cfg_scale, logits),
        bias=bias,
        banned=banned,
        bitmask=bitmask,
        temperature=one_value("temperature", temperature, logits),
        distribution=distribution,
        seed=one_value("seed", seed, logits),
        step=one_value("step", step, logits),
        position=position,
        redraw=one_value("redraw", redraw, logits),
        with_entropy=with_entropy,
    )


@torch.library.register_fake(add_op_namespace_prefix("shard_confidence"))
def _fake(logits, first, *, row_map=None, **optional):
    check_devices("shard_confidence", {"logits": logits}, {"row_map": row_map, **optional})
    check_gradients("shard_confidence", logits=logits, **optional)
    rows = logits.shape[0] if row_map is None else row_map.shape[0]
    return logits.new_empty((rows, SHARD_WORDS), dtype=torch.int64)


def combine_shards(
    partials: Tensor,
    *,
    temperature: Tensor | float | None = None,
    distribution: str = "raw",
    with_margin: bool = True,
    with_entropy: bool = True,
) -> TokenConfidence:
    """Merge the summaries of all shards of a vocabulary into the result of `token_confidence` on the whole vocabulary.

    Parameters
    ----------
    partials : Tensor
        int64 [S, N, 23]: the results of `shard_confidence` for each of the S shards, in any order. Together the shards
        hold the whole vocabulary, each token once.
    temperature, distribution
        The values that the shards were computed with.
    with_margin, with_entropy : bool
        Whether to compute the margin and the entropy. The entropy requires shards computed with `with_entropy`.

    Returns
    -------
    TokenConfidence
        As returned by `token_confidence`, bitwise identical for any division of the same vocabulary.

    Raises
    ------
    TypeError
        If `partials` is not an int64 tensor, `temperature` is not a number or a tensor, or a flag is not a bool.
    ArgumentError
        If the shape of `partials`, the shape, dtype, device or (on the CPU) a value of `temperature`, or the value of
        `distribution` is invalid.

    Notes
    -----
    Runs about a hundred small tensor operations, on any device, without synchronizing with the host.

    >>> own = ops.shard_confidence(hidden, rank * size, weight=weight, temperature=0.7, seed=seed, position=position)
    >>> everyone = [torch.empty_like(own) for _ in range(ranks)]
    >>> torch.distributed.all_gather(everyone, own)
    >>> stats = ops.combine_shards(torch.stack(everyone), temperature=0.7)
    """
    _check_partials(partials)
    for name, value in (("with_margin", with_margin), ("with_entropy", with_entropy)):
        if not isinstance(value, bool):
            raise TypeError(f"combine_shards: {name} must be True or False; got {value!r}")
    device, rows = partials.device, partials.shape[1]
    # The words as pairs of floats, the one in the low bits first.
    pair = partials.contiguous().view(torch.float32).unflatten(-1, (SHARD_WORDS, 2))
    argmax, largest, flags = partials[..., _ARGMAX], pair[..., _LARGEST, 0], partials[..., _FLAGS]
    best = largest.amax(0)
    any_allowed = best > -torch.inf
    winner = _lowest(largest == best, argmax)
    scale = _scale(one_value("temperature", temperature, partials), distribution, rows, device)

    def of_winner(word: int, half: int) -> Tensor:
        return pair[..., word, half].gather(0, winner)[0].double()

    is_far = _is_far(best.double() * scale)
    exponent = torch.where(is_far, 0.0, largest.double() * scale)
    exponent = torch.where(argmax >= 0, exponent, 0.0)
    counts = torch.where(is_far, largest == best, ~_is_far(largest.double() * scale)) & (argmax >= 0)
    top_exponent = torch.where(is_far | ~any_allowed, 0.0, best.double() * scale)
    factors, powers = _exact_exp(torch.cat((exponent, top_exponent[None])))
    factor, power, top_factor, top_power = factors[:-1], powers[:-1], factors[-1], powers[-1]

    own_chunk = counts & (torch.arange(len(partials), device=device)[:, None] != winner)
    weight, of_exponent = pair[..., _WEIGHT, 0].double(), pair[..., _EXPONENT, 0].double()
    sums = []
    for begin, end, above, term in (
        (_WEIGHTS, _EXPONENTS, 1, weight * factor),
        (_EXPONENTS, SHARD_WORDS, 2, (exponent * weight + of_exponent) * factor),
    ):
        count = end - begin
        digits = torch.zeros(rows, count + 1, dtype=torch.int64, device=device)  # last column: dropped digits
        top = (top_power >> 5) + above
        _add_words(digits, partials[..., begin:end], (top_power >> 5) - (power >> 5), counts)
        _add_terms(digits, torch.where(own_chunk, term, 0.0), power, top)
        sums.append(_value(digits[:, :count], above, top_power & 31) / top_factor)
    rest = of_winner(_WEIGHT, 1) + sums[0]
    total, log_total = 1.0 + rest, torch.log1p(rest)
    moment = of_winner(_EXPONENT, 1) + (sums[1] - top_exponent * sums[0])

    def probability(logit: Tensor) -> Tensor:
        return torch.exp((logit.double() - best.double()) * scale) / total

    token = partials[..., _TOKEN]
    key = torch.where(token >= 0, pair[..., _DRAWN, 0], -torch.inf)
    drawn_by = _lowest((token >= 0) & (key == key.amax(0)), token)
    drawn = token.gather(0, drawn_by)[0]
    logit = pair[..., _DRAWN, 1].gather(0, drawn_by)[0]
    is_here = (partials[..., _GIVEN] >> 32) == 1
    given = torch.where(is_here, pair[..., _GIVEN, 0], -torch.inf).amax(0)
    second = torch.where(torch.arange(len(partials), device=device)[:, None] == winner, pair[..., _LARGEST, 1], largest)

    chosen = argmax.gather(0, winner)[0]
    is_unused = (flags & _UNUSED).amax(0) > 0
    found = (flags & FLAG_NAN).amax(0) | (flags & FLAG_POSITIVE_INFINITY).amax(0)
    found = torch.where(any_allowed, found, found | FLAG_NOTHING_ALLOWED).masked_fill(is_unused, 0)

    def unless_empty(values: Tensor, otherwise: float) -> Tensor:
        return torch.where(any_allowed, values, otherwise).float()

    none = best.new_empty(0)
    margin = -torch.expm1((second.amax(0).double() - best.double()) * scale) / total
    return TokenConfidence(
        torch.where(any_allowed, torch.where(drawn >= 0, drawn, chosen), -1),
        torch.where(any_allowed, chosen, -1),
        unless_empty(torch.where(drawn >= 0, probability(logit), 1.0 / total), -torch.inf),
        unless_empty(margin, 0.0) if with_margin else none,
        unless_empty(log_total - moment / total, 0.0) if with_entropy else none,
        unless_empty(best.double() * scale + log_total, -torch.inf),
        unless_empty(torch.where(is_here.any(0), probability(given), 0.0), 0.0),
        found.int(),
    )


def _check_partials(partials: Tensor) -> None:
    if not isinstance(partials, Tensor) or partials.dtype != torch.int64:
        got = partials.dtype if isinstance(partials, Tensor) else type(partials).__name__
        raise TypeError(f"combine_shards: partials must be an int64 tensor; got {got}")
    if partials.dim() != 3 or partials.shape[0] < 1 or partials.shape[2] != SHARD_WORDS:
        raise ArgumentError(
            f"combine_shards: partials must have shape [S, N, {SHARD_WORDS}] with S at least 1; got "
            f"{list(partials.shape)}"
        )


def _lowest(candidates: Tensor, ids: Tensor) -> Tensor:
    """Return the index of the candidate (bool `[S, N]`) with the lowest id, int64 `[1, N]`; any if there is none."""
    return torch.where(candidates, ids, torch.iinfo(torch.int64).max).argmin(0, keepdim=True)


def _scale(temperature: Tensor | None, distribution: str, rows: int, device: torch.device) -> Tensor:
    """Return 1 / T of the distribution that the statistics describe, float64 `[N]`."""
    if distribution not in ("raw", "tempered", "filtered"):
        raise ArgumentError(f"combine_shards: distribution must be raw, tempered or filtered; got {distribution!r}")
    if temperature is not None:
        _check_temperature(temperature, rows, device)
    if temperature is None or distribution == "raw":
        return torch.ones(rows, dtype=torch.float64, device=device)
    inverse = 1.0 / torch.where(temperature > 0, temperature, 1.0).double()
    return inverse.reshape(-1, 1).expand(-1, rows // temperature.numel()).flatten()


def _check_temperature(temperature: Tensor, rows: int, device: torch.device) -> None:
    if temperature.dtype != torch.float32 or temperature.device != device:
        raise ArgumentError(
            f"combine_shards: temperature must be float32 on {device}; got {temperature.dtype} on {temperature.device}"
        )
    if temperature.dim() > 1 or temperature.numel() == 0 or rows % temperature.numel():
        raise ArgumentError(
            "combine_shards: temperature must hold one value, or one for each group of consecutive rows, whose number "
            f"divides the {rows} rows; got shape {list(temperature.shape)}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        low = torch.finfo(torch.float32).tiny
        fits = (temperature == 0) | ((temperature >= low) & (temperature < torch.inf))
        if not fits.all():
            raise ArgumentError(
                "combine_shards: temperature must be 0, or finite and at least 1.2e-38; got "
                f"{temperature[~fits].flatten()[0].item()}"
            )


def _is_far(t: Tensor) -> Tensor:
    return ~((t < _FAR) & (t > -_FAR))


def _exact_exp(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^t as a float64 factor and an int64 power of two, bit for bit as in csrc/common/shard.h."""
    t = torch.where(_is_far(t), 0.0, t)  # the result is not used there
    y = t * 1.4426950408889634
    n = (y + torch.where(y < 0, -0.5, 0.5)).long()
    x = (y - n.double()) * 0.6931471805599453
    p = torch.ones_like(x)
    for i in range(13, 0, -1):
        p = p * x * (1.0 / i) + 1.0
    return p, n


def _add_words(digits: Tensor, words: Tensor, lower: Tensor, counts: Tensor) -> None:
    """Add digits int64 `[S, N, n]`, the first of them `lower` `[S, N]` places below that of `digits` `[N, n + 1]`."""
    last = digits.shape[1] - 1
    place = (lower[..., None] + torch.arange(words.shape[2], device=words.device)).clamp(max=last)
    place = torch.where(counts[..., None], place, last)
    digits.scatter_add_(1, place.transpose(0, 1).flatten(1), words.transpose(0, 1).flatten(1))


def _add_terms(digits: Tensor, value: Tensor, power: Tensor, top: Tensor) -> None:
    """Add value * 2^power `[S, N]` to `digits` `[N, n + 1]`, whose first digit has the weight 2^(32 top)."""
    last = digits.shape[1] - 1
    bits = value.view(torch.int64)
    exponent = (bits >> 52) & 0x7FF
    mantissa = torch.where(exponent == 0, 0, (bits & ((1 << 52) - 1)) | (1 << 52))
    place = power + exponent - 1075
    low = (mantissa & 0xFFFFFFFF) << (place & 31)
    high = ((mantissa >> 32) << (place & 31)) + (low >> 32)
    parts = torch.stack((low & 0xFFFFFFFF, high & 0xFFFFFFFF, high >> 32)) * torch.where(bits < 0, -1, 1)
    at = top - (place >> 5) - torch.arange(3, device=value.device)[:, None, None]
    at = torch.where((at >= 0) & (at < last), at, last)
    digits.scatter_add_(1, at.flatten(0, 1).t(), parts.flatten(0, 1).t())


def _value(digits: Tensor, above: int, within: Tensor) -> Tensor:
    """Return the digits' sum over 2^power, float64 `[N]`, adding the lowest digits first.

    In these units digit 0 has the weight 2^(32 above - within).
    """
    place = 32 * (above - torch.arange(digits.shape[1], device=digits.device)[:, None])
    terms = digits.t().double() * ((place - within + 1023) << 52).view(torch.float64)
    total = terms[-1]
    for i in reversed(range(len(terms) - 1)):  # an order that does not depend on the number of rows
        total = total + terms[i]
    return total
