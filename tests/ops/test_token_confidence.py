# SPDX-License-Identifier: Apache-2.0
"""token_confidence against its reference, and its promises: ties, flags, batch invariance, exact sampling."""

import ctypes
import functools
import math

import pytest
import torch

import native
import numerics
from dlmkernels import _C, ops, reference
from dlmkernels.ops import FLAG_NAN, FLAG_NOTHING_ALLOWED, FLAG_POSITIVE_INFINITY, TokenConfidence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ("token", "argmax", "flags")
LARGEST = torch.finfo(torch.float32).max
INF = math.inf


@pytest.fixture(params=[isa for isa in _C.cpu_isas() if isa in ("generic", "avx2", "avx512")])
def isa(request):
    """Runs a test with the kernels of each instruction set that this machine has, and for which the op has its own."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def randomness(rows, seed=7):
    """A seed, a step and a position for each row, none twice, and none equal to another of its row."""
    row = torch.arange(rows)
    return dict(seed=row + seed + 1_000_000, step=(3 * row + 50_000).int(), position=(2 * row + 1).int())


def rows_apart(t, gap):
    """The same rows with `gap` elements of NaN between them."""
    rows, columns = t.shape
    room = numerics.poison_(torch.empty(rows, columns + gap, dtype=t.dtype))
    return room[:, gap // 2 : gap // 2 + columns].copy_(t)


def logits_of(rows, vocabulary, dtype=torch.float32, scale=3.0, seed=0):
    torch.manual_seed(seed + vocabulary)
    return (torch.randn(rows, vocabulary) * scale).to(dtype)


def in_precision(logits, arguments, dtype):
    arguments = dict(arguments)
    if arguments.get("uncond_logits") is not None:
        arguments["uncond_logits"] = arguments["uncond_logits"].to(dtype)
    return TokenConfidence(*reference.token_confidence(logits.to(dtype), **arguments))


def check(logits, **arguments):
    """Compare with the reference: ids and flags exactly, statistics within the tolerance policy. Return the output.

    Logits whose rows are one behind the other are spread, those of each argument by a stride of their own.
    """
    spread = dict(arguments)
    if arguments.get("uncond_logits") is not None and arguments["uncond_logits"].is_contiguous():
        spread["uncond_logits"] = rows_apart(arguments["uncond_logits"], 11)
    out = ops.token_confidence(rows_apart(logits, 5) if logits.is_contiguous() else logits, **spread)
    gold, peer = in_precision(logits, arguments, torch.float64), in_precision(logits, arguments, torch.float32)
    for name in TokenConfidence._fields:
        got, expected = getattr(out, name), getattr(gold, name)
        if name in IDS:
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), f"{name}: {got} instead of {expected}"
        else:
            assert got.dtype == torch.float32
            numerics.assert_close(name, got, expected, getattr(peer, name))
    return out


def tied_rows(value):
    """Two rows of three parts in which all logits are equal."""
    return dict(logits=torch.full((2, 33_000), value), temperature=torch.tensor([1.0]), **randomness(2))


@functools.cache
def ties_among_parts(value):
    """What the reference draws from them: once for all instruction sets and numbers of threads."""
    case = tied_rows(value)
    return reference.token_confidence(case.pop("logits").double(), **case)[0]


def assert_same(a, b, rows=slice(None)):
    """Equal to the last bit; `rows` picks from b."""
    for name, x, y in zip(TokenConfidence._fields, a, b):
        assert torch.equal(x, y[rows]), name


@pytest.mark.usefixtures("isa")
class TestAgainstReference:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocabulary", [1, 2, 31, 1000, 1024, 1025, 32000])
    def test_greedy(self, dtype, vocabulary):
        out = check(logits_of(5, vocabulary, dtype))
        assert torch.equal(out.token, out.argmax)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("vocabulary", [126464, 262144])
    def test_large_vocabulary(self, dtype, vocabulary):
        check(logits_of(2, vocabulary, dtype), top_p=torch.tensor([0.9]), distribution="filtered")

    def test_sampling_from_a_large_vocabulary(self):
        check(logits_of(1, 126464, torch.bfloat16), temperature=torch.tensor([0.9]), **randomness(1))

    def test_noise_far_out_in_the_tail_wins(self):
        logits = torch.zeros(1, 60_000)
        logits[0, 0] = 11
        tempered = dict(temperature=torch.tensor([1.0]), **randomness(6))
        assert 0 < check(logits.expand(6, -1), **tempered).token.count_nonzero() < 6

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sampling_many_rows_of_a_large_vocabulary(self, dtype):
        filters = dict(top_k=i32(0, 50), top_p=torch.tensor([1.0, 1.0, 0.9, 0.9]))
        check(logits_of(8, 262144, dtype), temperature=torch.tensor([0.9]), **filters, **randomness(8))

    @pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
    @pytest.mark.parametrize("distribution", ["raw", "tempered", "filtered"])
    def test_sampling(self, distribution, scale):
        logits, temperature = logits_of(40, 1000, scale=scale), torch.tensor([0.0, 0.3, 1.0, 1.0, 5.0])
        check(logits, temperature=temperature, distribution=distribution, **randomness(40))

    @pytest.mark.parametrize("vocabulary", [1, 2, 31, 1000, 3000])
    @pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
    def test_many_draws(self, vocabulary, seed):
        rows = 200 if vocabulary <= 31 else 20
        position = torch.arange(rows, dtype=torch.int32) * 1_000_003 - 1000
        step = i32(0, 1, 2**31 - 1, -1)
        keys = torch.arange(rows) * 2**32 + seed
        check(
            logits_of(1, vocabulary, scale=1.0).expand(rows, vocabulary),
            temperature=torch.tensor([1.0]),
            seed=keys,
            step=step,
            position=position,
        )

    @pytest.mark.parametrize("top_k", [0, 1, 5, 10**6])
    @pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("top_p_first", [False, True])
    @pytest.mark.parametrize("keep_crossing", [False, True])
    def test_filters(self, top_k, top_p, top_p_first, keep_crossing):
        for vocabulary, dtype in ((1, torch.float32), (31, torch.float32), (1000, torch.bfloat16)):
            check(
                logits_of(12, vocabulary, dtype),
                temperature=torch.tensor([0.0, 0.7, 1.0, 2.0]),
                top_k=i32(top_k),
                top_p=torch.tensor([top_p]),
                top_p_first=top_p_first,
                keep_crossing=keep_crossing,
                distribution="filtered",
                given=torch.arange(12) % vocabulary,
                **randomness(12),
            )

    def test_a_filter_over_a_whole_number_of_bins(self):
        """The values between the lowest that can be kept and the maximum fill the bins of the search to the last."""
        maxima = torch.tensor([0.5, *torch.linspace(0.25, 2, 15).tolist()])
        logits = torch.cat([maxima[:, None], torch.linspace(-3, 0, 999).expand(16, -1)], 1)
        for p in (0.9, 0.3, 0.99):
            check(logits, top_p=torch.tensor([p]), distribution="filtered", with_margin=False)

    @pytest.mark.parametrize(("distribution", "dtype"), zip(["raw", "tempered", "filtered"], DTYPES))
    def test_filters_of_a_large_vocabulary(self, distribution, dtype):
        check(
            logits_of(4, 32000, dtype),
            temperature=torch.tensor([0.8, 1.3]),
            top_k=i32(0, 50, 1000, 0),
            top_p=torch.tensor([0.9, 0.95, 0.5, 0.99]),
            distribution=distribution,
            given=torch.tensor([3, 31999, -1, 0]),
            **randomness(4),
        )

    @pytest.mark.parametrize("shape", ["flat", "heavy", "tied", "equal", "few", "one", "huge", "steps"])
    def test_where_filters_look(self, shape):
        """What is guessed from chunks and samples does not show, whatever a row looks like."""
        torch.manual_seed(len(shape))
        V = 17_000
        rows = {
            "flat": torch.randn(1, V),
            "heavy": 6 * torch.randn(1, V),
            "tied": torch.randint(0, 5, (1, V)).float(),
            "equal": torch.full((1, V), -2.5),
            "few": torch.randn(1, V).masked_fill(torch.rand(V) > 0.01, -INF),
            "one": torch.randn(1, V).index_fill(1, torch.tensor([12_345]), 40.0),
            "huge": 1e30 * torch.randn(1, V),
            "steps": torch.arange(V)[None] // 100 * 0.01,
        }[shape]
        k = i32(1, 60, 90, 1000, 9000, V - 1, V, 0, 0, 0, 0, 0, 3000, 100)
        p = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0.02, 0.5, 0.9, 0.9999, 0.7, 0.999])
        n = len(k)
        check(
            rows.expand(n, V).contiguous(), top_k=k, top_p=p, temperature=torch.tensor([0.7]).expand(n).contiguous(),
            distribution="filtered", **randomness(n),
        )  # fmt: skip

    def test_filter_values_of_every_kind(self):
        """Cut-offs at negative, zero, tiny and huge values."""
        values = torch.tensor([-3.0, -1e-40, -0.0, 0.0, 1e-40, 1e-5, 2.0, -1e30, 1e30, -INF, LARGEST, -LARGEST])
        logits = torch.stack([values, -values, values / 1e38, -values.abs(), values.abs()])
        for k in range(1, 13):
            for p in (0.4, 1.0):
                check(logits, top_k=i32(k), top_p=torch.tensor([p]), distribution="filtered")
                check(logits, top_k=i32(k), top_p=torch.tensor([p]), distribution="filtered", keep_crossing=False)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_row_strides(self, dtype):
        logits = logits_of(6, 1000, dtype)
        wide = torch.full((6, 1500), math.nan, dtype=dtype)
        wide[:, 7:1007] = logits
        assert_same(ops.token_confidence(wide[:, 7:1007]), check(logits))
        expanded = logits[2:3].expand(4, -1)
        assert_same(ops.token_confidence(expanded), check(logits), [2] * 4)
        assert_same(ops.token_confidence(logits[::2]), check(logits), [0, 2, 4])

    def test_guidance(self):
        logits, uncond = logits_of(6, 1500, torch.bfloat16), logits_of(6, 1500, torch.bfloat16, seed=1)
        scale = torch.tensor([0.0, 1.5, -0.5])
        check(logits, uncond_logits=uncond, cfg_scale=scale, row_map=i32(5, -1, 0, 0, 3, 1))
        wide = torch.full((6, 1600), math.nan, dtype=torch.bfloat16)
        wide[:, :1500] = uncond
        out = ops.token_confidence(logits, uncond_logits=wide[:, :1500], cfg_scale=scale)
        assert_same(out, check(logits, uncond_logits=uncond, cfg_scale=scale))

    @pytest.mark.parametrize("shape", [(1500,), (1, 1500), (3, 1500), (6, 1500)])
    def test_bias(self, shape):
        check(logits_of(6, 1500), bias=logits_of(1, math.prod(shape), seed=2).reshape(shape))

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (6, 4), (2, 0), (0,)])
    def test_banned(self, shape):
        logits = logits_of(6, 1500)
        best = logits.topk(10).indices.flatten()
        ids = best[torch.randperm(60)][: math.prod(shape)].reshape(shape)
        ids[..., 1:2] = -1
        out = check(logits, banned=ids)
        assert out.token.min() >= 0

    def test_banned_at_the_edges(self):
        logits = torch.zeros(5, 1100)
        ids = torch.tensor([0, 1023, 1024, 1055, 1099])
        logits[:, ids] = torch.arange(1.0, 6.0)
        for order in (ids, ids.flip(0)):
            out = check(logits, banned=torch.where(torch.tril(torch.ones(5, 5)) > 0, order, -1))
            assert out.flags.count_nonzero() == 0
        assert out.argmax.tolist() == [1055, 1024, 1023, 0, 1]

    @pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1500])
    @pytest.mark.parametrize("groups", [None, 1, 3, 6])
    def test_bitmask(self, vocabulary, groups):
        torch.manual_seed(vocabulary)
        words = (vocabulary + 31) // 32
        mask = torch.randint(-(2**31), 2**31, (groups or 1, words)).to(torch.int32)
        mask[:, words // 2] = -1
        check(logits_of(6, vocabulary), bitmask=mask[0] if groups is None else mask)

    def test_given(self):
        logits = logits_of(5, 1500)
        out = check(logits, given=torch.tensor([0, -1, 1499, 1024, 7]))
        assert out.p_given[1] == 0
        assert torch.equal(check(logits, given=out.argmax).p_given, out.confidence)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_vocabulary_up_to_a_few_vectors(self, dtype):
        """Ends of every length, behind and before memory that must not be read, at any alignment."""
        for vocabulary in range(1, 66):
            wide = torch.full((3, 100), math.nan, dtype=dtype)
            logits = wide[:, vocabulary % 7 : vocabulary % 7 + vocabulary]
            logits.copy_(logits_of(3, vocabulary, dtype))
            out = check(
                logits,
                temperature=torch.tensor([0.0, 1.0, 0.7]),
                top_k=i32(0, 0, 5),
                banned=torch.tensor([vocabulary // 2 if vocabulary > 1 else -1]),
                **randomness(3, vocabulary),
            )
            assert not out.flags.any()
            check(
                logits,
                uncond_logits=logits.flip(0),
                cfg_scale=torch.tensor([0.5]),
                bias=logits_of(1, vocabulary + 3)[0, 3:],
                bitmask=torch.full(((vocabulary + 31) // 32,), 0x7DFF_FFFF, dtype=torch.int32),
                distribution="filtered",
                top_p=torch.tensor([0.8]),
            )

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_decides_lies_at_the_ends_of_parts(self, dtype):
        """Rows are scanned in blocks of 1024 and parts of 16384 logits."""
        vocabulary = 2 * 16384 + 1030
        places = [0, 1023, 1024, 16383, 16384, 16385, 2 * 16384 - 1, 2 * 16384, vocabulary - 7, vocabulary - 1]
        logits = logits_of(len(places), vocabulary, dtype, scale=1.0)
        for row, at in enumerate(places):
            logits[row, at] = 9
            logits[row, places[row - 3]] = 8.5
        tempered = dict(temperature=torch.tensor([0.5]), **randomness(len(places)))
        out = check(logits, given=torch.tensor(places).roll(1), **tempered)
        assert out.argmax.tolist() == places
        check(logits, top_k=i32(2), distribution="filtered", **tempered)
        tied = logits.clamp(max=8.5)
        assert check(tied).argmax.tolist() == [min(at, places[row - 3]) for row, at in enumerate(places)]
        ordinary = logits_of(len(places), vocabulary, dtype, scale=1.0)
        for special, flag in ((math.nan, FLAG_NAN), (INF, FLAG_POSITIVE_INFINITY)):
            ordinary[torch.arange(len(places)), places] = special
            assert (check(ordinary).flags == flag).all()
            assert (check(ordinary, banned=torch.tensor(places)).flags == flag).all()
            assert (check(ordinary, top_k=i32(3), distribution="filtered").flags == flag).all()

    def test_row_map(self):
        logits = logits_of(4, 300)
        out = check(logits, row_map=i32(3, -1, 0, 0, -1, 2, 1), given=torch.full((7,), 5))
        for name, value in dict(token=-1, argmax=-1, confidence=-INF, margin=0, entropy=0, logsumexp=-INF).items():
            assert (getattr(out, name)[[1, 4]] == value).all(), name
        assert not out.p_given[1] and not out.flags[1]
        used = [0, 2, 3, 5, 6]
        straight = ops.token_confidence(logits, given=torch.full((4,), 5))
        assert_same([x[used] for x in out], straight, [3, 0, 0, 2, 1])

    def test_everything_at_once(self):
        rows, vocabulary = 12, 3000
        check(
            logits_of(5, vocabulary, torch.float16),
            row_map=torch.arange(rows, dtype=torch.int32) % 6 - 1,
            given=torch.arange(rows) * 100 - 1,
            uncond_logits=logits_of(5, vocabulary, torch.float16, seed=1),
            cfg_scale=torch.tensor([0.5, 1.0]),
            bias=logits_of(3, vocabulary, scale=0.1, seed=2),
            banned=torch.tensor([[0, 5], [-1, 2999], [1, -1], [-1, -1]]),
            bitmask=torch.full((2, 94), 0x7FFF7FFF, dtype=torch.int32),
            temperature=torch.tensor([0.5, 0.0, 1.0, 1.5]),
            top_k=i32(100, 0, 20),
            top_p=torch.tensor([0.9]),
            top_p_first=True,
            keep_crossing=False,
            distribution="filtered",
            seed=torch.arange(6),
            step=i32(4),
            position=torch.arange(rows, dtype=torch.int32),
        )

    def test_random_arguments(self):
        for trial in range(60):
            torch.manual_seed(trial)
            rows = int(torch.randint(1, 9, ()))
            vocabulary = int(torch.randint(1, 3000, ()))
            pick = torch.rand(12) < 0.5
            arguments = {
                "given": torch.randint(-1, vocabulary, (rows,)) if pick[0] else None,
                "bias": torch.randn(vocabulary) if pick[1] else None,
                "banned": torch.randint(-1, vocabulary, (rows, 3)) if pick[2] else None,
                "top_k": torch.randint(0, 60, (rows,), dtype=torch.int32) if pick[3] else None,
                "top_p": torch.rand(rows) if pick[4] else None,
                "top_p_first": bool(pick[5]),
                "keep_crossing": bool(pick[6]),
                "distribution": ["raw", "tempered", "filtered"][trial % 3],
            }
            if pick[7]:
                arguments |= dict(temperature=torch.rand(rows) * 2, **randomness(rows, trial))
            scale = float(10 ** (torch.rand(()) * 3 - 1))
            check(logits_of(rows, vocabulary, DTYPES[trial % 3], scale, seed=trial), **arguments)


@pytest.mark.usefixtures("isa")
class TestValues:
    def test_ties_take_the_lowest_id(self):
        for vocabulary in (2, 31, 5000):
            logits = torch.zeros(3, vocabulary)
            logits[1, [0, vocabulary // 2]] = -1
            logits[2, [vocabulary // 2, vocabulary - 1]] = 1
            out = check(logits)
            lowest = 1 if vocabulary > 2 else 0
            assert out.argmax.tolist() == [0, lowest, vocabulary // 2]
            assert not out.margin[0]

    def test_rows_full_of_ties(self):
        torch.manual_seed(0)
        logits = torch.randint(-3, 4, (12, 1200)).to(torch.bfloat16)
        tempered = dict(temperature=torch.tensor([1.0]), **randomness(12))
        check(logits, **tempered)
        for keep_crossing in (False, True):
            for k, p in ((10, 1.0), (0, 0.3), (500, 0.9)):
                filters = dict(top_k=i32(k), top_p=torch.tensor([p]), keep_crossing=keep_crossing)
                check(logits, **filters, distribution="filtered", **tempered)

    def test_ties_after_the_noise_take_the_lowest_id(self):
        """Large logits leave few bits to the noise."""
        for value in (1e5, 1e6, -1e6, 1e9):
            check(torch.full((50, 300), value), temperature=torch.tensor([1.0]), **randomness(50))

    def test_ties_after_the_noise_within_a_chunk_take_the_lowest_id(self):
        """So many that the most promising of a chunk, which is looked at first, is often not the lowest."""
        check(torch.full((3000, 64), 4e6), temperature=torch.tensor([1.0]), **randomness(3000))

    @pytest.mark.parametrize("value", [1e5, 1e7, 3e7, 1e9])
    def test_ties_after_the_noise_among_parts_take_the_lowest_id(self, value):
        expected = ties_among_parts(value)
        threads = torch.get_num_threads()
        try:
            for shared in (1, 2):
                torch.set_num_threads(shared)
                out = ops.token_confidence(**tied_rows(value))
                assert torch.equal(out.token, expected)
        finally:
            torch.set_num_threads(threads)

    def test_noise_alone_decides(self):
        """Where logits are equal, a bound on the noise that is too low by little loses the right token."""
        for temperature in (0.2, 1.0):
            logits = torch.full((1, 4000), 1.5).expand(150, -1)
            check(logits, temperature=torch.tensor([temperature]), **randomness(150))

    def test_signed_zeros_are_equal(self):
        out = check(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]), top_k=i32(1), distribution="filtered")
        assert out.argmax.tolist() == [1, 1]
        assert torch.equal(out.confidence, torch.tensor([0.5, 0.5]))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_infinities(self, dtype):
        logits = logits_of(6, 1100, dtype)
        logits[0, 1050] = math.nan
        logits[1, 3] = INF
        logits[2, :1099] = -INF
        logits[3] = -INF
        logits[4] = math.nan
        logits[5, 1] = INF
        logits[5, [2, 1099]] = math.nan
        for arguments in ({}, dict(temperature=torch.tensor([1.0]), **randomness(6), top_k=i32(3))):
            out = check(logits, given=torch.tensor([1050, 3, 1099, 0, 0, 1]), **arguments)
            expected = [FLAG_NAN, FLAG_POSITIVE_INFINITY, 0, FLAG_NOTHING_ALLOWED, FLAG_NAN + FLAG_NOTHING_ALLOWED]
            assert out.flags.tolist() == [*expected, FLAG_NAN + FLAG_POSITIVE_INFINITY]
            assert out.token[1:].tolist() == [3, 1099, -1, -1, 1]
            assert out.confidence[1:].tolist() == [1, 1, -INF, -INF, 1]
            assert out.logsumexp[3] == -INF
            assert out.p_given.tolist() == [0, 1, 1, 0, 0, 1]

    def test_flags_look_before_the_bans(self):
        logits = torch.tensor([[1.0, math.nan, INF]])
        out = check(logits, banned=torch.tensor([1, 2]))
        assert out.flags.item() == FLAG_NAN + FLAG_POSITIVE_INFINITY
        assert out.token.item() == 0

    def test_nan_from_bias_and_guidance(self):
        logits = torch.tensor([[1.0, -INF, 2.0]])
        out = check(logits, bias=torch.tensor([0.0, INF, 0.0]))
        assert (out.flags.item(), out.token.item()) == (FLAG_NAN, 2)
        out = check(logits, uncond_logits=logits, cfg_scale=torch.tensor([1.0]))
        assert (out.flags.item(), out.token.item()) == (FLAG_NAN, 2)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [INF, -INF, 1e30, -1e30, math.nan])
    def test_extreme_guidance(self, scale, dtype):
        """The row's end included: what lies behind it is no logit."""
        for vocabulary in (1, 15, 16, 17, 37, 63, 65, 1025):
            room = torch.full((3, 2, vocabulary + 9), math.nan, dtype=dtype)
            logits, uncond = room[:, 0, 2 : vocabulary + 2], room[:, 1, 5 : vocabulary + 5]
            logits.copy_(logits_of(3, vocabulary, dtype))
            uncond.copy_(torch.where(logits > 0, logits - 1, logits + 1))
            out = check(logits, uncond_logits=uncond, cfg_scale=torch.tensor([scale]))
            assert ((out.flags & FLAG_NAN) != 0).all() == math.isnan(scale)
            assert not (out.flags & FLAG_NAN).any() or math.isnan(scale)

    @pytest.mark.parametrize("special", [INF, -INF, math.nan])
    def test_special_biases_and_logits_at_the_end_of_a_row(self, special):
        for vocabulary in (1, 15, 16, 17, 37, 63, 65, 1025):
            for at in {vocabulary - 1, 0}:
                bias = torch.zeros(vocabulary + 40)[7 : vocabulary + 7]
                bias[at] = special
                check(logits_of(2, vocabulary), bias=bias)
                logits = logits_of(2, vocabulary)
                logits[1, at] = special
                check(logits, bias=torch.zeros(vocabulary))
                uncond = logits_of(2, vocabulary, seed=1)
                check(logits, uncond_logits=uncond, cfg_scale=torch.tensor([1.0, -2.0]))
                check(uncond, uncond_logits=logits, cfg_scale=torch.tensor([1.0, -2.0]))

    def test_everything_banned(self):
        logits = logits_of(2, 70)
        for arguments in (dict(banned=torch.arange(70)), dict(bitmask=torch.zeros(3, dtype=torch.int32))):
            out = check(logits, temperature=torch.tensor([1.0]), **randomness(2), **arguments)
            assert out.flags.tolist() == [FLAG_NOTHING_ALLOWED] * 2
            assert out.token.tolist() == out.argmax.tolist() == [-1, -1]

    def test_huge_logits(self):
        """Neither differences nor quotients of the largest floats make a NaN."""
        logits = torch.tensor([[-LARGEST, LARGEST, LARGEST], [INF, -LARGEST, 0.0], [-LARGEST, -INF, -INF]])
        for temperature in (1e-30, 0.5, 1.0, 1e38):
            for distribution in ("raw", "tempered", "filtered"):
                tempered = dict(temperature=torch.tensor([temperature]), **randomness(3))
                out = ops.token_confidence(logits, top_k=i32(2), distribution=distribution, **tempered)
                expected = ops.TokenConfidence(
                    *reference.token_confidence(logits, top_k=i32(2), distribution=distribution, **tempered)
                )
                assert torch.equal(out.token, expected.token)
                assert not torch.cat([out.confidence, out.margin, out.entropy, out.p_given]).isnan().any()

    @pytest.mark.parametrize(("rows", "mapped"), [(0, None), (0, 3), (3, 0)])
    def test_empty(self, rows, mapped):
        row_map = None if mapped is None else torch.full((mapped,), -1, dtype=torch.int32)
        outputs = (rows if mapped is None else mapped,)
        out = check(torch.zeros(rows, 5), row_map=row_map)
        assert all(x.shape == outputs for x in out)

    def test_unwanted_outputs(self):
        logits = logits_of(3, 2000)
        whole, part = ops.token_confidence(logits), check(logits, with_margin=False, with_entropy=False)
        assert part.margin.shape == part.entropy.shape == (0,)
        assert_same(part, whole._replace(margin=torch.empty(0), entropy=torch.empty(0)))

    def test_every_half_is_read_right(self):
        """With one column logsumexp is the logit itself."""
        for dtype in DTYPES[1:]:
            logits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1)
            finite = logits.isfinite()
            out = ops.token_confidence(logits).logsumexp.unsqueeze(1)
            assert torch.equal(out[finite], logits[finite].float())

    def test_small_probabilities_keep_their_accuracy(self):
        """Near certainty 1 - confidence is what decides: here it is entropy and logsumexp."""
        x = torch.linspace(-80, 0, 4001)
        out = ops.token_confidence(torch.stack([torch.zeros_like(x), x], 1))
        gold = torch.log1p(x.double().exp())
        peer = torch.log1p(x.exp()).double() / gold
        numerics.assert_close("logsumexp", (out.logsumexp / gold).float(), torch.ones_like(gold), peer)
        q = torch.sigmoid(x.double())
        gold = -q * x.double() + gold
        numerics.assert_close("entropy", (out.entropy / gold).float(), torch.ones_like(gold), torch.ones_like(gold))


