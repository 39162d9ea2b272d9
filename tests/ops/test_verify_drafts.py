# SPDX-License-Identifier: Apache-2.0
"""verify_drafts against its reference; its distributions against the exact ones; promises and errors."""

import itertools
import math

import pytest
import torch

import numerics
from dlmkernels import ops, reference
from dlmkernels.ops import VerifiedDrafts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
op = torch.ops.dlmkernels.verify_drafts.default


def generator(seed):
    return torch.Generator().manual_seed(seed)


def check(drafts, token, **arguments):
    out = ops.verify_drafts(drafts, token, **arguments)
    for name, got, want in zip(VerifiedDrafts._fields, out, reference.verify_drafts(drafts, token, **arguments)):
        assert got.dtype == want.dtype
        assert torch.equal(got, want), f"{name}: {got} instead of {want}"
    return out


def log_total(logits, temperature, banned=None):
    """A logsumexp for each row, float32, as token_confidence gives it, here by torch."""
    z = logits.double().nan_to_num(nan=-math.inf, posinf=torch.finfo(torch.float32).max, neginf=-math.inf)
    if banned is not None:
        z = z.index_fill(-1, banned[banned >= 0], -math.inf)
    return torch.logsumexp(z / temperature.double().view(-1, *[1] * (z.dim() - 1)), -1).float()


