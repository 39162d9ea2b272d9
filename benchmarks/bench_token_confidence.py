# SPDX-License-Identifier: Apache-2.0
"""Benchmark token_confidence against what published decoders compute from the logits of masked positions."""

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dlmkernels import ops
from harness import Limit, exp_limits, read_limit, touch
from shapes import DEMO, DREAM, LLADA, Shape


@dataclass(frozen=True)
class Case:
    shape: Shape
    rows: int
    dtype: torch.dtype

    def __str__(self):
        return f"{self.shape}, {self.rows} x {self.shape.vocab} {str(self.dtype).removeprefix('torch.')}"

    def logits(self):
        return (4 * torch.randn(self.rows, self.shape.vocab)).to(self.dtype)


QUICK = [Case(LLADA, 32, torch.bfloat16), Case(DEMO, 2624, torch.float32)]
SMALLEST = [Case(DEMO, 64, torch.float32)]
FULL = [
    Case(LLADA, 1, torch.bfloat16),
    Case(LLADA, 32, torch.float32),
    Case(LLADA, 64, torch.bfloat16),
    Case(LLADA, 256, torch.bfloat16),
    Case(DREAM, 32, torch.bfloat16),
]


def fp32_softmax_max(z):
    """The cheapest version in plain torch."""
    return F.softmax(z, -1, dtype=torch.float32).max(-1)


@functools.cache
def compiled():
    """Token and confidence with torch.compile, in a form that needs no other [R, V] tensor."""

    def token_and_confidence(z):
        z = z.float()
        top = z.max(-1)
        return (top.values - z.logsumexp(-1)).exp(), top.indices

    return torch.compile(token_and_confidence, dynamic=False)


def float64_softmax(z):
    """Fast-dLLM: argmax of the logits, and its probability from a float64 softmax."""
    token = z.argmax(-1)
    return F.softmax(z.to(torch.float64), -1).gather(-1, token[:, None])[:, 0], token


def margin_by_sort(z):
    """Dream, `topk_margin`: sort all probabilities, subtract the second from the first."""
    p = F.softmax(z, -1)
    token = p.argmax(-1)
    ordered, _ = p.sort(-1, descending=True)
    return ordered[:, 0] - ordered[:, 1], token


def margin_by_top2(z):
    """The margin with torch.topk instead of a full sort."""
    top, token = F.softmax(z, -1).topk(2, -1)
    return top[:, 0] - top[:, 1], token[:, 0]


def entropy_in_three_ops(z):
    """Dream, `entropy`: log, product and sum over the probabilities."""
    p = F.softmax(z, -1)
    token = p.argmax(-1)
    return -(p * torch.log(p + 1e-10)).sum(-1), token


def gumbel_float64(z, temperature=0.7):
    """LLaDA: Gumbel-max sampling in float64, confidence from another softmax."""
    z64 = z.to(torch.float64)
    noise = (-torch.log(torch.rand_like(z64))) ** temperature
    token = (z64.exp() / noise).argmax(-1)
    return F.softmax(z, -1).gather(-1, token[:, None])[:, 0], token


def multinomial(z, temperature=0.7):
    """SDAR: softmax, torch.multinomial, gather."""
    p = F.softmax(z / temperature, -1)
    token = torch.multinomial(p, 1)
    return p.gather(-1, token)[:, 0], token[:, 0]


def filtered_multinomial(z, top_k=0, top_p=1.0):
    z = z.float()
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, z.shape[1]), -1).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, ids = z.sort(-1, descending=True)
        p = F.softmax(values, -1)
        z = z.scatter(1, ids, values.masked_fill(p.cumsum(-1) - p > top_p, -torch.inf))
    p = F.softmax(z, -1)
    token = torch.multinomial(p, 1)
    return p.gather(-1, token)[:, 0], token[:, 0]


def limits(z) -> list[Limit]:
    """Return lower bounds on the time: every logit must be read and exponentiated."""
    return [read_limit(z), *exp_limits(z)]


def test_greedy(benchmark, harness, case):
    z = case.logits()
    ours = ops.token_confidence(z, with_margin=False, with_entropy=False)
    confidence, token = float64_softmax(z)
    assert torch.equal(ours.token, token)
    torch.testing.assert_close(ours.confidence, confidence.float())
    harness.compare(
        benchmark, f"token and confidence: {case}",
        lambda: ops.token_confidence(z, with_margin=False, with_entropy=False),
        {"fp32 softmax + max": lambda: fp32_softmax_max(z),
         "torch.compile of fp32 max and logsumexp": lambda: compiled()(z),
         "float64 softmax + argmax + gather": lambda: float64_softmax(z)},
        before=touch(z), limit=limits(z), work=z.nbytes,
    )  # fmt: skip


def test_margin_and_entropy(benchmark, harness, case):
    z = case.logits()
    ours = ops.token_confidence(z)
    torch.testing.assert_close(ours.margin, margin_by_sort(z.float())[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy_in_three_ops(z.float())[0], rtol=1e-3, atol=1e-4)
    harness.compare(
        benchmark, f"token, margin and entropy: {case}", lambda: ops.token_confidence(z),
        {"softmax + full sort": lambda: margin_by_sort(z), "softmax + topk(2)": lambda: margin_by_top2(z),
         "softmax, log, product, sum": lambda: entropy_in_three_ops(z)},
        before=touch(z), limit=limits(z), work=z.nbytes,
    )  # fmt: skip


def test_sample(benchmark, harness, case):
    z = case.logits()
    temperature, seed = torch.tensor([0.7]), torch.tensor([1])
    position = torch.arange(case.rows, dtype=torch.int32)

    def ours():
        return ops.token_confidence(
            z, temperature=temperature, seed=seed, position=position, with_margin=False, with_entropy=False
        )

    # Different generators draw different tokens, so compare the probabilities of those that ours has drawn.
    token = ours().token
    torch.testing.assert_close(
        ours().confidence, F.softmax(z.double(), -1).gather(-1, token[:, None])[:, 0].float(), rtol=1e-4, atol=1e-7
    )
    harness.compare(
        benchmark, f"sample and confidence: {case}", ours,
        {"softmax + multinomial": lambda: multinomial(z), "float64 Gumbel + softmax": lambda: gumbel_float64(z)},
        before=touch(z), limit=limits(z), work=z.nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("filters", [{"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_filtered_sample(benchmark, harness, case, filters):
    z = case.logits()
    top_k = torch.tensor([filters["top_k"]], dtype=torch.int32) if "top_k" in filters else None
    top_p = torch.tensor([filters["top_p"]]) if "top_p" in filters else None
    temperature, seed = torch.tensor([1.0]), torch.tensor([1])
    position = torch.arange(case.rows, dtype=torch.int32)

    def ours():
        return ops.token_confidence(
            z, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position,
            with_margin=False, with_entropy=False,
        )  # fmt: skip

    if "top_k" in filters:
        assert (z.gather(-1, ours().token[:, None]) >= z.topk(min(50, z.shape[1]), -1).values[:, -1:]).all()
    harness.compare(
        benchmark, f"sample with {', '.join(filters)}: {case}", ours,
        {"filter by topk or sort, softmax, multinomial": lambda: filtered_multinomial(z, **filters)},
        before=touch(z), limit=limits(z), work=z.nbytes,
    )  # fmt: skip
