# SPDX-License-Identifier: Apache-2.0
"""The attention function that stock transformers models call during decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from .. import ops
from ..reference import block_attention_mask
from ..window import AttentionWindow

NAME = "dlmkernels"
#: The op needs a head width that is a multiple of this; other widths are padded.
HEAD_STEP = 8


#: Keyword arguments of stock layers without effect here: positions are already in the rotated queries and keys, the
#: window determines what is attended to, and the others control what the model caches or returns.
WITHOUT_EFFECT = frozenset((
    "cache_position", "deterministic", "is_causal", "logits_to_keep", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache",
))  # fmt: skip


def attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, dlm_window: AttentionWindow | None = None, **kwargs,
):  # fmt: skip
    """Write new keys and values into the layer's cache, then attend. Implements transformers' attention interface.

    `query` `[B, H, Q, D]` and `key` `[B, G, Q, D]` are already rotated; `value` is `[B, G, Q, D]`. Under
    `torch.autocast` their dtypes may differ. `s_aux` `[H]` are attention sinks: one additional logit per head that
    takes part in the softmax but has no value. `attention_mask` is ignored, because `dlm_window` determines what is
    attended to. Returns the output `[B, Q, H, D]`, and None for the attention weights.

    Raises
    ------
    RuntimeError
        If `dlm_window` is missing, or gradients are needed through a cache.
    ValueError
        If a layer uses a feature that is not implemented. The message names it.
    """
    if dlm_window is None:
        raise RuntimeError(
            f"attention implementation '{NAME}' is for decoding only: the model must be called with dlm_window=…, as "
            "dlmkernels.generate does"
        )
    _refuse_unknown(module, kwargs | {"dropout": dropout or None})
    window = dlm_window.to(query.device)
    window.attended.add(id(module))
    index = getattr(module, "layer_idx", None)
    # Some encoders do not number their layers. A twin shares its parameter dict with the model's layer: use its id.
    index = id(module._parameters) if index is None else index
    dtype = _common_dtype(window, index, value)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    width, padding = value.shape[-1], -query.shape[-1] % HEAD_STEP
    if padding:  # zeros do not change any dot product
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (pad(x, (0, padding)) for x in (q, k, v))
    # In transformers, `sliding_window` includes the query's own position.
    reach = -1 if sliding_window is None else sliding_window - 1
    if window.shadow is not None:
        if reach >= 0:
            raise ValueError(
                f"a shadow block needs full attention; this model's layers have a sliding window of {sliding_window}"
            )
        if s_aux is not None:
            raise ValueError("a shadow block cannot be used with a model that has attention sinks")
        return _attend_with_shadow(q, k, v, window, softcap=softcap or 0.0, scale=scaling)[..., :width], None
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
        k_cache, v_cache = window.cache.layer(index, k, v)
    is_traced = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if is_traced and window.cache is not None:
        raise RuntimeError(f"attention implementation '{NAME}' does not support gradients through a KV cache")
    tensors = q, k_new, v_new, k_cache, v_cache, window.slots, kv_range
    visibility: dict[str, Any] = {
        "causal_block": window.causal_block, "block_origin": window.block_origin, "q_limit": window.q_limit,
        "k_order": window.k_order, "window_left": reach, "window_right": reach,
    }  # fmt: skip
    options = visibility | {"softcap": softcap or 0.0, "scale": scaling}
    if is_traced:
        out, lse = _with_gradients(*tensors, **options)
    else:
        out, lse = ops.block_attention(*tensors, **options, cache_rows=window.cache_rows, visible=window.visible)
    if window.watch is not None:
        if sliding_window is not None:
            raise ValueError(
                f"model: its {type(module).__name__} has a sliding window of {sliding_window}, which cannot be "
                "combined with a cache that evicts keys: use another cache"
            )
        window.watch(index, q, k_cache, v_cache, q.shape[-1] ** -0.5 if scaling is None else scaling)
    if s_aux is not None:
        # scale by the share of the softmax that does not go to the sink
        out = (out * torch.sigmoid(lse - s_aux.float())[..., None]).to(dtype)
    return out[..., :width] if padding else out, None


def _refuse_unknown(module, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and value is not False and name not in WITHOUT_EFFECT:
            raise ValueError(
                f"model: its {type(module).__name__} uses the attention argument {name}, which dlmkernels does not "
                "support"
            )


def _common_dtype(window: AttentionWindow, index: int, value: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of the layer's cache if there is one, else that of autocast or `value`."""
    kept = None if window.cache is None else window.cache.dtype(index)
    if kept is not None:
        return kept
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def _attend_with_shadow(q: Tensor, k: Tensor, v: Tensor, window: AttentionWindow, **options) -> Tensor:
    """Attend with T rows and n shadows of some of them, which do not see their originals; return `[B, T + n, H, D]`."""
    assert window.shadow is not None and window.kv_range is not None and window.cache is None
    slots, kv_range, used = window.shadow.clamp(min=0), window.kv_range, (window.shadow >= 0).sum(1, dtype=torch.int32)
    n, width = slots.shape[1], k.shape[1]
    length = width - n
    out = [ops.block_attention(q[:, :length], None, None, k, v, None, kv_range, **options).out]
    # Each shadow row has its own ranges (left and right of its original, and the used shadows), so each becomes a batch
    # row of its own, with the keys of its request.
    first, last = (bound.expand(-1, n) for bound in kv_range.split(1, dim=1))
    left = torch.stack((first, slots), 2)
    right = torch.stack((slots + 1, last), 2)
    rest = torch.full((len(k), n, 2), length, dtype=torch.int32, device=k.device)
    rest[..., 1].add_(used[:, None])
    ranges = torch.stack((left, right, rest), 2)  # [B, n, 3, 2]
    rows = [
        ops.block_attention(
            q[b, length:, None], None, None, k[b].expand(n, -1, -1, -1), v[b].expand(n, -1, -1, -1), None, ranges[b],
            **options,
        ).out
        for b in range(len(k))
    ]  # fmt: skip
    return torch.cat((*out, torch.stack([row[:, 0] for row in rows])), 1)


def _with_gradients(
    q: Tensor, k_new: Tensor | None, v_new: Tensor | None, k: Tensor, v: Tensor, slots: Tensor | None,
    kv_range: Tensor | None, *, softcap: float = 0.0, scale: float | None = None, **visibility: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `ops.block_attention` without a cache from differentiable operations, in float32."""
    (batch, rows, heads, width), groups = q.shape, k.shape[2]
    if slots is None:
        slots = torch.arange(rows, device=q.device).expand(batch, rows)
    visible = block_attention_mask(batch, rows, k.shape[1], slots, kv_range, **visibility)[:, None]
    k, v = (x.float().repeat_interleave(heads // groups, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * (width**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # Rows that see nothing keep finite scores, which avoids NaN; their outputs are set to 0 below.
    sees = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & sees, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1).masked_fill(~sees, 0.0), v)
    lse = scores.logsumexp(-1).masked_fill(~sees[..., 0], -torch.inf)
    return out.to(q.dtype), lse.transpose(1, 2)


# No mask function is registered with it, so transformers builds no attention mask.
AttentionInterface.register(NAME, attention_forward)
