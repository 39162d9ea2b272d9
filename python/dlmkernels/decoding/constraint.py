# SPDX-License-Identifier: Apache-2.0
"""Constraints: what the tokens of a decoding must obey, whatever the model says and the rule chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rules.base import Action

if TYPE_CHECKING:
    from ..window import TokenWindow
    from .canvas import Canvas
    from .config import DecodingConfig
    from .step import Step


class Constraint:
    """Base of all constraints. A subclass overrides `allowed`, `accepts`, or both.

    `allowed` says beforehand which tokens may be proposed, and the probabilities, margins and entropies that the rule
    sees are those of the distribution over them. `accepts` judges what the rule is about to write, all of it together:
    what it refuses is taken out of the distribution of its position, and the rule decides anew from the logits that are
    there, without a forward, until everything is accepted (as in constrained decoding of diffusion models with
    grammars, Mündler et al., arXiv:2508.10111). A position that has no candidate left stays open for the next forward,
    which sees another canvas. Where the rule has nothing to say any more, what is open gets forwards of its own, one
    position in each, until all is decided or nothing more is accepted.

    Canvases are int64 `[B, T]` and hold the mask token where nothing is decided. Answers begin in the same column in
    every row. Each row must be judged by itself, or its result depends on the batch.

    >>> class NoRepeats(Constraint):
    ...     def accepts(self, tokens, proposed):
    ...         after = torch.where(proposed >= 0, proposed, tokens)
    ...         same = after[:, 1:] == after[:, :-1]
    ...         return ~(torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1)))
    """

    #: how often a step decides at most; what is refused the last time stays open, and nothing else is lost
    attempts: int = 100

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def allowed(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Which tokens may stand at canvas `positions` int32 `[B, W]` (-1: a slot that is not used).

        Called once a step, with tensors on the model's device; reading their values stops a GPU. Returns int32 bitmasks
        `[B, W, n]`, one for each slot, or `[n]` for all, bit v % 32 of word v // 32 being 1 where token v is allowed
        (the layout of xgrammar and llguidance); None: any token. Tokens for which there is no word, n being less than
        V / 32, are not allowed.
        """
        return None

    def accepts(self, tokens: Tensor, proposed: Tensor) -> Tensor:
        """Which of the `proposed` tokens are all right: bool `[B, T]`.

        `tokens` is the canvas, `proposed` int64 `[B, T]` what is to be written into it, -1 where nothing is. To write
        exactly what is accepted must be all right. Called at least once a step, with tensors on the CPU: they are
        fetched in one transfer.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AllowedTokens(Constraint):
    """Bitmasks given for all positions beforehand: int32 `[n]`, or `[B, N, n]` for the N columns from `start` on.

    B and N may be 1. Behind those columns everything is allowed.
    """

    bitmask: Tensor
    start: int

    def allowed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.bitmask.dim() == 1:
            return self.bitmask
        batch, columns, _ = self.bitmask.shape
        index = (positions - self.start).clamp(min=0).long()
        row = torch.arange(len(positions), device=positions.device)[:, None].clamp(max=batch - 1)
        chosen = self.bitmask[row, index.clamp(max=columns - 1)]
        return torch.where((index >= columns)[..., None], -1, chosen) if columns > 1 else chosen


class Constrained:
    """A decoding's constraint at work; without one, nothing happens."""

    def __init__(self, config: DecodingConfig, canvas: Canvas, start: int, end: int, mask_token: int):
        self.canvas, self.rule, self.mask_token = canvas, config.rule, mask_token
        constraint = config.constraint
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
        self.begin_block()

    def begin_block(self) -> None:
        """Forget what was kept open in the block before."""
        #: requests in which a position of the block has been kept open; and those that no step can change, bool `[B]`
        self.is_behind = torch.zeros_like(self.canvas.origin, dtype=torch.bool)
        self.is_stuck = self.is_behind

    def without_stuck(self, window: TokenWindow, among: Tensor | None) -> TokenWindow:
        """The window without requests that are stuck, or not `among` bool `[B]`."""
        goes_on = ~self.is_stuck if among is None else among & ~self.is_stuck
        return replace(window, positions=torch.where(goes_on[:, None], window.positions, -1))

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

    def act(self, step: Step, act: Callable[[Step], Action]) -> tuple[Step, Action]:
        """What `act` does of the step, as far as it is accepted; and the step with the proposals it was decided from.

        One host round trip for each time that it decides.
        """
        if not self.may_leave_open:
            return step, act(step)
        assert self.constraint is not None
        memory, was_behind = dict(step.memory), self.is_behind
        for left in reversed(range(self.constraint.attempts)):
            step.memory.clear()
            step.memory.update(memory)  # a rule has decided once, however often it was asked
            action = act(step)
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
        if act is one_each:
            was_behind = torch.ones_like(was_behind)
        if act is one_each or not self.rule.draws:
            # the best that there is was tried, and this canvas would only be tried again
            self.is_stuck = self.is_stuck | (was_behind & ~(written | _mask(action.remask, step)).any(1))
        self.is_behind = self.is_behind | (step.eligible & ~written & (step.token < 0)).any(1)
        return step, action

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


def without(bitmask: Tensor, token: Tensor, where: Tensor) -> Tensor:
    """Bitmasks int32 `[B, W, n]` with the bit of `token` int64 `[B, W]` cleared `where` bool `[B, W]` says so."""
    word, bit = (token.clamp(min=0) // 32)[..., None], _to_int32(1 << token.clamp(min=0) % 32)
    bit = torch.where(where, bit, 0)[..., None]
    return bitmask.scatter(2, word, bitmask.gather(2, word) & ~bit)


def pack(allowed: Tensor) -> Tensor:
    """Bitmasks int32 `[…, ceil(V / 32)]` of bool `[…, V]`."""
    vocab = allowed.shape[-1]
    words = torch.nn.functional.pad(allowed, (0, -vocab % 32)).unflatten(-1, (-1, 32))
    return _to_int32((words.long() << torch.arange(32, device=allowed.device)).sum(-1))


def unpack(bitmask: Tensor, vocab: int) -> Tensor:
    """Which of `vocab` tokens bitmasks int32 `[…, ceil(vocab / 32)]` allow, bool `[…, vocab]`."""
    v = torch.arange(vocab, device=bitmask.device)
    return (bitmask[..., v // 32] >> (v % 32) & 1).bool()


def _to_int32(words: Tensor) -> Tensor:
    """The int32 with the same low 32 bits."""
    return torch.where(words < 2**31, words, words - 2**32).int()


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
