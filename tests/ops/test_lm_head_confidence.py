# SPDX-License-Identifier: Apache-2.0
"""lm_head_confidence against token_confidence of the head's logits, and its promises: memory, rows, bits."""

import math

import pytest
import torch

import numerics
from dlmkernels import _C, ops, reference
from dlmkernels.ops import TokenConfidence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ("token", "argmax", "flags")
INF = math.inf
op = torch.ops.dlmkernels.lm_head_confidence.default


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    """Runs a test with the kernels of each instruction set that this machine has, and for which the op has its own."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def inputs(rows, vocabulary, dim, dtype=torch.float32, scale=3.0):
    """Hidden states, and weights that make logits of a standard deviation of `scale`."""
    torch.manual_seed(rows + 7 * vocabulary + dim)
    return torch.randn(rows, dim).to(dtype), (torch.randn(vocabulary, dim) * scale / dim**0.5).to(dtype)


def exact_inputs(rows, vocabulary, dim, dtype):
    """The same, of small whole numbers: every order of addition gives the same logits, which the dtype holds."""
    torch.manual_seed(rows + vocabulary)
    return (torch.randint(-1, 2, (n, dim)).to(dtype) for n in (rows, vocabulary))


def sampling(rows, temperature=0.8):
    row = torch.arange(rows)
    key = dict(seed=row + 1_000_000, step=(3 * row + 50_000).int(), position=(2 * row + 1).int())
    return {"temperature": torch.full((rows,), temperature), **key}


def logits_of(hidden, weight):
    return (hidden.float() @ weight.float().t()).to(hidden.dtype)


def settings(rows, vocabulary):
    """Every setting of the sampler by name."""
    torch.manual_seed(rows)
    drawn, filters = sampling(rows), {"top_k": i32(20), "top_p": torch.tensor([0.9])}
    bitmask = torch.randint(-(2**31), 2**31, (1, (vocabulary + 31) // 32)).int()
    return {
        "greedy": {},
        "bare": {"with_margin": False, "with_entropy": False},
        "sampled": drawn,
        "some greedy": drawn | {"temperature": torch.rand(rows).round() * 0.7},
        "tempered": drawn | {"distribution": "tempered"},
        "hot": drawn | {"temperature": torch.tensor([2.0]), "distribution": "tempered"},
        "top-k": drawn | {"top_k": i32(5), "distribution": "filtered"},
        "top-p": drawn | {"top_p": torch.tensor([0.8])},
        "both": drawn | filters | {"distribution": "filtered"},
        "top-p first": drawn | filters | {"top_p_first": True, "keep_crossing": False},
        "given": {"given": torch.randint(-1, vocabulary, (rows,))},
        "banned": drawn | {"banned": torch.tensor([0, vocabulary // 2, -1])},
        "bitmask": drawn | {"bitmask": bitmask},
        "bias": drawn | {"bias": torch.randn(vocabulary), "redraw": i32(3)},
    }


SETTINGS = list(settings(1, 2))


def check(hidden, weight, **arguments):
    """Ids and flags are those of the head's logits; statistics are as near to float64 as theirs are."""
    out = ops.lm_head_confidence(hidden, weight, **arguments)
    if "uncond_hidden" in arguments:
        arguments["uncond_logits"] = logits_of(arguments.pop("uncond_hidden"), weight)
    logits = logits_of(hidden, weight)
    expected = ops.token_confidence(logits, **arguments)
    if "uncond_logits" in arguments:
        gold_arguments = arguments | {"uncond_logits": arguments["uncond_logits"].double()}
    else:
        gold_arguments = arguments
    gold = TokenConfidence(*reference.token_confidence(logits.double(), **gold_arguments))
    for name, ours, theirs, exact in zip(out._fields, out, expected, gold, strict=True):
        if name in IDS:
            assert torch.equal(ours, theirs), name
        else:
            numerics.assert_close(name, ours, exact, theirs)
    return out


