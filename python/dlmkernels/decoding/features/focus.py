# SPDX-License-Identifier: Apache-2.0
"""FOCUS: after the first layers, a forward pass continues with only the positions likely to be decided soon."""

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

#: width of the window over which scores are max-pooled
POOL = 3
#: tolerance for rounding: of two open positions, one is always exactly one standard deviation above the mean
TIE = 1e-5


@dataclass(frozen=True)
class FocusCache(FeatureCache):
    """FOCUS (Liang et al., arXiv:2601.23278), for models whose blocks see the blocks before them (SDAR, LLaDA2.0).

    This is `cache="block"` with less computation within a block. Layers 0 and 1 measure how much attention the open
    positions of the block receive from each other. Positions that receive more in layer 1 than in layer 0 are likely to
    be decided soon. From the attention of layer 1 on, a forward pass continues with only the open positions of largest
    increase, and only these may be decided. How many there are depends on how many tokens forward passes have decided
    in this block so far. Open positions to the left of a selected one are selected too if they are adjacent to it, or
    if the later layers have no keys and values for them yet.

    A decided token is forwarded until its right neighbor is decided as well. From then on, its keys and values stay
    unchanged until the block is finished. A finished block is forwarded once as a whole, as with `cache="block"`, so
    what later blocks see of it is exact.

    The defaults are the published setting, to be used with `rule=Threshold(0.8)` and blocks of 32.

    Parameters
    ----------
    alpha : float
        Number of open positions to select, as a multiple of the mean number of tokens decided per forward pass (or of
        1, if that is larger). At least 1; with infinity, all positions are selected.
    delayed : bool
        Whether decided tokens stop being forwarded. With False and an infinite `alpha`, nothing is approximated.
    """

    alpha: float = 1.5
    delayed: bool = True

    name: ClassVar[str] = "focus"
    limits: ClassVar = {"alpha": number(1, math.inf), "delayed": flag}


def importance(q: Tensor, k: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Return how much attention each of n positions receives from all of them, float32 `[B, n]`.

    The scaled products of queries and keys are max-pooled over each key position and its two neighbors, followed by a
    softmax over the key positions. The weights are summed over the queries and averaged over the heads.

    Parameters
    ----------
    q, k : Tensor
        `[B, n, H, D]` and `[B, n, G, D]`: rotated queries and keys.
    valid : Tensor
        bool `[B, n]`: which positions are used; these come first in each row. The others get 0.
    scale : float
        Factor of the products.
    """
    scores = torch.einsum("bqghd,bkgd->bghqk", q.float().unflatten(2, (k.shape[2], -1)), k.float()) * scale
    keys = valid[:, None, None, None, :]
    scores = scores.masked_fill(~keys, -torch.inf)
    pooled = max_pool1d(scores.flatten(0, 2), POOL, 1, POOL // 2).view_as(scores)
    weights = torch.softmax(pooled.masked_fill(~keys, -torch.inf), -1)
    # rows without any valid key have NaN weights, which become 0 here
    return weights.masked_fill(~(keys & valid[:, None, None, :, None]), 0.0).sum((1, 2, 3)) / q.shape[2]


def targets(alpha: float, open_now: Tensor, decided: Tensor, forwards: Tensor) -> Tensor:
    """Return how many open positions to select, float64 `[B]`: `alpha` times the mean tokens decided per forward pass.

    `open_now`, `decided` and `forwards` are int32 `[B]`: open positions of the block, tokens decided in it so far, and
    the number of forward passes that decided any. The mean is taken as at least 1, and the result is at most
    `open_now`.
    """
    forwards = forwards.clamp(min=1)
    wanted = torch.maximum(decided, forwards).double() * alpha / forwards
    return torch.minimum(wanted.ceil(), open_now.double())


def retained(increase: Tensor, valid: Tensor, position: Tensor, target: Tensor) -> Tensor:
    """Return the open positions selected for their increase in importance, bool `[B, n]`.

    These are the positions at least one standard deviation above the mean, or the `target` `[B]` largest if those are
    fewer, and each position directly before one of them. If there are no more positions than the target, all are
    selected. `increase` float and `valid` bool are `[B, n]`, as are the columns `position` int of the canvas.
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
    """Compute the layers of one forward pass of B rows with Q columns. A callback for `AttentionWindow.layers`.

    Parameters
    ----------
    position, used : Tensor
        int64 and bool `[B, Q]`: columns of the canvas, ascending in each row, and which of them are to be forwarded.
    is_open, inside : Tensor
        bool `[B, Q]`: which columns are open positions of the row's block, and which lie in the block.
    rows : Tensor
        int64 `[B]`: cache row of each batch row.
    target : Tensor
        `[B]`: number of open positions to select; see `targets`.
    done, least : Tensor
        int32 `[B]`: last column of the block up to which all layers have keys and values (-1 if there is none),
        and the block's first column.
    half : int
        Number of leading rows whose attention counts. With guidance, the other rows keep the same columns.
    measures : bool
        Whether layers are only as wide as they have to be, at the cost of two device synchronizations per forward pass.
        If False, they are as wide as the forward pass.
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
        #: columns that all layers compute, bool `[B, Q]`, and the end of what these see
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
        """Return the layer's input, with the listed columns replaced by the layer's output."""
        columns, there = self._columns.to(call.x.device), self._is_there.to(call.x.device)
        computed = call.at(columns, there)
        # one extra column for unused entries
        place = torch.where(there, columns, call.x.shape[1])[..., None].expand_as(computed)
        return pad(call.x, (0, 0, 0, 1)).scatter(1, place, computed)[:, :-1]

    def _hear(self, index: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        """Record the importance of the open columns in a layer, from the queries q `[B, n, H, D]` of listed columns."""
        half, home = self._half, self._used.device
        columns, there = self._open_columns[:half], self._open_there[:half]
        place = (self._used[:half].cumsum(1) - 1).clamp(min=0).gather(1, columns).clamp(max=q.shape[1] - 1)
        asked = q[:half].gather(1, place.to(q.device)[:, :, None, None].expand(-1, -1, *q.shape[2:]))
        slots = self._position[:half].gather(1, columns)
        k = k_cache[self._rows[:half, None].to(q.device), slots.to(q.device)]
        self._heard = importance(asked.to(home), k.to(home), there, scale)

    def _drop(self) -> None:
        """Choose the columns to keep from the importance measured in layers 0 and 1."""
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
        # later layers must have keys and values of everything up to the last column that they see
        missing = self._is_open & (self._position > self._done[:, None]) & (self._position < self._reached()[:, None])
        self.kept = self.kept | (self._used & missing)
        most = int(self.kept.sum(1).max()) if self._measures else width
        self._columns, self._is_there = listing(self.kept, most)

    def spoken(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Return, for the first `count` rows, the columns int64 `[count, Q]` that all layers computed, and `_reached`.

        Columns that were not computed are replaced by `length`.
        """
        return torch.where(self.kept, self._position, length)[:count], self._reached()[:count]

    def _reached(self) -> Tensor:
        """Return the end of the block's columns up to which all layers have keys and values, int64 `[B]`."""
        kept = torch.where(self.kept & self._inside, self._position, -1).amax(1)
        return torch.maximum(kept, self._done.long()) + 1


def listing(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the chosen columns of bool `[B, Q]` in order, int64 `[B, width]`, and which of these entries are used."""
    order = chosen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    there = torch.arange(width, device=chosen.device) < chosen.sum(1, keepdim=True)
    return order, there
