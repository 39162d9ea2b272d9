# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft: as many as decide most tokens a second, by what this machine takes and drafts are worth."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ...cache import KVCache
from ...models.adapt import DiffusionModel
from ...models.drafters import Drafter
from ...window import AttentionWindow

#: what a drafter is taken to be worth before anything is known: so many drafts of so many accepted
PRIOR_HITS, PRIOR_TRIES = 1.5, 2.0
#: how much of what was seen counts at the next step, so that a request's later text may be another matter
MEMORY = 0.9
CONTEXT, REPEATS = 32, 3


class Widths:
    """How many drafts each of S rows asks for, by its own acceptance so far and a cost curve.

    A draft is accepted with probability a, given that those before it are. Then w drafts decide 1 + a + … + a^w tokens
    in one step, which takes `costs[w]`; the row asks for the w at which the quotient is largest. a is the share of
    accepted drafts among those that were looked at, the latest counting most.

    Attributes
    ----------
    now : Tensor
        int32 `[S]`: what each row asks for.
    """

    def __init__(self, rows: int, costs: Tensor):
        """`costs` float64 `[W + 1]`: seconds of a step with so many drafts, infinite where no step has so many."""
        self._costs, self._power = costs, torch.arange(len(costs), dtype=torch.float64, device=costs.device)
        self._hits = torch.zeros(rows, dtype=torch.float64, device=costs.device)
        self._tries = torch.zeros_like(self._hits)
        self.now = torch.zeros(rows, dtype=torch.int32, device=costs.device)

    def begin(self) -> None:
        """Nothing is known of the requests."""
        self._hits.zero_()
        self._tries.zero_()
        self._choose()

    def see(self, accepted: Tensor, working: Tensor) -> None:
        """Take notice of how many drafts were accepted, int32 `[S]`, in the rows bool `[S]` that took a step."""
        looked_at = accepted + (accepted < self.now)
        self._hits.copy_(torch.where(working, self._hits * MEMORY + accepted, self._hits))
        self._tries.copy_(torch.where(working, self._tries * MEMORY + looked_at, self._tries))
        self._choose()

    def _choose(self) -> None:
        share = (self._hits + PRIOR_HITS) / (self._tries + PRIOR_TRIES)
        decided = (share[:, None] ** self._power).cumsum(1)
        self.now.copy_((decided / self._costs).argmax(1))


def offered(most: int) -> list[int]:
    """The widths that there are: 0, powers of 2, and the most."""
    return sorted({0, most, *(2**i for i in range(most.bit_length()) if 2**i < most)})


@torch.no_grad()
def measured(model: DiffusionModel, drafter: Drafter, rows: int, most: int) -> Tensor:
    """Seconds that a step of so many rows takes with 0 … `most` drafts, float64 `[most + 1]`.

    Measured once for each number of rows, at a short context, and kept with the drafter. Infinite where `offered` has
    no such width.
    """
    if (rows, most) not in drafter.costs:
        costs = torch.full((most + 1,), torch.inf, dtype=torch.float64, device="cpu")
        for width in offered(most):
            _step(model, drafter, rows, width)
            costs[width] = min(_step(model, drafter, rows, width) for _ in range(REPEATS))
        drafter.costs[rows, most] = costs
    return drafter.costs[rows, most].to(model.device)


def _step(model: DiffusionModel, drafter: Drafter, rows: int, width: int) -> float:
    """Seconds of one: the drafter's block, and the model's forward of the last token and the drafts."""
    device, count = model.device, width + 1
    place = torch.arange(CONTEXT, CONTEXT + count, dtype=torch.int32, device=device).expand(rows, -1).contiguous()
    seen = torch.tensor([[0, CONTEXT + count]], dtype=torch.int32, device=device).expand(rows, -1).contiguous()
    caches = [KVCache(CONTEXT + count, rows) for _ in range(2)]
    tokens, positions = torch.zeros_like(place, dtype=torch.int64), place.long()
    rotations = model.rotations(torch.full((rows,), CONTEXT + count, device=device))
    start = _now(device)
    if width:
        window = AttentionWindow(place, seen, caches[1])
        drafter.logits(drafter.hidden(tokens[:, 0], positions, window).flatten(0, 1))
    window = AttentionWindow(place, seen, caches[0], causal_block=1, rotations=rotations)
    model.logits(model.hidden(tokens, positions, window).flatten(0, 1))
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
