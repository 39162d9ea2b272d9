# SPDX-License-Identifier: Apache-2.0
"""soft_embedding against its reference and the published formulas; special values, batch invariance, errors."""

import math

import pytest
import torch

import numerics
from dlmkernels import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
op = torch.ops.dlmkernels.soft_embedding.default


@pytest.fixture(params=[isa for isa in _C.cpu_isas() if isa in ("generic", "avx512")])
def isa(request):
    """Runs a test with the kernels of each instruction set that this machine has, and for which the op has its own."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def inputs(rows, V, D, dtype=torch.float32, weight_dtype=None, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(1000 * seed + V + D)
    logits = (scale * torch.randn(rows, V, generator=g)).to(dtype)
    return logits, torch.randn(V, D, generator=g).to(weight_dtype or dtype)


def naive(logits, weight, row_map=None, temperature=None, top_k=None, mask_token_id=-1):
    """Softmax, filter and product wholly in the dtype of the table."""
    rows = len(logits) if row_map is None else len(row_map)
    z = logits if row_map is None else logits[row_map.long()]
    z = z.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=torch.finfo(logits.dtype).max).float()
    if temperature is not None:
        asked = reference.per_row(temperature, rows, 0.0)[:, None]
        z = z / torch.where(asked > 0, asked, 1.0)
    p = torch.softmax(z.to(weight.dtype), -1)
    if top_k is not None:
        k = reference.per_row(top_k, rows, 0).long()
        kth = z.sort(-1, descending=True).values.gather(1, k.clamp(1, z.shape[1])[:, None] - 1)
        kept = torch.where((k == 0)[:, None] | (z >= kth), p, 0)
        rest = 1 - kept.sum(1, keepdim=True)
        if mask_token_id < 0:
            return (kept @ weight) / kept.sum(1, keepdim=True)
        return kept @ weight + rest * weight[mask_token_id]
    return p @ weight


def rows_apart(t, gap):
    """The same rows with `gap` elements of NaN between them."""
    rows, columns = t.shape
    room = numerics.poison_(torch.empty(rows, columns + gap, dtype=t.dtype))
    return room[:, gap // 2 : gap // 2 + columns].copy_(t)


def check(logits, weight, **arguments):
    """Compare with the reference, on rows that are spread: those of each argument by a stride of their own."""
    out = ops.soft_embedding(rows_apart(logits, 5), rows_apart(weight, 11), **arguments)
    gold = reference.soft_embedding(logits.double(), weight.double(), **arguments)
    assert out.dtype == weight.dtype and out.is_contiguous()
    empty = (gold == 0).all(1)  # of these the naive program makes NaN
    peer = torch.where(empty[:, None], 0, naive(logits, weight, **arguments)) if len(gold) else gold
    numerics.assert_close("out", out, gold, peer)
    return out


@pytest.mark.usefixtures("isa")
class TestAgainstReference:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("V", [1, 2, 31, 257, 1000, 32000])
    def test_dense(self, dtype, V):
        check(*inputs(5, V, 40, dtype))

    @pytest.mark.parametrize("D", [1, 7, 8, 255, 256, 257, 600])
    @pytest.mark.parametrize("rows", [1, 8, 9, 17])
    def test_tiles(self, rows, D):
        check(*inputs(rows, 300, D), temperature=torch.tensor([0.7]))

    @pytest.mark.parametrize("weight_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype, weight_dtype):
        check(*inputs(9, 500, 72, dtype, weight_dtype), temperature=torch.tensor([1.3]))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [0.0, 0.1, 30.0])
    def test_flat_and_peaked(self, dtype, scale):
        check(*inputs(6, 5000, 33, dtype, scale=scale))

    @pytest.mark.parametrize("mask_token_id", [-1, 5])
    @pytest.mark.parametrize("k", [1, 2, 7, 1000])
    def test_top_k(self, k, mask_token_id):
        for V, dtype in ((31, torch.float32), (700, torch.bfloat16), (32000, torch.float32)):
            logits, weight = inputs(7, V, 48, dtype, torch.float32)
            check(logits, weight, top_k=i32(k), mask_token_id=mask_token_id, temperature=torch.tensor([0.8]))

    def test_parameters_given_once_or_grouped(self):
        logits, weight = inputs(6, 100, 20)
        temperature = torch.tensor([0.5, 0.0, 2.0])
        check(logits, weight, temperature=temperature, top_k=i32(3, 0), mask_token_id=1)
        check(logits, weight, temperature=temperature.repeat_interleave(2), top_k=i32(1, 2, 3, 4, 5, 0))

    def test_row_map(self):
        logits, weight = inputs(4, 100, 20)
        out = check(logits, weight, row_map=i32(3, -1, 0, 0, 2))
        assert (out[1] == 0).all() and torch.equal(out[2], out[3])

    def test_any_stride(self):
        logits, weight = inputs(4, 100, 20)
        wide = numerics.poison_(torch.empty(4, 115)), numerics.poison_(torch.empty(100, 31))
        wide[0][:, 7:107], wide[1][:, 3:23] = logits, weight
        expected = ops.soft_embedding(logits, weight)
        assert torch.equal(ops.soft_embedding(wide[0][:, 7:107], wide[1][:, 3:23]), expected)
        assert torch.equal(ops.soft_embedding(logits[:1].expand(3, 100), weight), expected[:1].expand(3, 20))

    @pytest.mark.parametrize(("rows", "D"), [(0, 4), (3, 0), (0, 0)])
    def test_nothing_to_do(self, rows, D):
        logits, weight = inputs(rows, 10, D)
        assert ops.soft_embedding(logits, weight).shape == (rows, D)


@pytest.mark.usefixtures("isa")
class TestMeaning:
    def test_certainty(self):
        weight = torch.randn(50, 12)
        logits = torch.full((50, 50), -1e4).fill_diagonal_(0.0)
        assert torch.equal(ops.soft_embedding(logits, weight), weight)

    def test_ties(self):
        """Whatever equals the k-th largest is kept with it."""
        logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
        weight = torch.eye(5)
        out = check(logits, weight, top_k=i32(1))
        third = torch.tensor(1 / 3)
        assert torch.equal(out[0] > 0, logits[0] == 3)
        numerics.assert_same_probabilities(out[0, 1], third)
        numerics.assert_same_probabilities(out[1], torch.full((5,), 0.2))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_special_values(self, dtype):
        logits, weight = inputs(6, 300, 24, dtype)
        logits[0, 7] = math.nan
        logits[1, :200] = -math.inf
        logits[2, 9] = math.inf
        logits[3, 3] = logits[3, 200] = math.inf
        logits[4] = -math.inf
        logits[5] = math.nan
        for arguments in ({}, {"top_k": i32(4)}, {"top_k": i32(1), "mask_token_id": 11}):
            out = check(logits, weight, **arguments)
            assert (out[4:] == 0).all()
        assert torch.equal(ops.soft_embedding(logits, weight)[2], weight[9])

    def test_largest_logits(self):
        largest = torch.finfo(torch.float32).max
        logits = torch.tensor([[-largest, largest, 0.0], [-largest, -largest, -math.inf]])
        out = ops.soft_embedding(logits, torch.eye(3), temperature=torch.tensor([1e-30]))
        assert out.tolist() == [[0, 1, 0], [0.5, 0.5, 0]]

    def test_what_is_not_kept_is_not_read(self):
        logits, weight = inputs(4, 300, 24)
        expected = ops.soft_embedding(logits, weight, top_k=i32(3))
        kept = logits.topk(3).indices.unique()
        dropped = torch.ones(300, dtype=torch.bool).index_fill(0, kept, False)
        weight[dropped] = math.nan
        assert torch.equal(ops.soft_embedding(logits, weight, top_k=i32(3)), expected)


class TestPublished:
    """Formulas as the published programs compute them, from a tensor of probabilities."""

    def test_diffusion_gemma(self):
        logits, weight = inputs(16, 2000, 64)
        numerics.assert_same_probabilities(ops.soft_embedding(logits, weight), torch.softmax(logits, -1) @ weight)

    @pytest.mark.parametrize("k", [1, 3])
    def test_dmax(self, k):
        """The k best and the mask's embedding by their probabilities, at the norm that theirs average to."""
        logits, weight = inputs(16, 500, 64)
        mask = 17
        p, ids = torch.softmax(logits, -1).topk(k)
        rest = 1 - p.sum(1, keepdim=True)
        mixed = (p[..., None] * weight[ids]).sum(1) + rest * weight[mask]
        norm = (p * weight[ids].norm(dim=-1)).sum(1, keepdim=True) + rest * weight[mask].norm()
        expected = mixed * norm / mixed.norm(dim=1, keepdim=True)

        arguments = dict(top_k=i32(k), mask_token_id=mask)
        out = ops.soft_embedding(logits, weight, **arguments)
        norms = ops.soft_embedding(logits, weight.norm(dim=1, keepdim=True), **arguments)
        numerics.assert_same_probabilities(out * norms / out.norm(dim=1, keepdim=True), expected)

    def test_iteration_smoothing(self):
        logits, weight = inputs(16, 500, 64)
        expected = weight[3] + 0.2 * torch.softmax(logits, -1) @ weight
        numerics.assert_same_probabilities(weight[3] + 0.2 * ops.soft_embedding(logits, weight), expected)


