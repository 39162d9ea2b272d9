# SPDX-License-Identifier: Apache-2.0
"""The canvas: a batch of token rows, each position open, decided or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..window import TokenWindow

OPEN, FROZEN = 1, 2  # bits of the state, as in csrc/common/params.h


@dataclass(frozen=True)
class Columns:
    """Some columns of each row of a canvas.

    Attributes
    ----------
    number : Tensor
        int32 `[B, W]`, ascending.
    index : Tensor
        int64 `[B, W]`: the same, or the last that there is.
    inside : Tensor
        bool `[B, W]`: whether there is such a column.
    """

    number: Tensor
    index: Tensor
    inside: Tensor


@dataclass(frozen=True)
class NegativePrompt:
    """What the unconditional half of a guided batch sees in place of the prompts.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, P]`, in the columns of the prompts, padded on the left.
    origin : Tensor
        int32 `[B]`: column at which each begins.
    """

    tokens: Tensor
    origin: Tensor


@dataclass(frozen=True)
class Canvas:
    """Tokens of a batch and what is known of each position; the ops write into these tensors.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`.
    state : Tensor
        uint8 `[B, T]`: bits open, frozen, edited, changed since its keys and values were written.
    origin, end : Tensor
        int32 `[B]`: where each request starts (its left padding), and the column after its last. What stands from `end`
        on is frozen, but nobody has given it.
    commit_step, confidence : Tensor
        int32 and float32 `[B, T]`: step at which a position was committed (-1: given, open, or padding), and the
        probability its token had then (0 there).
    step : Tensor
        int32 `[B]`: forwards each request has taken part in.
    negative : NegativePrompt, optional
        With guidance by a prompt of its own.
    """

    tokens: Tensor
    state: Tensor
    origin: Tensor
    end: Tensor
    commit_step: Tensor
    confidence: Tensor
    step: Tensor
    negative: NegativePrompt | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, is_open: Tensor, origin: Tensor, end: Tensor | int | None = None,
        negative: NegativePrompt | None = None,
    ) -> Canvas:  # fmt: skip
        """A fresh canvas; positions that are not open are frozen. `tokens` and `end` (None: all columns) are copied."""
        batch, width = tokens.shape
        return cls(
            tokens=tokens.clone(),
            state=torch.where(is_open, OPEN, FROZEN).to(torch.uint8),
            origin=origin.to(torch.int32),
            end=torch.zeros_like(origin, dtype=torch.int32) + (width if end is None else end),
            commit_step=torch.full_like(tokens, -1, dtype=torch.int32),
            confidence=torch.zeros_like(tokens, dtype=torch.float32),
            step=torch.zeros(batch, dtype=torch.int32, device=tokens.device),
            negative=negative,
        )

    @property
    def is_open(self) -> Tensor:
        """bool `[B, T]`."""
        return (self.state & OPEN) != 0

    def length(self, end: int) -> Tensor:
        """int32 `[B]`: column behind the last of the first `end` that was given, or is open, or was decided by a step.

        What is none of these is the padding behind an end token.
        """
        is_token = ((self.state & (OPEN | FROZEN)) != 0) | (self.commit_step >= 0)
        number = torch.arange(1, end + 1, dtype=torch.int32, device=self.tokens.device)
        return torch.where(is_token[:, :end], number, 0).amax(1)

    def columns(self, start: Tensor, length: int) -> Columns:
        """The columns `start[b]` … `start[b] + length` of each row; start int32 `[B]`."""
        number = start[:, None] + torch.arange(length, dtype=torch.int32, device=start.device)
        last = self.tokens.shape[1] - 1
        return Columns(number, number.clamp(max=last).long(), number <= last)

    def open_in(self, columns: Columns) -> Tensor:
        """Which of the columns are open: bool `[B, W]`."""
        return self._has(OPEN, columns) & columns.inside

    def window(self, columns: Columns, capacity: int) -> TokenWindow:
        """The open positions among the columns, ascending, in `capacity` slots, at least as many as any row has.

        Decided positions take no slot, so that no language-model head runs for them.
        """
        is_open = self.open_in(columns)
        if capacity == is_open.shape[1]:
            return TokenWindow(torch.where(is_open, columns.number, -1), self.origin)
        behind = self.tokens.shape[1]  # where closed columns go
        ranked = torch.where(is_open, columns.number, behind).sort(dim=1).values[:, :capacity]
        return TokenWindow(ranked.masked_fill(ranked == behind, -1), self.origin)

    def free_window(self, columns: Columns, working: Tensor) -> TokenWindow:
        """All positions among the columns that are not given, in the `working` rows, bool `[B]`."""
        free = columns.inside & ~self._has(FROZEN, columns) & working[:, None]
        return TokenWindow(torch.where(free, columns.number, -1), self.origin)

    def _has(self, bit: int, columns: Columns) -> Tensor:
        """Where the state at the columns has a bit: bool `[B, W]`; outside the canvas anything."""
        return (self.state.gather(1, columns.index) & bit).bool()

    def write(self, positions: Tensor, tokens: Tensor, **how: Any) -> Tensor:
        """`ops.remask_` at `positions` int32 `[B, W]` with proposals int64 `[B, W]`, and with the records; its info."""
        return ops.remask_(
            self.tokens, self.state, positions, tokens, commit_step=self.commit_step, commit_confidence=self.confidence,
            end=self.end, **how,
        )  # fmt: skip

    def fill_after_eos(self, eos: list[int], pad: int) -> None:
        """Complete the requests that have an end token with nothing open before it and nothing given behind it.

        All after it becomes `pad`.
        """
        nothing = torch.full_like(self.tokens[:, :1], -1)
        self.write(nothing.int(), nothing, eos_token_ids=eos, eos_policy="fill", fill_token_id=pad)

    def close_behind(self, column: Tensor) -> None:
        """Overwrite what stands behind `column` int32 `[B]` with the token there; nowhere in rows where that is -1.

        Nobody has committed it then.
        """
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        behind = (column >= 0)[:, None] & (columns > column[:, None]) & ((self.state & FROZEN) == 0)
        token = self.tokens.gather(1, column.clamp(min=0).long()[:, None])
        self.tokens.copy_(torch.where(behind, token, self.tokens))
        self.state.copy_(torch.where(behind, self.state & ~OPEN, self.state))
        self.commit_step.masked_fill_(behind, -1)
        self.confidence.masked_fill_(behind, 0.0)

    def renoise(self, seed: Tensor, vocab_size: int) -> None:
        """Put tokens drawn uniformly from the vocabulary at all open positions."""
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        position = torch.where(self.is_open, columns, -1)
        before_the_first = torch.full_like(self.step, -1)  # the draws of step 0 are that step's own
        self.write(
            position, torch.full_like(self.tokens, -1), renoise=self.is_open, step=before_the_first, seed=seed,
            origin=self.origin, vocab_size=vocab_size,
        )  # fmt: skip
