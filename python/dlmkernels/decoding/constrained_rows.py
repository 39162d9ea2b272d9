# SPDX-License-Identifier: Apache-2.0
"""A separate constraint for each batch row, in programs whose rows are given new requests while others decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bitmask import check_bitmask
from .constraint import AllowedTokens, AnswerPlace, Constraint


@dataclass(frozen=True)
class OwnConstraint:
    """The constraint of one row, and the number of columns of its request."""

    constraint: Constraint
    width: int


class ConstraintOfEachRow(Constraint):
    """Asks each row's constraint about that row alone, on the canvas that `generate` would show it.

    Rows without a constraint are free. If a constraint raises an exception, it is stored in `errors`, by row, and the
    row continues without it; the owner of the rows must check for errors. `like` is an example of the constraints to
    come: either all or none of them override `accepts`, and they have the same number of attempts.
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
        """Set the constraint of a row with canvas `tokens`, int64 `[1, T]`.

        `place`: the columns of the row's answer. `length`: length of the answer including the suffix.
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
        """Remove the constraint of a row."""
        self.errors.pop(row, None)
        self._own[row] = None

    def allowed_words(self, tokens: Tensor, positions: Tensor, vocab: int) -> Tensor | None:
        """Return bitmasks int32 `[B, W, ceil(vocab / 32)]`, or None if no row has any; see `Constraint.allowed`."""
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
    """A `ConstraintOfEachRow` for fixed tensors of allowed tokens."""

    is_given: ClassVar[bool] = True


class JudgeOfEachRow(ConstraintOfEachRow):
    """A `ConstraintOfEachRow` for constraints that override `accepts`."""

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
    """Check the result of `Constraint.allowed`; pad it to `vocab` bits per slot, int32 `[n]` or `[B, W, n]`."""
    words = -(-vocab // 32)
    if not isinstance(bitmask, Tensor) or bitmask.dtype != torch.int32 or bitmask.dim() == 0:
        raise ValueError(f"constraint: allowed tokens must be an int32 bitmask; got {kind_of(bitmask)}")
    shape = tuple(bitmask.shape)
    if shape[-1] > words:
        raise ValueError(
            f"constraint: the bitmask has {shape[-1]} words of 32 tokens, more than the {words} for {vocab} logits"
        )
    if shape[:-1] not in ((), tuple(positions.shape)):
        slots = ", ".join(map(str, positions.shape))
        raise ValueError(
            f"constraint: the bitmask must have shape [n] or [{slots}, n] with n at most {words} for {vocab} logits; "
            f"got {list(shape)}"
        )
    return torch.nn.functional.pad(bitmask, (0, words - shape[-1])).to(positions.device).contiguous()


def checked_verdict(constraint: Constraint, accepted: object, proposed: Tensor) -> Tensor:
    """Check the result of `Constraint.accepts`: bool, of the shape of `proposed`, on the CPU."""
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
    """Describe the type of a value for an error message; of a tensor, dtype, shape and device."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
