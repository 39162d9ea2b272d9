# SPDX-License-Identifier: Apache-2.0
"""Rules that change the length of a request while decoding it."""

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
    """Base class of rules that change a request's length, up to `max_new_tokens` decoded tokens.

    For models with full attention, without a KV cache. In `act`, `step.room` int32 `[B]` is the number of positions by
    which each request may still grow.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_block: ClassVar[bool] = False

    @property
    def ignores(self) -> frozenset[str]:
        return super().ignores | OF_THE_HEAD

    @property
    def most_growth(self) -> int:
        """Maximum number of positions by which a request grows in a step."""
        raise NotImplementedError

    def max_insertions(self, most: int) -> int:
        """Return the maximum number of insertions, in total, into a request of up to `most` decoded tokens."""
        return most

    def max_forwards(self, masks: int, most: int) -> int:
        """Return the maximum number of forward passes for a request of up to `most` tokens that starts with `masks`."""
        raise NotImplementedError

    def first_masks(self, most: int) -> int:
        """Return the number of masks that a continuation starts with."""
        return most

    def restrict(self, logits: Tensor, room: Tensor) -> None:
        """Set the logits `[B, W, V]` of tokens that must not be proposed to -inf, given the `room` int32 `[B]`."""


@dataclass(frozen=True)
class Expanding(VariableLength):
    """Fill in masks that can become two or none, so that the filled-in text finds its own length.

    DreamOn (arXiv:2602.01326). Each forward pass selects the best `count` positions. A position whose proposal is the
    expand token becomes two masks, one whose proposal is the delete token is removed, and all others are committed. The
    expand token is not proposed once a request has no room left or has expanded `budget` times. If there is room for
    some of a step's expansions only, the leftmost are made and the others keep their mask.

    For `infill`. A row has at most `max_new_tokens` decoded tokens and ends at `DecodingOutput.length`.

    Attributes
    ----------
    expand_token_id : int, optional
        If None, read from the model's configuration.
    delete_token_id : int, optional
        If None, read from the model's configuration. If that has none, the end tokens delete.
    count : int
        Number of positions per forward pass.
    budget : int, optional
        Maximum number of expansions per request. If None, twice `max_new_tokens`.
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
    """Let a text grow to the length that the model considers sufficient.

    DAEDAL (arXiv:2508.00819). Consider the positions where an end token is the most likely. The end confidence of a
    forward pass is the sum of the probabilities at the last `end_window` of them, divided by `end_window`. A request
    starts with `first_length` masks and gets `growth` more in each forward pass while its end confidence is below
    `end_enough`, then `end_window` // 2 more. From then on, block by block, a forward pass commits the positions with a
    score above `threshold`, and at least the best. If the end confidence is below `end_certain`, the least confident of
    the block's other open positions becomes `growth` masks, provided that its confidence is below `doubt`.
    `max_new_tokens` is the maximum length; masks that do not fit are not inserted.

    For `generate`. Each row ends at `DecodingOutput.length`.
    """

    slots: ClassVar[str] = "canvas"
    decodes: ClassVar[str] = "continuations"
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
