# SPDX-License-Identifier: Apache-2.0
"""Feature caches: they keep what each layer adds to each position, and recompute it for some positions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ...models.layerwise import LayerCall
from ..checks import Check, normalize

#: Computes one layer of a forward pass: takes its call, returns `[B, Q, hidden]`.
Layers: TypeAlias = Callable[[LayerCall], Tensor]

#: The parts of a feature cache, i.e. kinds of forward pass. Recomputed are: all positions in all layers; the response;
#: the prompt and the most changed positions of the response; or only the latter.
WHOLE, RESPONSE, PROMPT, CHANGED = "whole", "response", "prompt", "changed"


@dataclass(frozen=True)
class Spans:
    """Layout of the B batch rows of a forward pass in which layers may compute only some columns.

    All tensors are int32 `[B]` unless stated otherwise.

    Attributes
    ----------
    origin, first, ends : Tensor
        First column of each request, first column of its response, and end of the request (exclusive).
    cache : Tensor
        int64: row of `Kept` that belongs to each batch row. Unused batch rows have its last row, which is never read.
    width : int
        Maximum number of columns of any response.
    columns : int
        Number of columns of the canvas that are forwarded.
    """

    origin: Tensor
    first: Tensor
    ends: Tensor
    cache: Tensor
    width: int
    columns: int


class Kept:
    """The latest contribution of each layer to each position: `[rows + 1, columns + 1, hidden]` per layer.

    The last row and the last column absorb the writes of unused entries, so that writes need no condition.
    """

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self._of_layer: dict[int, Tensor] = {}

    def of(self, number: int, x: Tensor) -> Tensor:
        """Return the buffer of layer `number`, made with the dtype and device of `x` `[…, hidden]` on first use."""
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
    """Base class of caches that decide for each layer what it computes or keeps. Subclasses are frozen dataclasses.

    Attributes
    ----------
    name : str
        Value of `cache=` that selects the cache with its published settings.
    limits : dict
        Checks of the fields, as in `Rule.limits`.
    """

    name: ClassVar[str]
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)


class LayerwiseCache(FeatureCache):
    """Base class of caches whose layers compute some positions and reuse what they last added to the others."""

    def parts(self, step: Tensor) -> tuple[tuple[str, Tensor], ...]:
        """Return the parts (kinds of forward pass), each with the requests bool `[S]` that need it next.

        `step` int32 `[S]` is the number of forward passes that each request has had. The first one is WHOLE. If several
        parts apply to a request, the last one counts. The most common part comes first and applies to all requests.
        """
        raise NotImplementedError

    def layers(self, part: str, spans: Spans, kept: Kept) -> Layers:
        """Return the function that computes the layers in a forward pass of kind `part`."""
        raise NotImplementedError
