# SPDX-License-Identifier: Apache-2.0
"""Benchmark select_tokens against the per-request loops of published decoders."""

from dataclasses import dataclass

import torch

from dlmkernels import ops


@dataclass(frozen=True)
class Case:
    batch: int
    window: int

    def __str__(self):
        return f"batch {self.batch}, window {self.window}"

    def scores(self):
        score = torch.rand(self.batch, self.window)
        eligible = torch.rand(self.batch, self.window) < 0.7
        eligible[:, 0] = True  # the published loops need at least one
        return score, eligible


QUICK = [Case(1, 32), Case(32, 32), Case(8, 256)]
FULL = [Case(256, 32), Case(64, 1024)]


def quota_loop(score, eligible, quota):
    """LLaDA and Fast-dLLM: one torch.topk per request."""
    score = torch.where(eligible, score, -torch.inf)
    chosen = torch.zeros_like(eligible)
    for row in range(len(score)):
        _, best = torch.topk(score[row], k=int(quota[row]))
        chosen[row, best] = True
    return chosen


def threshold_loop(score, eligible, threshold):
    """Fast-dLLM: sort each request's scores, then check the positions one by one on the host."""
    count = eligible.sum(1)
    score = torch.where(eligible, score, -torch.inf)
    chosen = torch.zeros_like(eligible)
    for row in range(len(score)):
        _, best = torch.topk(score[row], k=int(count[row]))
        chosen[row, best] = True
        for i in range(1, int(count[row])):
            if score[row, best[i]] < threshold:
                chosen[row, best[i]] = False
    return chosen


def test_quota(benchmark, harness, case):
    score, eligible = case.scores()
    quota = (eligible.sum(1) // 4).clamp(min=1).int()

    def ours():
        return ops.select_tokens(score, eligible, "none", fill=quota)

    assert torch.equal(ours().selected, quota_loop(score, eligible, quota))
    harness.compare(benchmark, f"select_tokens, quota: {case}", ours,
                    {"topk in a loop over requests": lambda: quota_loop(score, eligible, quota)})  # fmt: skip


def test_threshold(benchmark, harness, case):
    score, eligible = case.scores()
    threshold, one = torch.tensor([0.9]), torch.ones(1, dtype=torch.int32)

    def ours():
        return ops.select_tokens(score, eligible, "threshold", parameter=threshold, need=one, fill=one)

    assert torch.equal(ours().selected, threshold_loop(score, eligible, 0.9))
    harness.compare(benchmark, f"select_tokens, threshold: {case}", ours,
                    {"Fast-dLLM's loop over positions": lambda: threshold_loop(score, eligible, 0.9)})  # fmt: skip
