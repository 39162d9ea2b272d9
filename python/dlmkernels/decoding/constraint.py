# SPDX-License-Identifier: Apache-2.0
"""Constraints: what the tokens of a decoding must obey, whatever the model says and the rule chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerPlace:
    """Where the answers of a decoding stand, and its special tokens.

    Attributes
    ----------
    start : int
        The column at which all answers begin.
    ends : tuple of int
        The column behind the last of each row's.
    mask, pad : int
    eos, banned : tuple of int
        End tokens, and tokens that are never proposed.
    vocab : int, optional
        How many logits the model has, where that is known.
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
        """The place of answers in a decoding with these `SpecialTokens`."""
        eos, banned = tuple(special.eos), tuple(special.banned)
        return cls(start, tuple(ends), special.mask, special.pad, eos, banned, vocab)


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
    every row; left of a shorter prompt, behind a shorter answer and behind an end token stands padding, `pad_token_id`.
    Each row must be judged by itself, or its result depends on the batch. An engine asks about one row at a time.

    >>> class NoRepeats(Constraint):
    ...     def accepts(self, tokens, proposed):
    ...         after = torch.where(proposed >= 0, proposed, tokens)
    ...         same = after[:, 1:] == after[:, :-1]
    ...         return ~(torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1)))
    """

    #: how often a step decides at most; what is refused the last time stays open, and nothing else is lost
    attempts: int = 100
    #: whether what is allowed depends on nothing but the position, so that what is open now stays possible
    is_given: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def bound(self, place: AnswerPlace) -> Constraint:
        """What judges the answers of one decoding, of whose canvas it is told beforehand; itself, if it need not know.

        An engine asks for each request, as it is admitted. What is returned must be of the same kind: judge what is
        about to be written or not, with as many attempts.
        """
        return self

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
