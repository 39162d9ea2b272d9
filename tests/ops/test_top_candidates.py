# SPDX-License-Identifier: Apache-2.0
"""top_candidates against its reference, and its promises: ties, absent candidates, the same bits in any batch."""

import math

import pytest
import torch

import numerics
from dlmkernels import _C, ops, reference
from dlmkernels.ops import TopCandidates

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KS = [1, 2, 7, 64]
INF = math.inf
op = torch.ops.dlmkernels.top_candidates.default


@pytest.fixture(params=[isa for isa in _C.cpu_isas() if isa in ("generic", "avx2", "avx512")])
def isa(request):
    """Runs a test with the kernels of each instruction set that this machine has, and for which the op has its own."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def logits_of(rows, vocabulary, dtype=torch.float32, scale=3.0, seed=0):
    torch.manual_seed(seed + vocabulary)
    return (torch.randn(rows, vocabulary) * scale).to(dtype)


def check(logits, k, **arguments):
    """Ids and values are the reference's; logsumexp is as near to float64 as the reference is."""
    out = ops.top_candidates(logits, k, **arguments)
    gold, peer = (
        TopCandidates(*reference.top_candidates(z, k, **arguments)) for z in (logits.double(), logits.float())
    )
    assert torch.equal(out.ids, peer.ids)
    assert torch.equal(out.values, peer.values)
    numerics.assert_close("logsumexp", out.logsumexp, gold.logsumexp, peer.logsumexp)
    return out


@pytest.mark.usefixtures("isa")
class TestAgainstReference:
    @pytest.mark.parametrize("k", KS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("V", [1, 2, 17, 255, 256, 257, 511, 4096, 5000, 16385, 40000])
    def test_vocabularies(self, V, dtype, k):
        check(logits_of(3, V, dtype), k)

    @pytest.mark.parametrize("rows", [1, 2, 7, 65])
    def test_rows(self, rows):
        check(logits_of(rows, 1000), 5)

    @pytest.mark.parametrize("k", KS)
    @pytest.mark.parametrize("ascending", [False, True])
    def test_sorted_rows(self, ascending, k):
        """All candidates in one chunk, and each better than all before it."""
        check(torch.linspace(-3, 3, 20000).sort(descending=not ascending).values.repeat(2, 1), k)

    @pytest.mark.parametrize("k", KS)
    def test_candidates_far_apart(self, k):
        """One in each chunk, and a chunk that has as many by itself."""
        logits = logits_of(2, 256 * 70)
        logits[0, ::256] += 100
        logits[1, 256 * 33 : 256 * 33 + 64] += 100
        check(logits, k)

    @pytest.mark.parametrize("k", KS)
    def test_bans_and_bitmask(self, k):
        logits, words = logits_of(6, 700), (700 + 31) // 32
        banned = torch.cat([logits.topk(3).indices, torch.full((6, 1), -1)], 1)
        torch.manual_seed(5)
        bitmask = torch.randint(-(2**31), 2**31, (3, words)).int()
        check(logits, k, banned=banned)
        check(logits, k, banned=banned[0])
        check(logits, k, bitmask=bitmask)
        out = check(logits, k, banned=banned[:3], bitmask=bitmask[0], row_map=i32(0, 5, -1, 2, 2, 4))
        assert out.ids[2].eq(-1).all()

    def test_row_map(self):
        out = check(logits_of(4, 100), 9, row_map=i32(3, -1, 0, 0, 2))
        assert torch.equal(out.ids[2], out.ids[3])
        assert out.ids[1].eq(-1).all() and out.values[1].eq(-INF).all() and out.logsumexp[1] == -INF

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_stride(self, dtype):
        logits = logits_of(4, 1000, dtype)
        wide = numerics.poison_(torch.empty(4, 1017, dtype=dtype))
        wide[:, 5:1005] = logits
        expected = ops.top_candidates(logits, 8)
        assert all(map(torch.equal, ops.top_candidates(wide[:, 5:1005], 8), expected))
        spread = ops.top_candidates(logits[:1].expand(3, 1000), 8)
        assert torch.equal(spread.ids, expected.ids[:1].expand(3, 8))

    def test_no_rows_under_a_bitmask(self):
        check(logits_of(3, 40), 5, row_map=i32(), bitmask=torch.full((2,), -1, dtype=torch.int32))

    def test_nothing_to_do(self):
        out = ops.top_candidates(torch.empty(0, 9), 4)
        assert [tuple(t.shape) for t in out] == [(0, 4), (0, 4), (0,)]


@pytest.mark.usefixtures("isa")
class TestMeaning:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", KS)
    def test_ties_go_to_the_lowest_ids(self, k, dtype):
        out = check(torch.zeros(2, 20000, dtype=dtype), k)
        assert torch.equal(out.ids, torch.arange(k).expand(2, k))
        torch.manual_seed(k)
        check(torch.randint(0, 3, (4, 20000)).to(dtype), k)
        check(torch.randint(0, 400, (4, 20000)).to(dtype), k)

    def test_zeros_of_both_signs_are_equal(self):
        out = check(torch.tensor([[-0.0, 0.0, -0.0, -1.0]]), 3)
        assert out.ids.tolist() == [[0, 1, 2]]
        assert not out.values.signbit().any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_values(self, dtype):
        logits = logits_of(5, 600, dtype)
        logits[0, 7] = math.nan
        logits[1, 2:] = -INF
        logits[2, 9] = logits[2, 300] = INF
        logits[3] = -INF
        logits[4] = math.nan
        out = check(logits, 5)
        assert out.ids[1].ge(0).sum() == 2
        assert out.ids[2, :2].tolist() == [9, 300]
        assert out.ids[3:].eq(-1).all()

    def test_logsumexp_is_that_of_token_confidence(self):
        """To the bit: what accepts drafts may take it from either."""
        for V in (300, 5000, 40000):
            logits = logits_of(5, V, torch.bfloat16)
            assert torch.equal(ops.top_candidates(logits, 3).logsumexp, ops.token_confidence(logits).logsumexp)

    def test_the_first_is_the_argmax(self):
        logits = logits_of(8, 5000, torch.bfloat16)
        assert torch.equal(ops.top_candidates(logits, 2).ids[:, 0], ops.token_confidence(logits).argmax)


@pytest.mark.usefixtures("isa")
class TestIndependence:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_batch_gives_the_same_rows(self, dtype):
        logits = logits_of(12, 5000, dtype)
        whole = ops.top_candidates(logits, 20)
        for index in ([3], [11, 0, 7]):
            for got in (ops.top_candidates(logits[index], 20), ops.top_candidates(logits, 20, row_map=i32(*index))):
                assert all(torch.equal(a, b[index]) for a, b in zip(got, whole))

    def test_any_number_of_threads(self):
        logits = logits_of(3, 100_000)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(ops.top_candidates(logits, 16))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *results))


