# SPDX-License-Identifier: Apache-2.0
"""Adaptive draft widths: draft the number of tokens that maximizes decoded tokens per second.

The choice depends on measured step times on the current machine and on the acceptance rate of each row.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ...cache import KVCache
from ...models.adapt import DiffusionModel
from ...models.drafters import Drafter
from ...window import AttentionWindow

#: prior for the acceptance rate of a drafter: number of accepted drafts, and number of drafts
PRIOR_HITS, PRIOR_TRIES = 1.5, 2.0
#: decay per step of past acceptance counts, so that the rate can change over the course of a request
MEMORY = 0.9
CONTEXT, REPEATS = 32, 3


class Widths:
    """Chooses how many drafts each of S rows asks for, from its acceptance rate so far and the cost of a step.

    Let a be the probability that a draft is accepted, given that all drafts before it are. Then w drafts decide
    1 + a + … + a^w tokens on average in one step, which takes `costs[w]` seconds. Each row asks for the w with the
    largest ratio of the two. a is estimated as the fraction of accepted drafts among those examined, with recent drafts
    weighted most.

    Attributes
    ----------
    now : Tensor
        int32 `[S]`: number of drafts that each row currently asks for.
    """

    def __init__(self, rows: int, costs: Tensor):
        """`costs` float64 `[W + 1]`: seconds of a step with 0 … W drafts; infinite for widths that are not offered."""
        self._costs, self._power = costs, torch.arange(len(costs), dtype=torch.float64, device=costs.device)
        self._hits = torch.zeros(rows, dtype=torch.float64, device=costs.device)
        self._tries = torch.zeros_like(self._hits)
        self.now = torch.zeros(rows, dtype=torch.int32, device=costs.device)

    def begin(self) -> None:
        """Reset the acceptance rates for new requests."""
        self._hits.zero_()
        self._tries.zero_()
        self._choose()

    def see(self, accepted: Tensor, working: Tensor) -> None:
        """Record the number of accepted drafts, int32 `[S]`, in the `working` rows bool `[S]` that took a step."""
        looked_at = accepted + (accepted < self.now)
        self._hits.copy_(torch.where(working, self._hits * MEMORY + accepted, self._hits))
        self._tries.copy_(torch.where(working, self._tries * MEMORY + looked_at, self._tries))
        self._choose()

    def _choose(self) -> None:
        share = (self._hits + PRIOR_HITS) / (self._tries + PRIOR_TRIES)
        decided = (share[:, None] ** self._power).cumsum(1)
        self.now.copy_((decided / self._costs).argmax(1))


def offered(most: int) -> list[int]:
    """Return the widths that are offered: 0, the powers of 2 below `most`, and `most`."""
    return sorted({0, most, *(2**i for i in range(most.bit_length()) if 2**i < most)})


@torch.no_grad()
def measured(model: DiffusionModel, drafter: Drafter, rows: int, most: int) -> Tensor:
    """Measure the seconds that a step of `rows` rows takes with 0 … `most` drafts, float64 `[most + 1]`.

    Measured once per number of rows, with a short context, and stored in the drafter. Infinite for widths that
    `offered` does not contain.
    """
    if (rows, most) not in drafter.costs:
        costs = torch.full((most + 1,), torch.inf, dtype=torch.float64, device="cpu")
        for width in offered(most):
            _step(model, drafter, rows, width)
            costs[width] = min(_step(model, drafter, rows, width) for _ in range(REPEATS))
        drafter.costs[rows, most] = costs
    return drafter.costs[rows, most].to(model.device)


def _step(model: DiffusionModel, drafter: Drafter, rows: int, width: int) -> float:
    """Time one step in seconds: the drafter's block, and the model's forward pass of the last token and the drafts."""
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
