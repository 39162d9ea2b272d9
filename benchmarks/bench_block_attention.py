# SPDX-License-Identifier: Apache-2.0
"""Benchmark block_attention against plain torch: a block of queries attends to a cache after updating its own keys."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dlmkernels import ops
from harness import product_timing, touch
from shapes import DEMO, DREAM, LLADA, SDAR, Shape


@dataclass(frozen=True)
class Case:
    shape: Shape
    batch: int
    keys: int
    dtype: torch.dtype = torch.bfloat16
    queries: int = 0  # 0: the model's block length

    @property
    def block(self):
        return self.queries or self.shape.block

    def __str__(self):
        s = self.shape
        return (f"{s}, heads {s.heads}/{s.kv_heads} of {s.head_dim}, batch {self.batch}, {self.block} queries, "
                f"{self.keys} keys, {str(self.dtype).removeprefix('torch.')}")  # fmt: skip


QUICK = [Case(LLADA, 1, 256), Case(LLADA, 1, 1024), Case(DREAM, 1, 1024), Case(SDAR, 1, 1024),
         Case(DEMO, 32, 82, torch.float32)]  # fmt: skip
SMALLEST = [Case(DEMO, 1, 82, torch.float32)]
FULL = [
    Case(LLADA, 1, 4096), Case(LLADA, 8, 1024), Case(LLADA, 8, 4096), Case(LLADA, 1, 1024, queries=4),
    Case(LLADA, 1, 4096, queries=4), Case(LLADA, 1, 1024, queries=1024), Case(DREAM, 1, 4096), Case(DREAM, 8, 1024),
    Case(DREAM, 8, 4096), Case(DREAM, 1, 1024, queries=4), Case(DREAM, 1, 4096, queries=4), Case(SDAR, 1, 4096),
    Case(LLADA, 1, 1024, torch.float32),
]  # fmt: skip


class Setting:
    """The tensors of a case: ours as `[B, position, head, d]`, and for torch (`_t`) as `[B, head, position, d]`."""

    def __init__(self, case):
        s, b, n, dtype = case.shape, case.batch, case.block, case.dtype
        self.q = torch.randn(b, n, s.heads, s.head_dim).to(dtype)
        self.k_new, self.v_new = (torch.randn(b, n, s.kv_heads, s.head_dim).to(dtype) for _ in range(2))
        caches = [torch.randn(b, s.kv_heads, case.keys, s.head_dim).to(dtype) for _ in range(2)]
        self.k_cache, self.v_cache = (x.transpose(1, 2) for x in caches)  # the memory layout of KVCache
        self.first = (case.keys - n) // 2  # the block is in the middle of the canvas, as with a dual cache
        self.slots = torch.arange(self.first, self.first + n, dtype=torch.int32).expand(b, n).contiguous()
        ours = (self.q, self.k_new, self.v_new, self.k_cache, self.v_cache)
        heads_first = [x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in ours]
        self.q_t, self.k_new_t, self.v_new_t, self.k_t, self.v_t = heads_first
        self.grouped = s.heads != s.kv_heads
        self.tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {}
        self.touch = touch(*caches, self.k_t, self.v_t)
        flops = 4.0 * b * s.heads * n * case.keys * s.head_dim
        moved = self.k_cache.nbytes + self.v_cache.nbytes + 2 * self.q.nbytes
        self.timing = {"before": self.touch, **product_timing(dtype, flops, moved, self.k_cache, self.v_cache)}

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)

    def with_new(self, cache, new):
        """Return a copy of the cache with the block's rows replaced."""
        left, right = cache[:, :, : self.first], cache[:, :, self.first + new.shape[2] :]
        return torch.cat((left, new, right), 2)


def test_block_attention(benchmark, harness, case):
    t = Setting(case)
    index = t.slots[0].long()

    def in_place():
        t.k_t[:, :, index] = t.k_new_t
        t.v_t[:, :, index] = t.v_new_t
        return t.attend(t.q_t, t.k_t, t.v_t)

    def concatenated():
        return t.attend(t.q_t, t.with_new(t.k_t, t.k_new_t), t.with_new(t.v_t, t.v_new_t))

    def ours():
        return ops.block_attention(t.q, t.k_new, t.v_new, t.k_cache, t.v_cache, t.slots)

    torch.testing.assert_close(ours().out.transpose(1, 2), in_place(), **t.tolerance)
    torch.testing.assert_close(concatenated(), in_place(), **t.tolerance)
    baselines = {"index_put into the cache + SDPA": in_place, "cat + SDPA": concatenated}
    harness.compare(benchmark, f"block_attention: {case}", ours, baselines, **t.timing)


@pytest.mark.parametrize("keys", [1024, 4096])
def test_tree_of_drafts(benchmark, harness, keys):
    """32 drafts in a binary tree after the context; each attends to its ancestors."""
    t = Setting(Case(LLADA, 1, keys))
    n = t.q.shape[1]
    sees = torch.eye(n, dtype=torch.bool)
    for node in range(1, n):
        sees[node] |= sees[(node - 1) // 2]
    visible = (sees.long() << torch.arange(n)).sum(1).int().view(1, n, 1)
    slots = torch.arange(keys - n, keys, dtype=torch.int32)[None]
    mask = torch.cat((torch.ones(n, keys - n, dtype=torch.bool), sees), 1)

    def ours():
        return ops.block_attention(t.q, t.k_new, t.v_new, t.k_cache, t.v_cache, slots, visible=visible)

    def masked():
        t.k_t[:, :, -n:], t.v_t[:, :, -n:] = t.k_new_t, t.v_new_t
        return F.scaled_dot_product_attention(t.q_t, t.k_t, t.v_t, attn_mask=mask)

    torch.testing.assert_close(ours().out.transpose(1, 2), masked(), **t.tolerance)
    harness.compare(benchmark, f"block_attention, tree of {n} drafts, {keys} keys", ours,
                    {"write + SDPA with a mask": masked}, **t.timing)  # fmt: skip


def rotate(x, cos, sin):
    """Apply rotary embeddings in fp32, as LLaDA's code does."""
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


@pytest.mark.parametrize("keys", [1024, 4096])
def test_keys_rotated_once(benchmark, harness, keys):
    """Caching rotated keys, against Fast-dLLM, which rotates the keys of the whole canvas in every forward."""
    case = Case(LLADA, 1, keys)
    t = Setting(case)
    angles = torch.outer(torch.arange(case.keys), 10000.0 ** -(torch.arange(0, 1, 2 / case.shape.head_dim)))
    cos, sin = angles.cos(), angles.sin()
    block = slice(t.first, t.first + case.block)
    t.k_cache.copy_(rotate(t.k_t, cos, sin).transpose(1, 2))

    def fast_dllm():
        k, v = t.with_new(t.k_t, t.k_new_t), t.with_new(t.v_t, t.v_new_t)
        return t.attend(rotate(t.q_t, cos[block], sin[block]), rotate(k, cos, sin), v)

    def ours():
        q, k_new = (rotate(x, cos[block, None], sin[block, None]) for x in (t.q, t.k_new))
        return ops.block_attention(q, k_new, t.v_new, t.k_cache, t.v_cache, t.slots)

    torch.testing.assert_close(ours().out.transpose(1, 2), fast_dllm(), **t.tolerance)
    title = f"block_attention with rotary embedding: {case}"
    harness.compare(benchmark, title, ours, {"cat + rotate all keys + SDPA (Fast-dLLM)": fast_dllm}, **t.timing)
