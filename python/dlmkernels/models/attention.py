# SPDX-License-Identifier: Apache-2.0
"""The attention function that stock transformers models call while we decode."""

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
#: The op takes heads whose width is a multiple of this; others are padded.
HEAD_STEP = 8


#: Keyword arguments of stock layers that change nothing here: positions are in the rotated queries and keys, what is
#: seen is said by the window, and the others are about what the model keeps or returns.
WITHOUT_EFFECT = frozenset((
    "cache_position", "deterministic", "is_causal", "logits_to_keep", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache",
))  # fmt: skip


def attention_forward(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, dlm_window: AttentionWindow | None = None, **kwargs,
):  # fmt: skip
    """Scatter the rows' keys and values into the layer's cache, then attend: transformers' attention interface.

    `query` `[B, H, Q, D]`, `key` and `value` `[B, G, Q, D]` come rotated, and under `torch.autocast` in different
    dtypes. `s_aux` `[H]` are attention sinks: a logit of each head that takes its share and has no value. Returns
    `[B, Q, H, D]` and no weights. `attention_mask` is ignored: visibility is the window's.

    Raises
    ------
    RuntimeError
        Without `dlm_window`.
    ValueError
        When a layer asks for what is not implemented; the message names it.
    """
    if dlm_window is None:
        raise RuntimeError(
            f"attention implementation '{NAME}' serves decoding only: the model must be called with dlm_window=…, as "
            "dlmkernels.generate does"
        )
    _refuse_unknown(module, kwargs | {"dropout": dropout or None})
    window = dlm_window.to(query.device)
    window.attended.add(id(module))
    index = getattr(module, "layer_idx", None)
    # some encoders do not number their layers; a twin is known by what it shares with the model's
    index = id(module._parameters) if index is None else index
    dtype = _common_dtype(window, index, value)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    width, padding = value.shape[-1], -query.shape[-1] % HEAD_STEP
    if padding:  # with zeros, which add nothing to any product
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (pad(x, (0, padding)) for x in (q, k, v))
    # transformers counts the query itself into `sliding_window`
    reach = -1 if sliding_window is None else sliding_window - 1
    if window.shadow is not None:
        if reach >= 0:
            raise ValueError("a shadow block needs full attention; this model's layers have a sliding window")
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
        raise RuntimeError(f"attention implementation '{NAME}' has no gradient through a cache of keys and values")
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
                f"model: its {type(module).__name__} has a sliding window of {sliding_window}, which does not go with "
                "a cache that evicts keys: use another one"
            )
        window.watch(index, q, k_cache, v_cache, q.shape[-1] ** -0.5 if scaling is None else scaling)
    if s_aux is not None:
        # the share of the sum of exponentials that is not the sink's
        out = (out * torch.sigmoid(lse - s_aux.float())[..., None]).to(dtype)
    return out[..., :width] if padding else out, None


def _refuse_unknown(module, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and value is not False and name not in WITHOUT_EFFECT:
            raise ValueError(
                f"model: its {type(module).__name__} attends with {name}, which dlmkernels does not implement"
            )


def _common_dtype(window: AttentionWindow, index: int, value: Tensor) -> torch.dtype:
    """What queries, keys and values are brought to: the dtype of the layer's cache, or what attention would run in."""
    kept = None if window.cache is None else window.cache.dtype(index)
    if kept is not None:
        return kept
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def _attend_with_shadow(q: Tensor, k: Tensor, v: Tensor, window: AttentionWindow, **options) -> Tensor:
    """Attention `[B, T + n, H, D]` of T rows and n of their shadows, which leave out what they are shadows of."""
    assert window.shadow is not None and window.kv_range is not None and window.cache is None
    slots, kv_range, used = window.shadow.clamp(min=0), window.kv_range, (window.shadow >= 0).sum(1, dtype=torch.int32)
    n, width = slots.shape[1], k.shape[1]
    length = width - n
    out = [ops.block_attention(q[:, :length], None, None, k, v, None, kv_range, **options).out]
    # A shadow row sees two ranges that are its own, so that it is a batch row; its keys are those of the request.
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
    """`ops.block_attention` without a cache in operations that autograd knows, in float32."""
    (batch, rows, heads, width), groups = q.shape, k.shape[2]
    if slots is None:
        slots = torch.arange(rows, device=q.device).expand(batch, rows)
    visible = block_attention_mask(batch, rows, k.shape[1], slots, kv_range, **visibility)[:, None]
    k, v = (x.float().repeat_interleave(heads // groups, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * (width**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # of a row that sees nothing, the softmax is of zeros, and counts for nothing
    sees = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & sees, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1).masked_fill(~sees, 0.0), v)
    lse = scores.logsumexp(-1).masked_fill(~sees[..., 0], -torch.inf)
    return out.to(q.dtype), lse.transpose(1, 2)


# No mask function is registered beside it: transformers then builds no mask at all.
AttentionInterface.register(NAME, attention_forward)
