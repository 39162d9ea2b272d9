# SPDX-License-Identifier: Apache-2.0
"""Continuous models: vectors walk from noise to tokens; against samplers and bounds restated from the same numbers."""

import itertools
import math

import pytest
import torch

import dlmkernels as dk
import numerics
import research
from decodings import ragged
from dlmkernels.decoding.programs.continuous import ContinuousProgram
from dlmkernels.decoding.vector_bounds import FlowBound
from dlmkernels.models.dit import DiTConfig, DiTForDiffusionLM
from dlmkernels.reference import normals
from research import HIDDEN, VOCAB


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Weights of a LangFlow and the model loaded from them; its self-conditioning and head weakened.

    At full strength a random one feeds its own rounding back, and two programs are tokens apart after some steps.
    """
    folder = tmp_path_factory.mktemp("langflow")
    w = research.write("langflow", folder)
    model = dk.load(folder)
    for name, factor in {"self_cond_proj.weight": 0.2, "output_layer.linear.weight": 0.3}.items():
        w[name] = w[name] * factor
        model.backbone.get_parameter(name).data.mul_(factor)
    return w, model


@pytest.fixture
def clean_flow(flow):
    """The same as though it had been trained with given tokens free of noise."""
    w, model = flow
    model.config.clean_context = True
    yield w, model
    model.config.clean_context = False


def restated_flow(w, noise, steps, given=None, dtype=torch.float64, clean_context=False):
    """Logits `[T, V]` of LangFlow's last forward: its sampler, from noise `[T, HIDDEN]`; `given` -1 where it is not."""
    w = {name: v.to(dtype) for name, v in w.items()}
    e = research.table(w)
    # quantiles of a Gumbel distribution whose uniform numbers end one rounding unit before 1
    q = torch.linspace(1 - 1e-5, 1e-5, steps).double() * (1 - torch.finfo(torch.float32).eps)
    gamma = (w["proposal.loc"].double() - w["proposal.scale"].double() * (-q.log()).log()).float().double()
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    is_given = torch.zeros(len(noise), 1, dtype=torch.bool) if given is None else (given >= 0)[:, None]
    clean = torch.zeros_like(noise).to(dtype) if given is None else e[given.clamp(min=0)]
    noise, opinion = noise.to(dtype), torch.zeros_like(noise).to(dtype)
    z = torch.where(is_given, alpha[0] * clean + sigma[0] * noise, noise).to(dtype)
    for i in range(steps):
        if clean_context:
            z = torch.where(is_given, clean, z)
        logits = research.langflow(w, z, gamma[i].item(), opinion)
        if i == steps - 1:
            return logits
        opinion = torch.where(is_given, clean, torch.softmax(logits, -1) @ e)
        implied = (z - alpha[i] * opinion) / sigma[i]
        z = (alpha[i + 1] * opinion + sigma[i + 1] * implied).to(dtype)
    return None


def first_noise(seed, length, width=HIDDEN):
    return normals(torch.tensor([seed]), torch.arange(length), torch.tensor(-1), width)


class TestNormals:
    def test_distribution(self):
        x = normals(torch.arange(200)[:, None], torch.arange(50), torch.tensor(3), 7).double().flatten()
        edges = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
        below = torch.cat((torch.tensor([0.0]), 0.5 * (1 + torch.erf(edges / 2**0.5)), torch.tensor([1.0]))).double()
        numerics.assert_distribution("normals", torch.bucketize(x, edges).bincount(minlength=22), below.diff())

    def test_pairs_are_independent(self):
        x = normals(torch.arange(20000), torch.tensor(0), torch.tensor(0), 2)
        quadrant = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
        numerics.assert_distribution("quadrants", quadrant.bincount(), [0.25] * 4)
        far = x.double().pow(2).sum(1) > 2 * math.log(2)  # with probability one half
        numerics.assert_distribution("radius", far.long().bincount(), [0.5, 0.5])

    def test_keys(self):
        """Every argument matters, and nothing else: not the width that is asked for, nor the batch."""
        seed, position = torch.tensor([1, 2**40]), torch.arange(5)
        x = normals(seed[:, None], position, torch.tensor(2), 6)
        assert torch.equal(x[1:], normals(seed[1:, None], position, torch.tensor(2), 6))
        assert torch.equal(x[..., :3], normals(seed[:, None], position, torch.tensor(2), 3))
        for other in (
            normals(seed[:, None], position, torch.tensor(3), 6), normals(seed[:, None] + 1, position, torch.tensor(2), 6),
            normals(seed[:, None], position + 5, torch.tensor(2), 6),
        ):  # fmt: skip
            assert not (x == other).any()