def rows_apart(t, gap):
    """The same rows with `gap` elements of NaN between them."""
    rows, columns = t.shape
    room = numerics.poison_(torch.empty(rows, columns + gap, dtype=t.dtype))
    return room[:, gap // 2 : gap // 2 + columns].copy_(t)


def ratio_case(seed, B, W, V, dtype=torch.float32, nearness=1.0, temperature=None, banned=None):
    """Target and draft logits that resemble each other, drafts of which some were drawn; arguments by name.

    Rows have seeds, steps and positions of their own, and logits and draft logits strides of their own.
    """
    g = generator(seed)
    target = 3 * torch.randn(B, W + 1, V, generator=g)
    drafter = target[:, :W] + nearness * torch.randn(B, W, V, generator=g)
    target, drafter = target.to(dtype), drafter.to(dtype)
    if temperature is None:
        temperature = torch.rand(B, generator=g) + 0.5
    weights = torch.softmax(drafter.float() / temperature.view(-1, 1, 1), -1).flatten(0, 1)
    drafts = weights.multinomial(1, generator=g).view(B, W) if B * W else torch.zeros(B, W, dtype=torch.long)
    ends = torch.randint(0, 2 * W + 1, (B, 1), generator=g)
    token = torch.where(torch.rand(B, W + 1, generator=g) < 0.2, -1, target.float().nan_to_num().argmax(-1))
    return {
        "drafts": torch.where(torch.arange(W) < ends, drafts, -1),
        "token": token,
        "logits": rows_apart(target.flatten(0, 1), 5),
        "logsumexp": log_total(target, temperature, banned),
        "draft_logits": rows_apart(drafter.flatten(0, 1), 11),
        "draft_logsumexp": log_total(drafter, temperature, banned),
        "banned": banned,
        "temperature": temperature,
        "seed": torch.arange(B) + 1000 * seed,
        "step": torch.randint(0, 50, (B,), generator=g, dtype=torch.int32),
        "position": torch.randint(-5, 5000, (B,), generator=g, dtype=torch.int32),
    }


class TestReference:
    @pytest.mark.parametrize(("B", "W"), [(0, 3), (1, 0), (3, 0), (0, 0), (1, 1), (64, 3), (5, 40)])
    def test_comparison(self, B, W):
        g = generator(W)
        drafts = torch.randint(-1, 3, (B, W), generator=g)
        out = check(drafts, torch.randint(-1, 2, (B, W + 1), generator=g))
        assert out.accepted.shape == (B,) and out.tokens.shape == (B, W + 1)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("B", "W", "V"), [(3, 2, 1), (20, 3, 2), (64, 3, 31), (8, 4, 257), (3, 3, 32000)])
    def test_ratio(self, dtype, B, W, V):
        rejected = 0
        for seed, nearness in enumerate((0.3, 2.0)):
            case = ratio_case(seed + V, B, W, V, dtype, nearness)
            out = check(**case)
            rejected += int((out.accepted < (case["drafts"] >= 0).sum(1)).sum())
        assert rejected > 0 or V == 1

    def test_a_vocabulary_of_the_largest_models(self):
        check(**ratio_case(3, 2, 1, 262144, torch.bfloat16, 3.0))

    @pytest.mark.parametrize("leniency", [0.0, 0.5, 3.0])
    def test_leniency(self, leniency):
        case = ratio_case(5, 64, 4, 31)
        out = check(**case, leniency=leniency)
        if leniency == 0:
            assert torch.equal(out.accepted, (case["drafts"] >= 0).sum(1, dtype=torch.int32))

    def test_banned(self):
        banned = torch.tensor([4, -1, 7, 30])
        case = ratio_case(6, 200, 2, 31, nearness=2.0, banned=banned)
        out = check(**case)
        drawn = out.tokens.gather(1, out.accepted.long()[:, None])[:, 0]
        is_drawn = (out.accepted < (case["drafts"] >= 0).sum(1)) & (drawn >= 0)
        assert is_drawn.sum() > 50 and not torch.isin(drawn[is_drawn], banned).any()

    def test_row_maps(self):
        """Rows in any order and repetition, among others; a draft without one of its rows is compared."""
        case = ratio_case(7, 16, 3, 31)
        expected = check(**case)
        g = generator(8)
        for name, map_name in (("logits", "row_map"), ("draft_logits", "draft_row_map")):
            rows = case[name]
            order = torch.randperm(2 * len(rows), generator=g)[: len(rows)]
            spread = numerics.poison_(rows.new_empty(2 * len(rows), 31))
            spread[order] = rows
            case[name] = spread
            case[map_name] = order.int().view(16, -1)
        assert all(map(torch.equal, check(**case), expected))
        for map_name in ("row_map", "draft_row_map"):
            unknown = torch.rand(case[map_name].shape, generator=g) < 0.4
            check(**case | {map_name: case[map_name].masked_fill(unknown, -1)})

    def test_rows_with_any_stride(self):
        case = ratio_case(9, 8, 3, 31)
        expected = check(**case)
        for strides in ((45, 38), (36, 61)):
            wide = case.copy()
            for name, stride in zip(("logits", "draft_logits"), strides):
                room = numerics.poison_(torch.empty(len(case[name]), stride))
                wide[name] = room[:, 5:36].copy_(case[name])
            assert all(map(torch.equal, check(**wide), expected))

    def test_parameters_given_once_or_grouped(self):
        case = ratio_case(10, 12, 3, 31, temperature=torch.full((12,), 0.7))
        for name, value in (("temperature", torch.tensor([0.7])), ("seed", torch.tensor([3, 4, 5]))):
            check(**case | {name: value})
        check(**case | {"step": None})

    def test_temperature_zero_compares(self):
        temperature = torch.tensor([0.0, 0.8]).repeat(8)
        case = ratio_case(11, 16, 3, 31, temperature=temperature.clamp(min=0.8)) | {"temperature": temperature}
        out = check(**case)
        compared = ops.verify_drafts(case["drafts"], case["token"])
        assert torch.equal(out.tokens[::2], compared.tokens[::2])


