# SPDX-License-Identifier: Apache-2.0
"""Benchmark verify_drafts against rejection sampling on full probability tensors."""

from dataclasses import dataclass

import torch

from dlmkernels import ops


@dataclass(frozen=True)
class Case:
    batch: int
    drafts: int = 3
    vocabulary: int = 151936

    def __str__(self):
        return f"batch {self.batch}, {self.drafts} drafts, vocabulary {self.vocabulary}"


QUICK = [Case(1), Case(8)]
SMALLEST = [Case(1, vocabulary=1000)]
FULL = [Case(64)]


def test_rejection(benchmark, harness, case):
    b, w, v = case.batch, case.drafts, case.vocabulary
    target = 3 * torch.randn(b, w + 1, v)
    drafter = target[:, :w] + 0.5 * torch.randn(b, w, v)
    drafts = torch.softmax(drafter, -1).flatten(0, 1).multinomial(1).view(b, w)
    token = target.argmax(-1)
    key = dict(
        temperature=torch.ones(1), seed=torch.arange(b), step=torch.ones(1, dtype=torch.int32),
        position=torch.arange(b, dtype=torch.int32),
    )  # fmt: skip
    totals = dict(logsumexp=target.logsumexp(-1), draft_logsumexp=drafter.logsumexp(-1))
    rows = dict(logits=target.flatten(0, 1), draft_logits=drafter.flatten(0, 1))

    def ours():
        return ops.verify_drafts(drafts, token, **rows, **totals, **key)

    def whole_tensors():
        """I-DLM: softmax of both models, one coin per draft, and one sample per row from the residual distribution."""
        p, q = torch.softmax(target, -1), torch.softmax(drafter, -1)
        ratio = p[:, :w].gather(2, drafts[..., None]) / q.gather(2, drafts[..., None])
        accepted = (torch.rand(b, w, device=target.device) < ratio[..., 0]).int().cumprod(1).sum(1)
        at = accepted.clamp(max=w - 1)[:, None, None].expand(b, 1, v)
        rest = (p.gather(1, at) - q.gather(1, at)).clamp(min=0)[:, 0] + 1e-20
        return accepted, rest.multinomial(1)

    assert ours().accepted.shape == whole_tensors()[0].shape
    harness.compare(
        benchmark, f"verify_drafts: {case}", ours, {"softmax of both, coins, multinomial": whole_tensors}
    )  # fmt: skip
