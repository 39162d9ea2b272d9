# SPDX-License-Identifier: Apache-2.0
"""Samplers against their exact distributions: chi-square over thousands of requests on a few positions.

The exact ones come from the transition probabilities as published, followed state by state through all steps.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dlmkernels as dk
import numerics
from joint_model import Joint
from transitions import follow

pytestmark = pytest.mark.filterwarnings("ignore:dlmkernels does not know:UserWarning")
ROWS, VOCAB, LENGTH, MASK = 6000, 3, 2, 3


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def joint():
    return Joint(VOCAB, LENGTH, peak=1.2)


def check(name, out, expected):
    """Texts of the batch against probabilities by text."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    number = sum(out.generated[:, i] * VOCAB ** (LENGTH - 1 - i) for i in range(LENGTH))
    numerics.assert_distribution(name, number.bincount(minlength=len(texts)), [expected.get(t, 0.0) for t in texts])


def sample(model, **options):
    prompt = torch.zeros(ROWS, 1, dtype=torch.int64)
    if not isinstance(options.get("rule"), dk.RenoisedEntropyBound):  # it has temperatures of its own
        options["temperature"] = 1.0
    return dk.generate(model, prompt, max_new_tokens=LENGTH, seed=torch.arange(ROWS), eos_policy="none", **options)


def context(joint, state):
    """p(token | the others) of each position, [LENGTH][VOCAB]."""
    number = 0
    for token in state:
        number = number * (VOCAB + 1) + token
    return joint.contexts[number].exp().tolist()


class TestMasked:
    MASKED = {"mask_token_id": MASK}

    def test_first_hitting_is_exact(self, joint):
        """One random position at a time, drawn from its conditional: the joint distribution itself."""
        out = sample(joint, config=dk.preset("bd3-lm", cache="none"), **self.MASKED)
        assert (out.num_forwards == LENGTH).all()
        texts = itertools.product(range(VOCAB), repeat=LENGTH)
        check("joint", out, dict(zip(texts, joint.table.flatten().tolist())))
        numerics.assert_distribution("order", (out.commit_step[:, 1] == 0).long().bincount(), [0.5, 0.5])

    @pytest.mark.parametrize("steps", [1, 3, 6])
    @pytest.mark.parametrize("denoise", [True, False])
    def test_mdlm(self, joint, steps, denoise):
        eps = 0.1

        def choices(state, i, step):
            if state[i] != MASK:
                return {state[i]: 1.0}
            p = context(joint, state)[i]
            if step == steps - 1:
                return {p.index(max(p)): 1.0} if denoise else dict(enumerate(p))
            width = (1 - eps) / (steps - denoise)
            t = 1 - width * step
            chance = 1 - (t - width) / t
            return {MASK: 1 - chance} | {v: chance * q for v, q in enumerate(p)}

        out = sample(joint, rule=dk.Ancestral(eps, denoise), steps=steps, **self.MASKED)
        check("mdlm", out, follow({(MASK,) * LENGTH: 1.0}, steps, choices))

    @pytest.mark.parametrize("strategy,eta", [("cap", 0.3), ("rescale", 0.6), ("loop", 0.4)])
    def test_remdm(self, joint, strategy, eta):
        eps, steps, t_on, t_off, top = 0.05, 6, 0.7, 0.25, 0.6
        grid = [1 - (1 - eps) / (steps - 1) * i for i in range(steps)]

        def alpha(t):
            if strategy != "loop":
                return 1 - t
            return top * (1 - t) / (1 - t_on) if t > t_on else top if t > t_off else 1 - (1 - top) * t / t_off

        def choices(state, i, step):
            p = context(joint, state)[i]
            if step == steps - 1:
                return {p.index(max(p)): 1.0} if state[i] == MASK else {state[i]: 1.0}
            t, s = grid[step], grid[step + 1]
            a, b = alpha(t), alpha(s)
            most = (1 - b) / a if a > 0 else math.inf
            sigma = eta * min(1, most) if strategy == "rescale" else min(eta, most)
            if strategy == "loop" and not t_off < t <= t_on:
                sigma = 0.0
            if state[i] != MASK:
                return {state[i]: 1 - sigma, MASK: sigma}
            chance = (b - (1 - sigma) * a) / (1 - a)
            return {MASK: 1 - chance} | {v: chance * q for v, q in enumerate(p)}

        rule = dk.AncestralRemask(eps, True, strategy, eta, t_on, t_off, top)
        out = sample(joint, rule=rule, steps=steps, **self.MASKED)
        check(strategy, out, follow({(MASK,) * LENGTH: 1.0}, steps, choices))

    @pytest.mark.parametrize("scale", [0.7, 1.5])
    def test_sedd(self, joint, scale):
        """A constant multiple of the conditionals as concrete score; the larger one asks for more than certainty."""
        eps, noise_eps, steps = 0.05, 0.2, 5
        grid = [1 - (1 - eps) / (steps - 1) * i for i in range(steps)]

        def sigma(t):
            return -math.log(1 - (1 - noise_eps) * t)

        def choices(state, i, step):
            if state[i] != MASK:
                return {state[i]: 1.0}
            score = [scale * q for q in context(joint, state)[i]]
            total = sum(score)
            chance = 1.0
            if step < steps - 1:
                chance = min(1.0, (math.exp(sigma(grid[step]) - sigma(grid[step + 1])) - 1) * total)
            return {MASK: 1 - chance} | {v: chance * q / total for v, q in enumerate(score)}

        class Scores(nn.Module):
            def __init__(self):
                super().__init__()
                self.joint = joint

            def forward(self, tokens, **kwargs):
                return SimpleNamespace(logits=self.joint(tokens).logits + math.log(scale))

        out = sample(Scores().eval(), rule=dk.ScoreAncestral(eps, noise_eps=noise_eps), steps=steps, **self.MASKED)
        expected = follow({(MASK,) * LENGTH: 1.0}, steps, choices)
        check("sedd", out, {k: v for k, v in expected.items() if MASK not in k})
        numerics.assert_distribution(
            "steps", out.commit_step[:, 1].bincount(minlength=steps), self._when(choices, steps)
        )

    def _when(self, choices, steps):
        left, out = 1.0, []
        for step in range(steps):
            stays = choices((MASK, MASK), 0, step)[MASK]
            out.append(left * (1 - stays))
            left *= stays
        return out


