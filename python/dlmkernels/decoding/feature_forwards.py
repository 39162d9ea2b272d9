# SPDX-License-Identifier: Apache-2.0
"""The forward passes of the caches that work inside the layers."""

from __future__ import annotations

from .active_forward import ActiveForward
from .block_forward import BlockForward
from .evicting_forward import EvictingForward
from .features import D2Cache, DLLMCache, FocusCache, SparseCache
from .focus_forward import FocusForward
from .layerwise_forward import LayerwiseForward

FORWARDS: dict[type, type[BlockForward]] = {
    DLLMCache: LayerwiseForward, SparseCache: EvictingForward, D2Cache: ActiveForward, FocusCache: FocusForward,
}  # fmt: skip