@pytest.mark.on_cpu
class TestErrors:
    def good(self):
        return {"logits": logits_of(4, 40), "k": 3, "row_map": i32(0, 1, 2, 3), "banned": torch.tensor([3, -1]),
                "bitmask": i32(-1, 9)}  # fmt: skip

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="top_candidates: " + message):
            ops.top_candidates(**self.good() | changed)

    def test_the_good_call_is_good(self):
        ops.top_candidates(**self.good())

    @pytest.mark.parametrize("name", ["logits", "row_map", "banned", "bitmask"])
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})

    @pytest.mark.parametrize("name", ["row_map", "banned", "bitmask"])
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of logits", **{name: self.good()[name].to("meta")})

    def test_shape_and_stride(self):
        good = self.good()
        self.refuses("logits must have shape", logits=good["logits"][0])
        self.refuses("row_map must have shape", row_map=good["row_map"][None])
        self.refuses(r"bitmask must have shape \[2\]; got \[1\]", bitmask=good["bitmask"][:1])
        self.refuses("banned must hold one value, or one for each group", banned=good["banned"].repeat(3, 1))
        self.refuses("logits must have at least one column", logits=good["logits"][:, :0])
        self.refuses("logits must have stride 1 in its last", logits=good["logits"].t().contiguous().t())

    @pytest.mark.parametrize("k", [0, -1, 65])
    def test_k(self, k):
        self.refuses(rf"k must be in \[1, 64\]; got {k}", k=k)

    def test_values(self):
        self.refuses(r"row_map must be -1 or in \[0, 4\); got 4 at 2", row_map=i32(0, 1, 4, 3))
        self.refuses(r"banned must be -1 or in \[0, 40\); got 40 at 1", banned=torch.tensor([1, 40]))


class TestRegistration:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fake(self, dtype):
        logits = logits_of(3, 31, dtype)
        fake = ops.top_candidates(logits.to("meta"), 5, row_map=i32(1, 0).to("meta"))
        real = ops.top_candidates(logits, 5, row_map=i32(1, 0))
        for a, b in zip(fake, real, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())

    @pytest.mark.parametrize("with_options", [False, True])
    def test_opcheck(self, with_options):
        options = dict(row_map=i32(1, -1, 0), banned=torch.tensor([4]), bitmask=i32(-3))
        torch.library.opcheck(op, (logits_of(3, 31), 4), options if with_options else {})

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(logits):
            best = ops.top_candidates(logits, 4)
            return best.ids, best.values - best.logsumexp[:, None]

        logits = logits_of(3, 310)
        assert all(map(torch.equal, torch.compile(step, fullgraph=True, backend=backend)(logits), step(logits)))
