# SPDX-License-Identifier: Apache-2.0
"""Benchmark top_candidates against topk and logsumexp."""

from dataclasses import dataclass

import torch

from dlmkernels import ops
from harness import exp_limits, read_limit


@dataclass(frozen=True)
class Case:
    rows: int
    k: int = 16
    vocabulary: int = 126464
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        return f"{self.k} of {self.rows} x {self.vocabulary} {str(self.dtype)[6:]}"

    def logits(self):
        return (4 * torch.randn(self.rows, self.vocabulary)).to(self.dtype)


QUICK = [Case(32), Case(32, dtype=torch.float32)]
SMALLEST = [Case(4, vocabulary=1000)]
FULL = [Case(1), Case(256), Case(32, k=64), Case(32, k=1), Case(32, vocabulary=262144)]


def test_topk_and_logsumexp(benchmark, harness, case):
    logits = case.logits()

    def ours():
        return ops.top_candidates(logits, case.k)

    def plain():
        values, ids = logits.topk(case.k)
        return ids, values, logits.float().logsumexp(-1)

    assert torch.equal(ours().values, plain()[1].float())
    harness.compare(
        benchmark, f"top_candidates: {case}", ours, {"topk + logsumexp": plain},
        limit=[read_limit(logits), *exp_limits(logits)], work=logits.nbytes,
    )  # fmt: skip
