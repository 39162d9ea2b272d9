# SPDX-License-Identifier: Apache-2.0
"""Key/value buffers with one slot per canvas position, written in place and never copied."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Dense key and value buffers of every layer, `[B, S, G, D]` each, allocated when a layer first writes.

    In memory, the slots of a head are adjacent (`[B, G, S, D]`): attention reads one head at a time, and if its rows
    were a whole slot of all heads apart, they would share only a few sets of the processor's cache.

    Keys are stored rotated (position-encoded), so a slot keeps the position that it was written for. The windows that
    read the cache determine which slots hold valid data: the cache itself has no length, and nothing is copied out of
    it.

    Parameters
    ----------
    num_slots : int
        S, the number of canvas positions.
    num_rows : int, optional
        B. If None, the number of rows of the first `k` that each layer writes.
    """

    def __init__(self, num_slots: int, num_rows: int | None = None):
        for name, value in (("num_slots", num_slots), ("num_rows", 0 if num_rows is None else num_rows)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0; got {value!r}")
        self.num_slots, self.num_rows = num_slots, num_rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers of one layer.

        They are allocated with the shape, dtype and device of the first `k` and `v` `[n, Q, G, D]`.
        """
        if index not in self._layers:
            self._layers[index] = tuple(  # type: ignore[assignment]
                torch.empty(
                    (self.num_rows or len(x), x.shape[2], self.num_slots, x.shape[3]), dtype=x.dtype, device=x.device
                ).transpose(1, 2)
                for x in (k, v)
            )
        return self._layers[index]

    def reserve_as(self, other: KVCache) -> None:
        """Allocate the buffers of all layers that another cache has."""
        for index, (k, v) in other._layers.items():
            self.layer(index, k, v)

    def values(self, index: int) -> Tensor:
        """Return the value buffer `[B, S, G, D]` of a layer that has written."""
        return self._layers[index][1]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers of all layers that have written."""
        return list(self._layers.values())

    def dtype(self, index: int) -> torch.dtype | None:
        """Return the dtype of a layer's buffers, or None before the layer has written."""
        return self._layers[index][0].dtype if index in self._layers else None

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers, in bytes."""
        return sum(x.numel() * x.element_size() for pair in self._layers.values() for x in pair)
