# SPDX-License-Identifier: Apache-2.0
"""A constraint at work: what it keeps from being proposed, and what it refuses of what a rule has decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..window import TokenWindow
from .bitmask import check_bitmask
from .constrained_rows import ConstraintOfEachRow, checked_bitmask, checked_verdict
from .constraint import AllowedTokens, AnswerPlace, Constraint
from .rules import Action, Rule
from .state import State
from .step import Step


class Constrained:
    """A decoding's constraint at work; without one, nothing happens."""

    def __init__(self, constraint: Constraint | Tensor | None, rule: Rule, canvas: State, place: AnswerPlace, end: int):
        self.canvas, self.rule, self.mask_token = canvas, rule, place.mask
        if isinstance(constraint, Tensor):
            constraint = AllowedTokens(check_bitmask(constraint, canvas.tokens, end - place.start), place.start)
        elif constraint is not None:
            constraint = constraint.bound(place)
        self.constraint = constraint
        #: whether what a rule chooses is judged
        self.checks = constraint is not None and type(constraint).accepts is not Constraint.accepts
        if self.checks and self.rule.noise != "mask":
            raise ValueError(
                f"constraint: {type(constraint).__name__}.accepts cannot be used with rule {type(self.rule).__name__}: "
                "it judges tokens that take the place of masks, and this rule has none; `allowed` can be used"
            )
        if constraint is not None and (not isinstance(constraint.attempts, int) or constraint.attempts < 1):
            raise ValueError(f"constraint: attempts must be an integer of at least 1; got {constraint.attempts!r}")
        #: whether positions may stay open that another canvas can decide
        is_given = getattr(constraint, "is_given", False)
        self.may_leave_open = constraint is not None and not is_given and self.rule.noise == "mask"
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
        if isinstance(self.constraint, ConstraintOfEachRow):
            return self.constraint.allowed_words(self.canvas.tokens, window.positions, vocab)
        bitmask = self.constraint.allowed(self.canvas.tokens, window.positions)
        return None if bitmask is None else checked_bitmask(bitmask, window.positions, vocab)

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
        accepted = checked_verdict(self.constraint, self.constraint.accepts(before, proposed), proposed)
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
