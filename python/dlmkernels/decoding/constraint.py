# SPDX-License-Identifier: Apache-2.0
"""Constraints on the tokens of an answer, enforced whatever the model predicts and the rule selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerPlace:
    """The canvas columns of a decoding's answers, and its special tokens.

    Attributes
    ----------
    start : int
        First column of every answer.
    ends : tuple of int
        Column after the last one of each row's answer.
    mask, pad : int
        Ids of the mask token (-1 for models without one) and of the padding token.
    eos, banned : tuple of int
        End tokens, and tokens that are never proposed.
    vocab : int, optional
        Number of logits of the model, if known.
    """

    start: int
    ends: tuple[int, ...]
    mask: int
    pad: int
    eos: tuple[int, ...]
    banned: tuple[int, ...]
    vocab: int | None = None

    @classmethod
    def of(cls, special: Any, start: int, ends: Sequence[int], vocab: int | None) -> AnswerPlace:
        """Create the place of a decoding's answers from its `SpecialTokens`."""
        eos, banned = tuple(special.eos), tuple(special.banned)
        return cls(start, tuple(ends), special.mask, special.pad, eos, banned, vocab)


class Constraint:
    """Base class of all constraints. A subclass overrides `allowed`, `accepts`, or both.

    `allowed` restricts the tokens that may be proposed. The rule then sees the probabilities, margins and entropies of
    the distribution over these tokens. `accepts` checks the tokens that the rule is about to commit, all together. A
    rejected token is removed from the distribution of its position, and the rule decides again from the same logits,
    without another forward pass, until everything is accepted (as in constrained decoding of diffusion models with
    grammars, Mündler et al., arXiv:2508.10111). A position without a remaining candidate stays open for the next
    forward pass, which sees a different canvas. When the rule has nothing more to commit, each open position gets an
    extra forward pass, one after another, until everything is decided or nothing more is accepted.

    A canvas holds prompt and answer: int64 `[B, T]`, with the mask token at open positions. Answers begin in the same
    column in every row. Shorter prompts are padded on the left; `pad_token_id` also follows a shorter answer or an end
    token. Judge each row independently of the others; otherwise its result depends on the batch. An engine asks about
    one row at a time.

    >>> class NoRepeats(Constraint):
    ...     def accepts(self, tokens, proposed):
    ...         after = torch.where(proposed >= 0, proposed, tokens)
    ...         same = after[:, 1:] == after[:, :-1]
    ...         return ~(torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1)))
    """

    #: maximum number of times that the rule decides in a step; tokens rejected at the last one stay open
    attempts: int = 100
    #: whether `allowed` depends on the position only, so that an open position never loses its candidates
    is_given: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def bound(self, place: AnswerPlace) -> Constraint:
        """Return the constraint for one decoding, whose answers are at `place`. By default, the constraint itself.

        Called before decoding; by an engine, for each request as it is admitted. The result must override `accepts` if
        and only if this class does, and have the same `attempts`.
        """
        return self

    def allowed(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Return the tokens that may be proposed at canvas `positions`, int32 `[B, W]` (-1: an unused entry).

        Called once per step, with tensors on the model's device; reading their values synchronizes a GPU. Returns int32
        bitmasks `[B, W, n]`, one per position, or `[n]` for all: bit v % 32 of word v // 32 is 1 if token v is allowed
        (the layout of xgrammar and llguidance). None allows any token. If n is less than V / 32, the tokens without a
        word are not allowed.
        """
        return None

    def accepts(self, tokens: Tensor, proposed: Tensor) -> Tensor:
        """Return which of the `proposed` tokens may be written, bool `[B, T]`.

        `tokens` is the canvas; `proposed`, int64 `[B, T]`, holds the tokens about to be written into it and -1
        elsewhere. The accepted tokens must be valid together, without the rejected ones. Called in every step that
        writes a token, and again after each rejection, with tensors on the CPU, which are fetched in one transfer.
        """
        raise NotImplementedError


def check_constraint(value: Any) -> None:
    """Raise unless `value` is None, a tensor with a dimension of tokens, or a Constraint."""
    if isinstance(value, Tensor) and value.dim() == 0:
        raise ValueError("constraint must have at least one dimension, that of tokens; got a tensor of shape []")
    if value is not None and not isinstance(value, (Constraint, Tensor)):
        hint = ""
        if isinstance(value, str):
            hint = f": for a regular expression, pass dlmkernels.regex({value!r}, tokenizer)"
        elif isinstance(value, type):
            hint = f": pass an instance, {value.__name__}(…)"
        raise TypeError(f"constraint must be a Constraint or a tensor; got {value!r}{hint}")


def check_overrides(constraint: Constraint) -> None:
    """Raise a ValueError if a constraint restricts nothing, for example because a method's name is misspelled."""
    kind = type(constraint)
    if all(getattr(kind, name) is getattr(Constraint, name) for name in ("allowed", "accepts", "bound")):
        raise ValueError(f"constraint has no effect: {kind.__name__} overrides neither allowed nor accepts")


@dataclass(frozen=True)
class AllowedTokens(Constraint):
    """Fixed bitmasks of allowed tokens: int32 `[n]`, or `[B, N, n]` for the N columns from `start` on.

    B and N may be 1. If N is greater than 1, everything is allowed after these columns.
    """

    is_given: ClassVar[bool] = True
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
