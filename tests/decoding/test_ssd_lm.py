# SPDX-License-Identifier: Apache-2.0
"""SSD-LM: loaded from its files, and its sampler against the published loop around transformers' own RoBERTa."""

import math

import pytest
import torch
import transformers

import dlmkernels as dk
import research
from dlmkernels.models.adapt import adapt
from dlmkernels.reference import gumbel, normals, philox
from research import VOCAB

K = 5.0


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssd-lm")
    w = research.write_ssd_lm(folder)
    stock = transformers.RobertaForMaskedLM(transformers.RobertaConfig.from_pretrained(folder)).double().eval()
    stock.load_state_dict({name: x for name, x in w.items() if name.startswith(("roberta", "lm_head"))})
    return w, dk.load(folder, allow_pickle=True), stock, folder


class TestModel:
    def test_loaded(self, made):
        w, model, _, _ = made
        adapted = adapt(model)
        assert adapted.family.name == "ssd-lm" and adapted.block_length == 25 and model.config.simplex_scale == K
        assert torch.equal(model.embed_sum.weight, w["embed_sum_layer.weight"])
        assert torch.equal(model.timestep.bias, w["timestep_layer.bias"])
        for name, x in model.roberta.state_dict().items():
            assert torch.equal(x, w[f"roberta.{name}"]), name

    def test_saved_again(self, made, tmp_path):
        _, model, _, _ = made
        model.save_pretrained(tmp_path)
        again = dk.load(tmp_path)
        for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(a, b), name
        assert adapt(again).family.name == "ssd-lm"

    def test_what_is_refused(self, made, tmp_path):
        folder = made[3]
        with pytest.raises(ValueError, match="holds pickle files: pass allow_pickle=True"):
            dk.load(folder)
        research.write_ssd_lm(tmp_path)
        torch.save({"weight": torch.ones(4, 7)}, tmp_path / "embed_sum_layer.pt")
        with pytest.raises(ValueError, match=rf"vocab_size={VOCAB}; expected 7, as in embed_sum_layer\.pt"):
            dk.load(tmp_path, allow_pickle=True)
        with pytest.raises(ValueError, match="there is no bound on the likelihood for models of family 'ssd-lm'"):
            dk.log_likelihood(made[1], torch.tensor([1]), torch.tensor([2]))
        with pytest.raises(ValueError, match="rule Threshold decodes mask tokens, which models of family 'ssd-lm'"):
            dk.generate(made[1], torch.tensor([[5]]), rule=dk.Threshold(0.9), max_new_tokens=4)


def restated(w, stock, prompt, seed, blocks, length, steps, nucleus, draw=False):
    """Tokens after the prompt, in float64: the published loop, with the draws of a request."""
    table, t_w, t_b = (
        w[name].double() for name in ("embed_sum_layer.weight", "timestep_layer.weight", "timestep_layer.bias")
    )
    text, least, forwards = prompt.clone(), math.inf, 0

    def power(t):
        return (
            math.cos((t / steps + 1e-4) / (1 + 1e-4) * math.pi / 2) / math.cos(1e-4 / (1 + 1e-4) * math.pi / 2)
        ) ** 2

    for _ in range(blocks):
        place = torch.arange(len(text), len(text) + length)

        def noise():
            return K * normals(torch.tensor([seed]), place, torch.tensor(forwards), VOCAB).double()  # noqa: B023

        x = noise()
        for t in range(steps, 0, -1):
            noisy = torch.softmax(x, -1) @ table.T + (t / steps * t_w[:, 0] + t_b)
            embeds = torch.cat((stock.roberta.embeddings.word_embeddings(text), noisy))
            logits = stock(inputs_embeds=embeds[None]).logits[0, len(text) :]
            best = logits.topk(2).values
            if t == 1:
                least = min(least, (best[:, 0] - best[:, 1]).min().item())
                break
            p, order = logits.softmax(-1).sort(-1, descending=True)
            clean = torch.full_like(logits, -K)
            for row in range(length):
                total = 0.0
                for q, token in zip(p[row].tolist(), order[row].tolist()):
                    clean[row, token] = K
                    total += q
                    if total >= nucleus:
                        break
            forwards += 1
            if draw:  # one of the tokens that were kept
                q = torch.where(clean > 0, logits, -torch.inf)
                token, edge = reference_draw(q, seed, place, forwards)
                least = min(least, edge)
                clean = torch.full_like(logits, -K).scatter(1, token[:, None], K)
            x = math.sqrt(power(t - 1)) * clean + math.sqrt(1 - power(t - 1)) * noise()
        forwards += 1
        text = torch.cat((text, logits.argmax(1)))
    return text, least


