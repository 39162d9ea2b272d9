# SPDX-License-Identifier: Apache-2.0
"""Rules under which a request grows and shrinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import Check, PerRequest, integer, number
from ..step import Step
from .base import OF_THE_HEAD, Action, Rule, row_sum


class VariableLength(Rule):
    """Base of the rules under which a request grows and shrinks, up to `max_new_tokens` of decoded tokens.

    For models with full attention, without a cache. In `act`, `step.room` says by how much each request may still grow.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return super().ignores | OF_THE_HEAD

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
        **{name: PerRequest(number()) for name in ("threshold", "doubt")},
        **{name: number() for name in ("end_enough", "end_certain")},
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
        adjusts = step.recall("adjusts", otherwise=step.everyone(True), by_row=True)
        is_end = step.used & step.is_end(step.argmax)
        counted = is_end & (is_end.flip(1).cumsum(1).flip(1) <= self.end_window)
        end_confidence = row_sum(step.argmax_confidence, counted) / self.end_window
        lengthens = adjusts & (end_confidence < self.end_enough) & (step.room > 0)
        step.keep("adjusts", lengthens, by_row=True)
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
