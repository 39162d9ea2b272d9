# SPDX-License-Identifier: Apache-2.0
"""Diffusion-LM: loaded from a file of weights, against its transformer and its samplers restated."""

import itertools
import math

import pytest
import torch

import dlmkernels as dk
import numerics
import research
from dlmkernels import AttentionWindow
from dlmkernels.decoding.vector_bounds import DenoisingBound
from dlmkernels.models.adapt import adapt
from dlmkernels.reference import normals
from research import HEADS, LATENT

STEPS = 40  # of the training


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusion-lm") / "ema_0.9999_200000.pt"
    w = research.write_diffusion_lm(path)
    options = {"family": "diffusion-lm", "num_attention_heads": HEADS, "noise_steps": STEPS}
    return w, dk.load(path, allow_pickle=True, **options), path


class TestModel:
    def test_forward(self, made):
        w, model, _ = made
        z, times = torch.randn(2, 9, LATENT), (12.5, 975.0)
        gold, peer = (
            torch.stack([research.diffusion_lm(v, z[i].to(dtype), times[i]) for i in range(2)])
            for v, dtype in ((research.double(w), torch.float64), (w, torch.float32))
        )
        out = model(z, torch.tensor(times)).last_hidden_state
        numerics.assert_close("own", out, gold, peer)
        window, positions = AttentionWindow(), torch.arange(9).expand(2, -1)
        hidden = adapt(model).hidden(positions, positions, window, z, level=torch.tensor(times))
        numerics.assert_close("ops", hidden, gold, peer)

    def test_schedule(self, made):
        """The power that is left, by ratios, the first of which is taken from 0.99."""
        _, model, _ = made
        kept = model.kept(torch.device("cpu"))
        expected = [(1 - math.sqrt((i + 1) / STEPS + 1e-4)) / 0.99 for i in range(STEPS - 1)]
        torch.testing.assert_close(kept[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(kept[-1], kept[-2] * 0.001, rtol=1e-12, atol=0)
        assert model.told(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1000 * (STEPS - 1) / STEPS]

    def test_saved_again(self, made, tmp_path):
        w, model, _ = made
        model.save_pretrained(tmp_path)
        again = dk.load(tmp_path)
        assert adapt(again).family.name == "diffusion-lm" and again.lm_head.weight is again.word_embedding.weight
        for name, a in again.state_dict().items():
            assert torch.equal(a, w[name.removeprefix("backbone.")]), name

    def test_what_is_refused(self, made, tmp_path):
        _, model, path = made
        with pytest.raises(ValueError, match="is a pickle: pass allow_pickle=True"):
            dk.load(path, family="diffusion-lm")
        with pytest.raises(
            ValueError, match=r"timesteps must be the step number of each batch row, of shape \[2\]; got None"
        ):
            model(torch.zeros(2, 3, LATENT))
        with pytest.raises(ValueError, match="gradients are not supported for the bound of family 'diffusion-lm'"):
            dk.log_likelihood(model, torch.tensor([1]), torch.tensor([2]), gradients=True)
        torch.save({"word_embedding.weight": torch.ones(3, 2)}, tmp_path / "ema.pt")
        with pytest.raises(ValueError, match=r"it lacks position_embeddings\.weight, time_embed"):
            dk.load(tmp_path / "ema.pt", family="diffusion-lm", allow_pickle=True)


def restated(w, seed, length, steps, clamp=True, eta=None, given=None):
    """Logits `[T, V]` read off the last clean vectors, in float64, from the draws of a request."""
    w = research.double(w)
    e = w["word_embedding.weight"]
    full = [0.99] + [1 - math.sqrt(i / STEPS + 1e-4) for i in range(1, STEPS + 1)]
    beta = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(full)]
    kept = torch.tensor([1 - b for b in beta], dtype=torch.float64).cumprod(0).tolist()
    index = [round(i * (STEPS - 1) / (steps - 1)) for i in range(steps)]

    def noise(step):
        return normals(torch.tensor([seed]), torch.arange(length), torch.tensor(step), LATENT).double()

    is_given = torch.zeros(length, 1, dtype=torch.bool) if given is None else (given >= 0)[:, None]
    clean = torch.zeros(length, LATENT).double() if given is None else e[given.clamp(min=0)]
    z = torch.where(is_given, clean, noise(-1))
    for number, i in enumerate(reversed(range(steps))):
        x = research.diffusion_lm(w, z, index[i] * 1000 / STEPS)
        if clamp:
            x = e[torch.cdist(x, e).argmin(1)]
        now, before = kept[index[i]], kept[index[i - 1]] if i > 0 else 1.0
        if i == 0:
            break
        x = torch.where(is_given, clean, x)
        if eta is None:
            b = 1 - now / before
            mean = b * math.sqrt(before) / (1 - now) * x + (1 - before) * math.sqrt(1 - b) / (1 - now) * z
            z = mean + math.sqrt(b * (1 - before) / (1 - now)) * noise(number)
        else:
            implied = (z - math.sqrt(now) * x) / math.sqrt(1 - now)
            s = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
            z = math.sqrt(before) * x + math.sqrt(1 - before - s**2) * implied + s * noise(number)
        z = torch.where(is_given, clean, z)
    return x @ e.T + w["lm_head.bias"]


class TestSampler:
    @pytest.mark.parametrize("steps", [STEPS, 9])
    @pytest.mark.parametrize("clamp,eta", [(True, None), (False, None), (True, 0.0), (False, 0.7)])
    def test_published(self, steps, clamp, eta, made):
        w, model, _ = made
        seeds = torch.tensor([3, 2**50])
        out = dk.generate(
            model, torch.zeros(2, 0, dtype=torch.int64), max_new_tokens=9, steps=steps, seed=seeds,
            rule=dk.VectorDenoising(clamp, eta),
        )  # fmt: skip
        assert (out.num_forwards == steps).all() and out.complete.all()
        for row, seed in enumerate(seeds.tolist()):
            z = restated(w, seed, 9, steps, clamp, eta)
            best = z.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
            assert torch.equal(out.sequences[row], z.argmax(1))

    def test_given_tokens(self, made):
        """They are overwritten in every step, without noise."""
        w, model, _ = made
        given = torch.tensor([7, 3, -1, -1, 5, -1, 8, -1])
        out = dk.infill(model, given, steps=STEPS, seed=7)
        z = restated(w, 7, 8, STEPS, given=given)
        assert torch.equal(out.sequences[0], torch.where(given >= 0, given, z.argmax(1)))

    def test_whatever_the_batch(self, made):
        model = made[1]
        ids, valid = torch.tensor([[3, 8, 2], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
        out = dk.generate(model, ids, valid, max_new_tokens=8, steps=12, seed=torch.tensor([4, 5]))
        for i, row in enumerate(([3, 8, 2], [9])):
            alone = dk.generate(model, torch.tensor(row), max_new_tokens=8, steps=12, seed=torch.tensor([4 + i]))
            assert torch.equal(alone.generated[0], out.generated[i])

    def test_a_rule_for_vectors_on_logits(self, tmp_path):
        """A model that says logits is walked with the mean of its embeddings, and nothing is clamped."""
        research.write("langflow", tmp_path)
        out = dk.generate(
            dk.load(tmp_path), torch.tensor([[4]]), max_new_tokens=5, steps=6, seed=1, rule=dk.VectorDenoising(False)
        )
        assert out.complete.all()

    def test_errors(self):
        with pytest.raises(ValueError, match=r"eta must be None or a number from 0 to 1"):
            dk.VectorDenoising(eta=2.0)


def schedule():
    """What is left of the signal's power after each step, and what each step takes of it."""
    full = [0.99] + [1 - math.sqrt(i / STEPS + 1e-4) for i in range(1, STEPS + 1)]
    beta = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(full)]
    return torch.tensor([1 - b for b in beta], dtype=torch.float64).cumprod(0).tolist(), beta


def gaussians(mean, variance, other, spread):
    """Divergence of a normal distribution from another, summed over dimensions."""
    return 0.5 * (math.log(spread / variance) - 1 + variance / spread + (mean - other) ** 2 / spread).sum(-1)


class TestBound:
    TEXT = torch.tensor([3, 8, 5, 11, 2])

    def draws(self, monkeypatch):
        """What the bound draws, in order: `[T, LATENT]` each."""
        drawn, real = [], DenoisingBound._normals

        def once(bound):
            x = real(bound)
            drawn.append(x[0].double())
            return x

        monkeypatch.setattr(DenoisingBound, "_normals", once)
        return drawn

    def term(self, w, i, first, noise, given):
        """What one step adds to ln p of each token, T times: the published sum, in float64."""
        e, (kept, beta) = w["word_embedding.weight"], schedule()
        clean = e[self.TEXT]
        is_given = (torch.arange(len(clean)) < given)[:, None]
        x = clean + math.sqrt(1 - kept[0]) * first
        z = torch.where(is_given, clean, math.sqrt(kept[i]) * x + math.sqrt(1 - kept[i]) * noise)
        said = research.diffusion_lm(w, z, i * 1000 / STEPS)
        said = e[torch.cdist(said, e).argmin(1)]
        if i == 0:
            spread = beta[1] * (1 - kept[0]) / (1 - kept[1])
            step = gaussians(clean, 1 - kept[0], said, spread)
        else:
            a = beta[i] * math.sqrt(kept[i - 1]) / (1 - kept[i])
            b = (1 - kept[i - 1]) * math.sqrt(1 - beta[i]) / (1 - kept[i])
            spread = beta[i] * (1 - kept[i - 1]) / (1 - kept[i])
            step = gaussians(a * x + b * z, spread, a * said + b * z, spread)
        end = gaussians(math.sqrt(kept[-1]) * x, 1 - kept[-1], torch.zeros_like(x), 1.0)
        tokens = (x @ e.T + w["lm_head.bias"]).log_softmax(-1)[torch.arange(len(clean)), self.TEXT]
        return tokens - end - STEPS * step

    @pytest.mark.parametrize("given", [0, 2])
    def test_restated(self, given, made, monkeypatch):
        """As many samples as steps: each step once, the last of which is the first of the noise's."""
        w, model, _ = made
        drawn = self.draws(monkeypatch)
        out = dk.log_likelihood(model, self.TEXT[:given], self.TEXT[given:], seed=6, num_samples=STEPS)
        assert len(drawn) == 2 * STEPS and out.num_forwards == STEPS
        v = research.double(w)
        expected = sum(self.term(v, i, *drawn[2 * i : 2 * i + 2], given) for i in range(STEPS)) / STEPS
        torch.testing.assert_close(out.per_token[0], expected[given:], rtol=1e-4, atol=1e-3)

    def test_fewer_samples_estimate_the_same(self, made):
        """Their mean over seeds is that of whole sums, and the squares of their standard errors have that of their
        spread; what is taken without being told is the whole sum.
        """
        model = made[1]
        rows, prompt = 400, torch.zeros(400, 0, dtype=torch.int64)
        answer = self.TEXT.expand(rows, -1)
        few = dk.log_likelihood(model, prompt, answer, seed=torch.arange(rows), num_samples=5)
        whole = dk.log_likelihood(model, prompt[:40], answer[:40], seed=torch.arange(1000, 1040))
        assert whole.num_forwards == STEPS
        errors = [out.total.std().item() / len(out.total) ** 0.5 for out in (few, whole)]
        assert abs(few.total.mean() - whole.total.mean()) < numerics.MAX_NORMAL_SCORE * math.hypot(*errors)
        assert 0.8 < few.standard_error.square().mean().sqrt() / few.total.std() < 1.5

    def test_whatever_the_batch(self, made):
        model = made[1]
        ids, valid = torch.tensor([[3, 8], [0, 9]]), torch.tensor([[1, 1], [0, 1]])
        answer = torch.tensor([[4, 6, 7], [1, 2, 0]])
        together = dk.log_likelihood(
            model, ids, answer, valid, torch.tensor([[1, 1, 1], [1, 1, 0]]), seed=torch.tensor([4, 5]), num_samples=6
        )
        for i, (prompt, text) in enumerate((([3, 8], [4, 6, 7]), ([9], [1, 2]))):
            alone = dk.log_likelihood(model, torch.tensor(prompt), torch.tensor(text), seed=4 + i, num_samples=6)
            torch.testing.assert_close(alone.per_token[0], together.per_token[i, : len(text)], rtol=1e-5, atol=1e-5)
