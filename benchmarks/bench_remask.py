# SPDX-License-Identifier: Apache-2.0
"""Benchmark remask_ against torch ops that give the same results."""

from dataclasses import dataclass

import torch

from dlmkernels import ops

MASK = 126336


@dataclass(frozen=True)
class Case:
    batch: int
    canvas: int
    window: int = 32

    def __str__(self):
        return f"batch {self.batch}, canvas {self.canvas}, window {self.window}"


QUICK = [Case(1, 256), Case(32, 1024)]
FULL = [Case(256, 1024), Case(32, 4096)]


def test_commit(benchmark, harness, case):
    b, t, w = case.batch, case.canvas, case.window
    first = t - w
    tokens = torch.randint(MASK, (b, t))
    tokens[:, first:] = MASK
    state = torch.zeros(b, t, dtype=torch.uint8)
    state[:, first:] = ops.STATE_OPEN
    position = torch.arange(first, t, dtype=torch.int32).expand(b, w).contiguous()
    proposal = torch.randint(MASK, (b, w))
    commit = torch.rand(b, w) < 0.3
    confidence = torch.rand(b, w)
    step = torch.zeros(b, dtype=torch.int32)
    commit_step, commit_confidence = torch.full((b, t), -1, dtype=torch.int32), torch.zeros(b, t)
    start = [x.clone() for x in (tokens, state, step, commit_step, commit_confidence)]

    def reset():
        for x, value in zip((tokens, state, step, commit_step, commit_confidence), start):
            x.copy_(value)

    def ours():
        return ops.remask_(
            tokens, state, position, proposal, commit=commit, confidence=confidence, commit_step=commit_step,
            commit_confidence=commit_confidence, step=step,
        )  # fmt: skip

    def published():
        """LLaDA: one torch.where and one indexed write over the whole canvas; nothing is recorded."""
        proposed = torch.full_like(tokens, MASK)
        proposed[:, first:] = proposal
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        chosen[:, first:] = commit
        proposed = torch.where(tokens == MASK, proposed, tokens)
        tokens[chosen] = proposed[chosen]
        return (tokens == MASK).sum(1)

    def recording():
        """The same results as ours, computed with torch.where on the window."""
        window = (slice(None), slice(first, t))
        act = commit & (tokens[window] == MASK)
        tokens[window] = torch.where(act, proposal, tokens[window])
        commit_step[window] = torch.where(act, step[:, None], commit_step[window])
        commit_confidence[window] = torch.where(act, confidence, commit_confidence[window])
        step.add_(1)
        is_open = tokens == MASK
        return is_open[window].sum(1), is_open.sum(1), act.sum(1)

    results = []
    for run in (ours, published, recording):
        reset()
        run()
        results.append(tokens.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    harness.compare(
        benchmark, f"remask_: {case}", ours,
        {"torch.where + indexed write (LLaDA)": published, "torch.where, recording as ours": recording},
        restore=reset,
    )  # fmt: skip
