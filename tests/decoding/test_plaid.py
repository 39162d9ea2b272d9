# SPDX-License-Identifier: Apache-2.0
"""Plaid: loaded from its four files, against its transformer, its sampler and its bound restated."""

import math

import pytest
import torch

import dlmkernels as dk
import numerics
import research
from dlmkernels import AttentionWindow
from dlmkernels.decoding.vector_bounds import NoiseBound
from dlmkernels.models.adapt import adapt
from dlmkernels.models.plaid import PlaidConfig, PlaidForDiffusionLM
from dlmkernels.reference import normals
from research import LATENT

LEVELS = (-2.0, 4.5)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plaid")
    return research.write_plaid(folder), dk.load(folder, allow_pickle=True), folder


class TestModel:
    def test_forward(self, made):
        w, model, _ = made
        g = torch.Generator().manual_seed(2)
        z, opinion = (torch.randn(2, 9, LATENT, generator=g) for _ in range(2))
        level = torch.tensor(LEVELS)
        gold, peer = (
            torch.stack([research.plaid(v, z[i].to(dtype), LEVELS[i], opinion[i].to(dtype)) for i in range(2)])
            for v, dtype in ((research.double(w), torch.float64), (w, torch.float32))
        )
        out = model(z, level, self_condition=opinion).logits
        numerics.assert_close("own", out, gold, peer)
        adapted = adapt(model)
        hidden = adapted.hidden(
            torch.zeros(2, 9, dtype=torch.int64),
            torch.arange(9).expand(2, -1),
            AttentionWindow(),
            z,
            opinion,
            level=level,
        )
        numerics.assert_close("ops", adapted.logits(hidden), gold, peer)

    def test_schedule(self, made):
        w, model, _ = made
        times = [0.0, 0.1, 0.5, 0.93, 1.0]
        expected = torch.tensor([research.plaid_gamma(w, t) for t in times], dtype=torch.float64)
        torch.testing.assert_close(
            model.gamma(torch.tensor(times, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9
        )
        assert expected.diff().min() > 0 and adapt(model).family.name == "plaid"

    def test_saved_again(self, made, tmp_path):
        w, model, _ = made
        model.save_pretrained(tmp_path)
        again = dk.load(tmp_path)
        for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(a, b) and torch.equal(a, w[name.replace("backbone.", "model.")]), name

    def test_what_is_refused(self, made, tmp_path):
        _, model, folder = made
        with pytest.raises(ValueError, match="holds pickle files: pass allow_pickle=True"):
            dk.load(folder)
        with pytest.raises(ValueError, match=r"timesteps must be gamma of each batch row, of shape \[2\]; got None"):
            model(torch.zeros(2, 3, LATENT))
        with pytest.raises(ValueError, match=rf"inputs_embeds must have shape \[batch, length, {LATENT}\]"):
            model(torch.zeros(2, 3, 1), torch.zeros(2))
        research.write_plaid(tmp_path)
        torch.save({"input_linear.weight": torch.ones(4, 2)}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"model\.pt lacks input_linear\.weight or output_linear\.weight"):
            dk.load(tmp_path, allow_pickle=True)
        with pytest.raises(ValueError, match="rule Threshold decodes mask tokens, which models of family 'plaid'"):
            dk.generate(model, torch.tensor([[1]]), rule=dk.Threshold(0.9), max_new_tokens=4)


def restated_sampler(w, seed, length, steps, temperature=0.9, ddim=False, given=None):
    """Logits `[T, V]` of Plaid's last forward, in float64, from the draws of a request."""
    w = research.double(w)
    e = research.plaid_table(w)
    count = steps - 1

    def noise(step):
        return normals(torch.tensor([seed]), torch.arange(length), torch.tensor(step), LATENT).double()

    is_given = torch.zeros(length, 1, dtype=torch.bool) if given is None else (given >= 0)[:, None]
    clean = torch.zeros(length, LATENT).double() if given is None else e[given.clamp(min=0)]
    gamma_t = research.plaid_gamma(w, 1.0)
    alpha, sigma = (1 / (1 + math.exp(s * gamma_t)) ** 0.5 for s in (1, -1))
    z = torch.where(is_given, alpha * clean + sigma * noise(-1), noise(-1))
    opinion = torch.zeros_like(z)
    for i in range(count):
        t = torch.linspace(1, 0, count)[i].double().item()
        gamma_t = research.plaid_gamma(w, t)
        x = torch.softmax(research.plaid(w, z, gamma_t, opinion), -1) @ e
        opinion = x = torch.where(is_given, clean, x)
        if t > 0:
            gamma_s = research.plaid_gamma(w, t - 1 / count)
            (a_t, s_t), (a_s, s_s) = (
                (1 / math.sqrt(1 + math.exp(g)), 1 / math.sqrt(1 + math.exp(-g))) for g in (gamma_t, gamma_s)
            )
            implied = (z - a_t * x) / s_t / temperature
            x = (z - s_t * implied) / a_t
            if ddim:
                z = a_s * x + s_s * implied
            else:
                c = -math.expm1(gamma_s - gamma_t)
                z = (1 - c) * a_s / a_t * z + c * a_s * x + math.sqrt(c * (1 - a_s**2)) * noise(i)
    return research.plaid(w, z, gamma_t, opinion)


class TestSampler:
    @pytest.mark.parametrize("temperature,ddim", [(0.9, False), (0.9, True), (1.0, False), (0.5, True)])
    def test_published(self, temperature, ddim, made):
        w, model, _ = made
        rule = dk.LearnedNoise(score_temperature=temperature, ddim=ddim)
        seeds = torch.tensor([3, 2**50])
        out = dk.generate(
            model, torch.zeros(2, 0, dtype=torch.int64), max_new_tokens=9, steps=24, seed=seeds, rule=rule
        )
        assert (out.num_forwards == 24).all() and out.complete.all()
        for row, seed in enumerate(seeds.tolist()):
            z = restated_sampler(w, seed, 9, 24, temperature, ddim)
            best = z.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
            assert torch.equal(out.sequences[row], z.argmax(1))

    def test_given_tokens(self, made):
        w, model, _ = made
        given = torch.tensor([7, 3, -1, -1, 5, -1, 8, -1])
        out = dk.infill(model, given, steps=16, seed=7)
        z = restated_sampler(w, 7, 8, 16, given=given)
        best = z.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
        assert torch.equal(out.sequences[0], torch.where(given >= 0, given, z.argmax(1)))

    @pytest.mark.parametrize("steps", [1, 2])
    def test_few_steps(self, steps, made):
        out = dk.generate(made[1], torch.tensor([[3]]), max_new_tokens=5, steps=steps, seed=1)
        assert out.complete.all() and out.num_forwards[0] == steps

    def test_whatever_the_batch(self, made):
        model = made[1]
        ids, valid = torch.tensor([[3, 8, 2], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
        out = dk.generate(model, ids, valid, max_new_tokens=8, steps=12, seed=torch.tensor([4, 5]))
        for i, row in enumerate(([3, 8, 2], [9])):
            alone = dk.generate(model, torch.tensor(row), max_new_tokens=8, steps=12, seed=torch.tensor([4 + i]))
            assert torch.equal(alone.generated[0], out.generated[i])


class TestBound:
    def test_exact_model(self):
        """Before training the model says the exact posterior of tokens that are all equally likely: -ln V each."""
        torch.manual_seed(0)
        config = PlaidConfig(
            vocab_size=5, hidden_size=16, embed_dim=8, num_attention_heads=2, num_hidden_layers=1, gamma_0=-5.0,
            gamma_1=8.0,
        )  # fmt: skip
        config.dlm_family = "plaid"
        model = PlaidForDiffusionLM(config).eval()
        rows = 1500
        out = dk.log_likelihood(
            model, torch.zeros(rows, 1, dtype=torch.int64), torch.arange(rows)[:, None] % 5, seed=torch.arange(rows),
            num_samples=16, batch_size=8192,
        )  # fmt: skip
        error = out.total.std().item() / rows**0.5
        assert abs(out.total.mean().item() + math.log(5)) < numerics.MAX_NORMAL_SCORE * error + 0.01 < 0.2

    def test_restated(self, made):
        """Every term from the same random numbers; the slope of the schedule by a difference."""
        w, model, _ = made
        v = research.double(w)
        e, text = research.plaid_table(v), torch.tensor([3, 8, 5, 11, 2])
        drawn, real = [], NoiseBound._normals

        def spy(bound):
            drawn.append(real(bound))
            return drawn[-1]

        NoiseBound._normals = spy
        times = []
        original = type(model).gamma
        type(model).gamma = lambda self, t: (times.append(t.detach().clone()), original(self, t))[1]
        try:
            out = dk.log_likelihood(model, text[:2], text[2:], seed=6, num_samples=1)
        finally:
            NoiseBound._normals, type(model).gamma = real, original
        t = next(t for t in times if t.shape == (1,)).item()
        g0, g1, g = research.plaid_gamma(v, 0.0), research.plaid_gamma(v, 1.0), research.plaid_gamma(v, t)
        slope = (research.plaid_gamma(v, t + 1e-5) - research.plaid_gamma(v, t - 1e-5)) / 2e-5

        def split(g):
            return 1 / math.sqrt(1 + math.exp(g)), 1 / math.sqrt(1 + math.exp(-g))

        def says(z, g):
            first = torch.softmax(research.plaid(v, z, g, torch.zeros_like(z)), -1) @ e
            return research.plaid(v, z, g, first)

        a, s = split(g0)
        z = a * e[text] + s * drawn[0][0].double()
        expected = says(z, g0).log_softmax(-1)[torch.arange(5), text]
        a, s = split(g)
        z = a * e[text] + s * drawn[1][0].double()
        x = torch.softmax(says(z, g), -1) @ e
        expected = expected - 0.5 * slope * math.exp(-g) * (e[text] - x).pow(2).sum(1)
        a, s = split(g1)
        expected = expected - 0.5 * (s**2 + (a * e[text]) ** 2 - 1 - 2 * math.log(s)).sum(1)
        torch.testing.assert_close(out.per_token[0], expected[2:], rtol=1e-4, atol=1e-4)
