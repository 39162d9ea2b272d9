# SPDX-License-Identifier: Apache-2.0
"""Forward passes with a shadow block, which predicts decided positions without seeing their own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..window import AttentionWindow, Rows, TokenWindow
from .block_forward import BlockForward
from .standing import Standing


class ShadowForward(BlockForward):
    """Forward passes like those of `BlockForward` without a cache, for rules with `Rule.shadow`."""

    def __call__(
        self, part: str, window: TokenWindow, standing: Standing, pick: Tensor | None = None, pending: int = 0,
        width: int | None = None, rows: Rows | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the whole canvas and the shadow of the block, and read decided positions from the shadow."""
        start, length, width = self._place.start, self.length, window.positions.shape[1]
        columns = self.twice(start)[:, None] + torch.arange(width, dtype=torch.int32, device=start.device)
        is_there = columns < torch.minimum(self.ends, self.twice(start + self._place.length))[:, None]
        columns = columns.clamp(max=length - 1)
        positions = window.positions.clamp(min=0)
        decided = ~self.state.is_open.gather(1, positions.long())
        row = torch.where(decided, length + positions - start[:, None], positions).clamp(0, length + width - 1)
        tokens, everywhere = self.tokens(), torch.cat((self.slots, columns), 1).long()
        tokens = torch.cat((tokens, torch.full_like(columns, self.special.mask, dtype=tokens.dtype)), 1)
        kv_range = torch.stack((self.origin, self.ends), 1)
        shadow = torch.where(is_there, columns, -1)
        seen = AttentionWindow(kv_range=kv_range, shadow=shadow, rotations=self.rotations)
        hidden = self.run(everywhere, self.positions.gather(1, everywhere), seen, tokens, self.moment_of(standing))
        return self._select(hidden, row, pick, None)
