# SPDX-License-Identifier: Apache-2.0
"""The attention function that stock transformers models call while we decode."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .. import ops, reference
from ..window import AttentionWindow

NAME = "dlmkernels"


def attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    dlm_window: AttentionWindow | None = None, **kwargs,
):  # fmt: skip
    """Scatter the rows' keys and values into the layer's cache, then attend: transformers' attention interface.

    `query` `[B, H, Q, D]`, `key` and `value` `[B, G, Q, D]` come rotated. Returns `[B, Q, H, D]` and no weights.
    `attention_mask` is ignored: visibility is the window's.
    """
    if dlm_window is None:
        raise RuntimeError(
            f"attention implementation '{NAME}' serves decoding only: the model must be called with dlm_window=…, as "
            "dlmkernels.generate does"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = dlm_window
    # transformers counts the query itself into `sliding_window`
    reach = -1 if sliding_window is None else sliding_window - 1
    if window.shadow is not None:
        if reach >= 0:
            raise ValueError("a shadow block needs full attention; this model's layers have a sliding window")
        return _attend_with_shadow(q, k, v, window, softcap=softcap or 0.0, scale=scaling), None
    kv_range = window.kv_range
    if reach >= 0 and window.context_end is not None:
        assert kv_range is not None and kv_range.dim() == 2
        first = torch.maximum(kv_range[:, 0], window.context_end - reach)
        kv_range, reach = torch.stack((first, kv_range[:, 1]), 1), -1
    if window.cache is None:
        k_new = v_new = None
        k_cache, v_cache = k, v
    else:
        k_new, v_new = k, v
        index = getattr(module, "layer_idx", None)
        # some encoders do not number their layers
        k_cache, v_cache = window.cache.layer(id(module) if index is None else index, k, v)
    tensors = q, k_new, v_new, k_cache, v_cache, window.slots, kv_range
    visibility: dict[str, Any] = {
        "causal_block": window.causal_block, "block_origin": window.block_origin, "q_limit": window.q_limit,
        "k_order": window.k_order, "window_left": reach, "window_right": reach,
    }  # fmt: skip
    if not (softcap or _has_kernel(q)):
        return _attend_in_torch(*tensors, scale=scaling, **visibility), None
    return ops.block_attention(*tensors, softcap=softcap or 0.0, scale=scaling, **visibility).out, None


def _has_kernel(q: Tensor) -> bool:
    """Whether `block_attention` takes heads of this size on this device."""
    head_dim = q.shape[3]
    return not q.is_cuda or head_dim in (64, 128, 256) or (head_dim == 32 and q.dtype == torch.float32)


@functools.cache
def _warn_of_torch(head_dim: int) -> None:
    warnings.warn(
        f"the CUDA kernels have heads of 64, 128 and 256, and this model's are of {head_dim}: its layers attend in "
        "plain torch, which is slower",
        stacklevel=2,
    )


def _attend_in_torch(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, k_cache: Tensor, v_cache: Tensor, slots: Tensor | None,
    kv_range: Tensor | None, *, scale: float | None, block_origin: Tensor | None = None, **visibility,
) -> Tensor:  # fmt: skip
    """`out` of `ops.block_attention` in torch alone, for heads that have no kernel; the cache is written likewise."""
    _warn_of_torch(q.shape[3])
    (batch, rows), length = q.shape[:2], k_cache.shape[1]
    numbers = torch.arange(rows, device=q.device).expand(batch, -1)
    slots = numbers if slots is None else slots
    if k_new is not None and v_new is not None:
        # the row that writes a slot, -1 for none; one more column, for unused rows
        nobody = torch.full((batch, length + 1), -1, device=q.device)
        row = nobody.scatter(1, torch.where(slots < 0, length, slots).long(), numbers)[:, :length, None, None]
        for cache, new in ((k_cache, k_new), (v_cache, v_new)):
            cache.copy_(torch.where(row >= 0, new.gather(1, row.clamp(min=0).expand_as(cache)), cache))
    origin = torch.zeros(batch, dtype=torch.int32, device=q.device) if block_origin is None else block_origin
    seen = reference.block_attention_mask(batch, rows, length, slots, kv_range, block_origin=origin, **visibility)
    unseen = ~seen.any(1)[:, :, None, None]  # these may hold anything
    k, v = (x.masked_fill(unseen, 0.0).transpose(1, 2) for x in (k_cache, v_cache))
    mask = seen[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)


def _attend_with_shadow(q: Tensor, k: Tensor, v: Tensor, window: AttentionWindow, **options) -> Tensor:
    """Attention `[B, T + n, H, D]` of T rows and n of their shadows, which leave out what they are shadows of."""
    slots, kv_range = window.shadow, window.kv_range
    assert slots is not None and kv_range is not None and window.cache is None
    n, width = slots.shape[1], k.shape[1]
    length = width - n
    out = [ops.block_attention(q[:, :length], None, None, k, v, None, kv_range, **options).out]
    # A shadow row sees two ranges that are its own, so that it is a batch row; its keys are those of the request.
    first, last = (bound.expand(-1, n) for bound in kv_range.split(1, dim=1))
    left = torch.stack((first, slots), 2)
    right = torch.stack((slots + 1, last), 2)
    rest = torch.tensor((length, width), dtype=torch.int32, device=k.device).expand(len(k), n, 2)
    ranges = torch.stack((left, right, rest), 2)  # [B, n, 3, 2]
    rows = [
        ops.block_attention(
            q[b, length:, None], None, None, k[b].expand(n, -1, -1, -1), v[b].expand(n, -1, -1, -1), None, ranges[b],
            **options,
        ).out
        for b in range(len(k))
    ]  # fmt: skip
    return torch.cat((*out, torch.stack([row[:, 0] for row in rows])), 1)


# No mask function is registered beside it: transformers then builds no mask at all.
AttentionInterface.register(NAME, attention_forward)


@contextmanager
def use_block_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend through `attention_forward`; its own setting is restored on leaving."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(c, c._attn_implementation) for c in configs]
    try:
        for c, _ in before:
            c._attn_implementation = NAME
        yield
    finally:
        for c, implementation in before:
            c._attn_implementation = implementation
