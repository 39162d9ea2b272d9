# SPDX-License-Identifier: Apache-2.0
"""block_attention beside plain torch: a block of queries against a cache in which its own keys are replaced."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dlmkernels import ops
from harness import matmul_limit, touch
from shapes import DEMO, DREAM, LLADA, SDAR, Shape


@dataclass(frozen=True)
class Case:
    shape: Shape
    batch: int
    keys: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        s = self.shape
        return (f"{s}, heads {s.heads}/{s.kv_heads} of {s.head_dim}, batch {self.batch}, {s.block} queries, "
                f"{self.keys} keys, {str(self.dtype).removeprefix('torch.')}")  # fmt: skip


QUICK = [Case(LLADA, 1, 256), Case(DREAM, 1, 1024), Case(SDAR, 1, 1024), Case(DEMO, 32, 82, torch.float32)]
FULL = [
    Case(LLADA, 1, 1024), Case(LLADA, 1, 4096), Case(LLADA, 8, 1024), Case(DREAM, 1, 4096), Case(DREAM, 8, 1024),
    Case(LLADA, 1, 1024, torch.float32),
]  # fmt: skip


def test_block_attention(benchmark, harness, case):
    s, b, dtype = case.shape, case.batch, case.dtype
    q = torch.randn(b, s.block, s.heads, s.head_dim).to(dtype)
    k_new, v_new = (torch.randn(b, s.block, s.kv_heads, s.head_dim).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.randn(b, case.keys, s.kv_heads, s.head_dim).to(dtype) for _ in range(2))
    first = (case.keys - s.block) // 2  # the block stands in the middle of the canvas, as with a dual cache
    slots = torch.arange(first, first + s.block, dtype=torch.int32).expand(b, s.block).contiguous()
    # torch wants heads before positions
    q_t, k_new_t, v_new_t, k_t, v_t = (x.transpose(1, 2).contiguous() for x in (q, k_new, v_new, k_cache, v_cache))
    index, grouped = slots[0].long(), s.heads != s.kv_heads

    def in_place():
        k_t[:, :, index] = k_new_t
        v_t[:, :, index] = v_new_t
        return F.scaled_dot_product_attention(q_t, k_t, v_t, enable_gqa=grouped)

    def concatenated():
        left, right = slice(first), slice(first + s.block, None)
        k = torch.cat((k_t[:, :, left], k_new_t, k_t[:, :, right]), 2)
        v = torch.cat((v_t[:, :, left], v_new_t, v_t[:, :, right]), 2)
        return F.scaled_dot_product_attention(q_t, k, v, enable_gqa=grouped)

    def ours():
        return ops.block_attention(q, k_new, v_new, k_cache, v_cache, slots)

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {}
    torch.testing.assert_close(ours().out.transpose(1, 2), in_place(), **tolerance)
    torch.testing.assert_close(concatenated(), in_place(), **tolerance)
    harness.compare(
        benchmark, f"block_attention: {case}", ours,
        {"index_put into the cache + SDPA": in_place, "cat + SDPA": concatenated},
        before=touch(k_cache, v_cache, k_t, v_t), limit=matmul_limit(dtype),
        work=4.0 * b * s.heads * s.block * case.keys * s.head_dim,
    )  # fmt: skip
