# SPDX-License-Identifier: Apache-2.0
"""Benchmark soft_embedding against a softmax tensor times the embedding table."""

from dataclasses import dataclass

import torch

from dlmkernels import ops
from harness import product_timing


@dataclass(frozen=True)
class Case:
    rows: int
    vocabulary: int = 32000
    dim: int = 1024
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{self.rows} rows, vocabulary {self.vocabulary}, dim {self.dim}, {str(self.dtype)[6:]}"

    def inputs(self):
        logits = (3 * torch.randn(self.rows, self.vocabulary)).to(self.dtype)
        return logits, torch.randn(self.vocabulary, self.dim).to(self.dtype)


QUICK = [Case(1), Case(32), Case(32, dtype=torch.bfloat16)]
SMALLEST = [Case(1, 1000, 64)]
FULL = [Case(32, 126464, 4096, torch.bfloat16), Case(256, 262144, 2816, torch.bfloat16)]


def test_whole_distribution(benchmark, harness, case):
    logits, weight = case.inputs()
    tolerance = {"rtol": 0, "atol": 1e-4 if case.dtype == torch.float32 else 3e-2}

    def ours():
        return ops.soft_embedding(logits, weight)

    def plain():
        return torch.softmax(logits, -1) @ weight

    torch.testing.assert_close(ours(), plain(), **tolerance)
    moved = logits.nbytes + weight.nbytes + case.rows * case.dim * weight.element_size()
    timing = product_timing(case.dtype, 2.0 * weight.numel() * case.rows, moved, logits, weight)
    harness.compare(benchmark, f"soft_embedding: {case}", ours, {"softmax + product": plain}, **timing)


def test_top_1_and_mask(benchmark, harness, case):
    logits, weight = case.inputs()
    logits.scatter_(1, logits.argmax(1, keepdim=True), 20.0)  # make the maximum unique, because ours keeps ties
    one = torch.ones(1, dtype=torch.int32)
    tolerance = {"rtol": 0, "atol": 1e-4 if case.dtype == torch.float32 else 6e-2}

    def ours():
        return ops.soft_embedding(logits, weight, top_k=one, mask_token_id=5)

    def dmax():
        p, ids = torch.softmax(logits, -1).topk(1)
        return p * weight[ids[:, 0]] + (1 - p) * weight[5]

    torch.testing.assert_close(ours(), dmax(), **tolerance)
    harness.compare(benchmark, f"soft_embedding, top-1 and mask: {case}", ours, {"softmax, topk, gather (DMax)": dmax})
