# SPDX-License-Identifier: Apache-2.0
"""select_tokens against its reference, against the published decoders restated in plain Python, and as a sampler."""

import itertools
import math
import random

import pytest
import torch

import numerics
from dlmkernels import ops, reference

RULES = ("none", "all", "threshold", "factor", "entropy-bound", "entropy-sum", "bernoulli")
op = torch.ops.dlmkernels.select_tokens.default


def generator(seed):
    return torch.Generator().manual_seed(seed)


def choose(g, *values):
    return values[torch.randint(len(values), (), generator=g)]


def random_scores(g, B, W):
    """Few levels, so that ties are the rule; every special value."""
    score = torch.randint(-1, choose(g, 2, 6, 40), (B, W), generator=g) / 8
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 3e38, -3e38])
    drawn = special[torch.randint(len(special), (B, W), generator=g)]
    return torch.where(torch.rand(B, W, generator=g) < choose(g, 0.0, 0.1, 0.9), drawn, score)


def random_mask(g, B, W):
    """Rows from empty to full."""
    density = torch.tensor([0.0, 0.2, 0.7, 1.0])[torch.randint(4, (B, 1), generator=g)]
    return torch.rand(B, W, generator=g) < density


def random_parameter(g, B, *values, dtype=torch.float32):
    """One value, one for each two rows, or one a row."""
    count = choose(g, *(n for n in (1, B // 2, B) if n > 0 and B % n == 0)) if B else choose(g, 0, 1)
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (count,), generator=g)]


def random_case(g, B, W, rule, strict=False, ordered=False):
    costs = torch.randint(0, 9, (B, W), generator=g) / 8
    costs[torch.rand(B, W, generator=g) < 0.03] = choose(g, math.nan, math.inf, -math.inf, -1.0, 2e6, 3e-10)
    counts = (-1, 0, 1, 2, W // 2, W, 2**31 - 1)
    kwargs = {
        "parameter": random_parameter(g, B, -0.25, 0.0, 0.125, 0.5, 1.0, 2.5, 9.0, math.inf, math.nan),
        "strict": strict,
        "gate": random_mask(g, B, W) if choose(g, True, False) else None,
        "cost": costs,
        **{
            name: random_parameter(g, B, *counts, dtype=torch.int32) if choose(g, True, True, False) else None
            for name in ("need", "fill", "cap")
        },
    }
    if ordered:
        kwargs["order_temperature"] = random_parameter(g, B, 0.0, -1.0, 0.25, 1.0, 1e-40, math.inf, math.nan)
    if ordered or rule == "bernoulli":
        kwargs["seed"] = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
        kwargs["step"] = random_parameter(g, B, 0, 1, 77, dtype=torch.int32) if choose(g, True, False) else None
        kwargs["position"] = torch.randint(-5, 5000, (B, W), generator=g, dtype=torch.int32)
    return (random_scores(g, B, W), random_mask(g, B, W), rule), kwargs


def assert_same(got, want):
    assert torch.equal(got[0], want[0]), f"selected differs in rows {(got[0] != want[0]).any(-1).nonzero().flatten()}"
    assert torch.equal(got[1], want[1])


def pick(score, eligible=None, rule="none", **kwargs):
    """Selected slots of one row given as lists."""
    row = torch.tensor([score], dtype=torch.float32)
    eligible = torch.ones_like(row, dtype=torch.bool) if eligible is None else torch.tensor([eligible])
    integers = ("need", "fill", "cap", "step")
    for name, value in kwargs.items():
        if name in ("gate", "cost", "position"):
            dtype = {"gate": torch.bool, "cost": torch.float32, "position": torch.int32}[name]
            kwargs[name] = torch.tensor([value], dtype=dtype)
        elif name != "strict":
            dtype = torch.int32 if name in integers else torch.int64 if name == "seed" else torch.float32
            kwargs[name] = torch.tensor([value], dtype=dtype)
    selected, count = ops.select_tokens(row, eligible, rule, **kwargs)
    slots = selected[0].nonzero().flatten().tolist()
    assert count.item() == len(slots)
    return slots


class TestReference:
    @pytest.mark.parametrize("ordered", [False, True], ids=["by_score", "drawn_order"])
    @pytest.mark.parametrize("strict", [False, True], ids=["at_least", "above"])
    @pytest.mark.parametrize("rule", RULES)
    def test_random(self, rule, strict, ordered):
        g = generator(RULES.index(rule) * 4 + strict * 2 + ordered)
        for _ in range(12):
            args, kwargs = random_case(g, 16, choose(g, 1, 2, 5, 17, 32, 70), rule, strict, ordered)
            assert_same(ops.select_tokens(*args, **kwargs), reference.select_tokens(*args, **kwargs))

    @pytest.mark.parametrize("W", [0, 1, 1024, 4096])
    @pytest.mark.parametrize("rule", RULES)
    def test_widths(self, rule, W):
        args, kwargs = random_case(generator(W), 4, W, rule, ordered=True)
        args = (torch.rand(4, W, generator=generator(1)), torch.ones(4, W, dtype=torch.bool), rule)
        assert_same(ops.select_tokens(*args, **kwargs), reference.select_tokens(*args, **kwargs))

    @pytest.mark.parametrize("B", [0, 1, 64])
    @pytest.mark.parametrize("rule", RULES)
    def test_batches(self, rule, B):
        args, kwargs = random_case(generator(B), B, 8, rule, ordered=True)
        out = ops.select_tokens(*args, **kwargs)
        assert out.selected.shape == (B, 8) and out.count.shape == (B,)
        assert_same(out, reference.select_tokens(*args, **kwargs))

    def test_parameters_given_once_or_grouped(self):
        g = generator(0)
        score, eligible = torch.rand(6, 9, generator=g), torch.ones(6, 9, dtype=torch.bool)
        groups = torch.tensor([0.2, 0.5, 0.8])
        grouped = ops.select_tokens(score, eligible, "threshold", parameter=groups)
        assert_same(grouped, ops.select_tokens(score, eligible, "threshold", parameter=groups.repeat_interleave(2)))
        once = ops.select_tokens(score, eligible, "threshold", parameter=torch.tensor(0.5))
        assert_same(once, ops.select_tokens(score, eligible, "threshold", parameter=torch.full((6,), 0.5)))

    def test_inputs_are_left_alone(self):
        args, kwargs = random_case(generator(3), 8, 32, "factor", ordered=True)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        ops.select_tokens(*args, **kwargs)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(tensors, before))


class TestMeaning:
    def test_ties_fall_to_the_lower_slot(self):
        assert pick([0.5, 0.7, 0.7, 0.5], fill=1) == [1]
        assert pick([0.5, 0.7, 0.7, 0.5], fill=3) == [0, 1, 2]
        assert pick([-0.0, 0.0], fill=1) == [0] and pick([0.0, -0.0], fill=1) == [0]

    def test_nan_and_minus_infinity_are_never_selected(self):
        score = [math.nan, -math.inf, math.inf, 0.1]
        assert pick(score, fill=4) == [2, 3]
        assert pick(score, rule="all") == [2, 3]
        assert pick(score, rule="threshold", parameter=-math.inf) == [2, 3]
        assert pick([math.nan, -math.inf], rule="all", need=1, fill=2) == []

    def test_nothing_eligible(self):
        for rule in RULES:
            key = {"seed": 1, "position": [0, 1]}
            assert pick([1.0, 2.0], [False, False], rule, parameter=9, cost=[1, 1], need=1, fill=2, **key) == []

    def test_need_is_met_or_fill_takes_over(self):
        score = [0.9, 0.2, 0.8, 0.4]
        assert pick(score, rule="threshold", parameter=0.7, need=2, fill=3) == [0, 2]
        assert pick(score, rule="threshold", parameter=0.7, need=3, fill=3) == [0, 2, 3]
        assert pick(score, rule="threshold", parameter=0.95, need=1, fill=1) == [0]
        assert pick(score, rule="threshold", parameter=0.95, fill=1) == []
        # all of E is enough even where `need` asks for more
        assert pick(score, rule="all", need=9, fill=1) == [0, 1, 2, 3]

    def test_cap_bounds_the_rule_but_not_fill(self):
        score = [0.9, 0.2, 0.8, 0.4]
        assert pick(score, rule="all", cap=2) == [0, 2]
        assert pick(score, rule="all", cap=0) == []
        assert pick(score, rule="threshold", parameter=0.7, need=3, fill=3, cap=1) == [0, 2, 3]

    def test_gate_bounds_the_rule_but_not_fill(self):
        score, gate = [0.9, 0.8, 0.3], [False, True, True]
        assert pick(score, rule="threshold", parameter=0.5, gate=gate, need=1, fill=1) == [1]
        assert pick(score, rule="threshold", parameter=0.85, gate=gate, need=1, fill=1) == [0]
        assert pick(score, rule="all", gate=gate, need=3, fill=1) == [0]
        assert pick(score, gate=gate, fill=1) == [0]

    def test_ranks_count_within_the_gate(self):
        # factor 1: rank 2 needs 2/3, rank 3 needs 3/4
        score = [0.99, 0.7, 0.7]
        assert pick(score, rule="factor", parameter=1) == [0, 1]
        assert pick(score, rule="factor", parameter=1, gate=[False, True, True]) == [1, 2]

    def test_strict(self):
        assert pick([0.5, 0.75], rule="threshold", parameter=0.5) == [0, 1]
        assert pick([0.5, 0.75], rule="threshold", parameter=0.5, strict=True) == [1]
        assert pick([0.75, 0.25], rule="factor", parameter=2.25) == [0, 1]
        assert pick([0.75, 0.25], rule="factor", parameter=2.25, strict=True) == [0]

    def test_the_two_entropy_rules_differ(self):
        cost = [0.1, 0.125, 0.1, 0.2, 0.3]
        score = [-c for c in cost]
        assert pick(score, rule="entropy-bound", cost=cost, parameter=0.35) == [0, 1, 2, 3]
        assert pick(score, rule="entropy-sum", cost=cost, parameter=0.35) == [0, 1, 2]

    def test_entropy_sums_are_exact(self):
        # 2^-20 is half a float32 unit of 16: a float sum would lose every one of them
        score = [1.0] + [0.0] * 4095
        cost = [16.0] + [2.0**-20] * 4095
        assert len(pick(score, rule="entropy-sum", cost=cost, parameter=16 + 4094 * 2.0**-20)) == 4094
        assert len(pick(score, rule="entropy-sum", cost=cost, parameter=16 + 4096 * 2.0**-20)) == 4096
        assert len(pick(score, rule="entropy-bound", cost=cost, parameter=4095 * 2.0**-20)) == 4096
        assert len(pick(score, rule="entropy-bound", cost=cost, parameter=4094 * 2.0**-20)) == 4095

    def test_entropy_costs_round_to_the_nearest_unit(self):
        unit = 2.0**-32
        for cost, taken in ((0.25, 8), (0.5, 2), (0.75, 2), (1.25, 2), (1.5, 1)):
            assert len(pick([0.0] * 8, rule="entropy-sum", cost=[cost * unit] * 8, parameter=3 * unit)) == taken

    def test_entropy_sums_do_not_overflow(self):
        cost = [math.inf, math.nan] * 2048
        assert pick([0.0] * 4096, rule="entropy-bound", cost=cost, parameter=math.inf) == [0, 1]
        assert pick([0.0] * 4096, rule="entropy-sum", cost=cost, parameter=math.inf) == []

    def test_order_temperature_leaves_the_threshold_alone(self):
        score = torch.rand(200, 8, generator=generator(0))
        key = {"seed": torch.arange(200), "position": torch.arange(8, dtype=torch.int32).repeat(200, 1)}
        plain = ops.select_tokens(score, score > 0, "threshold", parameter=torch.tensor(0.5))
        drawn = ops.select_tokens(
            score, score > 0, "threshold", parameter=torch.tensor(0.5), order_temperature=torch.tensor(1.0), **key
        )
        assert_same(drawn, plain)


class Published:
    """The decoders as their authors describe them: one row, lists, no sorting key shared with the library."""

    @staticmethod
    def ranked(score, slots):
        left, out = list(slots), []
        while left:
            best = left[0]
            for slot in left:
                if score[slot] > score[best]:
                    best = slot
            left.remove(best)
            out.append(best)
        return out

    @classmethod
    def llada(cls, score, masked, k):
        return cls.ranked(score, masked)[:k]

    @classmethod
    def fast_dllm_threshold(cls, score, masked, threshold):
        if not masked:
            return []
        return [slot for slot in masked if score[slot] >= threshold or slot == cls.ranked(score, masked)[0]]

    @classmethod
    def fast_dllm_factor(cls, score, masked, factor):
        taken = []
        for n, slot in enumerate(cls.ranked(score, masked), start=1):
            if n > 1 and (n + 1) * (1 - score[slot]) > factor:
                break
            taken.append(slot)
        return taken

    @classmethod
    def sdar_dynamic(cls, score, masked, k, threshold):
        high = [slot for slot in masked if score[slot] > threshold]
        return high if len(high) >= k else cls.ranked(score, masked)[:k]

    @classmethod
    def entropy_bounded(cls, entropy, masked, gamma):
        ranked = cls.ranked([-h for h in entropy], masked)
        taken = 0
        while taken < len(ranked):
            chosen = [entropy[slot] for slot in ranked[: taken + 1]]
            if math.fsum(chosen) - max(chosen) > gamma:
                break
            taken += 1
        return ranked[: max(taken, 1)]

    @classmethod
    def jetengine(cls, entropy, masked, eta):
        ranked = cls.ranked([-h for h in entropy], masked)
        taken = 0
        while taken < len(ranked) and math.fsum(entropy[slot] for slot in ranked[: taken + 1]) < eta:
            taken += 1
        return ranked[: max(taken, 1)]


class TestPublishedDecoders:
    """A thousand rows in one call each; scores are multiples of 2^-12, so that all arithmetic on them is exact."""

    def rows(self, seed, levels=4096):
        rng = random.Random(seed)
        B, W = 1000, 12
        score = [[rng.randrange(levels) / levels for _ in range(W)] for _ in range(B)]
        masked = [[slot for slot in range(W) if rng.random() < rng.choice((0.1, 0.6, 1.0))] for _ in range(B)]
        eligible = torch.zeros(B, W, dtype=torch.bool)
        for b, slots in enumerate(masked):
            eligible[b, slots] = True
        return score, masked, torch.tensor(score), eligible, rng

    def check(self, out, want):
        got = [row.nonzero().flatten().tolist() for row in out.selected]
        assert got == [sorted(slots) for slots in want]
        assert out.count.tolist() == [len(slots) for slots in want]

    @pytest.mark.parametrize("levels", [4, 4096])
    def test_llada(self, levels):
        score, masked, s, e, rng = self.rows(0, levels)
        k = [rng.randrange(8) for _ in score]
        out = ops.select_tokens(s, e, fill=torch.tensor(k, dtype=torch.int32))
        self.check(out, [Published.llada(*row) for row in zip(score, masked, k)])

    @pytest.mark.parametrize("levels", [4, 4096])
    def test_fast_dllm_threshold(self, levels):
        score, masked, s, e, _ = self.rows(1, levels)
        one = torch.tensor(1, dtype=torch.int32)
        out = ops.select_tokens(s, e, "threshold", parameter=torch.tensor(0.75), need=one, fill=one)
        self.check(out, [Published.fast_dllm_threshold(*row, 0.75) for row in zip(score, masked)])

    @pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
    def test_fast_dllm_factor(self, factor):
        score, masked, s, e, _ = self.rows(2)
        out = ops.select_tokens(s, e, "factor", parameter=torch.tensor(factor))
        self.check(out, [Published.fast_dllm_factor(*row, factor) for row in zip(score, masked)])

    @pytest.mark.parametrize("levels", [4, 4096])
    def test_sdar_dynamic(self, levels):
        score, masked, s, e, rng = self.rows(3, levels)
        k = [rng.randrange(1, 6) for _ in score]
        ks = torch.tensor(k, dtype=torch.int32)
        out = ops.select_tokens(s, e, "threshold", parameter=torch.tensor(0.5), strict=True, need=ks, fill=ks)
        self.check(out, [Published.sdar_dynamic(*row, 0.5) for row in zip(score, masked, k)])

    @pytest.mark.parametrize(("rule", "decoder"), [("entropy-bound", "entropy_bounded"), ("entropy-sum", "jetengine")])
    @pytest.mark.parametrize("levels", [4, 4096])
    def test_entropy(self, rule, decoder, levels):
        entropy, masked, h, e, rng = self.rows(4, levels)
        budget = [rng.randrange(12) / 4 for _ in entropy]
        one = torch.tensor(1, dtype=torch.int32)
        out = ops.select_tokens(-h, e, rule, cost=h, parameter=torch.tensor(budget), need=one, fill=one)
        self.check(out, [getattr(Published, decoder)(*row) for row in zip(entropy, masked, budget)])


class TestRandomness:
    def test_drawn_order_is_sampling_without_replacement(self):
        n, temperature, k = 60000, 0.5, 2
        score = torch.tensor([0.3, -0.2, 0.6, 0.0, 0.4])
        W = len(score)
        selected, _ = ops.select_tokens(
            score.repeat(n, 1),
            torch.ones(n, W, dtype=torch.bool),
            fill=torch.tensor(k, dtype=torch.int32),
            order_temperature=torch.tensor(temperature),
            seed=torch.arange(n),
            position=torch.arange(W, dtype=torch.int32).repeat(n, 1),
        )
        assert torch.all(selected.sum(1) == k)
        p = (score.double() / temperature).softmax(0).tolist()
        pairs = list(itertools.combinations(range(W), 2))
        exact = [p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs]
        counts = [int((selected[:, i] & selected[:, j]).sum()) for i, j in pairs]
        numerics.assert_distribution("pairs", counts, exact)

    @pytest.mark.parametrize("p", [0.0, 1e-3, 0.25, 0.9, 1.0])
    def test_bernoulli_frequency(self, p):
        B, W = 32, 4096
        _, count = ops.select_tokens(
            torch.zeros(B, W),
            torch.ones(B, W, dtype=torch.bool),
            "bernoulli",
            cost=torch.full((B, W), p),
            seed=torch.arange(B),
            position=torch.arange(W, dtype=torch.int32).repeat(B, 1),
        )
        hits = int(count.sum())
        if p in (0.0, 1.0):
            assert hits == p * B * W
        else:
            numerics.assert_distribution("hits", [hits, B * W - hits], [p, 1 - p])

    @pytest.mark.parametrize("rule", ["none", "bernoulli"])
    def test_draws_follow_the_position_not_the_slot(self, rule):
        g = generator(5)
        B, W = 50, 24
        score, position = torch.rand(B, W, generator=g), torch.arange(W, dtype=torch.int32).repeat(B, 1)
        kwargs = {"seed": torch.arange(B), "fill": torch.tensor(6, dtype=torch.int32)}
        kwargs["order_temperature"] = torch.tensor(0.7)

        def run(shuffle):
            every = torch.ones(B, W, dtype=torch.bool)
            at = position[:, shuffle].contiguous()
            s = score[:, shuffle].contiguous()
            return ops.select_tokens(s, every, rule, cost=s, position=at, **kwargs).selected

        shuffle = torch.randperm(W, generator=g)
        plain, shuffled = run(torch.arange(W)), run(shuffle)
        assert torch.equal(plain[:, shuffle], shuffled)
        assert 0 < plain.sum() < plain.numel()

    def test_seed_step_and_position_matter(self):
        score, every = torch.zeros(1, 64), torch.ones(1, 64, dtype=torch.bool)

        def run(seed=0, step=0, shift=0):
            position = torch.arange(64, dtype=torch.int32)[None] + shift
            key = {"seed": torch.tensor(seed), "step": torch.tensor(step, dtype=torch.int32), "position": position}
            fill, t = torch.tensor(8, dtype=torch.int32), torch.tensor(1.0)
            return ops.select_tokens(score, every, fill=fill, order_temperature=t, **key).selected

        assert torch.equal(run(), run())
        for other in ({"seed": 1}, {"seed": 2**32}, {"step": 1}, {"shift": 64}):
            assert not torch.equal(run(), run(**other))


class TestBatchInvariance:
    def case(self, rule):
        B, W = 64, 33
        args, kwargs = random_case(generator(11), B, W, rule, ordered=True)
        for name, value in kwargs.items():  # every parameter one a row, so that rows can be moved about
            if isinstance(value, torch.Tensor):
                kwargs[name] = value.repeat_interleave(B // len(value), 0)
        return args, kwargs, ops.select_tokens(*args, **kwargs)

    @staticmethod
    def take(args, kwargs, rows):
        kwargs = {k: v[rows].contiguous() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return ops.select_tokens(args[0][rows].contiguous(), args[1][rows].contiguous(), args[2], **kwargs)

    @pytest.mark.parametrize("rule", RULES)
    def test_any_batch_gives_the_same_rows(self, rule):
        args, kwargs, whole = self.case(rule)
        shuffle = torch.randperm(64, generator=generator(1))
        assert_same(self.take(args, kwargs, shuffle), (whole.selected[shuffle], whole.count[shuffle]))
        for size in range(1, 65):
            rows = slice(64 - size, 64)
            assert_same(self.take(args, kwargs, rows), (whole.selected[rows], whole.count[rows]))

    def test_any_number_of_threads(self):
        args, kwargs = random_case(generator(12), 64, 2048, "factor", ordered=True)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = ops.select_tokens(*args, **kwargs)
            torch.set_num_threads(2)
            two = ops.select_tokens(*args, **kwargs)
        finally:
            torch.set_num_threads(before)
        assert_same(one, two)


class TestErrors:
    B, W = 4, 6

    def call(self, rule="none", **changed):
        arguments = {
            "score": torch.zeros(self.B, self.W),
            "eligible": torch.ones(self.B, self.W, dtype=torch.bool),
            "rule": rule,
            **changed,
        }
        return ops.select_tokens(**arguments)

    def good(self, name):
        B, W = self.B, self.W
        return {
            "score": torch.zeros(B, W),
            "eligible": torch.ones(B, W, dtype=torch.bool),
            "gate": torch.ones(B, W, dtype=torch.bool),
            "cost": torch.zeros(B, W),
            "position": torch.zeros(B, W, dtype=torch.int32),
            "parameter": torch.zeros(B),
            "need": torch.zeros(B, dtype=torch.int32),
            "fill": torch.zeros(B, dtype=torch.int32),
            "cap": torch.zeros(B, dtype=torch.int32),
            "order_temperature": torch.zeros(B),
            "seed": torch.zeros(B, dtype=torch.int64),
            "step": torch.zeros(B, dtype=torch.int32),
        }[name]

    EVERY = ("score", "eligible", "gate", "cost", "position")
    PER_ROW = ("parameter", "need", "fill", "cap", "order_temperature", "seed", "step")

    @pytest.mark.parametrize("name", EVERY + PER_ROW)
    def test_dtype(self, name):
        with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must have dtype .*; got Double"):
            self.call(**{name: self.good(name).double()})

    @pytest.mark.parametrize("name", EVERY + PER_ROW)
    def test_device(self, name):
        shown = "eligible" if name == "score" else name  # the score's device is what the others are held against
        with pytest.raises(RuntimeError, match=rf"select_tokens: {shown} must be on the device of score"):
            self.call(**{name: self.good(name).to("meta")})

    @pytest.mark.parametrize("name", EVERY)
    def test_rank_and_shape(self, name):
        good = self.good(name)
        for bad in (good[0], good[None], good[:, :-1].contiguous(), good[:-1]):
            if name == "score" and bad.dim() == 2:
                continue  # then the others are of the wrong shape
            with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must have shape"):
                self.call(**{name: bad})

    @pytest.mark.parametrize("name", EVERY)
    def test_stride(self, name):
        with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must be contiguous"):
            self.call(**{name: self.good(name).t().contiguous().t()})

    @pytest.mark.parametrize("name", PER_ROW)
    def test_parameter_shape(self, name):
        with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must hold one value"):
            self.call(**{name: self.good(name)[:3]})
        with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must have at most one dimension"):
            self.call(**{name: self.good(name)[None]})
        with pytest.raises(RuntimeError, match=rf"select_tokens: {name} must be contiguous"):
            self.call(**{name: self.good(name).repeat(2)[::2]})

    def test_width(self):
        with pytest.raises(RuntimeError, match=r"score must have at most 4096 slots \(W\); got W = 4097"):
            ops.select_tokens(torch.zeros(1, 4097), torch.zeros(1, 4097, dtype=torch.bool))

    def test_unknown_rule(self):
        with pytest.raises(RuntimeError, match=f"rule must be one of {', '.join(RULES)}; got best"):
            self.call("best")

    @pytest.mark.parametrize("rule", ["threshold", "factor", "entropy-bound", "entropy-sum"])
    def test_missing_parameter(self, rule):
        with pytest.raises(RuntimeError, match=f"parameter is required by rule {rule}; got None"):
            self.call(rule, cost=self.good("cost"))

    @pytest.mark.parametrize("rule", ["entropy-bound", "entropy-sum", "bernoulli"])
    def test_missing_cost(self, rule):
        key = {name: self.good(name) for name in ("parameter", "seed", "position")}
        with pytest.raises(RuntimeError, match=f"cost is required by rule {rule}; got None"):
            self.call(rule, **key)

    @pytest.mark.parametrize("missing", ["seed", "position"])
    def test_missing_key(self, missing):
        key = {name: self.good(name) for name in ("seed", "position") if name != missing}
        with pytest.raises(RuntimeError, match=f"{missing} is required by rule bernoulli"):
            self.call("bernoulli", cost=self.good("cost"), **key)
        with pytest.raises(RuntimeError, match=f"{missing} is required by order_temperature"):
            self.call(order_temperature=self.good("order_temperature"), **key)

    def test_empty_batch_still_checks(self):
        empty = torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="parameter is required"):
            ops.select_tokens(*empty, "threshold")
        out = ops.select_tokens(*empty, "threshold", parameter=torch.zeros(0))
        assert out.selected.shape == (0, 4) and out.count.shape == (0,)


class TestRegistration:
    @pytest.mark.parametrize("rule", ["none", "threshold", "bernoulli"])
    def test_opcheck(self, rule):
        args, kwargs = random_case(generator(7), 4, 8, rule, ordered=rule == "none")
        torch.library.opcheck(op, args, kwargs)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(score, eligible, tau):
            one = torch.ones((), dtype=torch.int32)
            out = ops.select_tokens(score * 2, eligible, "threshold", parameter=tau, need=one, fill=one)
            return out.selected & eligible, out.count + 1

        g = generator(8)
        args = torch.rand(4, 16, generator=g), torch.rand(4, 16, generator=g) < 0.5, torch.tensor(1.5)
        assert_same(torch.compile(step, fullgraph=True, backend=backend)(*args), step(*args))
