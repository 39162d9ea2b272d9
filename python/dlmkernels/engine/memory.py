# SPDX-License-Identifier: Apache-2.0
"""Memory that an engine has allocated for its requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..decoding.config import DecodingConfig
from ..decoding.outcome import Unfinished
from ..models.adapt import DiffusionModel
from .lane import Lane


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the model's device that stay allocated while requests come and go.

    Attributes
    ----------
    state : int
        Canvases (the tokens of prompt and answer), records of every position and request, plans, and step buffers.
    caches : int
        Keys and values.
    lanes : int
        Number of lanes that this memory belongs to.
    total : int
        Sum of `state` and `caches`.

    Notes
    -----
    The model is not counted, nor are activations and logits, which are freed after each forward pass (or, with captured
    steps, stay in the memory pool of the CUDA graphs).
    """

    state: int
    caches: int
    lanes: int

    @property
    def total(self) -> int:
        return self.state + self.caches

    @classmethod
    def of(cls, lanes: Iterable[Lane]) -> EngineMemory:
        lanes = list(lanes)
        caches = {place for lane in lanes for cache in _parts(lane.program, KVCache) for place in _places(cache)}
        all_places = {place for lane in lanes for place in _places(lane.program)}
        size = {place: number for place, number in all_places | caches}
        kept = {place for place, _ in caches}
        in_caches = sum(number for place, number in size.items() if place in kept)
        return cls(sum(size.values()) - in_caches, in_caches, len(lanes))


def tensors_in(root: Any) -> list[Tensor]:
    """Return the tensors that an object holds, directly or indirectly, except those of a model or of the last step."""
    return [one for one in _walk(root) if isinstance(one, Tensor)]


def _places(root: Any) -> set[tuple[int, int]]:
    """Return the address and the size in bytes of each storage that the object's tensors use."""
    storages = [one.untyped_storage() for one in tensors_in(root)]
    return {(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()}


def _parts(root: Any, kind: type) -> list[Any]:
    return [one for one in _walk(root) if isinstance(one, kind)]


def _walk(root: Any) -> Iterator[Any]:
    """Yield an object and, recursively, everything that it holds."""
    left, seen = [root], set()
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(
            one, (DiffusionModel, DecodingConfig, torch.nn.Module, str, bytes, int, float)
        ):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple, set)):
            left += one
        elif isinstance(one, Unfinished):
            left.append(one.found)
        elif not isinstance(one, (type, Tensor)) and type(one).__module__.startswith("dlmkernels"):
            left += getattr(one, "__dict__", {}).values()
            names = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            left += [getattr(one, name, None) for name in names if not name.startswith("__")]
