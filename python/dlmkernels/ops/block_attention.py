# SPDX-License-Identifier: Apache-2.0
"""`block_attention`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients


class BlockAttention(NamedTuple):
    """Result of `block_attention`."""

    out: Tensor
    lse: Tensor


def block_attention(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None = None,
    kv_range: Tensor | None = None,
    *,
    causal_block: int = 0,
    block_origin: Tensor | int | None = None,
    q_limit: Tensor | None = None,
    k_order: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
    cache_rows: Tensor | None = None,
    k_slots: Tensor | None = None,
    visible: Tensor | None = None,
) -> BlockAttention:
    """Write new K/V rows into the given cache slots, then attend over the given ranges of the cache.

    Every scheme for reusing keys and values is a choice of slots and ranges: a full forward pass without a cache
    (`k_new` None, the fresh keys passed as the cache), appending a finished block, refreshing a window in the middle of
    a canvas, attending to a prompt and a suffix but not to what lies between them.

    Dimensions: B batch, Q query rows, H query heads, G key/value heads (H is a multiple of G; query head h reads key
    head h // (H / G)), D head dimension, K new rows, S cache slots, N ranges. Floating-point tensors may have any
    strides in their first three dimensions; index tensors are contiguous. All writes finish before any row attends.

    Parameters
    ----------
    q : Tensor
        [B, Q, H, D], float32, bfloat16 or float16; D a multiple of 8, at most 512.
    k_new, v_new : Tensor or None
        [B, K, G, D], dtype of `q`: keys and values to write into the cache. They belong to the query rows (K = Q)
        unless `k_slots` is given. Pass both or neither; without them nothing is written.
    k_cache, v_cache : Tensor
        [B, S, G, D] (see `cache_rows`), dtype of `q`. Written at `slots` when `k_new` is given, in which case they must
        not be expanded tensors. Slots that no row attends to may hold anything, including NaN.
    slots : Tensor or None
        int32 [B, Q]: the cache slot of each query row. It determines where the row's `k_new` and `v_new` are written,
        and is the row's own position for `causal_block` and the sliding window. -1 marks an unused row: nothing is
        written for it, its output is zero and its lse is -inf. The other slots of a batch row should be distinct; if
        two rows name the same slot, the later row is written. If None, row i has slot i (this requires Q <= S).
    kv_range : Tensor or None
        int32 [B, N, 2], or [B, 2] for a single range: half-open ranges of slots to attend to, in ascending order,
        N >= 1. A range starts no earlier than the ranges before it end, so an overlap counts once. A range with
        start >= end is empty. Left padding of p slots is a range that starts at p. If None, [0, S).
    causal_block : int
        0 imposes no order between slots. n > 0 is block-causal with blocks of n slots: a row sees the slots of its own
        block and of earlier blocks. 1 is ordinary causal attention.
    block_origin : Tensor or None
        int32, one value or [B]: the slot at which block 0 starts, so that blocks can be counted from the end of the
        prompt. Slots before it form one block that sees only itself and is seen by all. If None, 0.
    q_limit, k_order : Tensor or None
        int32 [B, Q] and [B, S], both or neither: slot j is visible only if ``k_order[b, j] <= q_limit[b, row]``. This
        expresses any nesting of visible sets, and applies in addition to the other conditions.
    window_left, window_right : int
        Sliding window: the row with slot i sees slots i - window_left through i + window_right. -1 leaves that side
        unbounded.
    softcap : float
        If positive, logits become ``softcap * tanh(s / softcap)``. 0 disables it.
    scale : float or None
        Factor applied to the logits ``q . k``. If None, 1 / sqrt(D).
    cache_rows : Tensor or None
        int32 [B]: the row of the caches, which then have shape [C, S, G, D], that each batch row reads and writes. This
        lets a subset of the requests form a batch without moving any data. Must be distinct where `k_new` is written.
        -1 marks an unused batch row, all of whose rows are treated like rows with slot -1. If None, batch row b uses
        cache row b, and C = B.
    k_slots : Tensor or None
        int32 [B, K]: the cache slot of each new row, for new rows that are not those of the queries, such as the
        context that a drafter injects, either alone (Q = 0) or ahead of its queries' own rows. Rows with slot -1 are
        not written; if two rows name the same slot, the later one is written. If None, K = Q and the new rows use the
        queries' `slots`.
    visible : Tensor or None
        int32 [B, Q, ceil(K / 32)]: bit i % 32 of word i // 32 is 1 where the query may see new row i, in addition to
        the other conditions. Use it for a tree of drafts, in which each draft sees its ancestors and itself, or for
        drafts alongside masks. Slots to which no new row is written are not affected. A slot named by several new rows
        is visible only where the bits of all of them are set. If None, all new rows are visible.

    Returns
    -------
    BlockAttention
        `out` [B, Q, H, D], contiguous, dtype of `q`: softmax-weighted values. `lse` [B, Q, H], float32: natural
        logarithm of the sum of the exponentials of the visible logits. For a row that sees nothing, `out` is zero and
        `lse` is -inf.

    Raises
    ------
    ArgumentError
        Wrong device, dtype, shape or stride, or a row, slot or range outside the cache (checked on CPU only). The
        message names the argument; nothing has been written.

    Notes
    -----
    Arithmetic is float32. A row's result is bitwise identical whatever the batch, the other query rows and the number
    of threads. On the CPU it is also independent of left padding (given as `kv_range`), and a block that attends to a
    cache gets the same bits as the same rows in a full forward pass. NaN in a row of `q` stays in that row. A visible
    logit of -inf has no weight; one of +inf makes its row NaN.

    To move the accepted rows of a draft tree to the front of its slots, use two calls of fixed shape, which a captured
    step may contain: gather the cache at the accepted slots, padded to the depth of the tree, then call this op without
    queries::

        # accepted: int32 [B, depth], slots or -1; first: [B, 1]
        rows = accepted.clamp(min=0).long()[:, :, None, None].expand(-1, -1, *k_cache.shape[2:])
        front = torch.where(accepted < 0, -1, first + torch.arange(depth)).int()
        k, v = k_cache.gather(1, rows), v_cache.gather(1, rows)
        block_attention(q[:, :0], k, v, k_cache, v_cache, accepted[:, :0], k_slots=front)

    Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. Query heads that share
    a key head: Ainslie et al., "GQA", 2023. Block-causal order: Arriola et al., "Block Diffusion", 2025.
    """
    return BlockAttention(
        *call(
            native.block_attention.default, q, k_new, v_new, k_cache, v_cache, slots, kv_range,
            causal_block=causal_block, block_origin=one_value("block_origin", block_origin, q), q_limit=q_limit,
            k_order=k_order, window_left=window_left, window_right=window_right, softcap=softcap, scale=scale,
            cache_rows=cache_rows, k_slots=k_slots, visible=visible,
        )
    )  # fmt: skip


@torch.library.register_fake(add_op_namespace_prefix("block_attention"))
def _fake(q, k_new, v_new, k_cache, v_cache, slots=None, kv_range=None, **optional):
    given = {"k_new": k_new, "v_new": v_new, "slots": slots, "kv_range": kv_range}
    check_devices("block_attention", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, given | optional)
    check_gradients("block_attention", q=q, k_new=k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
