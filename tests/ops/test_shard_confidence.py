# SPDX-License-Identifier: Apache-2.0
"""shard_confidence against its specification, and shards of any sizes against each other and the whole vocabulary."""

import itertools
import math

import pytest
import torch
import torch.multiprocessing

import numerics
import ranks
from dlmkernels import _C, ops, reference
from dlmkernels.ops import TokenConfidence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ("token", "argmax", "flags")
INF = math.inf
op = torch.ops.dlmkernels.shard_confidence.default
ROWS, V = 6, 2100  # 9 chunks, the last of 52 tokens


@pytest.fixture(params=[isa for isa in _C.cpu_isas() if isa in ("generic", "avx2", "avx512")])
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def logits_of(rows=ROWS, vocabulary=V, dtype=torch.float32, scale=4.0):
    torch.manual_seed(rows + vocabulary)
    return (torch.randn(rows, vocabulary) * scale).to(dtype)


def drawn(rows=ROWS, temperature=0.8):
    row = torch.arange(rows)
    return {"temperature": torch.full((rows,), temperature), "seed": row + 9, "step": i32(3), "position": 2 * row.int()}


SETTINGS = {
    "greedy": {},
    "bare": {"with_entropy": False},
    "sampled": drawn(),
    "some greedy": drawn() | {"temperature": torch.tensor([0.0, 0.7, 1.3, 0.0, 2.5, 1.0])},
    "tempered": drawn() | {"distribution": "tempered"},
    "hot": drawn(temperature=3.0) | {"distribution": "tempered", "redraw": i32(2)},
    "cold": drawn(temperature=1e-3) | {"distribution": "tempered"},
    "given": {"given": torch.tensor([0, -1, 255, 256, 1500, 2099])},
    "banned": drawn() | {"banned": torch.tensor([0, 700, -1, 2099])},
    "unused": {"row_map": i32(3, -1, 0, 5)},
}
#: settings whose tensors have a part for each shard
PARTED = {
    "bias": {"bias": torch.randn(V, generator=torch.Generator().manual_seed(1))},
    "biases": drawn() | {"bias": torch.randn(3, V, generator=torch.Generator().manual_seed(2))},
    "bitmask": drawn() | {"bitmask": torch.randint(-(2**31), 2**31, (2, -(-V // 32)), dtype=torch.int32,
                                                    generator=torch.Generator().manual_seed(3))},
    "guided": drawn() | {"uncond": logits_of(7)[:ROWS], "cfg_scale": torch.tensor([0.5, 1.5])},
}  # fmt: skip
ALL = SETTINGS | PARTED


def part_of(name, value, first, last):
    if name in ("bias", "uncond"):
        return value[..., first:last].contiguous()
    return value[..., first // 32 : -(-last // 32)].contiguous() if name == "bitmask" else value


def cuts(shards, vocabulary=V):
    """Where shards begin and end; of 8 some have one chunk, others two."""
    chunks = -(-vocabulary // 256)
    at = [chunks * i // shards * 256 for i in range(shards)] + [vocabulary]
    return list(itertools.pairwise(at))


def combined(logits, shards, options, order=None):
    where = cuts(shards, logits.shape[1])
    partials = []
    for first, last in where if order is None else [where[i] for i in order]:
        own = {name: part_of(name, value, first, last) for name, value in options.items()}
        partials.append(ops.shard_confidence(logits[:, first:last], first, **own))
    both = {name: options[name] for name in ("temperature", "distribution") if name in options}
    return ops.combine_shards(torch.stack(partials), with_entropy=options.get("with_entropy", True), **both)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.int32) if x.is_floating_point() else x,
                           y.view(torch.int32) if y.is_floating_point() else y) for x, y in zip(a, b, strict=True))  # fmt: skip


def whole(logits, options):
    """The same by token_confidence."""
    options = dict(options)
    if "uncond" in options:
        options["uncond_logits"] = options.pop("uncond")
    return ops.token_confidence(logits, **options), options


def check(logits, options, counts=(1, 2, 3, 8)):
    """Shards of all counts agree to the bit, and with the whole vocabulary."""
    first = combined(logits, counts[0], options)
    for count in counts[1:]:
        assert same_bits(combined(logits, count, options), first), count
    expected, options = whole(logits, options)
    gold_options = options | {"uncond_logits": options["uncond_logits"].double()} if "cfg_scale" in options else options
    gold = TokenConfidence(*reference.token_confidence(logits.double(), **gold_options))
    for name, ours, theirs, exact in zip(first._fields, first, expected, gold, strict=True):
        if name in IDS:
            assert torch.equal(ours, theirs), name
        else:
            numerics.assert_close(name, ours, exact, theirs)
    return first


@pytest.mark.on_cpu  # a GPU adds up a chunk's exponentials in its own way
@pytest.mark.usefixtures("isa")
class TestAgainstTheSpecification:
    """To the bit: what two ranks exchange may come from different kernels."""

    @pytest.mark.parametrize("name", ALL)
    def test_settings(self, name):
        for dtype in DTYPES if name == "sampled" else DTYPES[:1]:
            logits, options = logits_of(dtype=dtype), ALL[name]
            for first, last in ((0, V), (512, 1280), (1792, V)):
                own = {key: part_of(key, value, first, last) for key, value in options.items()}
                ours = ops.shard_confidence(logits[:, first:last], first, **own)
                assert torch.equal(ours, reference.shard_confidence(logits[:, first:last], first, **own))

    def test_special_values(self):
        logits = special()
        for first, last in ((0, V), (256, 1024)):
            ours = ops.shard_confidence(logits[:, first:last], first)
            assert torch.equal(ours, reference.shard_confidence(logits[:, first:last], first))


def special():
    """Rows of logits that are hard to add up."""
    logits = logits_of(12)
    logits[0, 7], logits[0, 600] = math.nan, INF
    logits[1] = -INF
    logits[2, 300:] = -INF
    logits[3] = math.nan
    logits[4] *= 1e30
    logits[5] = -3e38
    logits[5, 1000] = -2.9e38
    logits[6] = 3.4e38
    logits[7, 900] = 500.0  # nothing else is left
    logits[8, :] = 1e5
    logits[9] = logits[9] * 1e-3 - 40.0  # flat
    logits[10, 256:512] = 87.0
    logits[10, 1024:1300] = -60.0
    logits[11] = 0.0
    return logits


@pytest.mark.usefixtures("isa")
class TestShards:
    @pytest.mark.parametrize("name", ALL)
    def test_any_number_of_shards(self, name):
        check(logits_of(), ALL[name])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype):
        check(logits_of(dtype=dtype), drawn())

    @pytest.mark.parametrize("vocabulary", [257, 512, 40_000])
    def test_vocabularies(self, vocabulary):
        counts = (1, 2) if vocabulary < 600 else (1, 2, 3, 8)
        check(logits_of(3, vocabulary), drawn(3), counts)
        check(logits_of(3, vocabulary), {}, counts)


def test_special_values():
    for options in ({}, drawn(12), drawn(12, 30.0) | {"distribution": "tempered"}):
        logits = special()
        first = combined(logits, 1, options)
        for count in (2, 3, 8):
            assert same_bits(combined(logits, count, options), first)
        expected = ops.token_confidence(logits, **options)
        for name in IDS:
            assert torch.equal(getattr(first, name), getattr(expected, name)), name
        for name in ("confidence", "margin", "entropy", "logsumexp", "p_given"):
            torch.testing.assert_close(getattr(first, name), getattr(expected, name), rtol=1e-5, atol=1e-7)


def test_peaked_rows_keep_their_entropy():
    """To relative accuracy, however small: the argmax is left out of the sums."""
    gaps = torch.tensor([5.0, 20.0, 40.0, 60.0, 80.0])
    logits = torch.zeros(5, V)
    logits[:, 1300] = gaps
    out = combined(logits, 3, {})
    s = (V - 1) * torch.exp(-gaps.double())
    expected = torch.log1p(s) + gaps.double() * s / (1 + s)
    assert ((out.entropy / expected - 1).abs() < 1e-6).all()


def test_the_order_of_shards_does_not_matter():
    logits, options = logits_of(), drawn() | {"given": torch.arange(ROWS) * 300}
    assert same_bits(combined(logits, 8, options), combined(logits, 8, options, order=[5, 2, 7, 0, 1, 6, 4, 3]))


def test_ties_between_shards():
    """They fall to the lowest id."""
    logits = torch.zeros(2, V)
    logits[:, [300, 900, 2000]] = 5.0
    out = check(logits, {})
    assert out.argmax.tolist() == [300, 300] and out.margin.tolist() == [0.0, 0.0]


def test_threads_and_batches():
    """The bits of a row depend on nothing else: rows that threads share, and rows that they do not."""
    logits, options = logits_of(9, 70_000), drawn(9)
    everyone = ops.shard_confidence(logits, 256, **options)
    alone = [ops.shard_confidence(logits[n : n + 1], 256, **{k: v[n : n + 1] if k != "step" else v for k, v in
                                                              options.items()}) for n in range(9)]  # fmt: skip
    assert torch.equal(torch.cat(alone), everyone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(ops.shard_confidence(logits, 256, **options), everyone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_hidden_states_and_weights(dtype, guided):
    """On whole numbers, where the order of additions does not matter: the words of the logits; and cut at will."""
    torch.manual_seed(0)
    hidden, uncond = (torch.randint(-1, 2, (ROWS, 40)).to(dtype) for _ in range(2))
    weight = torch.randint(-1, 2, (V, 40)).to(dtype)
    options = drawn() | {"row_map": i32(4, -1, 0, 1, 5, 5), "given": torch.arange(ROWS) * 300}
    if guided:
        options["cfg_scale"] = torch.tensor([0.5])
    for first, last in ((0, V), (256, 1536), (1280, V)):
        of_hidden = {"uncond": uncond} if guided else {}
        of_logits = {"uncond": uncond @ weight[first:last].t()} if guided else {}
        ours = ops.shard_confidence(hidden, first, weight=weight[first:last], **options, **of_hidden)
        logits = hidden @ weight[first:last].t()
        assert torch.equal(ours, ops.shard_confidence(logits, first, **options, **of_logits))
        assert torch.equal(ours, reference.shard_confidence(hidden, first, weight=weight[first:last], **options,
                                                            **of_hidden))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_shards(dtype):
    """On any numbers: a product's bits do not depend on the cut, and ids are those of lm_head_confidence."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(ROWS, 96).to(dtype), (torch.randn(V, 96) * 0.4).to(dtype)
    options = drawn()
    outs = []
    for count in (1, 2, 3, 8):
        partials = [
            ops.shard_confidence(hidden, first, weight=weight[first:last], **options) for first, last in cuts(count)
        ]
        outs.append(ops.combine_shards(torch.stack(partials), temperature=options["temperature"]))
        assert same_bits(outs[-1], outs[0])
    expected = ops.lm_head_confidence(hidden, weight, **options)
    assert all(torch.equal(getattr(outs[0], name), getattr(expected, name)) for name in IDS)
    torch.testing.assert_close(outs[0].entropy, expected.entropy, rtol=1e-5, atol=1e-6)


def test_two_processes(tmp_path):
    """A tensor-parallel head over gloo: each rank ends with what one process alone finds."""
    torch.manual_seed(2)
    hidden, weight, options = torch.randn(ROWS, 64), torch.randn(V, 64) * 0.5, drawn()
    torch.save({"hidden": hidden, "weight": weight, "options": options}, tmp_path / "input.pt")
    other = torch.multiprocessing.get_context("spawn").Process(target=ranks.work, args=(1, 2, str(tmp_path)))
    other.start()
    ranks.work(0, 2, str(tmp_path))
    other.join(60)
    assert other.exitcode == 0
    alone = ops.combine_shards(
        ops.shard_confidence(hidden, 0, weight=weight, **options)[None], temperature=options["temperature"]
    )
    for rank in range(2):
        assert same_bits(torch.load(tmp_path / f"{rank}.pt"), alone)


class TestErrors:
    def good(self):
        return {"logits": logits_of(4, 300), "first": 256, "row_map": i32(0, 1, 2, 3), "banned": torch.tensor([3, -1])}

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="shard_confidence: " + message):
            ops.shard_confidence(**self.good() | changed)

    def test_the_good_call_is_good(self):
        ops.shard_confidence(**self.good())

    @pytest.mark.parametrize("first", [-256, 1, 255, 2**31])
    def test_first(self, first):
        self.refuses(f"first must be a multiple of 256 from 0 to 2147483648 less the shard's tokens; got {first}",
                     first=first)  # fmt: skip

    def test_shapes_and_values(self):
        weight = torch.randn(20, 300)
        self.refuses(r"weight must have shape \[\*, 300\]; got \[20, 299\]", weight=weight[:, 1:])
        self.refuses("weight must have dtype", weight=weight.half())
        self.refuses("weight must have at least one row", weight=weight[:0])
        self.refuses("logits must have at least one column", logits=torch.zeros(4, 0))
        self.refuses(r"uncond must have shape \[4, 300\]", uncond=torch.zeros(4, 299), cfg_scale=torch.ones(1))
        self.refuses("cfg_scale is required by uncond", uncond=torch.zeros(4, 300))
        self.refuses("uncond is required by cfg_scale", cfg_scale=torch.ones(1))
        self.refuses(r"bias must have shape \[300\]", bias=torch.zeros(299))
        self.refuses(r"bitmask must have shape \[10\]", bitmask=i32(1))
        self.refuses(r"row_map must be -1 or in \[0, 4\); got 4 at 2", row_map=i32(0, 1, 4, 3))
        self.refuses("banned must be -1 or in", banned=torch.tensor([-2]))
        self.refuses("seed is required by temperature", temperature=torch.ones(1))
        self.refuses("distribution must be raw, tempered or filtered; got warm", distribution="warm")

    def test_combining(self):
        partial = ops.shard_confidence(**self.good())
        with pytest.raises(ValueError, match=r"partials must have shape \[S, N, 23\] with S at least 1; got \[4, 23\]"):
            ops.combine_shards(partial)
        with pytest.raises(ValueError, match=r"got \[0, 4, 23\]"):
            ops.combine_shards(partial[None][:0])
        with pytest.raises(TypeError, match=r"must be an int64 tensor; got torch\.float32"):
            ops.combine_shards(partial[None].float())
        with pytest.raises(ValueError, match="distribution must be raw, tempered or filtered; got 'warm'"):
            ops.combine_shards(partial[None], distribution="warm")
        with pytest.raises(ValueError, match="temperature must hold one value"):
            ops.combine_shards(partial[None], distribution="tempered", temperature=torch.ones(3))

    @pytest.mark.parametrize("distribution", ["raw", "tempered"])
    @pytest.mark.parametrize(("temperature", "error", "message"), [
        (float("nan"), ValueError, "temperature must be 0, or finite and at least 1.2e-38; got nan"),
        (-1, ValueError, "temperature must be 0, or finite and at least 1.2e-38; got -1"),
        ("x", TypeError, "temperature must be a number or a tensor; got 'x'"),
        (torch.tensor([1.0, torch.nan, 1.0, 1.0]), ValueError, "temperature must be 0, or finite .* got nan"),
        (torch.tensor([-0.5]), ValueError, "temperature must be 0, or finite .* got -0.5"),
        (torch.ones(1, dtype=torch.float64), ValueError, "temperature must be float32 on cpu; got torch.float64 on cpu"),
        (torch.ones(1, device="meta"), ValueError, "temperature must be float32 on cpu; got torch.float32 on meta"),
        (torch.ones(3), ValueError, r"temperature must hold .* whose number divides the 4 rows; got shape \[3\]"),
    ], ids=str)  # fmt: skip
    def test_temperatures_to_combine_with(self, distribution, temperature, error, message):
        partial = ops.shard_confidence(**self.good())
        with pytest.raises(error, match=message):
            ops.combine_shards(partial[None], distribution=distribution, temperature=temperature)

    def test_flags_to_combine_with(self):
        for value in (torch.ones(2), 1, None):
            with pytest.raises(TypeError, match="combine_shards: with_margin must be True or False; got"):
                ops.combine_shards(ops.shard_confidence(**self.good())[None], with_margin=value)


class TestRegistration:
    def test_fake(self):
        logits = logits_of(3, 300)
        fake = ops.shard_confidence(logits.to("meta"), 256, row_map=i32(1, 0).to("meta"))
        real = ops.shard_confidence(logits, 256, row_map=i32(1, 0))
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())

    @pytest.mark.parametrize("with_options", [False, True])
    def test_opcheck(self, with_options):
        options = dict(row_map=i32(1, -1, 0), banned=torch.tensor([4]), weight=torch.randn(40, 31))
        torch.library.opcheck(op, (logits_of(3, 31), 256), options if with_options else {})

    def test_compile(self):
        def step(logits):
            partials = [ops.shard_confidence(logits[:, :256], 0), ops.shard_confidence(logits[:, 256:], 256)]
            return ops.combine_shards(torch.stack(partials))

        logits = logits_of(3, 310)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(logits), step(logits))


def test_no_rows():
    assert ops.shard_confidence(torch.zeros(0, 300), 0).shape == (0, 23)
    assert ops.combine_shards(torch.zeros(2, 0, 23, dtype=torch.int64)).token.shape == (0,)
