# SPDX-License-Identifier: Apache-2.0
"""A constraint at work: what it keeps from being proposed, and what it refuses of what a rule has decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..window import TokenWindow
from .bitmask import pack
from .constraint import AllowedTokens, Constraint
from .rules import Action, Rule
from .state import State
from .step import Step


class Constrained:
    """A decoding's constraint at work; without one, nothing happens."""

    def __init__(
        self, constraint: Constraint | Tensor | None, rule: Rule, canvas: State, start: int, end: int, mask_token: int
    ):
        self.canvas, self.rule, self.mask_token = canvas, rule, mask_token
        if isinstance(constraint, Tensor):
            constraint = AllowedTokens(_check_bitmask(constraint, canvas.tokens, end - start), start)
        self.constraint = constraint
        #: whether what a rule chooses is judged
        self.checks = constraint is not None and type(constraint).accepts is not Constraint.accepts
        if self.checks and self.rule.noise != "mask":
            raise ValueError(
                f"constraint: {type(constraint).__name__}.accepts cannot be used with rule {type(self.rule).__name__}, "
                "which puts noise where nothing is decided; `allowed` can"
            )
        if constraint is not None and (not isinstance(constraint.attempts, int) or constraint.attempts < 1):
            raise ValueError(f"constraint: attempts must be an integer of at least 1; got {constraint.attempts!r}")
        #: whether positions may stay open that another canvas can decide
        self.may_leave_open = (
            constraint is not None and not isinstance(constraint, AllowedTokens) and self.rule.noise == "mask"
        )
        #: requests in which a position of the block has been kept open; and those that no step can change, bool `[B]`
        self.is_behind = torch.zeros_like(canvas.origin, dtype=torch.bool)
        self.is_stuck = self.is_behind

    def enter(self, rows: Tensor) -> None:
        """Forget what was kept open in the block before, in rows bool `[B]`."""
        if self.may_leave_open:
            self.is_behind, self.is_stuck = self.is_behind & ~rows, self.is_stuck & ~rows

    def allowed(self, window: TokenWindow, vocab: int) -> Tensor | None:
        """Bitmask int32 `[ceil(vocab / 32)]` for all of the window's slots, or `[B, W, ceil(vocab / 32)]`."""
        if self.constraint is None:
            return None
        bitmask = self.constraint.allowed(self.canvas.tokens, window.positions)
        if bitmask is None:
            return None
        words = -(-vocab // 32)
        if not isinstance(bitmask, Tensor) or bitmask.dtype != torch.int32 or bitmask.dim() == 0:
            raise ValueError(f"constraint: allowed tokens must be an int32 bitmask; got {_kind(bitmask)}")
        shape = tuple(bitmask.shape)
        if shape[:-1] not in ((), tuple(window.positions.shape)) or shape[-1] > words:
            slots = ", ".join(map(str, window.positions.shape))
            raise ValueError(
                f"constraint: the bitmask must have shape [n] or [{slots}, n], n at most {words} for {vocab} logits; "
                f"got {list(shape)}"
            )
        return torch.nn.functional.pad(bitmask, (0, words - shape[-1])).to(window.positions.device).contiguous()

    def act(
        self, step: Step, is_extra: Tensor | None, act: Callable[[Step], Action] | None = None,
        taken: Tensor | None = None,
    ) -> tuple[Step, Action]:  # fmt: skip
        """What the rule, or `act`, does of the step, as far as it is accepted; and the step with the proposals used.

        In rows `is_extra` bool `[B]` (None: in no row) the rule's plan has come to its end: what is left open is
        committed one by one. `taken` bool `[B]`: the rows that take part in the step; None: all.
        One host round trip for each time that it decides.
        """
        act = self.rule.act if act is None else act
        if not self.may_leave_open:
            return step, act(step)
        assert self.constraint is not None
        is_extra = torch.zeros_like(self.is_behind) if is_extra is None else is_extra
        was_behind = self.is_behind | is_extra
        for left in reversed(range(self.constraint.attempts)):
            step.kept.clear()  # a rule has decided once, however often it was asked
            action = self._decide(act(step), step, is_extra)
            token = step.token if action.token is None else action.token
            written = self._written(step, action, token)
            if not self.rule.draws:
                # a plan that takes no notice of what was kept open may have come to its end
                idle = self.is_behind & ~(written | _mask(action.remask, step)).any(1)
                rescue = _mask(one_each(step).commit, step) & idle[:, None]
                action = replace(action, commit=_mask(action.commit, step) | rescue)
                written = written | (rescue & (token >= 0))
            refused = self._refused(step, action, token, written) if self.checks else None
            if refused is None:
                break
            if left:
                step = step.without(refused, token)
            else:
                action, written = _less(action, refused), written & ~refused
                self.is_behind = self.is_behind | refused.any(1)
        # in these the best that there is was tried, and this canvas would only be tried again
        tries_all = is_extra if self.rule.draws else torch.ones_like(is_extra)
        nothing = ~(written | _mask(action.remask, step)).any(1)
        nothing = nothing if taken is None else nothing & taken
        self.is_stuck = self.is_stuck | (tries_all & was_behind & nothing)
        self.is_behind = self.is_behind | (step.eligible & ~written & (step.token < 0)).any(1)
        return step, action

    @staticmethod
    def _decide(action: Action, step: Step, is_extra: Tensor) -> Action:
        """The action, or in the extra steps `one_each`."""
        alone, extra = one_each(step), is_extra[:, None]

        def otherwise(ours: Any, theirs: Tensor | None) -> Tensor | None:
            return None if theirs is None else torch.where(extra, ours, theirs)

        return replace(
            action, commit=torch.where(extra, _mask(alone.commit, step), _mask(action.commit, step)),
            token=otherwise(step.token, action.token), confidence=otherwise(step.confidence, action.confidence),
            **{name: otherwise(False, getattr(action, name)) for name in ("edit", "remask", "renoise", "embedded")},
        )  # fmt: skip

    @staticmethod
    def _written(step: Step, action: Action, token: Tensor) -> Tensor:
        """The slots into which `ops.remask_` would write `token`, bool `[B, W]`."""
        commit, edit = _mask(action.commit, step), _mask(action.edit, step)
        written = (commit & step.is_open) | (edit & step.decided & (token != step.current))
        return written & (token >= 0) & ~_mask(action.remask, step) & ~_mask(action.renoise, step)

    def _refused(self, step: Step, action: Action, token: Tensor, written: Tensor) -> Tensor | None:
        """Which of the `written` slots are refused, bool `[B, W]`; None if none is."""
        assert self.constraint is not None
        tokens, length = self.canvas.tokens, self.canvas.tokens.shape[1]
        column = step.window.positions.long()

        def on_canvas(values: Tensor, where: Tensor, canvas: Tensor) -> Tensor:
            wider = torch.nn.functional.pad(canvas, (0, 1))  # one more column, for the other slots
            return wider.scatter(1, torch.where(where, column, length), values)[:, :length]

        back = _mask(action.remask, step) & step.decided
        before = on_canvas(torch.full_like(token, self.mask_token), back, tokens)
        proposed = on_canvas(token, written, torch.full_like(tokens, -1))
        before, proposed = torch.stack((before, proposed)).cpu()
        is_new = proposed >= 0
        if not is_new.any():
            return None
        accepted = self.constraint.accepts(before, proposed)
        if (
            not isinstance(accepted, Tensor) or accepted.dtype != torch.bool or accepted.shape != proposed.shape
            or accepted.device.type != "cpu"
        ):  # fmt: skip
            raise ValueError(
                f"constraint: {type(self.constraint).__name__}.accepts must return bool {list(proposed.shape)} on the "
                f"CPU; got {_kind(accepted)}"
            )
        refused = is_new & ~accepted
        if not refused.any():
            return None
        return step.at(refused.to(tokens.device)) & written


def _less(action: Action, refused: Tensor) -> Action:
    """The action without what was refused in the end, bool `[B, W]`."""

    def less(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask & ~refused

    return replace(action, commit=less(action.commit), edit=less(action.edit), embedded=less(action.embedded))


def one_each(step: Step) -> Action:
    """Commit the best position of each request: what is done for positions that a rule's plan has left open."""
    return Action(commit=step.select("none", fill=1))


def _mask(mask: Tensor | None, step: Step) -> Tensor:
    return torch.zeros_like(step.eligible) if mask is None else mask


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)} on {value.device}"


def _check_bitmask(bitmask: Tensor, tokens: Tensor, columns: int) -> Tensor:
    """A bitmask `[n]` or `[B or 1, N or 1, n]` on the device of the canvas `tokens`, from one or from bools."""
    if bitmask.dtype == torch.bool:
        bitmask = pack(bitmask)
    if bitmask.dtype != torch.int32 or bitmask.device != tokens.device:
        raise ValueError(
            f"constraint must be an int32 bitmask or bool, on {tokens.device}; got {bitmask.dtype} on {bitmask.device}"
        )
    batch = len(tokens)
    if bitmask.dim() == 2:
        bitmask = bitmask[None]
    if bitmask.dim() not in (1, 3) or (
        bitmask.dim() == 3 and (bitmask.shape[0] not in (1, batch) or bitmask.shape[1] not in (1, columns))
    ):
        raise ValueError(
            f"constraint must have shape [n], [{columns}, n] or [{batch}, {columns}, n], n words of 32 tokens or n "
            f"bools; got {list(bitmask.shape)} as a bitmask"
        )
    return bitmask