@pytest.mark.usefixtures("isa")
class TestIndependence:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("top_k", [None, 5])
    def test_any_batch_gives_the_same_rows(self, dtype, top_k):
        logits, weight = inputs(20, 700, 300, dtype)
        arguments = {} if top_k is None else {"top_k": i32(top_k), "mask_token_id": 2}
        whole = ops.soft_embedding(logits, weight, **arguments)
        for index in ([3], [19, 0, 7], list(range(9, 20))):
            assert torch.equal(ops.soft_embedding(logits[index], weight, **arguments), whole[index])
            assert torch.equal(ops.soft_embedding(logits, weight, row_map=i32(*index), **arguments), whole[index])

    def test_any_number_of_threads(self):
        logits, weight = inputs(20, 700, 600)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(ops.soft_embedding(logits, weight))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*results)


@pytest.mark.on_cpu
class TestErrors:
    def good(self):
        logits, weight = inputs(4, 31, 8)
        return {"logits": logits, "weight": weight, "row_map": i32(0, 1, 2, 3), "temperature": torch.ones(4),
                "top_k": i32(2), "mask_token_id": 3}  # fmt: skip

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="soft_embedding: " + message):
            ops.soft_embedding(**self.good() | changed)

    def test_the_good_call_is_good(self):
        ops.soft_embedding(**self.good())

    @pytest.mark.parametrize("name", ["logits", "weight", "row_map", "temperature", "top_k"])
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})

    @pytest.mark.parametrize("name", ["weight", "row_map", "temperature", "top_k"])
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of logits", **{name: self.good()[name].to("meta")})

    def test_shape_and_stride(self):
        good = self.good()
        self.refuses("logits must have shape", logits=good["logits"][0])
        self.refuses(r"weight must have shape \[31, \*\]; got \[30, 8\]", weight=good["weight"][1:])
        self.refuses("row_map must have shape", row_map=good["row_map"][None])
        self.refuses("temperature must hold one value", temperature=torch.ones(3))
        self.refuses("top_k must have at most one dimension", top_k=i32(2)[None])
        self.refuses("logits must have at least one column", logits=good["logits"][:, :0])
        for name in ("logits", "weight"):
            self.refuses(f"{name} must have stride 1 in its last", **{name: good[name].t().contiguous().t()})

    def test_values(self):
        self.refuses(r"row_map must be -1 or in \[0, 4\); got 4 at 2", row_map=i32(0, 1, 4, 3))
        self.refuses("temperature must be 0, or finite.*; got -1 at 0", temperature=torch.tensor([-1.0]))
        self.refuses(r"top_k must be 0 \(off\) or positive; got -2 at 0", top_k=i32(-2))
        for bad in (-2, 31):
            self.refuses(rf"mask_token_id must be -1 or in \[0, 31\); got {bad}", mask_token_id=bad)
        self.refuses("top_k is required by mask_token_id; got None", top_k=None)


class TestRegistration:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("weight_dtype", DTYPES)
    def test_fake(self, dtype, weight_dtype):
        """The result has the dtype of the table, also where no kernel runs."""
        logits, weight = inputs(3, 31, 8, dtype, weight_dtype)
        fake = ops.soft_embedding(logits.to("meta"), weight.to("meta"), row_map=i32(1, 0).to("meta"))
        real = ops.soft_embedding(logits, weight, row_map=i32(1, 0))
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())
        assert fake.dtype == weight_dtype

    @pytest.mark.parametrize("with_options", [False, True])
    def test_opcheck(self, with_options):
        options = dict(row_map=i32(1, -1, 0), temperature=torch.ones(1), top_k=i32(2), mask_token_id=4)
        torch.library.opcheck(op, inputs(3, 31, 8), options if with_options else {})

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(logits, weight):
            return ops.soft_embedding(logits, weight, top_k=i32(3)) + ops.soft_embedding(logits, weight)

        case = inputs(3, 31, 8)
        assert torch.equal(torch.compile(step, fullgraph=True, backend=backend)(*case), step(*case))