class Pair(nn.Module):
    """Arbitrary distributions for two positions, as functions of both tokens; no mask token."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.table = nn.Parameter(1.5 * torch.randn(VOCAB, VOCAB, LENGTH, VOCAB, generator=g))
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.eval()

    def forward(self, tokens, **kwargs):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[:, 1:] = self.table[tokens[:, 1], tokens[:, 2]]
        return SimpleNamespace(logits=logits)


class TestUniform:
    @pytest.mark.parametrize("steps", [1, 3, 6])
    @pytest.mark.parametrize("denoise", [True, False])
    def test_duo(self, steps, denoise):
        """The posterior of uniform-state diffusion, written out for every token, against the three-way choice."""
        pair, eps, noise_eps = Pair(), 0.1, 0.02
        table = torch.softmax(pair.table.double(), -1)

        def choices(state, i, step):
            p = table[state[0], state[1], i].tolist()
            if denoise and step == steps - 1:
                return {p.index(max(p)): 1.0}
            width = (1 - eps) / (steps - denoise)
            t = 1 - width * step
            s = 0.0 if step == steps - 1 else t - width
            a, b = (1 - (1 - noise_eps) * x for x in (t, s))
            x, out = state[i], {}
            for v in range(VOCAB):
                same = float(v == x)
                top = a * VOCAB * p[v] * same + (a / b - a) * same + (b - a) * p[v] + (1 - a / b) * (1 - b) / VOCAB
                out[v] = top / (a * VOCAB * p[x] + 1 - a)
            assert abs(sum(out.values()) - 1) < numerics.TWO_PROGRAMS
            return out

        uniform = {s: 1 / VOCAB**LENGTH for s in itertools.product(range(VOCAB), repeat=LENGTH)}
        out = sample(pair, rule=dk.UniformState(eps, denoise, noise_eps), steps=steps)
        assert out.complete.all() and (out.num_forwards == steps).all()
        check("duo", out, follow(uniform, steps, choices))

    @pytest.mark.parametrize("denoise", [True, False])
    @pytest.mark.parametrize("strategy,more", [
        ("cap", {"eta": 0.3}), ("cap", {"eta": 1.0}), ("rescale", {"eta": 0.4}), ("loop", {"eta": 0.2}),
        ("constant", {"kappa": 0.6}), ("constant", {"kappa": 0.0, "t_on": 1.0, "t_off": 0.0}),
    ])  # fmt: skip
    def test_psi(self, strategy, more, denoise):
        """kappa times the posterior, and 1 - kappa times the forward process on its end, for every token."""
        pair, eps, noise_eps, steps = Pair(), 0.1, 0.02, 6
        table = torch.softmax(pair.table.double(), -1)
        o = {"eta": 0.5, "kappa": 0.5, "t_on": 0.7, "t_off": 0.25, "alpha_on": 0.6} | more

        def alpha(t):
            if strategy == "loop":  # time itself rests where alpha would be alpha_on
                rest = 1 - o["alpha_on"]
                ends = [(0.0, 0.0), (o["t_off"], rest), (o["t_on"], rest), (1.0, 1.0)]
                (x, u), (y, v) = next(pair for pair in itertools.pairwise(ends) if pair[0][0] <= t <= pair[1][0])
                t = u + (v - u) * (t - x) / (y - x)
            return 1 - (1 - noise_eps) * t

        def posterior(p, x, a, b):
            z = a * VOCAB * p[x] + 1 - a
            out = []
            for v in range(VOCAB):
                stays = (a * VOCAB * p[v] + a / b - a) * (v == x)
                out.append((stays + (b - a) * p[v] + (1 - a / b) * (1 - b) / VOCAB) / z)
            return out

        shares = []

        def share(t, a, b):
            is_on = o["t_off"] < t <= o["t_on"]
            if strategy == "constant":
                return o["kappa"] if is_on else 1.0
            sigma = {"cap": min(o["eta"], (1 - b) / a), "rescale": o["eta"] * min(1, (1 - b) / a), "loop": o["eta"]}
            return max(0.0, 1 - sigma[strategy] / (1 - b)) if b < 1 and (strategy != "loop" or is_on) else 1.0

        def choices(state, i, step):
            p, x = table[state[0], state[1], i].tolist(), state[i]
            if denoise and step == steps - 1:
                return {p.index(max(p)): 1.0}
            width = (1 - eps) / (steps - denoise)
            t = 1 - width * step
            a, b = alpha(t), alpha(0.0 if step == steps - 1 else t - width)
            kappa = share(t, a, b)
            shares.append(kappa)
            straight, end = posterior(p, x, a, b), posterior(p, x, a, 1.0)
            out = {v: kappa * straight[v] + (1 - kappa) * (b * end[v] + (1 - b) / VOCAB) for v in range(VOCAB)}
            assert abs(sum(out.values()) - 1) < numerics.TWO_PROGRAMS
            return out

        uniform = {s: 1 / VOCAB**LENGTH for s in itertools.product(range(VOCAB), repeat=LENGTH)}
        out = sample(pair, rule=dk.PredictorCorrector(eps, denoise, noise_eps, strategy, **o), steps=steps)
        assert out.complete.all() and (out.num_forwards == steps).all()
        check("psi", out, follow(uniform, steps, choices))
        assert min(shares) < 0.95  # the corrector was at work

    def test_one_step_of_psi(self):
        """Where a position goes from each state; the same counts do not fit the posterior alone."""

        class Watch(Pair):
            seen = []

            def forward(self, tokens, **kwargs):
                self.seen.append(tokens[:, 1:].clone())
                return super().forward(tokens)

        watch, kappa, noise_eps = Watch(), 0.3, 0.02
        table = torch.softmax(watch.table.double(), -1)
        rule = dk.PredictorCorrector(0.1, True, noise_eps, "constant", kappa=kappa, t_on=1.0, t_off=0.0)
        sample(watch, rule=rule, steps=4)
        before, after = Watch.seen[-4:][1:3]  # those before the four found out how it attends
        a, b = (1 - (1 - noise_eps) * (1 - 0.3 * i) for i in (1, 2))
        fits = []
        for x, y in itertools.product(range(VOCAB), repeat=2):
            rows = (before == torch.tensor((x, y))).all(1)
            p = table[x, y, 0].tolist()
            z = a * VOCAB * p[x] + 1 - a
            expected = {}
            for share in (kappa, 1.0):
                out = []
                for v in range(VOCAB):
                    same = float(v == x)
                    straight = (a * VOCAB * p[v] + a / b - a) * same + (b - a) * p[v] + (1 - a / b) * (1 - b) / VOCAB
                    end = a * VOCAB * p[v] * same + (1 - a) * p[v]
                    out.append(share * straight / z + (1 - share) * (b * end / z + (1 - b) / VOCAB))
                expected[share] = out
            counts = after[rows, 0].bincount(minlength=VOCAB)
            numerics.assert_distribution(f"from {x}, {y}", counts, expected[kappa])
            try:
                numerics.assert_distribution("posterior", counts, expected[1.0])
                fits.append(True)
            except AssertionError:
                fits.append(False)
        assert not all(fits)

    def test_psi_without_corrector_is_duo(self):
        pair = Pair()
        duo, psi = (
            sample(pair, rule=rule, steps=6).sequences
            for rule in (dk.UniformState(), dk.PredictorCorrector(strategy="constant", kappa=1.0))
        )
        assert torch.equal(duo, psi)

    def test_psi_errors(self):
        with pytest.raises(ValueError, match="strategy must be one of cap, rescale, loop, constant; got 'conf'"):
            dk.PredictorCorrector(strategy="conf")
        with pytest.raises(ValueError, match=r"kappa must be a number from 0 to 1; got 1\.5"):
            dk.PredictorCorrector(kappa=1.5)

    def test_first_noise_is_uniform_and_apart_from_the_second(self):
        """The noise before the first step is not drawn from that step's own numbers."""

        class Watch(Pair):
            seen = []

            def forward(self, tokens, **kwargs):
                self.seen.append(tokens[:, 1:].clone())
                return super().forward(tokens)

        sample(Watch(), rule=dk.RenoisedEntropyBound(0.0, 1.0, 1.0, stability=99, steps=2))
        first, second = Watch.seen[-2:]  # those before found out how it attends
        pairs = (first[:, 0] * VOCAB + first[:, 1]).bincount(minlength=9)
        numerics.assert_distribution("first", pairs, [1 / 9] * 9)
        # one position takes a sample, the other one noise again: independent of what stood there
        changed = (first != second).sum(1)
        assert (changed == 0).any() and (changed == 2).any()

    def test_vocabulary_must_be_known(self):
        model = Pair()
        del model.config
        with pytest.raises(
            ValueError, match="UniformState draws from the vocabulary, but the model's vocab_size is unknown"
        ):
            sample(model, rule=dk.UniformState())

    def test_a_request_does_not_depend_on_its_batch(self):
        pair, prompt = Pair(), torch.zeros(1, 1, dtype=torch.int64)
        out = sample(pair, rule=dk.UniformState(), steps=5)
        for row in (0, 7, 5999):
            alone = dk.generate(
                pair, prompt, max_new_tokens=LENGTH, temperature=1.0, seed=torch.tensor([row]), eos_policy="none",
                rule=dk.UniformState(), steps=5,
            )  # fmt: skip
            assert torch.equal(alone.sequences[0], out.sequences[row])