@pytest.mark.usefixtures("isa")
class TestSampling:
    ROWS = 40_000

    def draw(self, logits, **arguments):
        """Counts of ROWS draws from one row of logits, at as many positions."""
        out = ops.token_confidence(
            logits.unsqueeze(0),
            row_map=torch.zeros(self.ROWS, dtype=torch.int32),
            **{"temperature": torch.tensor([1.0])} | randomness(self.ROWS) | arguments,
        )
        return torch.bincount(out.token, minlength=len(logits))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_plain(self, temperature):
        logits = logits_of(1, 31, scale=1.0)[0] * temperature
        counts = self.draw(logits, temperature=torch.tensor([temperature]))
        numerics.assert_distribution("token", counts, torch.softmax(logits.double() / temperature, -1))

    @pytest.mark.parametrize("across", ["seed", "step"])
    def test_seeds_and_steps_are_independent_draws(self, across):
        logits = logits_of(1, 31, scale=1.0)[0]
        keys = torch.arange(self.ROWS)
        arguments = {"position": torch.zeros(self.ROWS, dtype=torch.int32)}
        arguments[across] = keys if across == "seed" else keys.to(torch.int32)
        numerics.assert_distribution("token", self.draw(logits, **arguments), torch.softmax(logits.double(), -1))

    def test_a_wide_vocabulary(self):
        """Draws over several blocks and chunks: the id modulo 5 has the right distribution."""
        logits = logits_of(1, 3000, scale=1.0)[0]
        self.ROWS = 20_000
        counts = torch.zeros(5, dtype=torch.long)
        counts.index_add_(0, torch.arange(3000) // 600, self.draw(logits))
        probability = torch.softmax(logits.double(), -1).reshape(5, 600).sum(-1)
        numerics.assert_distribution("token", counts, probability)

    @pytest.mark.parametrize("top_p_first", [False, True])
    @pytest.mark.parametrize("keep_crossing", [False, True])
    def test_filtered(self, top_p_first, keep_crossing):
        logits = logits_of(1, 31, scale=1.5)[0]
        p = torch.softmax(logits.double(), -1)
        order = logits.argsort(descending=True)
        whole = p if top_p_first else torch.zeros_like(p).index_copy(0, order[:8], p[order[:8]])
        mass = (whole / whole.sum())[order].cumsum(0)
        below = int((mass <= 0.8).sum())
        kept = order[: min(8, max(1, below + keep_crossing))]
        expected = torch.zeros_like(p).index_copy(0, kept, p[kept])
        filters = dict(top_k=i32(8), top_p=torch.tensor([0.8]), top_p_first=top_p_first, keep_crossing=keep_crossing)
        numerics.assert_distribution("token", self.draw(logits, **filters), expected / expected.sum())

    def test_greedy_rows_among_sampled_ones(self):
        logits = logits_of(8, 1000, scale=0.5)
        temperature = torch.tensor([0.0, 1.0] * 4)
        out = check(logits, temperature=temperature, **randomness(8))
        assert torch.equal(out.token[::2], out.argmax[::2])
        assert not torch.equal(out.token[1::2], out.argmax[1::2])


@pytest.mark.usefixtures("isa")
class TestInvariance:
    B = 64

    def arguments(self):
        torch.manual_seed(0)
        B, V = self.B, 1200
        return dict(
            logits=logits_of(B, V, torch.bfloat16),
            given=torch.randint(-1, V, (B,)),
            bias=torch.randn(B, V),
            banned=torch.randint(-1, V, (B, 3)),
            temperature=torch.rand(B).mul(2).sub(0.4).clamp(min=0),
            top_k=torch.randint(0, 60, (B,), dtype=torch.int32),
            top_p=torch.rand(B).add(0.5).clamp(max=1),
            seed=torch.randint(0, 2**62, (B,)),
            step=torch.randint(0, 100, (B,), dtype=torch.int32),
            position=torch.randint(0, 4096, (B,), dtype=torch.int32),
            distribution="filtered",
        )

    def run(self, arguments, rows):
        return ops.token_confidence(**{k: v if isinstance(v, str) else v[rows] for k, v in arguments.items()})

    def test_batches(self):
        arguments = self.arguments()
        whole = check(**arguments)
        for size in range(1, self.B + 1):
            rows = torch.randperm(self.B)[:size]
            assert_same(self.run(arguments, rows), whole, rows)

    def test_alone(self):
        arguments = self.arguments()
        whole = ops.token_confidence(**arguments)
        for row in range(self.B):
            assert_same(self.run(arguments, slice(row, row + 1)), whole, slice(row, row + 1))

    def test_through_a_row_map(self):
        arguments = self.arguments()
        whole = ops.token_confidence(**arguments)
        rows = torch.randperm(self.B)
        shuffled = torch.empty_like(rows)
        shuffled[rows] = torch.arange(self.B)
        arguments["logits"] = arguments["logits"][rows]
        assert_same(ops.token_confidence(row_map=shuffled.to(torch.int32), **arguments), whole)

    def test_threads(self):
        """Few long rows are shared among threads by parts, many by rows."""
        long = logits_of(3, 70_000, torch.bfloat16)
        long[1, :20_000] = -INF
        long[2] = -INF
        tempered = dict(temperature=torch.tensor([0.7, 0.0, 1.0]), **randomness(3))
        cases = [
            self.arguments(),
            dict(logits=long),
            dict(logits=long[:1], with_margin=False, with_entropy=False),
            dict(logits=long, row_map=i32(0, -1, 1), **tempered),
            dict(logits=long, distribution="filtered", top_k=i32(9), top_p=torch.tensor([0.9]), **tempered),
            dict(logits=long, distribution="tempered", top_p=torch.tensor([0.9]), **tempered),
        ]
        threads = torch.get_num_threads()
        try:
            for arguments in cases:
                torch.set_num_threads(1)
                alone = ops.token_confidence(**arguments)
                for shared in (2, 3):
                    torch.set_num_threads(shared)
                    assert_same(ops.token_confidence(**arguments), alone)
        finally:
            torch.set_num_threads(threads)

    def test_a_row_alone_and_among_many(self):
        """One row goes by parts, many rows go whole."""
        logits, position = logits_of(1, 70_000, torch.bfloat16), i32(5)
        for arguments in ({}, dict(temperature=torch.tensor([1.0]), seed=torch.tensor([3]))):
            rows = 4 * torch.get_num_threads()
            one = ops.token_confidence(logits, position=position, **arguments)
            many = ops.token_confidence(
                logits.expand(rows, -1), position=position.expand(rows).contiguous(), **arguments
            )
            assert_same(one, many, slice(rows - 1, rows))

    def test_one_value_a_row_or_a_group_or_all(self):
        logits = logits_of(6, 500)
        shared = dict(temperature=torch.tensor([0.7]), top_k=i32(9), top_p=torch.tensor([0.9]), seed=torch.tensor([4]))
        shared |= dict(step=i32(2), position=i32(7, 1, 9, 0, 5, 3))
        each = {k: v.expand(6).contiguous() if k != "position" else v for k, v in shared.items()}
        groups = {k: v.expand(3).contiguous() if k != "position" else v for k, v in shared.items()}
        scalar = {k: v[0] if k != "position" else v for k, v in shared.items()}
        for other in (each, groups, scalar):
            assert_same(ops.token_confidence(logits, **other), check(logits, **shared))
        grouped = check(logits, **shared | dict(top_k=i32(1, 5), temperature=torch.tensor([0.0, 1.0, 2.0])))
        assert torch.equal(grouped.token[:3], grouped.argmax[:3])


ARGUMENT_SETS = {
    "plain": lambda: {},
    "unwanted": lambda: dict(with_margin=False, with_entropy=False, row_map=i32(2, -1, 0, 0, 1)),
    "sampled": lambda: dict(
        temperature=torch.tensor([1.0, 0.0, 0.5]),
        top_k=i32(20),
        top_p=torch.tensor([0.9]),
        distribution="filtered",
        bias=torch.linspace(-1, 1, 300),
        banned=torch.tensor([1, -1]),
        bitmask=torch.full((10,), -1, dtype=torch.int32),
        given=torch.tensor([4, -1, 299]),
        **randomness(3),
    ),
    "guided": lambda: dict(uncond_logits=logits_of(3, 300, seed=1), cfg_scale=torch.tensor([1.5])),
}


class TestTorchIntegration:
    @pytest.mark.parametrize("name", ARGUMENT_SETS)
    def test_opcheck(self, name):
        torch.library.opcheck(
            torch.ops.dlmkernels.token_confidence.default, (logits_of(3, 300),), ARGUMENT_SETS[name]()
        )

    @pytest.mark.parametrize(("name", "backend"), [("plain", "aot_eager"), ("sampled", "inductor")])
    def test_compile(self, name, backend):
        arguments = ARGUMENT_SETS[name]()

        def commit(logits):
            out = ops.token_confidence(logits * 2, **arguments)
            return torch.where(out.confidence > 0.5, out.token, -1), out.entropy + 1

        logits = logits_of(3, 300)
        compiled = torch.compile(commit, fullgraph=True, backend=backend)
        for got, expected in zip(compiled(logits), commit(logits)):
            assert torch.equal(got, expected)

    def test_fake_shapes_on_meta(self):
        out = ops.token_confidence(torch.empty(4, 7, device="meta", dtype=torch.float16), with_margin=False)
        assert [x.shape[0] for x in out] == [4, 4, 4, 0, 4, 4, 4, 4]
        assert [x.dtype for x in out] == [x.dtype for x in ops.token_confidence(torch.zeros(4, 7))]


@pytest.mark.skipif(len(_C.cpu_isas()) < 2, reason="one instruction set")
class TestInstructionSets:
    """Ids and flags are the same to the last one, whatever the processor."""

    @pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
    def test_ids(self, scale):
        rows = 12
        for dtype, vocabulary in ((torch.bfloat16, 20_000), (torch.float32, 3001)):
            logits = logits_of(rows, vocabulary, dtype, scale)
            for filters in (
                {},
                dict(top_p=torch.linspace(0.05, 0.999, rows)),
                dict(top_p=torch.linspace(0.999, 0.05, rows), keep_crossing=False),
                dict(top_k=torch.arange(1, rows + 1, dtype=torch.int32) ** 3, top_p=torch.tensor([0.9])),
            ):
                outputs = []
                for name in _C.cpu_isas():
                    before = _C.cpu_isa()
                    _C.set_cpu_isa(name)
                    try:
                        outputs.append(
                            ops.token_confidence(logits, temperature=torch.tensor([1.3]), **filters, **randomness(rows))
                        )
                    finally:
                        _C.set_cpu_isa(before)
                for out in outputs[1:]:
                    for name in IDS:
                        assert torch.equal(getattr(out, name), getattr(outputs[0], name)), name


def meta(t):
    return t.to("meta")


# argument at fault: arguments for logits [6, 40]
ERRORS = [
    ("logits", dict(logits=torch.zeros(6, 40, dtype=torch.float64))),
    ("logits", dict(logits=torch.zeros(6, 40, dtype=torch.int32))),
    ("logits", dict(logits=torch.zeros(40))),
    ("logits", dict(logits=torch.zeros(1, 6, 40))),
    ("logits", dict(logits=torch.zeros(40, 6).t())),
    ("logits", dict(logits=torch.zeros(6, 0))),
    ("row_map", dict(row_map=torch.zeros(6, dtype=torch.int64))),
    ("row_map", dict(row_map=torch.zeros(2, 3, dtype=torch.int32))),
    ("row_map", dict(row_map=torch.zeros(12, dtype=torch.int32)[::2])),
    ("row_map", dict(row_map=i32(0, 6))),
    ("row_map", dict(row_map=i32(0, -2))),
    ("row_map", dict(row_map=meta(i32(0)))),
    ("given", dict(given=torch.zeros(6, dtype=torch.int32))),
    ("given", dict(given=torch.zeros(5, dtype=torch.int64))),
    ("given", dict(given=torch.zeros(12, dtype=torch.int64)[::2])),
    ("given", dict(given=torch.full((6,), 40))),
    ("given", dict(given=torch.full((6,), -2))),
    ("given", dict(given=meta(torch.full((6,), -1)))),
    ("cfg_scale", dict(uncond_logits=torch.zeros(6, 40))),
    ("uncond_logits", dict(cfg_scale=torch.ones(1))),
    ("uncond_logits", dict(uncond_logits=torch.zeros(6, 40, dtype=torch.bfloat16), cfg_scale=torch.ones(1))),
    ("uncond_logits", dict(uncond_logits=torch.zeros(6, 41), cfg_scale=torch.ones(1))),
    ("uncond_logits", dict(uncond_logits=torch.zeros(40), cfg_scale=torch.ones(1))),
    ("uncond_logits", dict(uncond_logits=torch.zeros(40, 6).t(), cfg_scale=torch.ones(1))),
    ("uncond_logits", dict(uncond_logits=meta(torch.zeros(6, 40)), cfg_scale=torch.ones(1))),
    ("cfg_scale", dict(uncond_logits=torch.zeros(6, 40), cfg_scale=torch.ones(4))),
    ("cfg_scale", dict(uncond_logits=torch.zeros(6, 40), cfg_scale=torch.ones(1, dtype=torch.float64))),
    ("bias", dict(bias=torch.zeros(40, dtype=torch.bfloat16))),
    ("bias", dict(bias=torch.zeros(39))),
    ("bias", dict(bias=torch.zeros(4, 40))),
    ("bias", dict(bias=torch.zeros(1, 6, 40))),
    ("bias", dict(bias=torch.zeros(40, 6).t())),
    ("bias", dict(bias=meta(torch.zeros(40)))),
    ("banned", dict(banned=i32(1))),
    ("banned", dict(banned=torch.tensor(1))),
    ("banned", dict(banned=torch.zeros(4, 1, dtype=torch.int64))),
    ("banned", dict(banned=torch.tensor([40]))),
    ("banned", dict(banned=torch.tensor([[0, -2]]))),
    ("banned", dict(banned=torch.zeros(4, dtype=torch.int64)[::2])),
    ("banned", dict(banned=meta(torch.tensor([1])))),
    ("bitmask", dict(bitmask=torch.zeros(2, dtype=torch.int64))),
    ("bitmask", dict(bitmask=i32(1))),
    ("bitmask", dict(bitmask=torch.zeros(4, 2, dtype=torch.int32))),
    ("bitmask", dict(bitmask=torch.zeros(4, dtype=torch.int32)[::2])),
    ("bitmask", dict(bitmask=meta(i32(1, 1)))),
    ("seed", dict(temperature=torch.ones(1))),
    ("position", dict(temperature=torch.ones(1), seed=torch.tensor([1]))),
    ("position", dict(seed=torch.tensor([1]))),
    ("temperature", dict(temperature=torch.ones(1, dtype=torch.float64), **randomness(6))),
    ("temperature", dict(temperature=torch.ones(4), **randomness(6))),
    ("temperature", dict(temperature=torch.ones(2, 3), **randomness(6))),
    ("temperature", dict(temperature=torch.ones(6)[::3], **randomness(6))),
    ("temperature", dict(temperature=torch.tensor([-1.0]), **randomness(6))),
    ("temperature", dict(temperature=torch.tensor([math.nan]), **randomness(6))),
    ("temperature", dict(temperature=torch.tensor([INF]), **randomness(6))),
    ("temperature", dict(temperature=torch.tensor([1e-39]), **randomness(6))),
    ("temperature", dict(temperature=meta(torch.ones(1)), **randomness(6))),
    ("top_k", dict(top_k=torch.tensor([1]))),
    ("top_k", dict(top_k=i32(-1))),
    ("top_k", dict(top_k=i32(1, 1, 1, 1))),
    ("top_k", dict(top_k=meta(i32(1)))),
    ("top_p", dict(top_p=torch.tensor([0.5], dtype=torch.float64))),
    ("top_p", dict(top_p=torch.tensor([1.5]))),
    ("top_p", dict(top_p=torch.tensor([-0.1]))),
    ("top_p", dict(top_p=torch.tensor([math.nan]))),
    ("top_p", dict(top_p=torch.ones(4))),
    ("top_p", dict(top_p=meta(torch.ones(1)))),
    ("distribution", dict(distribution="cooked")),
    ("seed", dict(temperature=torch.ones(1), **randomness(6) | dict(seed=i32(1)))),
    ("seed", dict(temperature=torch.ones(1), **randomness(6) | dict(seed=torch.arange(5)))),
    ("seed", dict(temperature=torch.ones(1), **randomness(6) | dict(seed=meta(torch.tensor([1]))))),
    ("step", dict(temperature=torch.ones(1), **randomness(6) | dict(step=torch.tensor([1])))),
    ("step", dict(temperature=torch.ones(1), **randomness(6) | dict(step=torch.ones(4, dtype=torch.int32)))),
    ("step", dict(temperature=torch.ones(1), **randomness(6) | dict(step=meta(i32(1))))),
    ("position", dict(temperature=torch.ones(1), **randomness(6) | dict(position=torch.arange(6)))),
    ("position", dict(temperature=torch.ones(1), **randomness(6) | dict(position=i32(*range(5))))),
    ("position", dict(temperature=torch.ones(1), **randomness(6) | dict(position=meta(i32(*range(6)))))),
]


@pytest.mark.on_cpu  # a GPU would have to wait for the values
@pytest.mark.parametrize(("name", "arguments"), ERRORS)
def test_errors(name, arguments):
    with pytest.raises(RuntimeError, match=f"^token_confidence: {name} "):
        ops.token_confidence(**{"logits": torch.zeros(6, 40)} | arguments)


def test_native_philox_is_what_the_op_draws_from():
    """One row, all logits equal: the token has the largest Gumbel variate of its own counter."""
    vocabulary = 64
    seed, position, step = 12345, 6, 2
    counter = i32(*[x for index4 in range(vocabulary // 4) for x in (position, step, 0, index4)]).reshape(-1, 4)
    words = native.call("philox", counter, torch.int32, ctypes.c_uint64(seed)).flatten()
    noise = native.call("gumbel", words, torch.float32)
    out = ops.token_confidence(
        torch.zeros(1, vocabulary),
        temperature=torch.ones(1),
        seed=torch.tensor([seed]),
        position=i32(position),
        step=i32(step),
    )
    assert out.token.item() == noise.argmax().item()