class TestMeaning:
    def test_comparison(self):
        drafts = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, -1, 7], [-1, 6, 7]])
        token = torch.tensor([[5, 6, 7, 8], [5, 9, 7, 8], [1, 6, 7, 8], [5, 6, 7, 8], [3, 6, 7, 8]])
        out = check(drafts, token)
        assert out.accepted.tolist() == [3, 1, 0, 1, 0]
        want = [[5, 6, 7, 8], [5, 9, -1, -1], [1, -1, -1, -1], [5, 6, -1, -1], [3, -1, -1, -1]]
        assert out.tokens.tolist() == want

    def test_rows_without_a_target(self):
        out = check(torch.tensor([[4, 5]]), torch.tensor([[4, -1, 6]]))
        assert out.accepted.tolist() == [1] and out.tokens.tolist() == [[4, -1, -1]]

    def test_equal_distributions_accept_everything(self):
        case = ratio_case(0, 50, 4, 31, nearness=0.0)
        out = check(**case)
        assert torch.equal(out.accepted, (case["drafts"] >= 0).sum(1, dtype=torch.int32))

    def test_what_the_target_rules_out_is_rejected(self):
        """And replaced by something that it does not."""
        case = ratio_case(1, 40, 1, 31)
        drafts = case["drafts"] = torch.arange(40)[:, None] % 31
        case["logits"][::2].scatter_(1, drafts, -math.inf)
        case["logsumexp"] = log_total(case["logits"].view(40, 2, 31), case["temperature"])
        out = check(**case)
        assert out.accepted.count_nonzero() == 0 and (out.tokens[:, 0] != drafts[:, 0]).all()

    def test_the_target_s_token_where_there_is_no_rest(self):
        """The same distribution, but a leniency that rejects."""
        case = ratio_case(2, 40, 1, 31, nearness=0.0)
        case["drafts"] = case["drafts"].clamp(min=0)
        case["token"] = torch.full((40, 2), 17)
        out = check(**case, leniency=1e9)
        assert out.accepted.count_nonzero() == 0 and (out.tokens[:, 0] == 17).all()

    @pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
    def test_special_logits(self, value):
        g = generator(3)
        for name in ("logits", "draft_logits"):
            case = ratio_case(4, 64, 2, 31, temperature=torch.ones(64))
            hit = torch.rand(case[name].shape, generator=g) < 0.05
            case[name] = case[name].masked_fill(hit, value)
            shape = (64, -1, 31)
            case["logsumexp"] = log_total(case["logits"].view(shape), case["temperature"])
            case["draft_logsumexp"] = log_total(case["draft_logits"].view(shape), case["temperature"])
            check(**case)

    def test_nothing_but_nan(self):
        case = ratio_case(5, 8, 2, 31, temperature=torch.ones(8))
        for name in ("logits", "draft_logits"):
            case[name] = torch.full_like(case[name], math.nan)
            total = {"logits": "logsumexp", "draft_logits": "draft_logsumexp"}[name]
            case[total] = torch.full_like(case[total], -math.inf)
        out = check(**case)
        assert out.accepted.count_nonzero() == 0
        assert torch.equal(out.tokens[:, 0], case["token"][:, 0])

    def test_equal_logits_tie_by_noise_alone(self):
        """Target flat over ten ids, drafter certain of an eleventh: the ten come up alike."""
        rows, V = 4000, 11
        target, drafter = torch.zeros(1, V), torch.full((1, V), -1e9)
        target[0, 10] = -1e9
        drafter[0, 10] = 0.0
        out = ops.verify_drafts(
            torch.full((rows, 1), 10), torch.zeros(rows, 2, dtype=torch.long), logits=target, draft_logits=drafter,
            logsumexp=torch.full((rows, 2), math.log(10)), draft_logsumexp=torch.zeros(rows, 1),
            row_map=torch.zeros(rows, 2, dtype=torch.int32), draft_row_map=torch.zeros(rows, 1, dtype=torch.int32),
            temperature=torch.ones(1), seed=torch.zeros(1, dtype=torch.long),
            position=torch.arange(rows, dtype=torch.int32),
        )  # fmt: skip
        numerics.assert_distribution("replacement", out.tokens[:, 0].bincount(minlength=V), [0.1] * 10 + [0.0])


