# SPDX-License-Identifier: Apache-2.0
"""Decoding rules restated in plain Python from their formulas: which slots one step of one request commits.

A rule here is a function of a `Case`, the lists that describe one step, and returns indices into them. `decode` runs
such a function in a loop over blocks, in the same frame as `published.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import numerics
import published
from published import Request, blocks_of, forward, propose, ranking, shifted


@dataclass
class Case:
    """One step of one request: lists of one element an open position of the block, in the order of the positions."""

    position: list[int]
    score: list[float]
    entropy: list[float]
    index: int
    num_steps: int
    open_at_start: int
    block_start: int
    block_length: int
    extra: dict[str, Any] = field(default_factory=dict)

    def best(self, count: int, among: list[int] | None = None) -> list[int]:
        """The `count` best; what scores -inf or NaN is out."""
        slots = range(len(self.score)) if among is None else among
        order = [i for i in ranking([s if s == s else -math.inf for s in self.score]) if i in slots]
        return [i for i in order if self.score[i] > -math.inf][:count]

    def passing(self, test: Callable[[int], bool]) -> list[int]:
        return [i for i, s in enumerate(self.score) if s > -math.inf and test(i)]


# --- one step --------------------------------------------------------------------------------------------------------


def quota(case: Case, of_block: bool = False) -> list[int]:
    n = case.block_length if of_block else case.open_at_start
    share = n // case.num_steps + (case.index < n % case.num_steps)
    return case.best(share)


def threshold(case: Case, tau: float, strict: bool = False, tie: float | None = None) -> list[int]:
    best = case.best(1)
    if not best:
        return []
    bars = [float32(tau)]
    if tie is not None:
        bars.append(float32(float32(case.score[best[0]]) - float32(tie)))
    bar = min(bars)
    chosen = case.passing(lambda i: case.score[i] > bar if strict else case.score[i] >= bar)
    return chosen or best


def dynamic(case: Case, tau: float) -> list[int]:
    """SDAR: all above the threshold if they are as many as the quota, else the quota."""
    share = published.linear_quota(case.block_length, case.num_steps)[min(case.index, case.num_steps - 1)]
    above = case.passing(lambda i: case.score[i] > float32(tau))
    return above if len(above) >= min(share, len(case.score)) else case.best(share)


def entropy_sum(case: Case, budget: float) -> list[int]:
    """In order of entropy, while the running sum is below the budget; at least one."""
    order = replace(case, score=[-h for h in case.entropy]).best(len(case.score))
    count, total = 0, 0.0
    for i in order:
        total += case.entropy[i]
        if total >= budget:
            break
        count += 1
    return order[: max(count, 1)]


def frechet(case: Case, delta: float) -> list[int]:
    """The largest n whose bound on the joint probability exceeds delta by what the n-th lacks; at least one."""
    order = case.best(len(case.score))
    c = [case.score[i] for i in order]
    passing = [n for n in range(1, len(c) + 1) if sum(c[:n]) - (n - 1) - (1 - c[n - 1]) > delta]
    return order[: max(passing, default=1)]


def reason_first(case: Case, first: int, choose: Callable[[Case], list[int]]) -> list[int]:
    """What `choose` does, of the positions left of `first` alone as long as there are some."""
    early = [i for i, position in enumerate(case.position) if position < first]
    if not early:
        return choose(case)
    part = {name: [getattr(case, name)[i] for i in early] for name in ("position", "score", "entropy")}
    return [early[i] for i in choose(replace(case, **part))]


def hierarchy(case: Case, tau: float, low: float) -> list[int]:
    """The best of every run of neighbours if above `low`; all above `tau`; the best of all."""
    runs: list[list[int]] = []
    for i, position in enumerate(case.position):
        if runs and position == case.position[runs[-1][-1]] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    winners = [w for run in runs for w in case.best(1, run) if case.score[w] > float32(low)]
    return [*winners, *case.passing(lambda i: case.score[i] > float32(tau)), *case.best(1)]


def local(case: Case, tau: float, relaxed: float, radius: int) -> list[int]:
    anchors = case.passing(lambda i: case.score[i] >= float32(tau))
    near = case.passing(
        lambda i: (
            case.score[i] >= float32(relaxed)
            and any(abs(case.position[i] - case.position[a]) <= radius for a in anchors)
        )
    )
    return [*anchors, *near] or case.best(1)


def dilated(case: Case, base: int) -> list[int]:
    stride = case.block_length // base ** (case.index + 1)
    on_grid = case.passing(lambda i: stride < 2 or (case.position[i] - case.block_start) % stride == 0)
    return on_grid or case.best(1)


def stable(case: Case, tau: float) -> list[int]:
    """KLASS: confident and calm, else LLaDA's quota."""
    both = case.passing(lambda i: case.score[i] > float32(tau) and case.extra["calm"][i])
    return both or quota(case)


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


