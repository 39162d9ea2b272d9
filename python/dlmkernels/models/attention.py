# SPDX-License-Identifier: Apache-2.0
"""The attention function that stock transformers models call while we decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .. import ops
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
    out, _ = ops.block_attention(
        q, k_new, v_new, k_cache, v_cache, window.slots, kv_range,
        causal_block=window.causal_block, block_origin=window.block_origin, q_limit=window.q_limit,
        k_order=window.k_order,
        window_left=reach, window_right=reach, softcap=softcap or 0.0, scale=scaling,
    )  # fmt: skip
    return out, None


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
