# SPDX-License-Identifier: Apache-2.0
"""FOCUS: after the first layers a forward of a block goes on with the open positions that may soon be decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from ...models.layerwise import LayerCall
from ..checks import flag, number
from .base import FeatureCache

#: neighbours whose largest score counts for a position
POOL = 3
#: increases that differ by less are equal but for rounding, as those of two open positions always are
TIE = 1e-5


@dataclass(frozen=True)
class FocusCache(FeatureCache):
    """FOCUS (Liang et al., arXiv:2601.23278), for models whose blocks see those before them (SDAR, LLaDA2.0).

    It is `cache="block"` with less work inside of a block. Layers 0 and 1 say how much the open positions of the block
    attend to each other. Where layer 1 pays a position more attention than layer 0 did, it is likely to be decided
    soon: from the attention of layer 1 on, a forward takes the positions with the largest increase alone, and these
    alone may be decided. How many it takes follows how many tokens a forward has decided in this block so far. A
    position left of one that is taken is taken, too, where it stands right beside it, or where the later layers have no
    keys and values of it yet.

    A decided token is forwarded until its right neighbour is decided as well. From then on its keys and values stay
    what they are until the block is finished. A finished block is forwarded once as a whole, as with `cache="block"`:
    what later blocks see of it is exact.

    The published setting is the default, with `rule=Threshold(0.8)` and blocks of 32.

    Parameters
    ----------
    alpha : float
        Positions that are taken, as a multiple of the tokens that a forward decides on average, at least 1. Infinity:
        all.
    delayed : bool
        Whether decided tokens stop being forwarded. With False and an infinite `alpha` nothing is approximated.
    """

    alpha: float = 1.5
    delayed: bool = True

    name: ClassVar[str] = "focus"
    limits: ClassVar = {"alpha": number(1, math.inf), "delayed": flag}


def importance(q: Tensor, k: Tensor, valid: Tensor, scale: float) -> Tensor:
    """How much attention n positions of each row pay to each of themselves, float32 `[B, n]`.

    The sum over queries, and mean over heads, of the softmax, over the positions, of the scaled products; a position
    has the largest product of itself and its two neighbours.

    Parameters
    ----------
    q, k : Tensor
        `[B, n, H, D]` and `[B, n, G, D]`: rotated queries and keys.
    valid : Tensor
        bool `[B, n]`: which of them there are, the first of each row. The others have 0.
    scale : float
        What products are multiplied by.
    """
    scores = torch.einsum("bqghd,bkgd->bghqk", q.float().unflatten(2, (k.shape[2], -1)), k.float()) * scale
    keys = valid[:, None, None, None, :]
    scores = scores.masked_fill(~keys, -torch.inf)
    pooled = max_pool1d(scores.flatten(0, 2), POOL, 1, POOL // 2).view_as(scores)
    weights = torch.softmax(pooled.masked_fill(~keys, -torch.inf), -1)
    # without any valid key there is nothing to sum
    return weights.masked_fill(~(keys & valid[:, None, None, :, None]), 0.0).sum((1, 2, 3)) / q.shape[2]


def targets(alpha: float, open_now: Tensor, decided: Tensor, forwards: Tensor) -> Tensor:
    """How many open positions are to be taken, float64 `[B]`: `alpha` times the tokens that a forward has decided.

    `open_now`, `decided`, `forwards` are int32 `[B]`: open positions of the block; tokens decided in it so far; and the
    forwards that decided some. One token a forward is counted on at least, and no more is taken than is open.
    """
    forwards = forwards.clamp(min=1)
    wanted = torch.maximum(decided, forwards).double() * alpha / forwards
    return torch.minimum(wanted.ceil(), open_now.double())


def retained(increase: Tensor, valid: Tensor, position: Tensor, target: Tensor) -> Tensor:
    """Which of the open positions are taken for their increase in importance, bool `[B, n]`.

    Those that are above the mean by a standard deviation, or the `target` `[B]` largest where these are fewer; and
    what stands right before one of them. All, where there are no more than the target. `position` int `[B, n]`.
    """
    count = valid.sum(1, keepdim=True)
    order = increase.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    total = count.clamp(min=1)
    mean = increase.masked_fill(~valid, 0.0).sum(1, keepdim=True) / total
    spread = ((increase - mean).masked_fill(~valid, 0.0).square().sum(1, keepdim=True) / total).sqrt()
    likely = (increase - mean >= spread - TIE) & valid
    target = target[:, None]
    chosen = torch.where(likely.sum(1, keepdim=True) >= target, likely, valid & (rank < target))
    is_before = position[:, 1:] - position[:, :-1] == 1
    chosen = chosen | (pad(chosen[:, 1:] & is_before, (0, 1)) & valid)
    return torch.where(count > target, chosen, valid)


class Narrowing:
    """What the layers of one forward compute, of B rows of Q columns: `AttentionWindow.layers`.

    Parameters
    ----------
    position, used : Tensor
        int64 and bool `[B, Q]`: columns of the canvas, ascending in each row; which are there and are forwarded.
    is_open, inside : Tensor
        bool `[B, Q]`: which of them are open positions of the row's block, and which stand in the block.
    rows : Tensor
        int64 `[B]`: their rows of the cache.
    target : Tensor
        `[B]`: see `targets`.
    done, least : Tensor
        int32 `[B]`: up to which column, itself included, all layers have keys and values of the block; and where what
        is left of the block ends.
    half : int
        So many rows come first whose attention counts; what they keep, the others keep as well (guidance).
    measures : bool
        Whether layers are as wide as they have to be, which the host reads twice in a forward. False: as wide as the
        forward.
    """

    def __init__(
        self, *, position: Tensor, used: Tensor, is_open: Tensor, inside: Tensor, rows: Tensor, target: Tensor,
        done: Tensor, least: Tensor, half: int, measures: bool,
    ):  # fmt: skip
        self._position, self._used, self._is_open, self._inside = position, used, is_open, inside
        self._rows, self._target, self._done, self._least = rows, target, done, least
        self._half, self._measures = half, measures
        self._earlier: Tensor | None = None  # importance in layer 0
        self._heard: Tensor | None = None
        #: which columns all layers compute, bool `[B, Q]`; and how far these see
        self.kept, self._end = used, least
        width = used.shape[1]
        widths, may_drop = (width, width), True
        if measures:
            figures = torch.stack((
                used.sum(1).max(), is_open.sum(1).max(), ((is_open.sum(1) > target) & used.any(1)).any(),
            )).tolist()  # fmt: skip
            widths, may_drop = (figures[0], figures[1]), bool(figures[2])
        self._may_drop = may_drop
        self._columns, self._is_there = listing(used, widths[0])
        self._open_columns, self._open_there = listing(is_open, widths[1])

    def __call__(self, call: LayerCall) -> Tensor:
        if call.number == 0:
            heard = self._hear if self._may_drop else None
            return self._spread(call.with_window(watch=heard))
        if call.number == 1:
            if self._may_drop:
                self._earlier = self._heard
                call.with_window(watch=self._hear).attend(self._columns, self._is_there)
                self._drop()
            self._end = torch.maximum(self._reached(), self._least).int()
        seen = call.window.kv_range
        assert seen is not None
        end = torch.minimum(seen[:, 1], self._end.to(seen.device))
        return self._spread(call.with_window(kv_range=torch.stack((seen[:, 0], end), 1)))

    def _spread(self, call: LayerCall) -> Tensor:
        """What comes into the layer, with what it makes of the listed columns in their place."""
        columns, there = self._columns.to(call.x.device), self._is_there.to(call.x.device)
        computed = call.at(columns, there)
        # one column more, for what is not used
        place = torch.where(there, columns, call.x.shape[1])[..., None].expand_as(computed)
        return pad(call.x, (0, 0, 0, 1)).scatter(1, place, computed)[:, :-1]

    def _hear(self, index: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        """Importance of the open columns in a layer whose queries of the listed columns are q `[B, n, H, D]`."""
        half, home = self._half, self._used.device
        columns, there = self._open_columns[:half], self._open_there[:half]
        place = (self._used[:half].cumsum(1) - 1).clamp(min=0).gather(1, columns).clamp(max=q.shape[1] - 1)
        asked = q[:half].gather(1, place.to(q.device)[:, :, None, None].expand(-1, -1, *q.shape[2:]))
        slots = self._position[:half].gather(1, columns)
        k = k_cache[self._rows[:half, None].to(q.device), slots.to(q.device)]
        self._heard = importance(asked.to(home), k.to(home), there, scale)

    def _drop(self) -> None:
        """Choose what is kept, by what two layers said."""
        assert self._earlier is not None and self._heard is not None
        half = self._half
        columns, there = self._open_columns[:half], self._open_there[:half]
        position = self._position[:half].gather(1, columns)
        chosen = retained(self._heard - self._earlier, there, position, self._target[:half])
        width = self._used.shape[1]
        nothing = torch.zeros_like(self._used[:half])
        wanted = pad(nothing, (0, 1)).scatter(1, torch.where(chosen, columns, width), True)[:, :width]
        if half < len(self._used):
            wanted = torch.cat((wanted, wanted))
        self.kept = self._used & (~self._is_open | wanted)
        # what later layers know nothing of may not lie left of what they see
        missing = self._is_open & (self._position > self._done[:, None]) & (self._position < self._reached()[:, None])
        self.kept = self.kept | (self._used & missing)
        most = int(self.kept.sum(1).max()) if self._measures else width
        self._columns, self._is_there = listing(self.kept, most)

    def spoken(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Of the first `count` rows: columns int64 `[count, Q]` that all layers computed, `length` in place of others;
        and `_reached`.
        """
        return torch.where(self.kept, self._position, length)[:count], self._reached()[:count]

    def _reached(self) -> Tensor:
        """Where the keys and values of the block end that all layers have, int64 `[B]`."""
        kept = torch.where(self.kept & self._inside, self._position, -1).amax(1)
        return torch.maximum(kept, self._done.long()) + 1


def listing(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The chosen columns of bool `[B, Q]`, ascending, int64 `[B, width]`; and which of the list there are, bool."""
    order = chosen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    there = torch.arange(width, device=chosen.device) < chosen.sum(1, keepdim=True)
    return order, there
