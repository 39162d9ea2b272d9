# SPDX-License-Identifier: Apache-2.0
"""Caches of features: a forward computes a layer for the rows that need it, and keeps what it added to the others."""

from .base import FeatureCache as FeatureCache
from .dllm_cache import DLLMCache as DLLMCache

#: the caches by the names of their published settings
FEATURE_CACHES: dict[str, FeatureCache] = {kind.name: kind() for kind in (DLLMCache,)}