@pytest.mark.usefixtures("isa")
class TestAgainstTheHeadsLogits:
    """On whole numbers, where nothing depends on the order of additions: nothing may differ."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", SETTINGS)
    def test_settings(self, name, dtype):
        hidden, weight = exact_inputs(9, 3000, 40, dtype)
        arguments = settings(9, 3000)[name]
        out = check(hidden, weight, **arguments)
        specified = TokenConfidence(*reference.lm_head_confidence(hidden, weight, **arguments))
        assert all(torch.equal(getattr(out, field), getattr(specified, field)) for field in IDS)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 255, 256, 257, 1024, 1025, 5000])
    def test_vocabularies(self, V, dtype):
        for arguments in ({}, sampling(3), sampling(3) | {"top_k": i32(4)}):
            check(*exact_inputs(3, V, 24, dtype), **arguments)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 511, 512, 513, 1100])
    def test_dimensions(self, D, dtype):
        hidden, weight = exact_inputs(5, 300, D, dtype)
        check(hidden, weight * (torch.rand(D) < 0.2).to(dtype), **sampling(5))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 127, 128, 129, 300])
    def test_rows(self, rows, dtype):
        check(*exact_inputs(rows, 600, 16, dtype), **sampling(rows))
        check(*exact_inputs(rows, 600, 16, dtype), **sampling(rows), top_p=torch.tensor([0.7]))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("filters", [{}, {"top_k": i32(9)}])
    def test_guidance(self, dtype, filters):
        hidden, weight = exact_inputs(7, 2000, 32, dtype)
        check(hidden, weight, uncond_hidden=hidden.flip(0), cfg_scale=torch.tensor([0.5]), **sampling(7), **filters)

    @pytest.mark.parametrize("filters", [{}, {"top_k": i32(9)}])
    def test_row_map(self, filters):
        hidden, weight = exact_inputs(5, 900, 32, torch.bfloat16)
        row_map = i32(3, -1, 0, 0, 4, 2, -1)
        drawn = sampling(7) | filters
        out = ops.lm_head_confidence(hidden, weight, row_map=row_map, **drawn)
        expected = ops.token_confidence(logits_of(hidden, weight), row_map=row_map, **drawn)
        assert torch.equal(out.token, expected.token) and torch.equal(out.flags, expected.flags)
        assert out.token[1] == out.token[6] == -1 and out.confidence[1] == -INF

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_stride(self, dtype):
        """Rows of weights that start anywhere; in bfloat16 they are copied where they are no words."""
        hidden, weight = inputs(4, 700, 50, dtype)
        expected = ops.lm_head_confidence(hidden, weight)
        for gap, at in ((7, 3), (6, 2), (14, 1)):
            wide = numerics.poison_(torch.empty(700, 50 + gap, dtype=dtype))[:, at : at + 50].copy_(weight)
            tall = numerics.poison_(torch.empty(4, 50 + gap, dtype=dtype))[:, at : at + 50].copy_(hidden)
            assert all(map(torch.equal, ops.lm_head_confidence(tall, wide), expected))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("arguments", [{}, {"top_p": torch.tensor([0.9]), "distribution": "filtered"}])
    def test_special_values(self, dtype, arguments):
        hidden, weight = inputs(6, 1500, 20, dtype)
        hidden[1, 3] = math.nan
        weight[7, 2] = weight[900, 5] = INF
        hidden[:, 2] = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
        hidden[:, 5] = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
        weight[1499, 0] = math.nan
        out = check(hidden, weight, **arguments)
        assert out.flags[1] & ops.FLAG_NOTHING_ALLOWED and out.argmax[0] == 7

    @pytest.mark.parametrize(("rows", "V"), [(0, 5), (0, 3000)])
    def test_nothing_to_do(self, rows, V):
        out = ops.lm_head_confidence(torch.zeros(rows, 8), torch.zeros(V, 8))
        assert out.token.shape == (rows,)

    def test_no_dimension(self):
        out = check(torch.zeros(2, 0), torch.zeros(300, 0))
        assert out.argmax.tolist() == [0, 0]


@pytest.mark.usefixtures("isa")
class TestRealNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["greedy", "sampled", "both"])
    def test_tokens_are_equal_but_for_near_ties(self, name, dtype):
        """A token may differ only where the logits' rounding decides: theirs are as good in the other's place."""
        rows, V = 64, 5000
        hidden, weight = inputs(rows, V, 96, dtype)
        arguments = settings(rows, V)[name]
        ours = ops.lm_head_confidence(hidden, weight, **arguments)
        logits = logits_of(hidden, weight)
        theirs = ops.token_confidence(logits, **arguments)
        at = torch.arange(rows)
        # Two neighbouring numbers of the dtype at the size of the logits.
        step = torch.finfo(dtype).eps * logits.float().abs().max() * (16 if dtype == torch.float32 else 2)
        gap = (logits[at, ours.argmax].float() - logits[at, theirs.argmax].float()).abs()
        assert (gap <= step).all()
        assert (ours.argmax != theirs.argmax).sum() <= 1 and (ours.token != theirs.token).sum() <= 2

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_logits_are_rounded_as_the_heads_are(self, dtype):
        """The probability of each of many ids is that of the rounded logits: one unit of bf16 is 0.4 %."""
        hidden, weight = inputs(1, 400, 128, dtype)
        ids = torch.arange(400)
        out = ops.lm_head_confidence(hidden, weight, row_map=torch.zeros(400, dtype=torch.int32), given=ids)
        exact = torch.softmax(logits_of(hidden, weight).double()[0], -1)
        same = (out.p_given.double() / exact - 1).abs() < 2e-5
        assert same.sum() >= 395


@pytest.mark.usefixtures("isa")
class TestIndependence:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("filters", [{}, {"top_k": i32(30), "top_p": torch.tensor([0.95])}])
    def test_any_batch_gives_the_same_rows(self, dtype, filters):
        hidden, weight = inputs(150, 1300, 300, dtype)
        drawn = sampling(150)
        whole = ops.lm_head_confidence(hidden, weight, **drawn, **filters)
        for index in ([3], [149, 0, 7], list(range(20, 60))):
            some = {name: value[index] for name, value in drawn.items()}
            got = ops.lm_head_confidence(hidden[index], weight, **some, **filters)
            assert all(torch.equal(a, b[index]) for a, b in zip(got, whole))

    @pytest.mark.parametrize("filters", [{}, {"top_k": i32(30)}])
    def test_any_number_of_threads(self, filters):
        hidden, weight = inputs(40, 9000, 64, torch.bfloat16)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(ops.lm_head_confidence(hidden, weight, **sampling(40), **filters))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *results))


@pytest.mark.on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("filters", [{}, {"top_k": i32(30)}])
def test_memory(dtype, filters):
    """What a call needs beyond its arguments, by the peak of the process: 8 MB, where the logits would be 67 or 134."""
    try:
        reset = open("/proc/self/clear_refs", "w")  # noqa: SIM115
    except OSError:
        pytest.skip("the system does not tell the peak of a process's memory")
    hidden, weight = torch.randn(128, 16).to(dtype), torch.randn(262144, 16).to(dtype)
    drawn = sampling(128) | filters

    def memory(of):
        lines = open("/proc/self/status").read().splitlines()  # noqa: SIM115
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(of))

    ops.lm_head_confidence(hidden[:2], weight, **sampling(2), **filters)
    with reset:
        reset.write("5")
    before = memory("VmRSS")
    ops.lm_head_confidence(hidden, weight, **drawn)
    assert memory("VmHWM") - before < 9_000_000  # with the threads' stacks


@pytest.mark.on_cpu
class TestErrors:
    def good(self):
        hidden, weight = inputs(4, 31, 8)
        return {"hidden": hidden, "weight": weight, "uncond_hidden": hidden.flip(0), "cfg_scale": torch.ones(1)}

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="lm_head_confidence: " + message):
            ops.lm_head_confidence(**self.good() | changed)

    def test_the_good_call_is_good(self):
        ops.lm_head_confidence(**self.good())

    @pytest.mark.parametrize("name", ["hidden", "weight", "uncond_hidden", "cfg_scale"])
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})

    def test_dtypes_that_differ(self):
        self.refuses("weight must have dtype Float; got BFloat16", weight=self.good()["weight"].bfloat16())

    @pytest.mark.parametrize("name", ["weight", "uncond_hidden", "cfg_scale"])
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of hidden", **{name: self.good()[name].to("meta")})

    def test_shape_and_stride(self):
        good = self.good()
        self.refuses(r"hidden must have shape \[\*, \*\]; got \[8\]", hidden=good["hidden"][0])
        self.refuses(r"weight must have shape \[\*, 8\]; got \[31, 7\]", weight=good["weight"][:, 1:])
        self.refuses(r"uncond_hidden must have shape \[4, 8\]; got \[3, 8\]", uncond_hidden=good["hidden"][1:])
        self.refuses("weight must have at least one row", weight=good["weight"][:0])
        for name in ("hidden", "weight", "uncond_hidden"):
            self.refuses(f"{name} must have stride 1 in its last", **{name: good[name].t().contiguous().t()})

    def test_what_goes_together(self):
        self.refuses("cfg_scale is required by uncond_hidden; got None", cfg_scale=None)
        self.refuses("uncond_hidden is required by cfg_scale; got None", uncond_hidden=None)
        self.refuses("seed is required by temperature; got None", temperature=torch.ones(1))

    def test_values(self):
        self.refuses(r"row_map must be -1 or in \[0, 4\); got 4 at 1", row_map=i32(0, 4))
        self.refuses(r"given must be -1 or in \[0, 31\); got 31 at 3", given=torch.tensor([0, 1, 2, 31]))
        self.refuses("distribution must be raw, tempered or filtered; got cold", distribution="cold")


class TestRegistration:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fake(self, dtype):
        hidden, weight = inputs(3, 31, 8, dtype)
        for options in ({}, {"with_margin": False, "with_entropy": False}):
            fake = ops.lm_head_confidence(hidden.to("meta"), weight.to("meta"), **options)
            real = ops.lm_head_confidence(hidden, weight, **options)
            for a, b in zip(fake, real, strict=True):
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())

    @pytest.mark.parametrize("with_options", [False, True])
    def test_opcheck(self, with_options):
        hidden, weight = inputs(3, 31, 8)
        options = sampling(3) | dict(uncond_hidden=hidden.flip(0), cfg_scale=torch.ones(1), banned=torch.tensor([4]))
        torch.library.opcheck(op, (hidden, weight), options if with_options else {})

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(hidden, weight):
            out = ops.lm_head_confidence(hidden, weight)
            return out.token, out.confidence * 2

        case = inputs(3, 310, 8)
        assert all(map(torch.equal, torch.compile(step, fullgraph=True, backend=backend)(*case), step(*case)))


@pytest.mark.parametrize("name", ["greedy", "sampled", "both", "given"])
def test_unused_rows_among_others(name):
    """They are left out of the product, and the others have the bits that they have without them."""
    hidden, weight = inputs(40, 3000, 40)
    options = settings(40, 3000)[name]
    everyone = ops.lm_head_confidence(hidden, weight, **options)
    nobody = ops.lm_head_confidence(hidden, weight, row_map=torch.full((40,), -1, dtype=torch.int32), **options)
    assert nobody.token.eq(-1).all() and nobody.flags.eq(0).all() and nobody.confidence.eq(-INF).all()
    row_map = torch.arange(40, dtype=torch.int32)
    for kept in (row_map % 3 == 0, row_map > 37, (row_map > 4) & (row_map < 30)):
        out = ops.lm_head_confidence(hidden, weight, row_map=torch.where(kept, row_map, -1), **options)
        for ours, used, unused in zip(out, everyone, nobody, strict=True):
            assert torch.equal(ours, torch.where(kept, used, unused))
