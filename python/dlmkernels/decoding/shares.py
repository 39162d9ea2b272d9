# SPDX-License-Identifier: Apache-2.0
"""Schedules: the share of a block that is decided after each step, and its rounding to whole positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .checks import check_readable, number, plain

Schedule = str | Callable[[float], float] | tuple[float, ...]

#: by name: functions from the share of steps done to the share of positions decided, both from 0 to 1
NAMED: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,
    # MaskGIT, arXiv:2202.04200: few tokens in the first steps, many in the last
    "cosine": lambda r: 1 - math.cos(math.pi / 2 * r) if r < 1 else 1.0,
}
ROUNDINGS = ("down", "nearest")


def check_schedule(name: str, schedule: Any) -> Schedule:
    """Check a schedule (see `checks`), and return it in a form that can be compared."""
    if isinstance(schedule, str):
        if schedule not in NAMED:
            raise ValueError(
                f"{name} must be one of {tuple(NAMED)}, a callable or a sequence of shares; got {schedule!r}"
            )
        return schedule
    if callable(schedule):
        return schedule
    if isinstance(schedule, Tensor):
        check_readable(name, schedule)
        schedule = schedule.detach().double().flatten().tolist() if schedule.dim() == 1 else schedule
    if not isinstance(schedule, Sequence) or not all(isinstance(plain(x), (int, float)) for x in schedule):
        raise TypeError(
            f"{name} must be one of {tuple(NAMED)}, a callable from the share of steps done to the share of positions "
            f"decided by then, or a sequence (or tensor [S]) of such shares; got {schedule!r}"
        )
    shares = tuple(float(number()(f"{name}[{i}]", x)) for i, x in enumerate(schedule))
    _check_shares((0.0, *shares), shares)
    return shares


def shares_after(schedule: Schedule, steps: int) -> list[float]:
    """Return the shares decided before the first step and after each of `steps` steps, rising from 0 to 1."""
    if isinstance(schedule, tuple):
        points = (0.0, *schedule)
        shares = [_between(points, i, steps) for i in range(steps + 1)]
    else:
        share = NAMED[schedule] if isinstance(schedule, str) else schedule
        shares = [0.0, *(float(share(i / steps)) for i in range(1, steps + 1))]
    _check_shares(shares, schedule)
    return shares


def _between(points: Sequence[float], i: int, steps: int) -> float:
    """Interpolate linearly between evenly spaced `points`, and return the value at i / steps of the way."""
    k, rest = divmod(i * (len(points) - 1), steps)
    return points[k] if rest == 0 else points[k] + (points[k + 1] - points[k]) * (rest / steps)


def _check_shares(shares: Sequence[float], schedule) -> None:
    if len(shares) < 2 or shares[-1] != 1 or not all(a <= b for a, b in pairwise(shares)):
        raise ValueError(
            "schedule must not decrease and must end at 1, since every position is decided after the last step; got "
            f"{schedule!r}"
        )


def counts(n: Tensor, shares: Sequence[float], rounding: str) -> Tensor:
    """Return how many of `n` int `[B]` positions each of the S steps decides, int32 `[B, S]`.

    `shares` has S + 1 values. With rounding "down", the number of positions left after a step is rounded down, and
    every step decides at least one position while there are any (MaskGIT). With "nearest", each step decides its share
    of the positions left, rounded to the nearest number, halves to even; steps that would decide nothing are moved to
    the end (dllm). All in float64.
    """
    left_share = torch.tensor([1 - s for s in shares], dtype=torch.float64, device=n.device)
    if rounding == "down":
        number = torch.arange(len(shares), device=n.device)
        left = (n[:, None] * left_share).floor().long()
        # decrease by at least one per step: running minimum of the positions left plus the number of the step
        left = ((left + number).cummin(1).values - number).clamp(min=0)
        return (left[:, :-1] - left[:, 1:]).int()
    left, taken = n.double(), []
    for before, after in pairwise(left_share):
        share = 1 - after / before.clamp(min=torch.finfo(torch.float64).tiny)
        count = (left * share).round(decimals=9).round()  # treat a half that differs only in the last bits as a half
        taken.append(count)
        left = left - count
    table = torch.stack(taken, 1)
    idle = (table == 0).int().argsort(dim=1, stable=True)
    return table.gather(1, idle).int()
