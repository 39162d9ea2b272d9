# SPDX-License-Identifier: Apache-2.0
"""Seeds of several answers to one prompt, all derived from the seed of the request."""

from __future__ import annotations

from torch import Tensor

#: the increment and the multipliers of splitmix64 (Steele, Lea and Flood, 2014)
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL = 2**64 - 1


def seed_of_copy(seed: int, number: int) -> int:
    """Return the seed of a request's copy, an int64. Copy 0 has the request's own seed."""
    if number == 0:
        return seed
    z = (seed + number * INCREMENT) & ALL
    z = ((z ^ z >> 30) * FIRST) & ALL
    z = ((z ^ z >> 27) * SECOND) & ALL
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def seeds_of_copies(seeds: Tensor, count: int) -> Tensor:
    """Return seeds int64 `[B * count]` for `count` adjacent copies of each request, from `seeds` int64 `[B]`."""
    copies = [seed_of_copy(seed, k) for seed in seeds.tolist() for k in range(count)]
    return seeds.new_tensor(copies)
