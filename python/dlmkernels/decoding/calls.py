# SPDX-License-Identifier: Apache-2.0
"""The ops of every step, called without the argument checks of `dlmkernels.ops` unless they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import ops
from .._ops import ops as native


def token_confidence(*args: Any, **options: Any) -> ops.TokenConfidence:
    """Call `ops.token_confidence`; per-row options must be tensors."""
    return ops.TokenConfidence(
        *_call(native.token_confidence.default, ops.token_confidence, args, options)
    )  # fmt: skip


def lm_head_confidence(*args: Any, **options: Any) -> ops.TokenConfidence:
    """Call `ops.lm_head_confidence`; per-row options must be tensors."""
    return ops.TokenConfidence(
        *_call(native.lm_head_confidence.default, ops.lm_head_confidence, args, options)
    )  # fmt: skip


def shard_confidence(*args: Any, **options: Any) -> Tensor:
    """Call `ops.shard_confidence`; per-row options must be tensors."""
    return _call(native.shard_confidence.default, ops.shard_confidence, args, options)


def select_tokens(*args: Any, **options: Any) -> Tensor:
    """Return the slots that `ops.select_tokens` selects; per-row options must be tensors."""
    return _call(native.select_tokens.default, ops.select_tokens, args, options)[0]


def remask_(*args: Any, **options: Any) -> Tensor:
    """Call `ops.remask_`; per-row options must be tensors."""
    return _call(native.remask_.default, ops.remask_, args, options)


def _call(op: Callable[..., Any], explained: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    try:
        return op(*args, **options)
    except RuntimeError:
        explained(*args, **options)  # the checked op explains what is wrong
        raise
