# SPDX-License-Identifier: Apache-2.0
"""A constraint of its own for each row of a program whose rows come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bitmask import check_bitmask
from .constraint import AllowedTokens, AnswerPlace, Constraint


@dataclass(frozen=True)
class OwnConstraint:
    """The constraint of one row, and how many columns its request has."""

    constraint: Constraint
    width: int


class ConstraintOfEachRow(Constraint):
    """Asks the constraint of each row about that row alone, on the canvas that `generate` would show it.

    Rows that have none are free. What a constraint raises is kept in `errors`, by row, and the row goes on without it;
    whoever owns the rows has to look there. `like` is one of those that are to come: all of them judge what is about to
    be written or none does, and they have as many attempts.
    """

    def __init__(self, like: Constraint | Tensor, rows: int):
        self.attempts = 1 if isinstance(like, Tensor) else like.attempts
        self.errors: dict[int, Exception] = {}
        self._own: list[OwnConstraint | None] = [None] * rows

    @staticmethod
    def of(like: Constraint | Tensor, rows: int) -> ConstraintOfEachRow:
        if isinstance(like, Tensor):
            return TokensOfEachRow(like, rows)
        judges = type(like).accepts is not Constraint.accepts
        return (JudgeOfEachRow if judges else ConstraintOfEachRow)(like, rows)

    def set(
        self, row: int, constraint: Constraint | Tensor, place: AnswerPlace, length: int, tokens: Tensor
    ) -> None:  # fmt: skip
        """Give a row, int64 `tokens` `[1, T]`, a request's constraint.

        `place` is that of its answer alone; `length` is how long this is with the suffix.
        """
        self.clear(row)
        if isinstance(constraint, Tensor):
            constraint = AllowedTokens(check_bitmask(constraint, tokens, length), place.start)
        else:
            try:
                constraint = constraint.bound(place)
            except Exception as error:
                self.errors[row] = error
                return
        self._own[row] = OwnConstraint(constraint, tokens.shape[1])

    def clear(self, row: int) -> None:
        """Let a row be free."""
        self.errors.pop(row, None)
        self._own[row] = None

    def allowed_words(self, tokens: Tensor, positions: Tensor, vocab: int) -> Tensor | None:
        """Bitmasks int32 `[B, W, ceil(vocab / 32)]`, None where no row has any; see `Constraint.allowed`."""
        used = (positions >= 0).any(1).tolist()
        found: Tensor | None = None
        for row, own in enumerate(self._own):
            if own is None or not used[row]:
                continue
            part = slice(row, row + 1)
            try:
                mask = own.constraint.allowed(tokens[part, : own.width], positions[part])
                if mask is None:
                    continue
                mask = checked_bitmask(mask, positions[part], vocab)
            except Exception as error:
                self.errors[row] = error
                continue
            if found is None:
                found = torch.full((*positions.shape, mask.shape[-1]), -1, dtype=torch.int32, device=positions.device)
            found[row] = mask
        return found


class TokensOfEachRow(ConstraintOfEachRow):
    """The same of tensors that say beforehand what is allowed."""

    is_given: ClassVar[bool] = True


class JudgeOfEachRow(ConstraintOfEachRow):
    """The same of constraints that judge what is about to be written."""

    def accepts(self, tokens: Tensor, proposed: Tensor) -> Tensor:
        accepted = torch.ones_like(proposed, dtype=torch.bool)
        for row, own in enumerate(self._own):
            if own is None:
                continue
            part = slice(row, row + 1), slice(own.width)
            if not (proposed[part] >= 0).any():
                continue
            try:
                accepted[part] = checked_verdict(own.constraint, own.constraint.accepts(tokens[part], proposed[part]),
                                                 proposed[part])  # fmt: skip
            except Exception as error:
                self.errors[row] = error
        return accepted


def checked_bitmask(bitmask: object, positions: Tensor, vocab: int) -> Tensor:
    """What `Constraint.allowed` has returned, with a bit for each of `vocab` logits: int32 `[n]` or `[B, W, n]`."""
    words = -(-vocab // 32)
    if not isinstance(bitmask, Tensor) or bitmask.dtype != torch.int32 or bitmask.dim() == 0:
        raise ValueError(f"constraint: allowed tokens must be an int32 bitmask; got {kind_of(bitmask)}")
    shape = tuple(bitmask.shape)
    if shape[:-1] not in ((), tuple(positions.shape)) or shape[-1] > words:
        slots = ", ".join(map(str, positions.shape))
        raise ValueError(
            f"constraint: the bitmask must have shape [n] or [{slots}, n], n at most {words} for {vocab} logits; "
            f"got {list(shape)}"
        )
    return torch.nn.functional.pad(bitmask, (0, words - shape[-1])).to(positions.device).contiguous()


def checked_verdict(constraint: Constraint, accepted: object, proposed: Tensor) -> Tensor:
    """What `Constraint.accepts` has returned, bool of the shape of what is proposed."""
    if (
        not isinstance(accepted, Tensor) or accepted.dtype != torch.bool or accepted.shape != proposed.shape
        or accepted.device.type != "cpu"
    ):  # fmt: skip
        raise ValueError(
            f"constraint: {type(constraint).__name__}.accepts must return bool {list(proposed.shape)} on the CPU; got "
            f"{kind_of(accepted)}"
        )
    return accepted


def kind_of(value: object) -> str:
    """What kind of thing a value is, for messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
