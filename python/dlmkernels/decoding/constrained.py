# SPDX-License-Identifier: Apache-2.0
"""Application of a constraint during decoding: restrict the proposals, and reject tokens that a rule has chosen."""

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
    """Applies the constraint of a decoding; does nothing if there is none."""

    def __init__(self, constraint: Constraint | Tensor | None, rule: Rule, canvas: State, place: AnswerPlace, end: int):
        self.canvas, self.rule, self.mask_token = canvas, rule, place.mask
        if isinstance(constraint, Tensor):
            constraint = AllowedTokens(check_bitmask(constraint, canvas.tokens, end - place.start), place.start)
        elif constraint is not None:
            constraint = constraint.bound(place)
        self.constraint = constraint
        #: whether the tokens that a rule chooses have to be accepted
        self.checks = constraint is not None and type(constraint).accepts is not Constraint.accepts
        if self.checks and self.rule.noise != "mask":
            raise ValueError(
                f"constraint: {type(constraint).__name__}.accepts cannot be used with rule {type(self.rule).__name__}: "
                "it checks tokens that replace mask tokens, and this rule has none; override `allowed` instead"
            )
        if constraint is not None and (not isinstance(constraint.attempts, int) or constraint.attempts < 1):
            raise ValueError(f"constraint: attempts must be an integer of at least 1; got {constraint.attempts!r}")
        #: whether positions may stay open until the canvas around them has changed
        is_given = getattr(constraint, "is_given", False)
        self.may_leave_open = constraint is not None and not is_given and self.rule.noise == "mask"
        #: requests in which a position of the block was kept open; and those that no step can change, bool `[B]`
        self.is_behind = torch.zeros_like(canvas.origin, dtype=torch.bool)
        self.is_stuck = self.is_behind

    def enter(self, rows: Tensor) -> None:
        """Start a new block in rows bool `[B]`: forget that positions were kept open in the previous one."""
        if self.may_leave_open:
            self.is_behind, self.is_stuck = self.is_behind & ~rows, self.is_stuck & ~rows

    def allowed(self, window: TokenWindow, vocab: int) -> Tensor | None:
        """Return bitmasks of allowed tokens, int32 `[n]` or, by slot, `[B, W, n]`, n = ceil(vocab / 32); None: any."""
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
        """Return the step with the proposals that were used, and the accepted part of the action of `act`.

        `act`: decides the step; None: `Rule.act` of the rule. In rows `is_extra` bool `[B]` (None: in no row) the
        rule's plan has ended, and remaining open positions are committed one by one. `taken` bool `[B]`: rows that take
        part in the step; None: all. If tokens have to be accepted, each decision costs a device synchronization.
        """
        act = self.rule.act if act is None else act
        if not self.may_leave_open:
            return step, act(step)
        assert self.constraint is not None
        is_extra = torch.zeros_like(self.is_behind) if is_extra is None else is_extra
        was_behind = self.is_behind | is_extra
        for left in reversed(range(self.constraint.attempts)):
            step.kept.clear()  # only the last of the step's decisions counts
            action = self._decide(act(step), step, is_extra)
            token = step.token if action.token is None else action.token
            written = self._written(step, action, token)
            if not self.rule.draws:
                # the plan may have ended, since it does not account for positions that were kept open
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
        # in these rows even the best position was tried, and the next step would only see the same canvas again
        tries_all = is_extra if self.rule.draws else torch.ones_like(is_extra)
        nothing = ~(written | _mask(action.remask, step)).any(1)
        nothing = nothing if taken is None else nothing & taken
        self.is_stuck = self.is_stuck | (tries_all & was_behind & nothing)
        self.is_behind = self.is_behind | (step.eligible & ~written & (step.token < 0)).any(1)
        return step, action

    @staticmethod
    def _decide(action: Action, step: Step, is_extra: Tensor) -> Action:
        """Return the action, with `one_each` in its place in the rows `is_extra`."""
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
        """Return the slots into which `ops.remask_` would write `token`, bool `[B, W]`."""
        commit, edit = _mask(action.commit, step), _mask(action.edit, step)
        written = (commit & step.is_open) | (edit & step.decided & (token != step.current))
        return written & (token >= 0) & ~_mask(action.remask, step) & ~_mask(action.renoise, step)

    def _refused(self, step: Step, action: Action, token: Tensor, written: Tensor) -> Tensor | None:
        """Return which of the `written` slots the constraint rejects, bool `[B, W]`; None if it rejects none."""
        assert self.constraint is not None
        tokens, length = self.canvas.tokens, self.canvas.tokens.shape[1]
        column = step.window.positions.long()

        def on_canvas(values: Tensor, where: Tensor, canvas: Tensor) -> Tensor:
            wider = torch.nn.functional.pad(canvas, (0, 1))  # one extra column, for the other slots
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
    """Return the action without the slots that were finally rejected, bool `[B, W]`."""

    def less(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask & ~refused

    return replace(action, commit=less(action.commit), edit=less(action.edit), embedded=less(action.embedded))


def one_each(step: Step) -> Action:
    """Return the action that commits the best position of each request, for positions that a rule's plan left open."""
    return Action(commit=step.select("none", fill=1))


def _mask(mask: Tensor | None, step: Step) -> Tensor:
    return torch.zeros_like(step.eligible) if mask is None else mask
