# SPDX-License-Identifier: Apache-2.0
"""Caches of features: a forward computes a layer for the rows that need it, and keeps what it added to the others."""

from .base import FeatureCache as FeatureCache
from .base import LayerwiseCache as LayerwiseCache
from .dllm_cache import DLLMCache as DLLMCache
from .sparse import SparseCache as SparseCache

#: the caches by the names of their published settings
FEATURE_CACHES: dict[str, FeatureCache] = {kind.name: kind() for kind in (DLLMCache, SparseCache)}
