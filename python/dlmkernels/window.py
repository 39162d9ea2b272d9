# SPDX-License-Identifier: Apache-2.0
"""Describe what one forward pass reads, writes and attends to."""

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
    """The n of S batch rows that a forward pass processes, some of which may be unused.

    Attributes
    ----------
    index : Tensor
        int64 `[n]`: the index of each row among the S; arbitrary for an unused row.
    cache : Tensor
        int32 `[n]`: like `index`, but -1 for an unused row.
    taken, place : Tensor
        bool and int64 `[S]`: whether each of the S rows is processed, and its place among the n (arbitrary if it is
        not).
    """

    index: Tensor
    cache: Tensor
    taken: Tensor
    place: Tensor

    @classmethod
    def chosen(cls, rows: Tensor, count: int) -> Rows:
        """Return the first `count` of the chosen rows, bool `[S]`, or all of them if there are fewer."""
        index = torch.nonzero_static(rows, size=count, fill_value=-1)[:, 0]
        place = rows.cumsum(0) - 1
        return cls(index.clamp(min=0), index.int(), rows & (place < count), place.clamp(0, count - 1))

    def twice(self) -> Rows:
        """Return these rows in both halves of a batch of 2 S rows."""
        half, count = len(self.place), len(self.index)
        other = torch.where(self.cache >= 0, self.cache + half, -1)
        return Rows(
            torch.cat((self.index, self.index + half)), torch.cat((self.cache, other)),
            torch.cat((self.taken, self.taken)), torch.cat((self.place, self.place + count)),
        )  # fmt: skip

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of `x` `[S, …]`, `[n, …]`."""
        return x.index_select(0, self.index)

    def write(self, to: Tensor, values: Tensor) -> None:
        """Write `values` `[n, …]` to these rows of `to` `[S, …]`, leaving the others unchanged."""
        taken = self.taken.view(-1, *[1] * (to.dim() - 1))
        to.copy_(torch.where(taken, values.index_select(0, self.place), to))


@dataclass(frozen=True)
class AttentionWindow:
    """The rows of one forward pass and what they may attend to.

    It is passed to every layer as the keyword argument `dlm_window`.

    Attributes
    ----------
    slots : Tensor, optional
        int32 `[B, Q]`: cache slot (= canvas position) of each row, -1 for an unused row. If None, row i has slot i.
    kv_range : Tensor, optional
        int32 `[B, 2]` or `[B, N, 2]`: half-open ranges of slots that may be attended to. If None, all.
    cache : KVCache, optional
        Holds the keys and values: those of the rows are written to it, and those of other slots are read from it. If
        None, the rows attend only to each other and nothing is stored.
    causal_block : int
        0: bidirectional; 1: causal; n: block-causal with blocks of n.
    block_origin : Tensor, optional
        int32 `[B]`: slot at which block 0 starts.
    q_limit, k_order : Tensor, optional
        int32 `[B, Q]` and `[B, S]`: slot j is visible only if its order does not exceed the row's limit.
    context_end : Tensor, optional
        int32 `[B]`: start of the open block. In layers with a sliding window, all rows then see the whole block, and to
        the left of it the same slots as the block's first row. If None, the window slides with each row.
    shadow : Tensor, optional
        int32 `[B, n]`: for each of the last n rows, the slot that it represents a second time. Unused rows have -1 and
        come last. Such a row sees everything in `kv_range` except this slot, and also the used ones of the last n rows;
        the other rows do not see the last n rows. Full attention without a cache only.
    cache_rows : Tensor, optional
        int32 `[B]`: row of the cache that each batch row reads and writes, -1 for an unused one. If None, row b uses
        cache row b.
    rotations : object, optional
        Result of `DiffusionModel.rotations` for the requests' lengths, for models whose rotary embedding depends on the
        length. If None, the length of each batch row is taken from the largest of its positions.
    visible : Tensor, optional
        int32 `[B, Q, words]`, only with a cache: which of the other rows of this forward pass each row sees, in the
        format of `ops.block_attention`. If None, all that the other conditions allow.
    layers : callable, optional
        Computes each layer from a `models.layerwise.LayerCall`, for models made by `DiffusionModel.by_layers`. If None,
        every layer computes all rows.
    watch : callable, optional
        Called in every layer once its keys and values have been written, with the layer's index, its queries
        `[B, Q, H, D]`, the layer's key and value buffers, and the scale of the attention logits. Not called in layers
        with a sliding window.
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
    #: Indices of the layers that have attended so far.
    attended: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    #: Device of the tensors (None without any), and copies of this window on other devices.
    _home: torch.device | None = field(default=None, init=False, repr=False, compare=False)
    _copies: dict[torch.device, AttentionWindow] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        tensors = (value for f in fields(self) if isinstance(value := getattr(self, f.name, None), Tensor))
        object.__setattr__(self, "_home", next((tensor.device for tensor in tensors), None))

    def of(self, rows: Rows) -> AttentionWindow:
        """Return the window restricted to some of its batch rows."""
        chosen: dict[str, Any] = {
            f.name: rows.of(value)
            for f in fields(self)
            if f.init and isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **chosen, cache_rows=None if self.cache is None else rows.cache)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> AttentionWindow:
        """Return this window with its tensors on `device`: itself, or a copy that is made once per device.

        The cache is not moved, since each of its layers is on the device of that layer of the model.
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
            # All devices share these.
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
        """Return the window of `positions` with its `used` slots, bool `[B, W]`, given, which saves the comparison."""
        window = cls(positions, origin)
        vars(window)["used"] = used
        return window

    @cached_property
    def used(self) -> Tensor:
        """Slots that have a position, bool `[B, W]`."""
        return self.positions >= 0

    @property
    def request_positions(self) -> Tensor:
        """Positions counted from the start of the request. Random draws depend on these, so padding has no effect."""
        return self.positions - self.origin[:, None]
