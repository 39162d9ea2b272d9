# SPDX-License-Identifier: Apache-2.0
"""The model's logits as a step gets them: as a tensor, or as hidden states from which they are computed on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .calls import lm_head_confidence, token_confidence


class HiddenRows:
    """Hidden states that stand for logits `[R, V]`, which are never all in memory at once.

    Attributes
    ----------
    logits : callable
        The model's head, from hidden states `[n, hidden]` to logits `[n, V]`.
    shape : tuple of int
        (R, V), the shape of the logits. With guidance, R counts both halves.
    weight : Tensor, optional
        `[V, hidden]`: weight of the fused head. If None, logits are computed in slices.
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor], hidden: Tensor, weight: Tensor | None, vocab: int, dtype: torch.dtype,
        is_guided: bool, budget: int,
    ):  # fmt: skip
        self.logits, self.hidden, self.weight, self.is_guided = logits, hidden, weight, is_guided
        self.shape = len(hidden), vocab
        self.device, self.dtype = hidden.device, dtype
        #: number of rows in a slice
        self.count = max(1, budget // (vocab * dtype.itemsize))

    def __len__(self) -> int:
        return self.shape[0]

    def all(self) -> Tensor:
        """Compute all logits `[R, V]`, regardless of the budget."""
        return self.logits(self.hidden)

    def rows(self, rows: Tensor) -> Tensor:
        """Compute the logits of rows int64 `[n]`, float32 `[n, V]`."""
        parts = (self.logits(self.hidden[part]).float() for part in rows.split(self.count))
        return torch.cat(list(parts))

    def of_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Compute the logit of one token in each of some rows, float32 `[n]`; `rows` and `tokens` are int64 `[n]`."""
        if self.weight is not None:
            return self._of_tokens_fused(rows, tokens)
        parts = (
            self.logits(self.hidden[part]).gather(1, token[:, None])[:, 0].float()
            for part, token in zip(rows.split(self.count), tokens.split(self.count))
        )
        return torch.cat(list(parts))

    def _of_tokens_fused(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Compute them bit for bit as the fused head does, on a vocabulary of just these tokens.

        A bitmask allows each row only its own token, and the logsumexp of a single logit is the logit.
        """
        assert self.weight is not None
        found = []
        for part, token in zip(rows.split(256), tokens.split(256)):
            own = torch.arange(len(part), device=rows.device)
            bitmask = torch.zeros(len(part), -(-len(part) // 32), dtype=torch.int32, device=rows.device)
            bit = torch.where(own % 32 == 31, -(1 << 31), torch.ones_like(own) << (own % 32).clamp(max=30))
            bitmask.scatter_(1, (own // 32)[:, None], bit.int()[:, None])
            stats = lm_head_confidence(
                self.hidden[part], self.weight[token], bitmask=bitmask, with_margin=False, with_entropy=False
            )
            found.append(stats.logsumexp)
        return torch.cat(found)

    def by_rows(self, of_logits: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Apply a function to all logits, slice by slice: see the function `by_rows`."""
        ranges = [slice(first, first + self.count) for first in range(0, len(self), self.count)]
        return torch.cat([of_logits(self.logits(self.hidden[rows]), rows) for rows in ranges])

    def confidence(self, row_map: Tensor, options: dict[str, Any]) -> ops.TokenConfidence:
        """Compute `ops.token_confidence` of the logits; with guidance, of those of both halves.

        `row_map` int32 `[N]`: the row that each output reads, -1 if unused. `options`: other arguments of the op.
        """
        if self.weight is None:
            return self._sliced(row_map, options)
        hidden, uncond = self.hidden, None
        if self.is_guided:
            hidden, uncond = hidden.chunk(2)
        return lm_head_confidence(hidden, self.weight, row_map=row_map, uncond_hidden=uncond, **options)

    def _sliced(self, row_map: Tensor, options: dict[str, Any]) -> ops.TokenConfidence:
        found: ops.TokenConfidence | None = None
        for first, logits, uncond in self._slices():
            inside = (row_map >= first) & (row_map < first + len(logits))
            own = torch.where(inside, row_map - first, -1)
            new = token_confidence(logits, row_map=own, uncond_logits=uncond, **options)
            if found is not None:
                pairs = zip(new, found)
                new = ops.TokenConfidence(*(torch.where(inside, x, y) if x.numel() else x for x, y in pairs))
            found = new
        assert found is not None
        return found

    def _slices(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield for each slice its first row, its logits, and those of the same rows in the unconditional half."""
        logits = self.logits
        if not self.is_guided:
            for i, part in enumerate(self.hidden.split(self.count)):
                yield i * self.count, logits(part), None
            return
        hidden, uncond = self.hidden.chunk(2)
        count = max(1, self.count // 2)
        for i, (part, blind) in enumerate(zip(hidden.split(count), uncond.split(count))):
            yield i * count, logits(part), logits(blind)


#: the model's logits as a step gets them
Logits = Tensor | HiddenRows


def by_rows(logits: Logits, of_logits: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Apply a function of logits `[n, V]` and their slice of rows to all logits; concatenate the results `[n, …]`."""
    return logits.by_rows(of_logits) if isinstance(logits, HiddenRows) else of_logits(logits, slice(None))


def whole(logits: Logits) -> Tensor:
    """Return all logits `[R, V]`, regardless of the budget, to modify them or keep them for longer than a step."""
    return logits.all() if isinstance(logits, HiddenRows) else logits