# --- scores ----------------------------------------------------------------------------------------------------------


def density(is_open: list[bool], position: int, sigma: float) -> float:
    """Share of decided positions under a Gaussian around `position`, decided left of the canvas, like its end behind."""
    reach = math.ceil(5 * sigma)
    total = weight = 0.0
    for offset in range(-reach, reach + 1):
        at = min(position + offset, len(is_open) - 1)
        w = math.exp(-(offset**2) / (2 * sigma**2))
        weight += w
        total += w * (at < 0 or not is_open[at])
    return total / weight


# --- whole decodings -------------------------------------------------------------------------------------------------


def decode(
    model: Callable, canvas: Tensor, start: int, mask: int, choose: Callable[[Case], list[int]], *,
    block_length: int | None = None, steps: int | None = None, shift: bool = False,
    score: Callable[[Request, Any, int], list[float]] | None = None, observe: Callable | None = None,
    embed: Callable | None = None,
) -> Request:  # fmt: skip
    """Block by block, until no mask is left; every forward takes the whole canvas.

    `embed(request, index)` may give the canvas' embeddings `[T, hidden]` for forward `index` of a block, or None.
    `score(request, proposals, block_start)` defaults to the probability; `observe(logits, positions, index)` may
    remember what it sees (`logits` `[n, V]` without the mask) and returns what `Case.extra` is to hold, and optionally
    other logits under "logits" to propose from.
    """
    request, jitter = Request(canvas, mask), random.Random(0)
    blocks = blocks_of(start, len(canvas), block_length)
    for begin, end in blocks:
        at_start, index = len(request.open(begin, end)), 0
        planned = steps // len(blocks) if steps else end - begin
        while eligible := request.open(begin, end):
            embeds = embed(request, index) if embed else None
            logits = (
                forward(model, request.tokens)[0]
                if embeds is None
                else model(request.tokens[None], embeds=embeds[None])[0][0]
            )
            logits = shifted(logits) if shift else logits
            logits = logits.float().index_fill(1, torch.tensor([mask]), -torch.inf)
            extra = observe(logits[eligible], eligible, index) if observe else {}
            if "logits" in extra:
                logits = logits.index_copy(0, torch.tensor(eligible), extra["logits"])
            proposals = propose(logits, eligible, mask)
            scores = score(request, proposals, begin) if score else proposals.probability
            case = Case(eligible, scores, proposals.entropy, index, planned, at_start, begin, end - begin, extra)
            chosen = sorted(set(choose(case)))
            for _ in range(3):  # would rounding of another program change the choice?
                moved = replace(
                    case,
                    score=[s + jitter.uniform(-1, 1) * numerics.TWO_PROGRAMS for s in scores],
                    entropy=[h + jitter.uniform(-1, 1) * numerics.TWO_PROGRAMS for h in case.entropy],
                )
                if sorted(set(choose(moved))) != chosen:
                    request.note(0.0)
            request.commit(proposals, chosen)
            index += 1
    return request