class TestDistribution:
    """Two tokens at a time from a target of 4 ids whose second distribution depends on the first token."""

    V, ROWS = 4, 40_000

    def target(self):
        g = generator(1)
        return 1.5 * torch.randn(self.V + 1, self.V, generator=g)  # row 0: the first token; 1 + t: after t

    def exact(self, temperature):
        p = torch.softmax(self.target().double() / temperature, -1)
        return (p[0][:, None] * p[1:]).flatten()

    def run(self, drafter, temperature, argmax=False, by_ratio=True, **options):
        """Count of each pair of first tokens, where a row has emitted two, and the number of rows by length."""
        rows, V = self.ROWS, self.V
        target, T = self.target(), torch.full((1,), temperature)
        seed, position = torch.full((1,), 5), torch.arange(rows, dtype=torch.int32) * 2

        def draw(logits, row, at, step):
            return ops.token_confidence(
                logits, row_map=row.int(), temperature=T, seed=seed, position=at.int(), distribution="tempered",
                step=torch.tensor([step], dtype=torch.int32),
            )  # fmt: skip

        first = draw(drafter, torch.zeros(rows), position, 1)
        drafts = (first.argmax if argmax else first.token)[:, None]
        row_map = torch.stack((torch.zeros(rows, dtype=torch.long), 1 + drafts[:, 0]), 1).int()
        chosen = draw(target, row_map.flatten(), (position[:, None] + torch.arange(2)).flatten(), 2)
        arguments = {}
        if by_ratio:
            arguments = dict(
                logits=target, logsumexp=chosen.logsumexp.view(rows, 2), row_map=row_map, draft_logits=drafter,
                draft_logsumexp=first.logsumexp[:, None], draft_row_map=torch.zeros(rows, 1, dtype=torch.int32),
                temperature=T, seed=seed, position=position, step=torch.tensor([2], dtype=torch.int32), **options,
            )  # fmt: skip
        out = ops.verify_drafts(drafts, chosen.token.view(rows, 2), **arguments)
        # A row that emitted one token gets its second from the target, as the next forward would.
        after = draw(target, 1 + out.tokens[:, 0], position + 1, 3).token
        second = torch.where(out.accepted == 1, out.tokens[:, 1], after)
        return (out.tokens[:, 0] * V + second).bincount(minlength=V * V), out.accepted.double().mean().item()

    @pytest.mark.parametrize("temperature", [1.0, 1.8])
    def test_ratio(self, temperature):
        drafter = torch.randn(1, self.V, generator=generator(2))
        pairs, accepted = self.run(drafter, temperature)
        numerics.assert_distribution("pairs", pairs, self.exact(temperature))
        p, q = (torch.softmax(z.double() / temperature, -1) for z in (self.target()[0], drafter[0]))
        rate = torch.minimum(p, q).sum().item()
        counts = torch.tensor([accepted, 1 - accepted]) * self.ROWS
        numerics.assert_distribution("acceptance", counts.round(), [rate, 1 - rate])

    @pytest.mark.parametrize("argmax", [False, True], ids=["drawn", "argmax"])
    def test_comparison(self, argmax):
        drafter = torch.randn(1, self.V, generator=generator(2))
        pairs, accepted = self.run(drafter, 1.0, argmax, by_ratio=False)
        numerics.assert_distribution("pairs", pairs, self.exact(1.0))
        if argmax:
            rate = torch.softmax(self.target()[0].double(), -1)[drafter.argmax()].item()
            counts = torch.tensor([accepted, 1 - accepted]) * self.ROWS
            numerics.assert_distribution("acceptance", counts.round(), [rate, 1 - rate])

    def test_argmax_by_ratio_is_another_distribution(self):
        """What I-DLM serves: the test of distributions has the power to see that it is not the target's."""
        drafter = torch.randn(1, self.V, generator=generator(2))
        pairs, _ = self.run(drafter, 1.0, argmax=True)
        with pytest.raises(AssertionError, match="chi-square"):
            numerics.assert_distribution("pairs", pairs, self.exact(1.0))
        # It accepts s with probability min(1, p(s) / (leniency q(s))), and draws from the rest otherwise.
        p, q = (torch.softmax(z.double(), -1) for z in (self.target()[0], drafter[0]))
        s, rest = int(drafter.argmax()), (p - q).clamp(min=0)
        for leniency in (0.7, 1.0, 1.5):
            pairs, _ = self.run(drafter, 1.0, argmax=True, leniency=leniency)
            rate = min(1.0, (p[s] / (leniency * q[s])).item())
            expected = (1 - rate) * rest / rest.sum()
            expected[s] += rate
            numerics.assert_distribution("first", pairs.view(self.V, self.V).sum(1), expected)

    def test_the_target_s_noise_is_shared_by_drafts_drawn_with_it(self):
        """Same seed, step and position, distributions that differ a little: accepted nearly as often as by ratio."""
        rows, V = 20_000, 50
        g = generator(4)
        target = torch.randn(1, V, generator=g)
        drafter = target + 0.3 * torch.randn(1, V, generator=g)
        key = dict(temperature=torch.ones(1), seed=torch.tensor([3]), position=torch.arange(rows, dtype=torch.int32))
        drafts = ops.token_confidence(drafter.expand(rows, V), **key).token[:, None]
        token = ops.token_confidence(target.expand(rows, V), **key).token[:, None]
        rate = ops.verify_drafts(drafts, torch.cat((token, token), 1)).accepted.double().mean().item()
        overlap = torch.minimum(torch.softmax(target, -1), torch.softmax(drafter, -1)).sum().item()
        assert overlap / (2 - overlap) - 0.01 < rate <= overlap + 0.01


