# SPDX-License-Identifier: Apache-2.0
"""Caches of features: what a layer adds to its rows is kept, and a forward computes it anew for some rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ...models.layerwise import LayerCall
from ..checks import Check, normalize

#: What a forward computes in a layer: `[B, Q, hidden]` of a call.
Layers: TypeAlias = Callable[[LayerCall], Tensor]

#: The parts that forwards of a cache of features have: all rows of all layers; the response; the prompt, and of the
#: response what has changed most; the latter alone.
WHOLE, RESPONSE, PROMPT, CHANGED = "whole", "response", "prompt", "changed"


@dataclass(frozen=True)
class Spans:
    """Where the B rows of a forward stand, of which a layer may compute some columns. All int32 `[B]` but where said.

    Attributes
    ----------
    origin, first, ends : Tensor
        Where a request begins, where its response begins, and where it ends.
    cache : Tensor
        int64: its row of what is kept; the last that there is, which nobody reads, of rows that are unused.
    width : int
        No response has more columns.
    columns : int
        Of the canvas that is forwarded.
    """

    origin: Tensor
    first: Tensor
    ends: Tensor
    cache: Tensor
    width: int
    columns: int


class Kept:
    """What every layer adds to its rows, as it was when it was last computed: `[rows + 1, columns + 1, hidden]` each.

    The last row and the last column take what nobody asks for, so that a write needs no condition.
    """

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self._of_layer: dict[int, Tensor] = {}

    def of(self, number: int, x: Tensor) -> Tensor:
        """The buffer of a layer, whose rows are of the dtype and on the device of `x` `[…, hidden]`."""
        if number not in self._of_layer:
            self._of_layer[number] = torch.zeros(
                self.rows + 1, self.columns + 1, x.shape[-1], dtype=x.dtype, device=x.device
            )
        return self._of_layer[number]

    @property
    def num_bytes(self) -> int:
        """Memory held for all layers, in bytes."""
        return sum(x.numel() * x.element_size() for x in self._of_layer.values())


class FeatureCache:
    """Base of the caches that say for each layer what it computes or keeps; frozen dataclasses.

    Attributes
    ----------
    name : str
        What `cache=` may be instead, for its published setting.
    limits : dict
        What its numbers may be, as `Rule.limits`.
    """

    name: ClassVar[str]
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)


class LayerwiseCache(FeatureCache):
    """Base of those whose layers compute some rows, and add what they last added to the others."""

    def parts(self, step: Tensor) -> tuple[tuple[str, Tensor], ...]:
        """The parts that forwards may have, each with the rows bool `[S]` whose next forward it is.

        `step` int32 `[S]`: how many forwards each request has had; the first is WHOLE. Of several that apply to a row
        the last counts. The usual one stands first and applies to all.
        """
        raise NotImplementedError

    def layers(self, part: str, spans: Spans, kept: Kept) -> Layers:
        """What the layers of a forward of that part compute."""
        raise NotImplementedError
