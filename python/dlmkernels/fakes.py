# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op's outputs, for torch.compile and fake tensors; same order as csrc/torch/ops.cpp."""

import torch


# --- block_attention -------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::block_attention")
def _(
    q, k_new, v_new, k_cache, v_cache, slots=None, kv_range=None, *, causal_block=0, block_origin=None, q_limit=None,
    k_order=None, window_left=-1, window_right=-1, softcap=0.0, scale=None,
):  # fmt: skip
    tensors = {
        "k_new": k_new, "v_new": v_new, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, "kv_range": kv_range,
        "block_origin": block_origin, "q_limit": q_limit, "k_order": k_order,
    }  # fmt: skip
    for name, tensor in tensors.items():
        # a meta tensor among real ones is dispatched here, not to the kernel
        if tensor is not None and tensor.device != q.device:
            raise RuntimeError(f"block_attention: {name} must be on the device of q ({q.device}); got {tensor.device}")
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