class TestIndependence:
    def test_any_batch_gives_the_same_rows(self):
        case = ratio_case(20, 24, 4, 300, torch.bfloat16)
        whole = check(**case)
        per_row = {name: v for name, v in case.items() if name not in ("logits", "draft_logits", "banned")}
        for size in (1, 2, 7, 24):
            index = torch.randperm(24, generator=generator(size))[:size]
            part = {name: value[index] for name, value in per_row.items()}
            for name in ("logits", "draft_logits"):
                part[name] = case[name].view(24, -1, 300)[index].flatten(0, 1)
            out = ops.verify_drafts(**part)
            assert torch.equal(out.accepted, whole.accepted[index]) and torch.equal(out.tokens, whole.tokens[index])

    def test_any_number_of_threads(self):
        case, before, results = ratio_case(21, 40, 2, 5000), torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(ops.verify_drafts(**case))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *results))

    def test_draws_follow_position_and_step(self):
        case = ratio_case(22, 300, 1, 31, nearness=3.0)
        first = ops.verify_drafts(**case)
        for name in ("seed", "step", "position"):
            other = ops.verify_drafts(**case | {name: case[name] + 1})
            assert not torch.equal(first.accepted, other.accepted), name

    def test_inputs_are_left_alone(self):
        case = ratio_case(23, 8, 3, 31)
        before = {name: v.clone() for name, v in case.items() if isinstance(v, torch.Tensor)}
        ops.verify_drafts(**case)
        assert all(torch.equal(case[name], value) for name, value in before.items())


