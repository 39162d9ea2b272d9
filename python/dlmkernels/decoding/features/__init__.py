# SPDX-License-Identifier: Apache-2.0
"""Caches that decide for each layer which positions it computes, or which keys it keeps."""

from typing import Any

from ..checks import Check, one_of
from .base import FeatureCache as FeatureCache
from .base import LayerwiseCache as LayerwiseCache
from .d2cache import D2Cache as D2Cache
from .dllm_cache import DLLMCache as DLLMCache
from .focus import FocusCache as FocusCache
from .sparse import SparseCache as SparseCache

#: name -> cache with its published settings
FEATURE_CACHES: dict[str, FeatureCache] = {kind.name: kind() for kind in (DLLMCache, SparseCache, D2Cache, FocusCache)}


def cache_or(*names: str) -> Check:
    """Return a check that accepts a `FeatureCache`, the name of one, or one of `names`."""
    of_names = one_of(*names, *FEATURE_CACHES)

    def check(name: str, value: Any) -> str | FeatureCache | None:
        return value if isinstance(value, FeatureCache) else of_names(name, value)

    return check


def features_of(cache: str | FeatureCache) -> FeatureCache | None:
    """Return the `FeatureCache` that `cache` denotes, or None if it is a cache of another kind."""
    return FEATURE_CACHES.get(cache) if isinstance(cache, str) else cache


def is_by_block(cache: str | FeatureCache) -> bool:
    """Return whether a cache keeps finished blocks, for models whose blocks see the blocks before them."""
    return cache == "block" or isinstance(features_of(cache), FocusCache)
