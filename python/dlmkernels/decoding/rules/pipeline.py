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
    """Several blocks at once: a block is begun before the one on its left is finished.

    Discrete Diffusion Forcing (arXiv:2508.09192), for models whose blocks see themselves and those before them. Once
    `open_at` of the newest block is decided, the next one is opened, one a forward. A forward takes all open blocks and
    commits what is surer than `threshold`; a block of which nothing is gets its best position all the same if it is
    active, that is, if `activate_at` of the block before it is decided. Finished blocks leave on the left, into the
    cache. Once an end token stands, no block is opened.

    Attributes
    ----------
    threshold : float
        What the score of a position must exceed.
    open_at, activate_at : float
        Shares of a block from 0 to 1.
    buffer : int, optional
        How many blocks are open at once at most, so that forwards have a fixed width (the multi-block buffers of
        Diffulex, github.com/SJTU-DENG-Lab/Diffulex). None: any number.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    #: whether an end token closes what stands behind it before everything left of it is decided
    closes_at_eos: ClassVar[bool] = False
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
        raise TypeError(f"{type(self).__name__} has a program of its own and selects by block")

    def select_by_block(self, step: Step, is_active: Tensor) -> Tensor:
        """Positions to commit, bool `[B, W]`, of the open blocks; `is_active` bool `[B, N]` says which are active.

        The blocks are N equal parts of the step's block, which is the whole of what is decoded.
        """
        return ByBlock(step, is_active.shape[1]).select(
            step.score, "threshold", parameter=self.threshold, strict=True, need=1, fill=is_active.flatten()
        )


@dataclass(frozen=True)
class EntropyPipeline(Pipeline):
    """The pipeline of d3LLM (arXiv:2601.07568), for models with full attention.

    A forward commits what has an entropy of at most `threshold` nats, in all of the open blocks, and at least one
    position in the first of the unfinished blocks that is active; with `best_of_all` the best position of all, too (its
    program for LLaDA does, the one for Dream does not). What stands behind an end token is overwritten with it at once.

    With cache="prefix" a block goes into the cache `delay` forwards after it was found finished, when what it stands
    among has settled; until then, and at every `refresh_interval`-th forward, all of the canvas is forwarded, and what
    is in the cache written anew. Otherwise a forward takes what is not in the cache.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    closes_at_eos: ClassVar[bool] = True
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
    """A step's slots sorted into the `count` equal parts of its block, so that each part is a row of its own."""

    def __init__(self, step: Step, count: int):
        self.step, self.count, self.length = step, count, step.standing.width // count
        self.place = torch.where(step.used, step.index_in_block, step.standing.width).long()

    def any(self, slots: Tensor) -> Tensor:
        """In which parts one of the slots bool `[B, W]` lies: bool `[B, count]`."""
        return self._sort(slots, False).view(len(slots), self.count, self.length).any(2)

    def select(self, score: Tensor, rule: str, **options: Any) -> Tensor:
        """`Step.select` in each part; options that are tensors hold one value a part. Bool `[B, W]`."""
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
        chosen = torch.nn.functional.pad(chosen.view(len(score), -1), (0, 1))  # the place of unused slots
        return chosen.gather(1, self.place)

    def _sort(self, values: Tensor, missing: float) -> Tensor:
        """Values `[B, W]` of the slots at their places, `[B, count * length]`."""
        places = values.new_full((len(values), self.step.standing.width + 1), missing)
        return places.scatter(1, self.place, values)[:, :-1].contiguous()
