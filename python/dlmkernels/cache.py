# SPDX-License-Identifier: Apache-2.0
"""Key/value buffers: one slot a canvas position, written in place, never copied."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Dense key and value buffers of every layer, `[B, S, G, D]` each, allocated when a layer first writes.

    In memory a head's slots lie side by side (`[B, G, S, D]`): attention reads one head at a time, and rows that
    a whole slot of all heads keeps apart share few sets of a processor's cache.

    Keys are stored rotated (position-encoded), so a slot keeps the position it was written for. Which slots hold
    something is the business of the windows that read them: a cache has no length and nothing is ever copied out of it.

    Parameters
    ----------
    num_slots : int
        S, the number of canvas positions.
    num_rows : int, optional
        B. None: as many as there are in the first `k` of a layer.
    """

    def __init__(self, num_slots: int, num_rows: int | None = None):
        self.num_slots, self.num_rows = num_slots, num_rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers of one layer; shape, dtype and device follow the first `k`, `v` `[n, Q, G, D]` seen."""
        if index not in self._layers:
            self._layers[index] = tuple(  # type: ignore[assignment]
                torch.empty(
                    (self.num_rows or len(x), x.shape[2], self.num_slots, x.shape[3]), dtype=x.dtype, device=x.device
                ).transpose(1, 2)
                for x in (k, v)
            )
        return self._layers[index]

    def reserve_as(self, other: KVCache) -> None:
        """Allocate the buffers of the layers that another cache has."""
        for index, (k, v) in other._layers.items():
            self.layer(index, k, v)

    def values(self, index: int) -> Tensor:
        """The value buffer of a layer that has written, `[B, S, G, D]`."""
        return self._layers[index][1]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers of all layers that have written."""
        return list(self._layers.values())

    def dtype(self, index: int) -> torch.dtype | None:
        """What one layer's buffers hold, None before the layer has written."""
        return self._layers[index][0].dtype if index in self._layers else None

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers, in bytes."""
        return sum(x.numel() * x.element_size() for pair in self._layers.values() for x in pair)