@pytest.mark.on_cpu
class TestErrors:
    B, W, V = 4, 3, 31

    def good(self):
        return ratio_case(0, self.B, self.W, self.V, banned=torch.tensor([2]))

    def refuses(self, message, **changed):
        with pytest.raises(RuntimeError, match="verify_drafts: " + message):
            ops.verify_drafts(**self.good() | changed)

    ALL = tuple(ratio_case(0, 1, 1, 1, banned=torch.tensor([-1])))
    SHAPED = ("token", "logsumexp", "draft_logsumexp", "position")

    def test_the_good_call_is_good(self):
        ops.verify_drafts(**self.good())

    @pytest.mark.parametrize("name", ALL)
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})

    @pytest.mark.parametrize("name", ALL[1:])
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of drafts", **{name: self.good()[name].to("meta")})

    @pytest.mark.parametrize("name", SHAPED)
    def test_shape(self, name):
        good = self.good()[name]
        for bad in (good[0], good[None], good[:-1]):
            self.refuses(f"{name} must have shape", **{name: bad})

    def test_shape_of_logits(self):
        good = self.good()
        self.refuses(r"logits must have shape \[16, \*\]; got \[15, 31\]", logits=good["logits"][1:])
        self.refuses(r"draft_logits must have shape \[12, 31\]", draft_logits=good["draft_logits"][1:])
        self.refuses(r"draft_logits must have shape \[12, 31\]", draft_logits=good["draft_logits"][:, :30])
        self.refuses("draft_logits must have dtype Float; got BFloat16", draft_logits=good["draft_logits"].bfloat16())
        self.refuses("logits must have stride 1 in its last", logits=good["logits"].t().contiguous().t())

    @pytest.mark.parametrize("name", ["drafts", "token", "logsumexp", "draft_logsumexp"])
    def test_stride(self, name):
        self.refuses(f"{name} must be contiguous", **{name: self.good()[name].t().contiguous().t()})

    def test_missing(self):
        for name in ("logsumexp", "draft_logsumexp", "temperature", "seed", "position"):
            self.refuses(f"{name} is required by draft_logits; got None", **{name: None})
        self.refuses("logits is required by draft_logits; got None", logits=None)
        self.refuses("draft_logits is required by logits; got None", draft_logits=None)

    def test_values(self):
        self.refuses(
            r"leniency must be 0 \(accept every draft that the target can draw\) or positive and finite in float32; got -0.5",
            leniency=-0.5,
        )
        self.refuses("leniency must be 0 .* or positive and finite in float32; got nan", leniency=math.nan)
        self.refuses("temperature must be 0, or finite.*; got -1", temperature=torch.tensor([-1.0]))
        drafts = self.good()["drafts"]
        drafts[2, 1] = 31
        self.refuses(r"drafts must be below the vocabulary's size 31; got 31 at \[2, 1\]", drafts=drafts)
        for bad in (-2, 31, 2**62):
            self.refuses(rf"banned must be -1 or in \[0, 31\); got {bad} at 1", banned=torch.tensor([3, bad, -1]))
        for name, shape, rows in (("row_map", (4, 4), 16), ("draft_row_map", (4, 3), 12)):
            for bad in (-2, rows):
                row_map = torch.zeros(shape, dtype=torch.int32)
                row_map[1, 2] = bad
                self.refuses(rf"{name} must be -1 or in \[0, {rows}\); got {bad}", **{name: row_map})

    def test_parameter_shape(self):
        self.refuses("seed must hold one value", seed=torch.zeros(3, dtype=torch.long))
        self.refuses("temperature must have at most one dimension", temperature=torch.ones(1, 1))


class TestRegistration:
    @pytest.mark.parametrize("by_ratio", [False, True])
    def test_opcheck(self, by_ratio):
        case = ratio_case(1, 4, 3, 31)
        positional = [case.pop("drafts"), case.pop("token")]
        torch.library.opcheck(op, positional, case if by_ratio else {})

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(case):
            out = ops.verify_drafts(**case)
            return out.accepted + 1, out.tokens * 2

        case = ratio_case(2, 4, 3, 31)
        want, got = step(case), torch.compile(step, fullgraph=True, backend=backend)(case)
        assert all(map(torch.equal, want, got))

    def test_every_combination_of_optional_arguments(self):
        case = ratio_case(3, 4, 3, 31, banned=torch.tensor([3]))
        for left_out in itertools.product((False, True), repeat=2):
            check(**{n: None if n in itertools.compress(("banned", "step"), left_out) else v for n, v in case.items()})
