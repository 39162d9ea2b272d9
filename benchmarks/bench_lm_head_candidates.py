# SPDX-License-Identifier: Apache-2.0
"""Benchmark lm_head_candidates against the LM head followed by a selection of candidates from its logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dlmkernels import ops
from harness import product_timing


@dataclass(frozen=True)
class Case:
    rows: int
    k: int = 16
    dim: int = 512
    vocabulary: int = 126464
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        return f"{self.k} of {self.rows} rows, {self.dim} -> {self.vocabulary}, {str(self.dtype)[6:]}"


QUICK = [Case(32), Case(32, dtype=torch.float32)]
SMALLEST = [Case(4, dim=64, vocabulary=1000)]
FULL = [Case(1), Case(8), Case(128), Case(32, k=64), Case(32, dim=4096)]


def test_candidates(benchmark, harness, case):
    hidden = torch.randn(case.rows, case.dim).to(case.dtype)
    weight = (torch.randn(case.vocabulary, case.dim) * 3 / case.dim**0.5).to(case.dtype)

    def ours():
        return ops.lm_head_candidates(hidden, weight, case.k)

    def with_logits():
        return ops.top_candidates(F.linear(hidden, weight), case.k)

    def in_torch():
        logits = F.linear(hidden, weight)
        values, ids = logits.topk(case.k)
        return ids, values, logits.float().logsumexp(-1)

    assert (ours().ids[:, 0] == with_logits().ids[:, 0]).float().mean() > 0.9  # near ties of bf16 logits
    timing = product_timing(case.dtype, 2.0 * weight.numel() * case.rows, weight.nbytes, weight)
    baselines = {"linear + top_candidates": with_logits, "linear + topk + logsumexp": in_torch}
    harness.compare(benchmark, f"lm_head_candidates: {case}", ours, baselines, **timing)
