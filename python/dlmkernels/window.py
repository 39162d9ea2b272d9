# SPDX-License-Identifier: Apache-2.0
"""What one forward reads, writes and attends to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache


@dataclass(frozen=True)
class Rows:
    """The n of S rows that a forward takes, in which some may be unused.

    Attributes
    ----------
    index : Tensor
        int64 `[n]`: which they are; any for an unused one.
    cache : Tensor
        int32 `[n]`: the same, but -1 for an unused one.
    taken, place : Tensor
        bool and int64 `[S]`: which of the S rows are among them, and where (any place for one that is not).
    """

    index: Tensor
    cache: Tensor
    taken: Tensor
    place: Tensor

    @classmethod
    def chosen(cls, rows: Tensor, count: int) -> Rows:
        """The first `count` of the chosen rows bool `[S]`, or all if there are fewer."""
        index = torch.nonzero_static(rows, size=count, fill_value=-1)[:, 0]
        place = rows.cumsum(0) - 1
        return cls(index.clamp(min=0), index.int(), rows & (place < count), place.clamp(0, count - 1))

    def twice(self) -> Rows:
        """The same rows of both halves of a batch of 2 S."""
        half, count = len(self.place), len(self.index)
        other = torch.where(self.cache >= 0, self.cache + half, -1)
        return Rows(
            torch.cat((self.index, self.index + half)), torch.cat((self.cache, other)),
            torch.cat((self.taken, self.taken)), torch.cat((self.place, self.place + count)),
        )  # fmt: skip

    def of(self, x: Tensor) -> Tensor:
        """`x` `[S, …]` in these rows, `[n, …]`."""
        return x.index_select(0, self.index)

    def write(self, to: Tensor, values: Tensor) -> None:
        """Let `values` `[n, …]` stand in these rows of `to` `[S, …]`; the others stay what they are."""
        taken = self.taken.view(-1, *[1] * (to.dim() - 1))
        to.copy_(torch.where(taken, values.index_select(0, self.place), to))


@dataclass(frozen=True)
class AttentionWindow:
    """The rows of one forward and what they may see; handed to every layer as the keyword argument `dlm_window`.

    Attributes
    ----------
    slots : Tensor, optional
        int32 `[B, Q]`: cache slot (= canvas position) of each row, -1 for an unused row. None: row i has slot i.
    kv_range : Tensor, optional
        int32 `[B, 2]` or `[B, N, 2]`: half-open ranges of slots that may be attended. None: all.
    cache : KVCache, optional
        Where the rows' keys and values are written and the other slots' are found. None: the rows attend to each
        other alone and nothing is kept.
    causal_block : int
        0: bidirectional; 1: causal; n: block-causal with blocks of n.
    block_origin : Tensor, optional
        int32 `[B]`: slot at which block 0 starts.
    q_limit, k_order : Tensor, optional
        int32 `[B, Q]` and `[B, S]`: slot j is seen only if its order does not exceed the row's limit.
    context_end : Tensor, optional
        int32 `[B]`: where the open block starts. In layers with a sliding window all of its rows then see the block,
        and of what stands left of it the same slots as its first row. None: the window slides with each row.
    shadow : Tensor, optional
        int32 `[B, n]`: the slots that the last n rows stand for a second time, unused ones, with -1, behind the others.
        Such a row sees all that `kv_range` says but this slot, and those of the last n rows that are used; the other
        rows do not see these. Full attention without a cache only.
    cache_rows : Tensor, optional
        int32 `[B]`: row of the cache that each row of the batch reads and writes, -1 for an unused one. None: its own.
    rotations : object, optional
        What `DiffusionModel.rotations` made of the requests' lengths, for models whose rotary embedding depends on
        them. None: each row of the batch is as long as the largest of its positions says.
    visible : Tensor, optional
        int32 `[B, Q, words]`, with a cache: which of the other rows of this forward each row sees, as
        `ops.block_attention` takes it. None: all that the other conditions let it see.
    layers : callable, optional
        What each layer computes: a function of a `models.layerwise.LayerCall`, for models that
        `DiffusionModel.by_layers` has made. None: every layer all rows.
    watch : callable, optional
        Called in every layer when its keys and values have been written, with the layer's index, its queries
        `[B, Q, H, D]`, the layer's buffers of keys and values, and what products of these are multiplied by. Not in
        layers with a sliding window.
    """

    slots: Tensor | None = None
    kv_range: Tensor | None = None
    cache: KVCache | None = None
    causal_block: int = 0
    block_origin: Tensor | None = None
    q_limit: Tensor | None = None
    k_order: Tensor | None = None
    context_end: Tensor | None = None
    shadow: Tensor | None = None
    cache_rows: Tensor | None = None
    rotations: Any = None
    visible: Tensor | None = None
    layers: Callable[..., Tensor] | None = None
    watch: Callable[[int, Tensor, Tensor, Tensor, float], None] | None = None
    #: the layers that have attended so far
    attended: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    #: where the tensors are, None without any; and the same window on other devices
    _home: torch.device | None = field(default=None, init=False, repr=False, compare=False)
    _copies: dict[torch.device, AttentionWindow] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        tensors = (value for f in fields(self) if isinstance(value := getattr(self, f.name, None), Tensor))
        object.__setattr__(self, "_home", next((tensor.device for tensor in tensors), None))

    def of(self, rows: Rows) -> AttentionWindow:
        """The window of some of its rows."""
        chosen: dict[str, Any] = {
            f.name: rows.of(value)
            for f in fields(self)
            if f.init and isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **chosen, cache_rows=None if self.cache is None else rows.cache)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> AttentionWindow:
        """The same window with its tensors on `device`: itself, or a copy that is made once for each device.

        The cache stays what it is, since each of its layers lives where that layer of the model does.
        """
        device = torch.device(device)
        if self._home is None or device == self._home:
            return self
        if device not in self._copies:
            moved: dict[str, Any] = {
                f.name: value.to(device, non_blocking=non_blocking)
                for f in fields(self)
                if f.init and isinstance(value := getattr(self, f.name), Tensor)
            }
            copy = replace(self, **moved)
            # of which there is one set for all devices
            vars(copy).update(attended=self.attended, _copies=self._copies)
            self._copies.update({self._home: self, device: copy})
        return self._copies[device]


@dataclass(frozen=True)
class TokenWindow:
    """The canvas positions that one step may commit.

    Attributes
    ----------
    positions : Tensor
        int32 `[B, W]`: canvas position of each slot, ascending, -1 for an unused slot.
    origin : Tensor
        int32 `[B]`: canvas position at which each request starts (after its padding).
    """

    positions: Tensor
    origin: Tensor

    @classmethod
    def of(cls, positions: Tensor, origin: Tensor, used: Tensor) -> TokenWindow:
        """The window of `positions` whose slots are known to be `used`, bool `[B, W]`, so that nothing need compare."""
        window = cls(positions, origin)
        vars(window)["used"] = used
        return window

    @cached_property
    def used(self) -> Tensor:
        """Slots that stand for a position, bool `[B, W]`."""
        return self.positions >= 0

    @property
    def request_positions(self) -> Tensor:
        """Positions counted from the start of the request: what random draws depend on, whatever the padding."""
        return self.positions - self.origin[:, None]
