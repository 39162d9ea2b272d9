# SPDX-License-Identifier: Apache-2.0
"""Specification of `shard_confidence`, bit for bit, in plain torch and Python numbers."""

import struct

import torch
from torch import Tensor
from torch.nn.functional import pad

from .race import CHUNK, chunk_exp, chunk_sum, plain_log, tempered
from .randomness import gumbel, philox
from .rows import per_row
from .token_confidence import FLAG_NOTHING_ALLOWED, effective_logits

FLAG_UNUSED = 8
WORDS, WEIGHTS, EXPONENTS = 23, 8, 15  # words per row; first digits of the two sums
FAR = 2.0**32
INF = float("inf")


def exact_exp(t: float) -> tuple[float, int]:
    """Return e^t as a factor and a power of two, computed in doubles with each operation rounded."""
    y = t * 1.4426950408889634
    n = int(y + (-0.5 if y < 0 else 0.5))
    x = (y - n) * 0.6931471805599453
    p = 1.0
    for i in range(13, 0, -1):
        p = p * x * (1.0 / i) + 1.0
    return p, n


def add_digits(words: list[int], begin: int, count: int, top: int, value: float, power: int) -> None:
    """Add value * 2^power to 32-bit digits, the first of which has the weight 2^(32 top); lower ones are dropped."""
    mantissa, denominator = abs(value).as_integer_ratio()
    place = power - (denominator.bit_length() - 1)
    while mantissa and mantissa.bit_length() < 53:
        mantissa, place = mantissa * 2, place - 1
    while mantissa.bit_length() > 53:
        mantissa, place = mantissa // 2, place + 1
    shifted = mantissa << place % 32
    for i in range(3):
        at = top - (place // 32 + i)
        if 0 <= at < count:
            words[begin + at] += (shifted >> 32 * i & 0xFFFFFFFF) * (-1 if value < 0 else 1)


def two_floats(low: float, high: float) -> int:
    """Pack two float32 values into the low and the high bits of an int64."""
    return struct.unpack("<q", struct.pack("<ff", low, high))[0]


def shard_confidence(
    logits: Tensor,
    first: int,
    *,
    weight: Tensor | None = None,
    row_map: Tensor | None = None,
    given: Tensor | None = None,
    uncond: Tensor | None = None,
    cfg_scale: Tensor | None = None,
    bias: Tensor | None = None,
    banned: Tensor | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    distribution: str = "raw",
    seed: Tensor | None = None,
    step: Tensor | None = None,
    position: Tensor | None = None,
    redraw: Tensor | None = None,
    with_entropy: bool = True,
) -> Tensor:
    """Summarize tokens [first, first + V) of a vocabulary for each row, int64 [N, 23].

    The rows' effective logits z are those of `token_confidence`, restricted to the shard's columns. They are described
    by chunks of 256 tokens (race.py): the largest logit l of a chunk, and the float32 sums w of e^x and e of x e^x,
    where x = (z - l) s, and s = 1, or 1 / T if `distribution` is not "raw". Chunk c of the shard is chunk first / 256 +
    c of the vocabulary. The words of a row, two float32 values each where two are listed:

    0. the lowest id with the largest logit; -1 where nothing is allowed, in which case only words 2 and 7 are
       meaningful
    1. the id of the token that wins the race among the shard's tokens, -1 where none is drawn
    2. flags: 1 for a NaN, 2 for +inf, 8 for an unused row
    3. the largest logit L, and the second largest
    4. w of the chunk that contains word 0, and w of its other tokens, relative to L
    5. e, likewise
    6. the key of the chunk that wins the race, and the logit of the drawn token
    7. the logit of the given token, and the integer 1; 0 where it is not in the shard
    8. seven digits of the sum of w e^t over all other chunks, t = l s as a double
    15. eight digits of the sum of (t w + e) e^t

    With n = round(L s / ln 2), the first digit of word 8 has the weight 2^(32 (floor(n / 32) + 1)), that of word 15
    2^(32 (floor(n / 32) + 2)), and each following digit 2^32 less. Whatever lies below the last digit is dropped, digit
    by digit. Terms are doubles times powers of two (`exact_exp`). Where |L s| >= 2^32, only chunks with l = L count,
    and t is 0; elsewhere, chunks with |t| >= 2^32 do not count.
    """
    if weight is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        heads = [None if x is None else (x.to(wide) @ weight.to(wide).t()).to(logits.dtype) for x in (logits, uncond)]
        logits, uncond = heads[0], heads[1]  # type: ignore[assignment]
    row = torch.arange(len(logits), device=logits.device) if row_map is None else row_map.long()
    rows, vocabulary = len(row), logits.shape[1]
    if banned is not None:
        inside = (banned >= first) & (banned < first + vocabulary)
        banned = torch.where(inside, banned - first, -1)
    z, flags = effective_logits(logits, row, uncond, cfg_scale, bias, banned, bitmask)
    flags = torch.where(row < 0, FLAG_UNUSED, flags & ~FLAG_NOTHING_ALLOWED)

    asked = per_row(temperature, rows, 0.0)
    samples = (asked > 0) & (position is not None)
    temper = torch.where(asked > 0, asked, 1.0)
    inverse = 1.0 / temper
    scale = torch.ones_like(inverse) if distribution == "raw" else inverse
    chunked = pad(z, (0, -vocabulary % CHUNK), value=-INF).unflatten(1, (-1, CHUNK))
    largest = chunked.max(-1).values

    def sums(z: Tensor, largest: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        x = (z - largest.unsqueeze(-1)) * by.view(-1, *[1] * (z.dim() - 1))
        w = chunk_exp(x)
        lowest = torch.tensor(-87.33654, dtype=torch.float32, device="cpu")
        e = chunk_sum(w * torch.maximum(x, lowest)) if with_entropy else torch.zeros_like(largest)
        return chunk_sum(w), e

    there = torch.where(largest > -INF, largest, 0.0)
    whole_weight, whole_exponent = sums(chunked, there, scale)
    argmax = z.argmax(-1)
    others = z.scatter(1, argmax[:, None], -INF)
    own = (argmax // CHUNK)[:, None]
    rest = pad(others, (0, -vocabulary % CHUNK), value=-INF).unflatten(1, (-1, CHUNK))
    rest = rest.gather(1, own[..., None].expand(-1, 1, CHUNK))[:, 0]
    rest_weight, rest_exponent = sums(rest, there.gather(1, own)[:, 0], scale)

    chunk = first // CHUNK + torch.arange(largest.shape[1], device=z.device)
    token = first + torch.arange(vocabulary, device=z.device)
    key, place, now = (per_row(x, rows, 0).long().unsqueeze(1) for x in (seed, position, step))
    again = per_row(redraw, rows, 0).long().unsqueeze(1)
    racing = sums(chunked, there, inverse)[0]
    chunk_key = tempered(there, inverse[:, None]) + plain_log(torch.where(largest > -INF, racing, 1.0))
    chunk_key = (chunk_key + gumbel(philox(key, place, now, "chunk", chunk, again))).masked_fill(largest == -INF, -INF)
    winner = chunk_key.argmax(-1, keepdim=True)
    token_key = tempered(torch.where(z > -INF, z, 0.0), inverse[:, None]) + gumbel(
        philox(key, place, now, "token", token, again)
    )
    token_key = token_key.masked_fill((z == -INF) | (token // CHUNK - first // CHUNK != winner), -INF)
    drawn = token_key.argmax(-1)

    out = []
    for n in range(rows):
        words = [-1, -1, int(flags[n]), two_floats(-INF, -INF), 0, 0, two_floats(-INF, -INF), 0] + [0] * 15
        out.append(words)
        best, c = float(z[n, argmax[n]]), int(own[n, 0])
        if row[n] < 0 or best == -INF:
            continue
        words[0] = first + int(argmax[n])
        words[3] = two_floats(best, float(others[n].max()))
        words[4] = two_floats(float(whole_weight[n, c]), float(rest_weight[n]))
        words[5] = two_floats(float(whole_exponent[n, c]), float(rest_exponent[n]))
        if samples[n]:
            words[1] = first + int(drawn[n])
            words[6] = two_floats(float(chunk_key[n, winner[n, 0]]), float(z[n, drawn[n]]))
        at = -1 if given is None else int(given[n]) - first
        if 0 <= at < vocabulary:
            words[7] = two_floats(float(z[n, at]), struct.unpack("<f", struct.pack("<i", 1))[0])
        s = 1.0 if distribution == "raw" else 1.0 / float(temper[n])
        far = not -FAR < best * s < FAR
        top = exact_exp(0.0 if far else best * s)[1] // 32
        for i in range(largest.shape[1]):
            value = float(largest[n, i])
            if i == c or value == -INF or (value != best if far else not -FAR < value * s < FAR):
                continue
            t = 0.0 if far else value * s
            factor, power = exact_exp(t)
            w, e = float(whole_weight[n, i]), float(whole_exponent[n, i])
            add_digits(words, WEIGHTS, 7, top + 1, w * factor, power)
            add_digits(words, EXPONENTS, 8, top + 2, (t * w + e) * factor, power)
    return torch.tensor(out, dtype=torch.int64, device=logits.device).view(rows, WORDS)
