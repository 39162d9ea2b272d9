# SPDX-License-Identifier: Apache-2.0
"""Two-level races, over chunks of 256 tokens and then within one chunk, bit for bit as in csrc/common/race.h."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .randomness import exponential, gumbel, philox, plain_log

CHUNK = 256


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c in float32, rounded once. The sums must be 0 or normal floats."""
    product, c = a.double() * b.double(), c.double()  # the product is exact
    total = product + c
    of_c = total - product
    lost = (product - (total - of_c)) + (c - of_c)  # exact: Knuth's two-sum
    # Rounding to odd keeps the last bit from hiding on which side of a tie of float32 the exact sum lies (Boldo and
    # Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    bits = total.view(torch.int64)
    away = torch.where((lost > 0) == (total > 0), 1, -1)
    return torch.where((lost != 0) & (bits & 1 == 0), bits + away, bits).view(torch.float64).float()


def chunk_exp(x: Tensor) -> Tensor:
    """Return the exponentials of float32 values that are at most 0; the result is 0 below -87.33654."""

    def c(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    log2e = c(1.44269502)
    normal = x >= c(-87.33654)
    x = torch.where(normal, x, 0.0)
    n = fma(x, log2e, c(12582912.0)) - 12582912.0
    f = fma(x, c(1.92596303e-8), fma(x, log2e, -n))
    p = torch.full_like(f, 1.53533620e-4)
    for a in (1.33988739e-3, 9.61843692e-3, 5.55033237e-2, 2.40226477e-1, 6.93147182e-1, 1.0):
        p = fma(p, f, c(a))
    scaled = (p.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)
    return torch.where(normal, scaled, 0.0)


def chunk_sum(weight: Tensor) -> Tensor:
    """Sum the last dimension of 256 float32 values: element i is added to i + 128, then to i + 64, and so on."""
    while weight.shape[-1] > 1:
        weight = weight[..., : weight.shape[-1] // 2] + weight[..., weight.shape[-1] // 2 :]
    return weight.squeeze(-1)


def _chunks(x: Tensor, absent: float) -> Tensor:
    """Reshape `[N, V]` to `[N, ceil(V / 256), 256]`, padding with `absent`."""
    return pad(x, (0, -x.shape[1] % CHUNK), value=absent).unflatten(1, (-1, CHUNK))


def _winner(chunk_key: Tensor, token_keys, chunked: Tensor) -> Tensor:
    """Return the token with the largest key in the chunk with the largest key, int64 `[N]`; the first of equal ones."""
    chunk = chunk_key.argmax(-1, keepdim=True)
    token = chunk * CHUNK + torch.arange(CHUNK, device=chunk.device)
    weights = chunked.gather(1, chunk.unsqueeze(-1).expand(-1, 1, CHUNK)).squeeze(1)
    return token.gather(1, token_keys(weights, token).argmax(-1, keepdim=True)).squeeze(1)


def tempered(z: Tensor, inverse: Tensor) -> Tensor:
    """Divide finite logits by the temperature; what overflows becomes the largest float of its sign."""
    largest = torch.finfo(torch.float32).max
    return (z * inverse).clamp(-largest, largest)


def race(z: Tensor, inverse: Tensor, seed: Tensor, position: Tensor, step: Tensor, redraw: Tensor | int = 0) -> Tensor:
    """Draw a token for each row from softmax(z * inverse).

    Parameters
    ----------
    z : Tensor
        float32 `[N, V]`: finite logits, with -inf for tokens that must not be drawn.
    inverse : Tensor
        float32 `[N, 1]`: 1 / temperature.
    seed, position, step, redraw : Tensor
        int64 `[N, 1]`.

    Returns
    -------
    Tensor
        int64 `[N]`: the token with the largest key of the stream "token", within the chunk with the largest key of the
        stream "chunk". Undefined if all of a row is -inf.
    """
    chunked = _chunks(z, -torch.inf)
    largest = chunked.max(-1).values
    there = largest > -torch.inf
    largest = torch.where(there, largest, 0.0)
    total = chunk_sum(chunk_exp((chunked - largest.unsqueeze(-1)) * inverse.unsqueeze(-1)))
    words = philox(seed, position, step, "chunk", torch.arange(largest.shape[1], device=z.device), redraw)
    key = (tempered(largest, inverse) + plain_log(torch.where(there, total, 1.0))) + gumbel(words)

    def token_keys(z: Tensor, token: Tensor) -> Tensor:
        key = tempered(z, inverse) + gumbel(philox(seed, position, step, "token", token, redraw))
        return key.masked_fill(z == -torch.inf, -torch.inf)

    return _winner(key.masked_fill(~there, -torch.inf), token_keys, chunked)


def race_of_weights(weight: Tensor, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """Draw a token for each row with probability proportional to its weight.

    Uses the streams "residual_chunk" and "residual".

    Parameters
    ----------
    weight : Tensor
        float32 `[N, V]`, non-negative.
    seed, position, step : Tensor
        int64 `[N, 1]`.

    Returns
    -------
    Tensor
        int64 `[N]`: the token with the largest weight / e, within the chunk with the largest sum / e, where e is
        exponential noise. Undefined if all of a row is 0.
    """
    chunked = _chunks(weight, 0.0)
    total = chunk_sum(chunked)
    chunk = torch.arange(total.shape[1], device=weight.device)
    key = total / exponential(philox(seed, position, step, "residual_chunk", chunk))

    def token_keys(weight: Tensor, token: Tensor) -> Tensor:
        return weight / exponential(philox(seed, position, step, "residual", token))

    return _winner(key, token_keys, chunked)