class TestLangFlow:
    @pytest.mark.parametrize("steps", [1, 2, 16, 64])
    def test_published_sampler(self, steps, flow):
        w, model = flow
        seeds = torch.tensor([3, 4, 2**50])
        out = dk.generate(model, torch.zeros(3, 0, dtype=torch.int64), max_new_tokens=11, steps=steps, seed=seeds)
        assert out.complete.all() and (out.num_forwards == steps).all()
        for row, seed in enumerate(seeds.tolist()):
            z = restated_flow(w, first_noise(seed, 11), steps)
            best = z.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
            assert torch.equal(out.sequences[row], z.argmax(1))
            p = z.softmax(1).max(1).values.float()
            torch.testing.assert_close(out.confidence[row], p, rtol=0, atol=1e-3)

    def test_one_step_is_exact(self, flow):
        """The vectors after each step, to the rounding of float32."""
        w, model = flow
        seen = []
        with watched(seen):
            dk.generate(model, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=8, steps=4, seed=5)
        gold = self.vectors(w, 5, 8, 4, torch.float64)
        peer = self.vectors(w, 5, 8, 4, torch.float32)
        for i in range(3):
            numerics.assert_close(f"z {i}", seen[i][0], gold[i], peer[i])

    def vectors(self, w, seed, length, steps, dtype):
        out, real = [], research.langflow

        def spy(w, z, gamma, opinion):
            out.append(z)
            return real(w, z, gamma, opinion)

        research.langflow = spy
        try:
            restated_flow(w, first_noise(seed, length), steps, dtype=dtype)
        finally:
            research.langflow = real
        return out[1:]

    def test_given_tokens(self, flow):
        """After a prompt, and around tokens that stand in the answer: their vectors have the noise that all have."""
        w, model = flow
        prompt, given = torch.tensor([7, 3, 9]), torch.tensor([-1, -1, 5, -1, 8, -1])
        out = dk.generate(model, prompt, max_new_tokens=6, steps=12, seed=7, given=given)
        z = restated_flow(w, first_noise(7, 9), 12, torch.cat((prompt, given)))
        best = z.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
        expected = torch.where(torch.cat((prompt, given)) >= 0, torch.cat((prompt, given)), z.argmax(1))
        assert torch.equal(out.sequences[0], expected)
        assert (out.commit_step[0] >= 0).tolist() == (torch.cat((prompt, given)) < 0).tolist()
        filled = dk.infill(model, torch.cat((prompt, given)), steps=12, seed=7)
        assert torch.equal(filled.sequences, out.sequences)

    def test_given_tokens_without_noise(self, clean_flow):
        """Of models that were trained so; of others their vectors have the noise of the others."""
        w, model = clean_flow
        prompt, given = torch.tensor([7, 3, 9]), torch.tensor([-1, -1, 5, -1, 8, -1])
        z = restated_flow(w, first_noise(7, 9), 12, torch.cat((prompt, given)), clean_context=True)
        best = z.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie: this comparison needs another seed"
        out = dk.generate(model, prompt, max_new_tokens=6, steps=12, seed=7, given=given)
        is_given = torch.cat((prompt, given)) >= 0
        assert torch.equal(out.sequences[0], torch.where(is_given, torch.cat((prompt, given)), z.argmax(1)))
        p = z.softmax(1).max(1).values.float()[~is_given]
        torch.testing.assert_close(out.confidence[0, ~is_given], p, rtol=0, atol=1e-3)
        model.config.clean_context = False
        other = dk.generate(model, prompt, max_new_tokens=6, steps=12, seed=7, given=given)
        assert numerics.far(other.confidence[0, ~is_given], out.confidence[0, ~is_given])

    def test_given_tokens_matter(self, flow):
        _, model = flow
        outs = [dk.generate(model, torch.tensor([t] * 4), max_new_tokens=8, steps=8, seed=1) for t in (3, 20)]
        assert not torch.equal(outs[0].generated, outs[1].generated)

    def test_whatever_the_batch(self, flow):
        _, model = flow
        rows, ids, valid = ragged((5, 9, 2))
        rows, ids = [r % VOCAB for r in rows], (ids % VOCAB) * valid
        out = dk.generate(model, ids, valid, seed=torch.tensor((3, 4, 5)), max_new_tokens=12, steps=10)
        for i, row in enumerate(rows):
            alone = dk.generate(model, row, seed=torch.tensor((3 + i,)), max_new_tokens=12, steps=10)
            assert torch.equal(alone.generated[0], out.generated[i])
            assert torch.equal(alone.commit_step[0, len(row) :], out.commit_step[i, 9:])

    def test_when_a_token_came(self, flow):
        """`commit_step`: the forward since which a token has been the likeliest; a streamer sees all of them."""

        class Drafts:
            def __init__(self):
                self.drafts = []

            def put(self, value):
                pass

            def put_draft(self, tokens, *args):
                self.drafts.append(tokens.clone())

            def end(self):
                pass

        _, model = flow
        drafts = Drafts()
        out = dk.generate(model, torch.tensor([[4, 5]]), max_new_tokens=10, steps=9, seed=2, streamer=drafts)
        seen = torch.stack([d.flatten()[-10:] for d in drafts.drafts])
        assert len(seen) == 9 and torch.equal(seen[-1], out.generated[0])
        for i, step in enumerate(out.commit_step[0, 2:].tolist()):
            assert (seen[step:, i] == seen[-1, i]).all() and (step == 0 or seen[step - 1, i] != seen[-1, i])
        assert len(out.commit_step[0, 2:].unique()) > 1

    def test_excluded_tokens(self, flow):
        _, model = flow
        free = dk.generate(model, torch.tensor([[4]]), max_new_tokens=10, steps=8, seed=2)
        banned = free.generated.unique().tolist()
        out = dk.generate(model, torch.tensor([[4]]), max_new_tokens=10, steps=8, seed=2, suppress_token_ids=banned)
        assert out.complete.all() and not torch.isin(out.generated, torch.tensor(banned)).any()
        wanted = dk.generate(model, torch.tensor([[4]]), max_new_tokens=10, steps=8, seed=2, logit_bias={17: 1e4})
        assert (wanted.generated == 17).all()

    def test_other_steps_by_default(self, flow):
        out = dk.generate(flow[1], torch.tensor([[4]]), max_new_tokens=7, seed=2)
        assert (out.num_forwards == 7).all()

    @pytest.mark.parametrize("options,match", [
        ({"rule": dk.NextToken()}, r"rule NextToken predicts each token from those before it, which models of family 'langflow' were not trained on"),
        ({"rule": dk.Threshold(0.9)}, r"rule Threshold decodes mask tokens, which models of family 'langflow' were not trained on: use the rule of the preset 'langflow'"),
        ({"temperature": 0.5}, r"temperature=0\.5 has no effect with rule EmbeddingFlow here"),
        ({"cfg_scale": 1.0, "mask_token_id": 1}, r"cfg_scale cannot be used with rule EmbeddingFlow"),
        ({"constraint": torch.ones(VOCAB, dtype=torch.bool)}, r"constraint cannot be used with rule EmbeddingFlow"),
        ({"cache": "dual"}, r"cache cannot be used with rule EmbeddingFlow"),
        ({"rule": dk.EmbeddingFlow}, r"rule must be a Rule"),
    ])  # fmt: skip
    def test_what_is_refused(self, options, match, flow):
        with pytest.raises((ValueError, TypeError), match=match):
            dk.generate(flow[1], torch.tensor([[4]]), max_new_tokens=4, **options)

    def test_other_models_are_refused(self, tmp_path):
        research.write("mdlm", tmp_path)
        with pytest.raises(ValueError, match="rule EmbeddingFlow decodes noisy vectors, which models of family 'mdlm'"):
            dk.generate(dk.load(tmp_path), torch.tensor([[4]]), max_new_tokens=4, rule=dk.EmbeddingFlow())
        with pytest.raises(ValueError, match=r"eps must be a positive number, up to 0\.5; got 0"):
            dk.EmbeddingFlow(0.0)


