# SPDX-License-Identifier: Apache-2.0
"""lm_head_candidates against top_candidates of the head's logits, and its promises: memory, rows, bits."""

import math

import pytest
import torch

from dlmkernels import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
op = torch.ops.dlmkernels.lm_head_candidates.default


@pytest.fixture(params=[isa for isa in _C.cpu_isas() if isa in ("generic", "avx2", "avx512", "avx512bf16")])
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact_inputs(rows, vocabulary, dim, dtype):
    """Small whole numbers: every order of addition gives the same logits, with many ties."""
    torch.manual_seed(rows + vocabulary)
    return (torch.randint(-2, 3, (n, dim)).to(dtype) for n in (rows, vocabulary))


def inputs(rows, vocabulary, dim, dtype=torch.float32):
    torch.manual_seed(rows + vocabulary)
    return torch.randn(rows, dim).to(dtype), (torch.randn(vocabulary, dim) / dim**0.5).to(dtype)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("isa")
class TestAgainstTheHeadsLogits:
    """On whole numbers nothing may differ, the logsumexp included: it comes of the same sums."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("rows", "vocabulary", "k"), [
        (1, 1, 3), (3, 40, 64), (5, 256, 1), (9, 3000, 16), (2, 5000, 64), (40, 700, 7), (1, 70_000, 20),
    ])  # fmt: skip
    def test_sizes(self, rows, vocabulary, k, dtype):
        hidden, weight = exact_inputs(rows, vocabulary, 24, dtype)
        logits = (hidden.float() @ weight.float().t()).to(dtype)
        ours = ops.lm_head_candidates(hidden, weight, k)
        assert same(ours, ops.top_candidates(logits, k))
        specified = reference.lm_head_candidates(hidden, weight, k)
        assert torch.equal(ours.ids, specified[0]) and torch.equal(ours.values, specified[1])

    def test_options(self):
        hidden, weight = exact_inputs(6, 3000, 24, torch.float32)
        bitmask = torch.randint(-(2**31), 2**31, (1, 94)).int()
        logits = hidden @ weight.t()
        for options in (
            {"row_map": i32(3, -1, 0, 5)}, {"banned": torch.tensor([[1, 2, -1], [7, 2999, 4]])}, {"bitmask": bitmask},
            {"banned": torch.arange(3000)},
        ):  # fmt: skip
            assert same(ops.lm_head_candidates(hidden, weight, 9, **options),
                        ops.top_candidates(logits, 9, **options))  # fmt: skip

    def test_special_values(self):
        hidden, weight = exact_inputs(3, 900, 16, torch.float32)
        hidden[0, 3] = math.nan
        hidden[1] = 1.0
        weight[700] = math.inf
        weight[800] = math.nan
        out = ops.lm_head_candidates(hidden, weight, 5)
        assert same(out, ops.top_candidates(hidden @ weight.t(), 5))
        assert out.ids[0].eq(-1).all() and out.ids[1, 0] == 700 and not out.ids.eq(800).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_number(dtype):
    """A row's bits do not depend on the batch, on slices, or on the threads that share the vocabulary."""
    hidden, weight = inputs(300, 5000, 64, dtype)
    everyone = ops.lm_head_candidates(hidden, weight, 8)
    for index in ([0], [299], [5, 131, 7]):
        for got in (ops.lm_head_candidates(hidden[index], weight, 8),
                    ops.lm_head_candidates(hidden, weight, 8, row_map=i32(*index))):  # fmt: skip
            assert all(torch.equal(a, b[index]) for a, b in zip(got, everyone))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same(ops.lm_head_candidates(hidden, weight, 8), everyone)
    finally:
        torch.set_num_threads(before)


def test_strides():
    hidden, weight = inputs(4, 600, 40)
    wide, tall = torch.zeros(4, 50), torch.zeros(1200, 40)
    wide[:, 3:43], tall[::2] = hidden, weight
    assert same(ops.lm_head_candidates(wide[:, 3:43], tall[::2], 4), ops.lm_head_candidates(hidden, weight, 4))


def test_memory():
    """At 40,000 tokens and 512 rows logits would take 82 MB."""
    hidden, weight = inputs(512, 40_000, 8)
    with torch.profiler.profile(profile_memory=True) as seen:
        ops.lm_head_candidates(hidden, weight, 16)
    assert max(event.cpu_memory_usage for event in seen.events()) <= 8_100_000


class TestErrors:
    def good(self):
        hidden, weight = inputs(4, 40, 8)
        return {"hidden": hidden, "weight": weight, "k": 3, "row_map": i32(0, 1, 2, 3), "banned": torch.tensor([3, -1])}

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="lm_head_candidates: " + message):
            ops.lm_head_candidates(**self.good() | changed)

    def test_what_is_refused(self):
        ops.lm_head_candidates(**self.good())
        good = self.good()
        self.refuses("hidden must have dtype .*; got Double", hidden=good["hidden"].double())
        self.refuses("weight must have dtype", weight=good["weight"].half())
        self.refuses("weight must be on the device of hidden; got meta", weight=good["weight"].to("meta"))
        self.refuses("hidden must have shape", hidden=good["hidden"][0])
        self.refuses(r"weight must have shape \[\*, 8\]; got \[40, 7\]", weight=good["weight"][:, 1:])
        self.refuses("weight must have at least one row", weight=good["weight"][:0])
        self.refuses("weight must have stride 1 in its last", weight=good["weight"].t().contiguous().t())
        self.refuses(r"k must be in \[1, 64\]; got 65", k=65)
        self.refuses(r"k must be in \[1, 64\]; got 0", k=0)
        self.refuses(r"row_map must be -1 or in \[0, 4\); got 4 at 2", row_map=i32(0, 1, 4, 3))
        self.refuses(r"banned must be -1 or in \[0, 40\); got 40 at 1", banned=torch.tensor([1, 40]))
        self.refuses(r"bitmask must have shape \[2\]; got \[1\]", bitmask=i32(1))


class TestRegistration:
    def test_fake(self):
        hidden, weight = inputs(3, 31, 8)
        fake = ops.lm_head_candidates(hidden.to("meta"), weight.to("meta"), 5, row_map=i32(1, 0).to("meta"))
        real = ops.lm_head_candidates(hidden, weight, 5, row_map=i32(1, 0))
        for a, b in zip(fake, real, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())

    @pytest.mark.parametrize("with_options", [False, True])
    def test_opcheck(self, with_options):
        options = dict(row_map=i32(1, -1, 0), banned=torch.tensor([4]), bitmask=i32(-3))
        torch.library.opcheck(op, (*inputs(3, 31, 8), 4), options if with_options else {})

    def test_compile(self):
        def step(hidden, weight):
            best = ops.lm_head_candidates(hidden, weight, 4)
            return best.ids, best.values - best.logsumexp[:, None]

        hidden, weight = inputs(3, 310, 8)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert same(compiled(hidden, weight), step(hidden, weight))


def test_no_rows():
    out = ops.lm_head_candidates(torch.zeros(0, 8), torch.zeros(30, 8), 3)
    assert out.ids.shape == (0, 3) and out.logsumexp.shape == (0,)
