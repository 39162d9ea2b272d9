# SPDX-License-Identifier: Apache-2.0
"""`block_attention`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients


class BlockAttention(NamedTuple):
    """What `block_attention` returns."""

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
    """Scatter, then attend: write new K/V rows at given cache slots, then attend over given ranges of the cache.

    Every way to reuse keys and values is a choice of slots and ranges: a full forward without a cache (`k_new` None,
    the fresh keys as the cache), appending a finished block, refreshing a window in the middle of a canvas, attending
    to a prompt and a suffix but not to what lies between them.

    Letters: B batch, Q query rows, H query heads, G key/value heads (H is a multiple of G; query head h reads key
    head h // (H / G)), D head dimension, S cache slots, N ranges. Tensors of floats may have any strides in their
    first three dimensions; index tensors are contiguous. All writing is complete before any row attends.

    Parameters
    ----------
    q : Tensor
        [B, Q, H, D], float32, bfloat16 or float16; D a multiple of 8, at most 512.
    k_new, v_new : Tensor or None
        [B, K, G, D], dtype of `q`: keys and values to be written into the cache, those of the query rows (K = Q) unless
        `k_slots` says otherwise. Both or neither; without them nothing is written.
    k_cache, v_cache : Tensor
        [B, S, G, D] (see `cache_rows`), dtype of `q`; written at `slots` when `k_new` is given, and then not an
        expanded tensor. Slots that no row sees may hold anything, NaN included.
    slots : Tensor or None
        int32 [B, Q]: the cache slot of each query row. It says where the row's `k_new` and `v_new` go, and is the
        row's own place for `causal_block` and the sliding window. -1: unused row, nothing is written for it, its
        output is zero and its lse -inf. The other slots of a batch row should be distinct; if two rows name one slot,
        the later row is written. None: row i has slot i (then Q <= S).
    kv_range : Tensor or None
        int32 [B, N, 2], or [B, 2] for one range: half-open ranges of attended slots, ascending. A range starts no
        earlier than the ranges before it end, so an overlap counts once; start >= end is an empty range; N >= 1. None:
        [0, S). Left padding of p slots is a range that starts at p.
    causal_block : int
        0: no order between slots. n > 0: block-causal with blocks of n slots, a row sees the slots of its own block and
        of earlier ones; 1 is plain causal.
    block_origin : Tensor or None
        int32, one value or [B]: the slot at which block 0 starts, so that blocks can be counted from the prompt's end.
        Slots before it form one block that sees itself and is seen by all. None: 0.
    q_limit, k_order : Tensor or None
        int32 [B, Q] and [B, S], both or neither: slot j is seen only if ``k_order[b, j] <= q_limit[b, row]``. Any
        nesting of visible sets, in addition to the other conditions.
    window_left, window_right : int
        Sliding window: the row with slot i sees slots i - window_left ... i + window_right. -1: open on that side.
    softcap : float
        Positive: logits become ``softcap * tanh(s / softcap)``. 0: none.
    scale : float or None
        Factor of the logits ``q . k``. None: 1 / sqrt(D).
    cache_rows : Tensor or None
        int32 [B]: which row of the caches, then [C, S, G, D], each batch row reads and writes, so that some requests of
        many are a batch without moving anything. Distinct where `k_new` is written. -1: an unused batch row, whose rows
        are all like those of slot -1. None: batch row b has cache row b, and C = B.

    k_slots : Tensor or None
        int32 [B, K]: the cache slot of each new row, where new rows are not those of the queries: context without
        queries, which a drafter injects, alone (Q = 0) or before its queries' own rows. -1 is written nowhere, and of
        two rows that name one slot the later is written. None: K = Q, and the new rows have the queries' `slots`.
    visible : Tensor or None
        int32 [B, Q, ceil(K / 32)]: bit i % 32 of word i / 32 tells whether a query sees new row i, in addition to the
        other conditions: a tree of drafts, where each sees its ancestors and itself, or drafts beside masks. Slots that
        no new row is written to are not concerned. A slot that several new rows name is seen only where all of them
        are. None: all are seen.

    Returns
    -------
    BlockAttention
        `out` [B, Q, H, D], contiguous, dtype of `q`: softmax-weighted values. `lse` [B, Q, H], float32: natural
        logarithm of the sum of the exponentials of the visible logits. A row that sees nothing: zeros and -inf.

    Raises
    ------
    ArgumentError
        Wrong device, dtype, shape, stride, or a row, slot or range outside the cache (checked on CPU only). The message
        names the argument; nothing has been written.

    Notes
    -----
    Arithmetic is float32. A row's result has the same bits whatever the batch, the other query rows and the number of
    threads; on the CPU also whatever the left padding (as `kv_range`), and a block attending to a cache gives the bits
    of the same rows in a full forward. NaN in a row of `q` stays in that row. A visible logit of -inf weighs nothing,
    one of +inf makes its row NaN.

    Rows of a tree that were accepted move to the front of its slots by two calls of fixed shape, which a captured step
    may hold: a gather of the cache at the accepted slots, padded to the depth of the tree, and this op, no queries::

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
