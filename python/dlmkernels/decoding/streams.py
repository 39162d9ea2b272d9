# SPDX-License-Identifier: Apache-2.0
"""Rules that do not go block after block. They have loops of their own, in which each row advances by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..window import TokenWindow
from .checks import FLOAT32, Check, amount, flag, integer, number
from .rules import Action, Rule
from .rules.base import SHARE, row_sum

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True)
class Strided(Rule):
    """Up to `stride` tokens a forward: drafts of the last forward are verified, and the next ones drafted, in one.

    I-DLM (arXiv:2604.11035), for strictly causal models whose row i speaks of position i + 1. A forward takes the last
    token, the drafts after it and stride - 1 masks. From the left, a draft is accepted if it is the very token that the
    model chooses in that row; the first that is not is replaced by that token. If none is rejected, one more token is
    taken, and the rows of the masks draft the next ones, with the noise of the forward that will verify them. So at
    temperature 0 the tokens are those of decoding one after another, and at any other, under any filter, they have the
    same distribution. Masks leave nothing in the cache.

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

    decodes: ClassVar[str] = "continuations"
    limits: ClassVar[Mapping[str, Check]] = {
        "stride": integer(2), "leniency": number(0, FLOAT32.max, above=True, optional=True),
    }  # fmt: skip
    by_block: ClassVar[bool] = False

    stride: int = 4
    leniency: float | None = None

    @property
    def ignores(self) -> frozenset[str]:
        names = {"block_length", "sub_block_length", "score", "defer_token_ids", "order_temperature", "seeded"}
        # drafts are then compared under the tempered distribution
        return frozenset(names if self.leniency is None else names | {"distribution"})

    def select(self, step):
        raise TypeError("Strided has a loop of its own and selects nothing of a step")


@dataclass(frozen=True)
class SelfSpeculative(Rule):
    """A block drafted in one forward that sees all of it, and verified in another that reads it from the left.

    The linear self-speculation of Nemotron-Labs-Diffusion (arXiv:2607.05722), for models that are causal in what is
    decided (their row i then speaks of position i + 1) and fill the masks of a block in place. The block begins with
    the last token. Drafts are accepted from the left while they are what the causal model says itself; its own token
    comes after them. So the tokens are those of decoding one after another, drawn ones too: drafts are only compared.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    decodes: ClassVar[str] = "continuations"
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"sub_block_length", "score", "defer_token_ids", "order_temperature"})

    def select(self, step):
        raise TypeError("SelfSpeculative has a loop of its own and selects nothing of a step")


@dataclass(frozen=True)
class Reordered(Rule):
    """A window of masks that slides with what is decided before it, all of it read again as if in another order.

    WeDLM (arXiv:2512.22737), for causal models that fill masks in place. A forward takes the decided tokens first, then
    the masks of the window, each seeing those before it in this order, at its own place in the text. So what is decided
    up to the first mask is final, and is appended to the cache. Masks are filled where entropy + `distance_penalty`
    (distance from the first mask) is below `entropy_threshold` nats; at least the least.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    decodes: ClassVar[str] = "continuations"
    limits: ClassVar[Mapping[str, Check]] = {
        "window": integer(1), "entropy_threshold": number(), "distance_penalty": amount,
    }  # fmt: skip
    by_block: ClassVar[bool] = False

    window: int = 16
    entropy_threshold: float = 0.4
    distance_penalty: float = 0.02

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"block_length", "sub_block_length", "score", "defer_token_ids", "seeded"})

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
    decodes: ClassVar[str] = "continuations"
    #: whether an end token closes what stands behind it before everything left of it is decided
    closes_at_eos: ClassVar[bool] = False
    limits: ClassVar[Mapping[str, Check]] = {"threshold": number(), "open_at": SHARE, "activate_at": SHARE}
    by_block: ClassVar[bool] = False

    threshold: float = 0.9
    open_at: float = 0.1
    activate_at: float = 0.95

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


