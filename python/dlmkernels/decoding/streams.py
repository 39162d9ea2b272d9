# SPDX-License-Identifier: Apache-2.0
"""Rules that do not go block after block. They have loops of their own, in which each row advances by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..window import TokenWindow
from .rules import Rule
from .rules.base import check_number

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True)
class Strided(Rule):
    """Up to `stride` tokens a forward: drafts of the last forward are verified, and the next ones drafted, in one.

    I-DLM (arXiv:2604.11035), for strictly causal models whose row i speaks of position i + 1. A forward takes the last
    token, the drafts after it and stride - 1 masks. From the left, a draft is accepted if it is the very token that the
    model chooses in that row; the first that is not is replaced by that token. If none is rejected, one more token is
    taken, and the rows of the masks draft the next ones, with the noise of the forward that will verify them. So the
    tokens are those of decoding one after another, under any temperature and filter. Masks leave nothing in the cache.

    Attributes
    ----------
    stride : int
        At least 2.
    leniency : float, optional
        With a number, drafts are accepted as I-DLM's program does it (at a temperature): the masks draft their most
        likely tokens, a draft x is accepted with probability min(1, p(x) / (leniency q(x))), p and q the unfiltered
        distributions of the forward that verifies and of the one that drafted it, and the first one rejected is
        replaced by a draw from max(0, p - q). More drafts are accepted, of another distribution than the model's.
    """

    stride: int = 4
    leniency: float | None = None

    def __post_init__(self):
        if not isinstance(self.stride, int) or self.stride < 2:
            raise ValueError(f"stride must be an integer of at least 2; got {self.stride!r}")
        if self.leniency is not None and not (isinstance(self.leniency, (int, float)) and self.leniency > 0):
            raise ValueError(f"leniency must be None or a positive number; got {self.leniency!r}")

    def select(self, step):
        raise TypeError("Strided has a loop of its own and selects nothing of a step")


@dataclass(frozen=True)
class Reordered(Rule):
    """A window of masks that slides with what is decided before it, all of it read again as if in another order.

    WeDLM (arXiv:2512.22737), for causal models that fill masks in place. A forward takes the decided tokens first, then
    the masks of the window, each seeing those before it in this order, at its own place in the text. So what is decided
    up to the first mask is final, and is appended to the cache. Masks are filled where entropy + `distance_penalty`
    (distance from the first mask) is below `entropy_threshold` nats; at least the least.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    window: int = 16
    entropy_threshold: float = 0.4
    distance_penalty: float = 0.02

    def __post_init__(self):
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an integer of at least 1; got {self.window!r}")

    def select(self, step: Step) -> Tensor:
        distance = step.window.positions - step.window.positions[:, :1]  # slots ascend
        score = -(step.entropy + self.distance_penalty * distance)
        return step.select("threshold", score=score, parameter=-self.entropy_threshold, strict=True, need=1, fill=1)


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
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    #: whether an end token closes what stands behind it before everything left of it is decided
    closes_at_eos: ClassVar[bool] = False

    threshold: float = 0.9
    open_at: float = 0.1
    activate_at: float = 0.95

    def __post_init__(self):
        check_number("threshold", self.threshold)
        check_number("open_at", self.open_at, 0, 1)
        check_number("activate_at", self.activate_at, 0, 1)

    def select(self, step):
        raise TypeError(f"{type(self).__name__} has a loop of its own and selects by block")

    def select_by_block(self, step: Step, is_active: Tensor) -> Tensor:
        """Positions to commit, bool `[B, W]`, of the open blocks; `is_active` bool `[B, N]` says which are active.

        The blocks are N equal parts of the step's block, which is the whole of what is decoded.
        """
        return ByBlock(step, is_active.shape[1]).select(
            step.score, "threshold", parameter=self.threshold, strict=True, need=1, fill=is_active.flatten()
        )


@dataclass(frozen=True)
class EntropyPipeline(Pipeline):
    """The pipeline of d3LLM (github.com/hao-ai-lab/d3LLM), for models with full attention.

    A forward commits what has an entropy of at most `threshold` nats, in all of the open blocks, and at least one
    position; and at least one in the first of the unfinished blocks that is active. What stands behind an end token is
    overwritten with it at once.

    With cache="prefix" a block goes into the cache `delay` forwards after it was found finished, when what it stands
    among has settled; until then, and at every `refresh_interval`-th forward, all of the canvas is forwarded, and what
    is in the cache written anew. Otherwise a forward takes what is not in the cache.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    closes_at_eos: ClassVar[bool] = True

    threshold: float = 0.5
    delay: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.delay, int) or self.delay < 1:
            raise ValueError(f"delay must be an integer of at least 1; got {self.delay!r}")

    def select_by_block(self, step: Step, is_active: Tensor) -> Tensor:
        score, blocks = -step.entropy, ByBlock(step, is_active.shape[1])
        chosen = step.select("threshold", score=score, parameter=-self.threshold, need=1, fill=1)
        working = is_active & blocks.any(step.eligible)
        first = working & (working.cumsum(1) == 1)
        return chosen | blocks.select(score, "none", fill=(first & ~blocks.any(chosen)).flatten())


class ByBlock:
    """A step's slots sorted into the `count` equal parts of its block, so that each part is a row of its own."""

    def __init__(self, step: Step, count: int):
        self.step, self.count, self.length = step, count, step.block_length // count
        self.place = torch.where(step.used, step.index_in_block, step.block_length).long()

    def any(self, slots: Tensor) -> Tensor:
        """In which parts one of the slots bool `[B, W]` lies: bool `[B, count]`."""
        return self._sort(slots, False).view(len(slots), self.count, self.length).any(2)

    def select(self, score: Tensor, rule: str, **options: Any) -> Tensor:
        """`Step.select` in each part; options that are tensors hold one value a part. Bool `[B, W]`."""
        step, shape = self.step, (len(score) * self.count, self.length)
        columns = torch.arange(step.block_length, dtype=torch.int32, device=score.device)
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
        places = values.new_full((len(values), self.step.block_length + 1), missing)
        return places.scatter(1, self.place, values)[:, :-1].contiguous()
