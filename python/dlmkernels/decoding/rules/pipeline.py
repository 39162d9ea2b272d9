# SPDX-License-Identifier: Apache-2.0
"""Rules that decode several blocks of a request at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...window import TokenWindow
from ..checks import Check, flag, integer, number
from ..step import Step
from .base import SHARE, Rule


@dataclass(frozen=True)
class Pipeline(Rule):
    """Decode several blocks at once: a block is started before the one to its left is finished.

    Discrete Diffusion Forcing (arXiv:2508.09192), for models whose blocks see themselves and earlier blocks. Once the
    share `open_at` of the newest block is decided, the next block is opened, at most one per forward pass. A forward
    pass covers all open blocks and commits every position with a score above `threshold`. A block without such a
    position still commits its best one if it is active, which means that the share `activate_at` of the block before it
    is decided. Finished blocks on the left move to the KV cache. Once an end token is decided, no further block is
    opened (unless eos_policy="none").

    Attributes
    ----------
    threshold : float
        Value that a position's score must exceed.
    open_at, activate_at : float
        Shares of a block, from 0 to 1.
    buffer : int, optional
        Maximum number of blocks open at once, which gives forward passes a fixed width (the multi-block buffers of
        Diffulex, github.com/SJTU-DENG-Lab/Diffulex). If None, there is no limit.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    #: whether an end token overwrites everything after it at once, even if positions before it are still open
    closes_at_eos: ClassVar[bool] = False
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": number(), "open_at": SHARE, "activate_at": SHARE,
        "buffer": integer(1, optional=True),
    }  # fmt: skip
    by_block: ClassVar[bool] = False

    threshold: float = 0.9
    open_at: float = 0.1
    activate_at: float = 0.95
    buffer: int | None = field(default=None, kw_only=True)

    def select(self, step):
        raise TypeError(
            f"{type(self).__name__} has its own decoding program, which calls select_by_block instead of select"
        )

    def select_by_block(self, step: Step, is_active: Tensor) -> Tensor:
        """Return the positions to commit in the open blocks, bool `[B, W]`; `is_active` bool `[B, N]` is per block.

        The blocks are N equal parts of the step's block, which spans everything to be decoded.
        """
        return ByBlock(step, is_active.shape[1]).select(
            step.score, "threshold", parameter=self.threshold, strict=True, need=1, fill=is_active.flatten()
        )


@dataclass(frozen=True)
class EntropyPipeline(Pipeline):
    """Pipeline of d3LLM (arXiv:2601.07568), for models with full attention.

    A forward pass commits every position of the open blocks whose entropy is at most `threshold` nats, and at least one
    position in the first active block that is unfinished. With `best_of_all`, it also commits at least the best
    position overall, as d3LLM's program for LLaDA does (the one for Dream does not). Everything after an end token is
    overwritten with that token immediately.

    With cache="prefix", a block moves to the KV cache `delay` forward passes after it was found finished, when its
    context has settled. Until then, and in every `refresh_interval`-th forward pass, the whole canvas is forwarded and
    the cache is rewritten. All other forward passes cover only what is not in the cache.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    closes_at_eos: ClassVar[bool] = True
    thresholds: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[Mapping[str, Check]] = {**Pipeline.limits, "delay": integer(1), "best_of_all": flag}

    threshold: float = 0.5
    delay: int = 2
    best_of_all: bool = True

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids", "warmup", "vicinity"})

    def select_by_block(self, step: Step, is_active: Tensor) -> Tensor:
        score, blocks = -step.entropy, ByBlock(step, is_active.shape[1])
        least = int(self.best_of_all)
        chosen = step.select("threshold", score=score, parameter=-self.threshold, need=least, fill=least)
        working = is_active & blocks.any(step.eligible)
        first = working & (working.cumsum(1) == 1)
        return chosen | blocks.select(score, "none", fill=(first & ~blocks.any(chosen)).flatten())


class ByBlock:
    """A step whose slots are sorted into the `count` equal parts of its block, one row per part."""

    def __init__(self, step: Step, count: int):
        self.step, self.count, self.length = step, count, step.standing.width // count
        self.place = torch.where(step.used, step.index_in_block, step.standing.width).long()

    def any(self, slots: Tensor) -> Tensor:
        """Return which parts contain at least one of the slots bool `[B, W]`: bool `[B, count]`."""
        return self._sort(slots, False).view(len(slots), self.count, self.length).any(2)

    def select(self, score: Tensor, rule: str, **options: Any) -> Tensor:
        """Run `Step.select` in each part, bool `[B, W]`; options that are tensors hold one value per part."""
        step, shape = self.step, (len(score) * self.count, self.length)
        columns = torch.arange(step.standing.width, dtype=torch.int32, device=score.device)
        parts = replace(
            step,
            window=TokenWindow(
                (step.block_start[:, None] + columns).view(shape), step.window.origin.repeat_interleave(self.count)
            ),
            eligible=self._sort(step.eligible, False).view(shape),
            order_temperature=step.order_temperature or step.score_of.order_temperature,
        )
        chosen = parts.select(rule, score=self._sort(score, -torch.inf).view(shape), **options)
        chosen = torch.nn.functional.pad(chosen.view(len(score), -1), (0, 1))  # one more column for unused slots
        return chosen.gather(1, self.place)

    def _sort(self, values: Tensor, missing: float) -> Tensor:
        """Sort the slots' `values` `[B, W]` to their places, `[B, count * length]`, with `missing` in all others."""
        places = values.new_full((len(values), self.step.standing.width + 1), missing)
        return places.scatter(1, self.place, values)[:, :-1].contiguous()
