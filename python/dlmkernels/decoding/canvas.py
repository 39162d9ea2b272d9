# SPDX-License-Identifier: Apache-2.0
"""The canvas: a batch of token rows, each position open, decided or frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..window import TokenWindow

OPEN, FROZEN = 1, 2  # bits of the state, as in csrc/common/params.h


@dataclass(frozen=True)
class Canvas:
    """Tokens of a batch and what is known of each position; the ops write into these tensors.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`.
    state : Tensor
        uint8 `[B, T]`: bits open, frozen, edited, changed since its keys and values were written.
    origin : Tensor
        int32 `[B]`: where each request starts (its left padding).
    commit_step, confidence : Tensor
        int32 and float32 `[B, T]`: step at which a position was committed (-1: given or open), and the probability
        its token had then.
    step : Tensor
        int32 `[B]`: forwards each request has taken part in.
    """

    tokens: Tensor
    state: Tensor
    origin: Tensor
    commit_step: Tensor
    confidence: Tensor
    step: Tensor

    @classmethod
    def of(cls, tokens: Tensor, is_open: Tensor, origin: Tensor) -> Canvas:
        """A fresh canvas; positions that are not open are frozen. `tokens` is copied."""
        batch = tokens.shape[0]
        return cls(
            tokens=tokens.clone(),
            state=torch.where(is_open, OPEN, FROZEN).to(torch.uint8),
            origin=origin.to(torch.int32),
            commit_step=torch.full_like(tokens, -1, dtype=torch.int32),
            confidence=torch.zeros_like(tokens, dtype=torch.float32),
            step=torch.zeros(batch, dtype=torch.int32, device=tokens.device),
        )

    @property
    def is_open(self) -> Tensor:
        """bool `[B, T]`."""
        return (self.state & OPEN) != 0

    def open_in(self, start: Tensor, length: int) -> Tensor:
        """Which of the columns `start[b]` … `start[b] + length` of each row are open: bool `[B, length]`."""
        columns = start.long()[:, None] + torch.arange(length, device=start.device)
        inside = columns < self.state.shape[1]
        return self.is_open.gather(1, columns.clamp(max=self.state.shape[1] - 1)) & inside

    def window(self, start: Tensor, length: int, capacity: int) -> TokenWindow:
        """The open positions among `length` columns from `start` int32 `[B]` on, ascending, in `capacity` slots.

        `capacity` is at least as many as any row has. Decided positions take no slot, so that no language-model head
        runs for them.
        """
        columns = start[:, None] + torch.arange(length, dtype=torch.int32, device=start.device)
        is_open = self.open_in(start, length)
        if capacity == length:
            return TokenWindow(torch.where(is_open, columns, -1), self.origin)
        # Open columns keep their number, closed ones sort behind them.
        ranked = torch.where(is_open, columns, columns + length).sort(dim=1).values[:, :capacity]
        return TokenWindow(torch.where(ranked < start[:, None] + length, ranked, -1), self.origin)