def reference_draw(logits, seed, place, step):
    """A draw for each row of fewer than 256 logits by the race of the ops: Gumbel noise on every id; and the least
    lead of a winner.
    """
    index = torch.arange(logits.shape[1])
    bits = philox(torch.tensor([[seed]]), place[:, None], torch.tensor(step), "token", index)
    best = (logits + gumbel(bits).double()).topk(2)
    lead = best.values[:, 0] - best.values[:, 1]
    return best.indices[:, 0], lead.min().item()


class TestSampler:
    @pytest.mark.parametrize("draw", [False, True])
    @pytest.mark.parametrize("nucleus", [0.0, 0.5, 0.9])
    @pytest.mark.parametrize("steps", [1, 12])
    def test_published(self, nucleus, steps, draw, made):
        w, model, stock, _ = made
        prompt = torch.tensor([7, 3, 9, 12])
        out = dk.generate(
            model, prompt, max_new_tokens=12, block_length=6, steps=2 * steps, seed=3,
            rule=dk.SimplexDenoising(nucleus, draw),
        )  # fmt: skip
        expected, least = restated(w, stock, prompt, 3, 2, 6, steps, nucleus, draw)
        assert least > 1e-3, "a near tie: this comparison needs another seed"
        assert torch.equal(out.sequences[0], expected)
        assert out.num_forwards[0] == 2 * steps and out.complete.all()

    def test_given_tokens(self, made):
        """They are read as decided ones are, and stay."""
        model = made[1]
        given = torch.tensor([7, 3, -1, -1, 5, -1, 8, -1])
        out = dk.infill(model, given, steps=8, seed=7)
        kept = given >= 0
        assert out.complete.all() and torch.equal(out.sequences[0, kept], given[kept])
        other = dk.infill(model, torch.where(given == 5, 20, given), steps=8, seed=7)
        assert not torch.equal(other.confidence[0, ~kept], out.confidence[0, ~kept])

    @pytest.mark.parametrize("draw", [False, True])
    def test_whatever_the_batch(self, draw, made):
        model = made[1]
        ids, valid = torch.tensor([[3, 8, 2], [1, 1, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
        rule = dk.SimplexDenoising(0.9, draw)
        how = {"max_new_tokens": 8, "steps": 12, "block_length": 4, "rule": rule}
        out = dk.generate(model, ids, valid, seed=torch.tensor([4, 5]), **how)
        for i, row in enumerate(([3, 8, 2], [9])):
            alone = dk.generate(model, torch.tensor(row), seed=torch.tensor([4 + i]), **how)
            assert torch.equal(alone.generated[0], out.generated[i])
        assert (out.commit_step[:, 3:7] < 6).all() and (out.commit_step[:, 7:] >= 6).all()

    def test_rules_of_other_models(self, made, tmp_path):
        with pytest.raises(
            ValueError, match=r"rule EmbeddingFlow needs a model whose noise is on embeddings .* got SSDLM"
        ):
            dk.generate(made[1], torch.tensor([[5]]), max_new_tokens=4, rule=dk.EmbeddingFlow())
        research.write("langflow", tmp_path)
        with pytest.raises(
            ValueError, match=r"rule SimplexDenoising needs a model that reads distributions .* got DiT"
        ):
            dk.generate(dk.load(tmp_path), torch.tensor([[5]]), max_new_tokens=4, rule=dk.SimplexDenoising())

    def test_errors(self, made):
        with pytest.raises(ValueError, match="nucleus must be a number from 0 to 1; got 2"):
            dk.SimplexDenoising(2)
        with pytest.raises(ValueError, match="cfg_scale cannot be used with rule SimplexDenoising"):
            dk.generate(made[1], torch.tensor([[5]]), max_new_tokens=4, cfg_scale=1.0, mask_token_id=0)
