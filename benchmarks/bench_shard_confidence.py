# SPDX-License-Identifier: Apache-2.0
"""Benchmark a rank's work on its shard of the logits against token_confidence on the same logits."""

from dataclasses import dataclass

import torch

from dlmkernels import ops
from harness import exp_limits, read_limit


@dataclass(frozen=True)
class Case:
    rows: int
    ranks: int = 4
    vocabulary: int = 126464
    dtype: torch.dtype = torch.bfloat16

    def __str__(self):
        return f"{self.rows} rows, one of {self.ranks} shares of {self.vocabulary} {str(self.dtype)[6:]}"


QUICK = [Case(32)]
SMALLEST = [Case(4, 2, 1024)]
FULL = [Case(1), Case(128), Case(32, ranks=8), Case(32, ranks=1)]


def test_share(benchmark, harness, case):
    share = -(-case.vocabulary // case.ranks) // 256 * 256
    logits = (4 * torch.randn(case.rows, share)).to(case.dtype)
    drawn = dict(temperature=torch.ones(1), seed=torch.arange(case.rows),
                 position=torch.arange(case.rows, dtype=torch.int32))  # fmt: skip

    def ours():
        return ops.combine_shards(ops.shard_confidence(logits, 0, **drawn)[None].expand(case.ranks, -1, -1))

    def alone():
        return ops.token_confidence(logits, **drawn)

    assert torch.equal(ops.combine_shards(ops.shard_confidence(logits, 0, **drawn)[None]).token, alone().token)
    harness.compare(
        benchmark, f"shard_confidence: {case}", ours, {"token_confidence of the share": alone},
        limit=[read_limit(logits), *exp_limits(logits)], work=logits.nbytes,
    )  # fmt: skip
