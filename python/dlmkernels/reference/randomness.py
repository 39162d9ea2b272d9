# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers (csrc/common/philox.h), bit for bit as the kernels draw them."""

import torch
from torch import Tensor

STREAMS = {
    "token": 0, "order": 1, "bernoulli": 2, "renoise": 3, "verify": 4, "residual": 5, "chunk": 6, "residual_chunk": 7,
    # drawn only in torch, not by kernels
    "normal": 8, "time": 9,
}  # fmt: skip
_LOW32 = 0xFFFFFFFF


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a 32 x 32 bit product, computed in int64 without overflow."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    seed: Tensor, position: Tensor, step: Tensor, stream: str, index: Tensor, redraw: Tensor | int = 0
) -> Tensor:
    """Return 32 random bits (int64) per element.

    Philox4x32-10 with key = seed and counter = (position, step, stream, index / 4).

    Parameters
    ----------
    seed, position, step, index : Tensor
        int64, broadcast against each other; `index` is the vocabulary index (0 where a position needs one draw).
    stream : str
        A key of `STREAMS`.
    redraw : Tensor or int
        How many times a token drawn for the position has been rejected in this step; 256 times this number is added to
        the stream.
    """
    refusals = torch.as_tensor(redraw, device=seed.device)
    seed, position, step, index, refusals = torch.broadcast_tensors(seed, position, step, index, refusals)
    c0, c1 = position & _LOW32, step & _LOW32
    c2, c3 = (STREAMS[stream] + (refusals << 8)) & _LOW32, (index // 4) & _LOW32
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return torch.stack((c0, c1, c2, c3), -1).gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)


def plain_log(x: Tensor) -> Tensor:
    """Return the logarithm of positive normal float32 values, rounding each operation (Cephes' logf polynomial)."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    z = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * f + torch.tensor(c, dtype=torch.float32, device="cpu")
    p = (p * f) * z
    e = exponent.to(torch.float32)
    p = p + e * torch.tensor(-2.12194440e-4, dtype=torch.float32, device="cpu")
    p = p - 0.5 * z
    return (f + p) + e * 0.693359375


def plain_exp(x: Tensor) -> Tensor:
    """Return e^x of float32 x at most 0, rounding each operation (Cephes' expf); the result is 0 below -87.33654."""

    def c(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    normal = x >= c(-87.33654)
    x = torch.where(normal, x, 0.0)
    n = (x * c(1.44269504) + 12582912.0) - 12582912.0
    r = n * c(-0.693359375) + x
    r = n * c(2.12194440e-4) + r
    p = torch.full_like(r, 1.9875691500e-4)
    for a in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c(a)
    p = (p * (r * r) + r) + 1.0
    return torch.where(normal, p * ((n.to(torch.int32) + 127) << 23).view(torch.float32), 0.0)


def exponential(bits: Tensor) -> Tensor:
    """Return standard exponential variates (float32) from 32 random bits, bit for bit as the kernels do."""
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    y = 1.0 - u
    lost = (1.0 - y) - u
    return -(plain_log(y) + lost / y)


def gumbel(bits: Tensor) -> Tensor:
    """Return standard Gumbel variates (float32) from 32 random bits, bit for bit as the kernels do."""
    return -plain_log(exponential(bits))


def bernoulli(bits: Tensor, p: Tensor) -> Tensor:
    """Return True with probability p."""
    return bits.double() < p.double() * 2.0**32


def uniform_below(bits: Tensor, n: int) -> Tensor:
    """Return uniform integers in [0, n)."""
    return _multiply32(n, bits)[0] if n <= _LOW32 else bits
