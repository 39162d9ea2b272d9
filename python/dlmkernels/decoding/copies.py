# SPDX-License-Identifier: Apache-2.0
"""Several answers to one prompt: each has a seed of its own, which follows from that of the first."""

from __future__ import annotations

from torch import Tensor

#: the increment and the multipliers of splitmix64 (Steele, Lea and Flood, 2014)
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL = 2**64 - 1


def seed_of_copy(seed: int, number: int) -> int:
    """Seed of a request's copy, an int64; that of copy 0 is the request's own."""
    if number == 0:
        return seed
    z = (seed + number * INCREMENT) & ALL
    z = ((z ^ z >> 30) * FIRST) & ALL
    z = ((z ^ z >> 27) * SECOND) & ALL
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def seeds_of_copies(seeds: Tensor, count: int) -> Tensor:
    """Seeds int64 `[B * count]` of so many copies of each request, side by side; `seeds` int64 `[B]`."""
    copies = [seed_of_copy(seed, k) for seed in seeds.tolist() for k in range(count)]
    return seeds.new_tensor(copies)
