# SPDX-License-Identifier: Apache-2.0
"""Fused kernels and parallel decoding loops for diffusion language models.

>>> import dlmkernels as dk
>>> out = dk.generate(model, input_ids, rule=dk.Threshold(0.9), block_length=32, cache="dual")

The kernels are `torch.ops.dlmkernels.*`, documented in `dlmkernels.ops`; they need only torch. Everything that works
on models needs transformers, which is imported at first use.
"""

import importlib

from . import host_memory as _host_memory
from . import wait_policy as _wait_policy

_wait_policy.choose()
_host_memory.choose()

# ruff: noqa: E402  (the imports below load torch)
try:
    import torch  # noqa: F401  (its library must be loaded before _C)

    from . import _C  # registers torch.ops.dlmkernels
except ImportError as error:
    from .installation import why_not_loaded

    raise ImportError(why_not_loaded(error)) from error
from . import ops as ops
from .cache import KVCache as KVCache
from .decoding import rules as rules
from .decoding import scores as scores
from .decoding.config import DecodingConfig as DecodingConfig
from .decoding.constraint import Constraint as Constraint
from .decoding.features import D2Cache as D2Cache
from .decoding.features import DLLMCache as DLLMCache
from .decoding.features import FeatureCache as FeatureCache
from .decoding.features import FocusCache as FocusCache
from .decoding.features import SparseCache as SparseCache
from .decoding.presets import PRESETS as PRESETS
from .decoding.presets import preset as preset
from .decoding.rules import *  # noqa: F403
from .decoding.scores import Score as Score
from .trace import Trace as Trace
from .window import AttentionWindow as AttentionWindow
from .window import TokenWindow as TokenWindow

__version__ = _C.build_info()["version"]

_LAZY = {
    "generate": ".decoding.generate",
    "infill": ".decoding.generate",
    "custom_generate": ".decoding.custom_generate",
    "DecodingOutput": ".decoding.output",
    "log_likelihood": ".decoding.likelihood",
    "LogLikelihood": ".decoding.likelihood",
    "adapt": ".models.adapt",
    "Backbone": ".models.backbone",
    "BackboneInput": ".models.backbone",
    "load": ".models.load",
    "load_drafter": ".models.drafters",
    "Drafter": ".models.drafters",
    "plan": ".planning",
    "MemoryPlan": ".planning",
    "Engine": ".engine.engine",
    "EngineMemory": ".engine.memory",
    "EngineMetrics": ".engine.metrics",
    "RequestOutput": ".engine.request",
    "RequestStatus": ".engine.request",
    "generate_batch": ".engine.batch",
    "json_schema": ".grammars.make",
    "json_object": ".grammars.make",
    "regex": ".grammars.make",
}
__all__ = [
    "PRESETS", "AttentionWindow", "Constraint", "D2Cache", "DLLMCache", "DecodingConfig", "FeatureCache", "FocusCache",
    "KVCache", "Score", "SparseCache", "TokenWindow", "Trace", "ops", "preset", "rules", "scores", *_LAZY,
]  # fmt: skip
__all__ += rules.__all__


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str):
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(_LAZY[name], __name__), name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] in ("transformers", "safetensors", "huggingface_hub"):
                raise ImportError(
                    f'dlmkernels.{name} needs transformers: pip install -U "dlmkernels[models]" ({error})'
                ) from error
            raise
    raise AttributeError(f"module 'dlmkernels' has no attribute '{name}'")
