# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op's outputs, for torch.compile and fake tensors; same order as csrc/torch/ops.cpp."""

import torch

# --- token_confidence ------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::token_confidence")
def _token_confidence(logits, *, row_map=None, with_margin=True, with_entropy=True, **optional):
    # With one tensor on "meta" this runs in place of the kernel and its checks.
    for name, value in {"row_map": row_map, **optional}.items():
        if isinstance(value, torch.Tensor) and value.device != logits.device:
            raise RuntimeError(f"token_confidence: {name} must be on the device of logits; got {value.device}")
    rows = logits.shape[0] if row_map is None else row_map.shape[0]

    def empty(length, dtype=torch.float32):
        return logits.new_empty((length,), dtype=dtype)

    return (
        empty(rows, torch.int64),
        empty(rows, torch.int64),
        empty(rows),
        empty(rows if with_margin else 0),
        empty(rows if with_entropy else 0),
        empty(rows),
        empty(rows),
        empty(rows, torch.int32),
    )
