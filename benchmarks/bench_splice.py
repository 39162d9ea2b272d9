# SPDX-License-Identifier: Apache-2.0
"""Benchmark splice_ against the list and cat operations of published programs."""

from dataclasses import dataclass

import torch

from dlmkernels import ops

MASK, PAD = 126336, 126081


@dataclass(frozen=True)
class Case:
    batch: int
    canvas: int
    window: int = 32

    def __str__(self):
        return f"batch {self.batch}, canvas {self.canvas}, window {self.window}"


QUICK = [Case(1, 256), Case(32, 1024)]
FULL = [Case(256, 1024), Case(32, 4096)]


def test_expand_and_delete(benchmark, harness, case):
    b, t, w = case.batch, case.canvas, case.window
    tokens, begin = torch.randint(MASK, (b, t)), t // 2
    expand = torch.rand(b, w) < 0.1
    deleted = (torch.rand(b, w) < 0.1) & ~expand
    length = torch.full((b,), t - w, dtype=torch.int32)
    start = torch.full((b,), begin, dtype=torch.int32)
    insert = expand.int()
    before, length_before = tokens.clone(), length.clone()

    def reset():
        tokens.copy_(before)
        length.copy_(length_before)

    def ours():
        return ops.splice_(
            tokens, start, insert=insert, remove=deleted, length=length, fill_token_id=MASK, pad_token_id=PAD
        )

    def published():
        """DreamOn: one torch.cat per expanded or deleted position, from right to left, row by row."""
        for row in range(b):
            x, n = tokens[row], t - w
            for i in reversed(range(w)):
                at = begin + i
                if expand[row, i]:
                    x = torch.cat((x[:at], x.new_tensor([MASK]), x[at:-1]))
                    n += 1
                elif deleted[row, i]:
                    x = torch.cat((x[:at], x[at + 1 :], x.new_tensor([PAD])))
                    n -= 1
            tokens[row] = x
            length[row] = n

    results = []
    for run in (ours, published):
        reset()
        run()
        live = torch.arange(t) < length[:, None]
        results.append((torch.where(live, tokens, -1), length.clone()))
    assert all(map(torch.equal, *results))
    harness.compare(
        benchmark, f"splice_: {case}", ours, {"torch.cat for each edit (DreamOn)": published}, restore=reset
    )