class VariableLength(Rule):
    """Base of the rules under which a request grows and shrinks, up to `max_new_tokens` of decoded tokens.

    For models with full attention, without a cache. In `act`, `step.room` says by how much each request may still grow.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_block: ClassVar[bool] = False

    @property
    def most_growth(self) -> int:
        """By how many positions at most a request grows in a step."""
        raise NotImplementedError

    def max_insertions(self, most: int) -> int:
        """How many positions may be inserted into a request of at most `most` decoded tokens, all in all."""
        return most

    def max_forwards(self, masks: int, most: int) -> int:
        """Forwards after which such a request, which began with `masks`, is complete."""
        raise NotImplementedError

    def first_masks(self, most: int) -> int:
        """How many masks a continuation begins with."""
        return most

    def restrict(self, logits: Tensor, room: Tensor) -> None:
        """Write -inf to the logits `[B, W, V]` of what must not be proposed."""


@dataclass(frozen=True)
class Expanding(VariableLength):
    """Masks that become two, or none: what is filled in finds its own length.

    DreamOn (arXiv:2602.01326). A forward takes the best `count` positions: one whose proposal is the expand token
    becomes two masks, one whose proposal is the delete token is taken out, the others are committed. Where a request
    has no room left, or has expanded `budget` times, the expand token is not proposed. Of several expansions that have
    too little room together the first are made; the others leave their mask as it is.

    For `infill`: a row has at most `max_new_tokens` decoded tokens, and ends where `DecodingOutput.length` says.

    Attributes
    ----------
    expand_token_id : int, optional
        Taken from the model's configuration where None.
    delete_token_id : int, optional
        Where neither the rule nor the model's configuration has one, the end tokens delete.
    count : int
        Positions a forward.
    budget : int, optional
        None: twice `max_new_tokens`.
    """

    decodes: ClassVar[str] = "infillings"
    token_ids: ClassVar[dict[str, bool]] = {"expand_token_id": True, "delete_token_id": False}
    limits: ClassVar[Mapping[str, Check]] = {
        "expand_token_id": integer(0, optional=True), "delete_token_id": integer(0, optional=True),
        "count": integer(1), "budget": integer(0, optional=True),
    }  # fmt: skip
    reads_ends: ClassVar[bool] = True

    expand_token_id: int | None = None
    delete_token_id: int | None = None
    count: int = 1
    budget: int | None = None

    @property
    def most_growth(self) -> int:
        return self.count

    def max_insertions(self, most: int) -> int:
        return 2 * most if self.budget is None else self.budget

    def max_forwards(self, masks: int, most: int) -> int:
        return masks + 2 * self.max_insertions(most)

    def restrict(self, logits: Tensor, room: Tensor) -> None:
        assert self.expand_token_id is not None
        logits[..., self.expand_token_id].masked_fill_((room <= 0)[:, None], -torch.inf)

    def act(self, step: Step) -> Action:
        assert step.room is not None
        chosen = step.select("none", fill=self.count)
        expands = chosen & (step.token == self.expand_token_id)
        deletes = chosen & (
            step.is_end(step.token) if self.delete_token_id is None else step.token == self.delete_token_id
        )
        made = expands & (expands.cumsum(1) <= step.room[:, None])
        return Action(chosen & ~expands & ~deletes, insert=made.int(), remove=deletes)


@dataclass(frozen=True)
class Lengthening(VariableLength):
    """A text that is as long as the model thinks it has to be.

    DAEDAL (arXiv:2508.00819). The end confidence of a forward is the sum of the probabilities of the last `end_window`
    positions at which an end token is the likeliest, divided by `end_window`. A request begins with `first_length`
    masks, and gets `growth` more as long as its end confidence is below `end_enough`; then `end_window` // 2 more. From
    there on, block by block, a forward commits what is more confident than `threshold`, the best at least; and where
    the end confidence is below `end_certain`, the least confident of the other open positions of the block, if it is
    below `doubt`, becomes `growth` masks. `max_new_tokens` is the largest length; what does not fit is not inserted.

    For `generate`; a row ends where `DecodingOutput.length` says.
    """

    slots: ClassVar[str] = "canvas"
    decodes: ClassVar[str] = "continuations"
    limits: ClassVar[Mapping[str, Check]] = {
        **{name: number() for name in ("threshold", "doubt", "end_enough", "end_certain")},
        **{name: integer(1) for name in ("first_length", "growth", "end_window")},
    }  # fmt: skip
    reads_ends: ClassVar[bool] = True

    threshold: float = 0.9
    doubt: float = 0.1
    first_length: int = 64
    growth: int = 8
    end_window: int = 32
    end_enough: float = 0.5
    end_certain: float = 0.9

    @property
    def most_growth(self) -> int:
        return max(self.growth, self.end_window // 2)

    def max_forwards(self, masks: int, most: int) -> int:
        return -(-most // self.growth) + 1 + most

    def first_masks(self, most: int) -> int:
        return min(self.first_length, most)

    def act(self, step: Step) -> Action:
        assert step.room is not None
        adjusts = step.memory.get("adjusts", step.everyone(True))
        is_end = step.used & step.is_end(step.argmax)
        counted = is_end & (is_end.flip(1).cumsum(1).flip(1) <= self.end_window)
        end_confidence = row_sum(step.argmax_confidence, counted) / self.end_window
        lengthens = adjusts & (end_confidence < self.end_enough) & (step.room > 0)
        step.memory["adjusts"] = lengthens
        append = torch.where(lengthens, self.growth, self.end_window // 2).masked_fill(~adjusts, 0)

        eligible = step.eligible & ~adjusts[:, None]
        commit = step.select("threshold", eligible=eligible, parameter=self.threshold, strict=True, need=1, fill=1)
        doubted = eligible & ~commit & (step.confidence < self.doubt)
        doubted &= (end_confidence < self.end_certain)[:, None]
        chosen = step.select("none", score=-step.confidence, eligible=doubted, fill=1)
        insert = chosen * step.room.clamp(0, self.growth - 1)[:, None]
        return Action(
            commit, insert=insert.int(), remove=torch.zeros_like(commit), append=torch.minimum(append, step.room).int()
        )


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