class watched:
    """Keeps a copy of the vectors after each step."""

    def __init__(self, seen):
        self.seen, self.real = seen, ContinuousProgram._move

    def __enter__(self):
        def move(program, *args):
            self.real(program, *args)
            self.seen.append(program.z.clone())

        ContinuousProgram._move = move

    def __exit__(self, *exc):
        ContinuousProgram._move = self.real


class TestFlowBound:
    def test_exact_model(self):
        """A model before training says the exact posterior of tokens that are all equally likely: -ln V each."""
        torch.manual_seed(0)
        config = DiTConfig(
            vocab_size=5, hidden_size=16, cond_dim=8, num_attention_heads=2, num_hidden_layers=1, time="gamma",
            head="flow", noise="gumbel", normalized_embedding=True, self_conditioning=True,
        )  # fmt: skip
        config.dlm_family = "langflow"
        model = DiTForDiffusionLM(config).eval()
        rows = 1500
        out = dk.log_likelihood(
            model, torch.zeros(rows, 1, dtype=torch.int64), torch.arange(rows)[:, None] % 5, seed=torch.arange(rows),
            ode_steps=12,
        )  # fmt: skip
        assert out.num_forwards == 1 and out.standard_error.isnan().all()
        error = out.total.std().item() / rows**0.5
        assert abs(out.total.mean().item() + math.log(5)) < numerics.MAX_NORMAL_SCORE * error < 0.35

    @pytest.mark.parametrize("clean", [False, True])
    @pytest.mark.parametrize("exact", [False, True])
    def test_restated(self, flow, exact, clean, monkeypatch):
        """Heun's method, the divergence by the whole Jacobian, and every term, from the same random numbers."""
        w, model = flow
        w = research.double(w)
        monkeypatch.setattr(model.config, "clean_context", clean)
        prompt, answer, steps, seed = torch.tensor([3, 8]), torch.tensor([5, 11, 2]), 3, 6
        drawn, real = [], FlowBound._normals

        def spy(bound):
            drawn.append(real(bound))
            return drawn[-1]

        FlowBound._normals = spy
        try:
            out = dk.log_likelihood(model, prompt, answer, seed=seed, ode_steps=steps, exact_divergence=exact)
        finally:
            FlowBound._normals = real
        e, text = research.table(w), torch.cat((prompt, answer))
        q = torch.linspace(0, 1, steps + 1).clamp(1e-5, 1 - 1e-5).double() * (1 - torch.finfo(torch.float32).eps)
        gamma = w["proposal.loc"] - w["proposal.scale"] * (-q.log()).log()
        ratio, noise = (-gamma / 2).exp(), drawn[0][0].double()

        is_answer = (torch.arange(5) >= 2)[:, None]

        def logits_of(z, g, opinion):
            if clean:
                z = torch.where(is_answer, z, e[text])
            return research.langflow(w, z, g, opinion)

        def mean(z, g, opinion):
            return torch.softmax(logits_of(z, g, opinion), -1) @ e

        def opinion_of(z, g):
            said = mean(z, g, None)
            return torch.where(is_answer, said, e[text]) if clean else said

        def at(y, s, u):
            g = -2 * math.log(s)
            spread = 1 / math.sqrt(1 + math.exp(-g))
            opinion = opinion_of(y * spread, g)
            with torch.enable_grad():
                jacobian = torch.autograd.functional.jacobian(lambda z: mean(z, g, opinion), y * spread)
            if exact:
                return mean(y * spread, g, opinion), torch.einsum("idid->i", jacobian) * spread
            pulled = torch.einsum("id,idje->je", u, jacobian)
            return mean(y * spread, g, opinion), (u * pulled).sum(1) * spread

        y, change = ratio[0] * e[text] + noise, torch.zeros(5).double()
        spread = 1 / math.sqrt(1 + math.exp(-gamma[0]))
        z = y * spread
        logits = logits_of(z, gamma[0].item(), opinion_of(z, gamma[0].item()))
        likely = logits.log_softmax(-1)[torch.arange(5), text]
        assert len(drawn) == (1 if exact else 1 + 2 * steps)
        probes = itertools.cycle([None]) if exact else iter(u[0].double() * is_answer for u in drawn[1:])
        for i in range(steps):
            h = (ratio[i + 1] - ratio[i]).item()
            known = ratio[i + 1] * e[text] + noise
            x, d = at(y, ratio[i].item(), next(probes))
            moved = torch.cat((known[:2], (y + h * x)[2:]))
            x2, d2 = at(moved, ratio[i + 1].item(), next(probes))
            y = torch.cat((known[:2], (y + h / 2 * (x + x2))[2:]))
            change += h / 2 * (d + d2)
        expected = likely + change - (0.5 * y**2 - 0.5).sum(1)
        torch.testing.assert_close(out.per_token[0], expected[2:], rtol=2e-4, atol=2e-3)

    def test_whatever_the_batch(self, flow):
        _, model = flow
        parts = [(torch.tensor([3, 8]), torch.tensor([5, 11, 2])), (torch.tensor([9]), torch.tensor([1, 1]))]
        ids, answers = torch.tensor([[3, 8], [0, 9]]), torch.tensor([[5, 11, 2], [1, 1, 0]])
        ids_mask, answers_mask = torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        seeds = torch.tensor([4, 5])
        out = dk.log_likelihood(model, ids, answers, ids_mask, answers_mask, seed=seeds, num_samples=2, ode_steps=3)
        for row, (prompt, answer) in enumerate(parts):
            alone = dk.log_likelihood(model, prompt, answer, seed=seeds[row : row + 1], num_samples=2, ode_steps=3)
            mine = out.per_token[row, : len(answer)]
            torch.testing.assert_close(mine, alone.per_token[0], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(out.standard_error[row], alone.standard_error[0], rtol=1e-3, atol=1e-3)

    def test_errors(self, flow):
        with pytest.raises(ValueError, match="gradients are not supported for the bound of family 'langflow'"):
            dk.log_likelihood(flow[1], torch.tensor([3]), torch.tensor([3]), gradients=True)
        with pytest.raises(TypeError, match="exact_divergence must be True or False; got 1"):
            dk.log_likelihood(flow[1], torch.tensor([3]), torch.tensor([3]), exact_divergence=1)
        with pytest.raises(ValueError, match="ode_steps must be None or an integer of at least 1; got 0"):
            dk.log_likelihood(flow[1], torch.tensor([3]), torch.tensor([3]), ode_steps=0)
