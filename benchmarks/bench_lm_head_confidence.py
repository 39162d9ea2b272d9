# SPDX-License-Identifier: Apache-2.0
"""Benchmark lm_head_confidence against the LM head followed by the confidence computed from its logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dlmkernels import ops
from harness import product_timing


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int = 512
    vocabulary: int = 126464
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        return f"{self.rows} rows, {self.dim} -> {self.vocabulary}, {str(self.dtype)[6:]}"

    def inputs(self):
        hidden = torch.randn(self.rows, self.dim).to(self.dtype)
        return hidden, (torch.randn(self.vocabulary, self.dim) * 3 / self.dim**0.5).to(self.dtype)


QUICK = [Case(32), Case(32, dtype=torch.float32)]
SMALLEST = [Case(4, 64, 1000)]
FULL = [Case(1), Case(8), Case(128), Case(1, 4096), Case(8, 4096), Case(32, 4096), Case(64, 4096), Case(128, 4096),
        Case(32, 2816, 262144)]  # fmt: skip


def compare(benchmark, harness, case, name, **arguments):
    hidden, weight = case.inputs()

    def ours():
        return ops.lm_head_confidence(hidden, weight, **arguments)

    def with_logits():
        return ops.token_confidence(F.linear(hidden, weight), **arguments)

    def in_torch():
        return F.softmax(F.linear(hidden, weight), -1, dtype=torch.float32).max(-1)

    assert (ours().token == with_logits().token).float().mean() > 0.9  # near ties of bf16 logits
    timing = product_timing(case.dtype, 2.0 * weight.numel() * case.rows, weight.nbytes, weight)
    baselines = {"linear + token_confidence": with_logits}
    if not arguments:
        baselines["linear + fp32 softmax + max"] = in_torch
    harness.compare(benchmark, f"lm_head_confidence{name}: {case}", ours, baselines, **timing)


def drawn(rows):
    return dict(temperature=torch.ones(1), seed=torch.arange(rows), position=torch.arange(rows, dtype=torch.int32))


def test_greedy(benchmark, harness, case):
    compare(benchmark, harness, case, "")


def test_sampled(benchmark, harness, case):
    compare(benchmark, harness, case, ", sampled", **drawn(case.rows))


def test_top_p(benchmark, harness, case):
    compare(benchmark, harness, case, ", top-p 0.9", **drawn(case.rows), top_p=torch.tensor([0.9]))
