# SPDX-License-Identifier: Apache-2.0
"""Bounds by the noise of each family: tight for exact models, restated on the same noise, exact over all noise."""

import itertools
import math

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import research
from decodings import lively
from dlmkernels.decoding.bounds import FIRST_TIME, Absorbing, Bound, Masking, Uniform
from dlmkernels.decoding.config import DecodingConfig
from dlmkernels.decoding.presets import default_config
from dlmkernels.decoding.resolve import prepare
from dlmkernels.models.adapt import adapt
from small_models import prompts

SMALL, MASK, EPS, BLOCK = 3, 3, 1e-3, 2
FAMILIES = ("mdlm", "sedd", "duo", "bd3-lm")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: weights on a vocabulary of three (and the mask), and the model loaded from them, once."""
    done = {}

    def get(name, **options):
        key = name, *sorted(options.items())
        if key not in done:
            options |= {"block_size": BLOCK} | options if name == "bd3-lm" else {}
            folder = tmp_path_factory.mktemp(name)
            done[key] = research.write(name, folder, vocab=SMALL + (name != "duo"), **options), dk.load(folder)
        return done[key]

    return get


def says(name, w, noisy, clean, time, start=0):
    """Logits `[T, V]` of a noisy text; blocks of BD3-LM see the clean ones before them. `time` of each position."""
    if name == "bd3-lm":
        rows = []
        for first in range(0, len(noisy), BLOCK):
            text = torch.cat((clean[:first], noisy[first : first + BLOCK]))
            x = w["vocab_embed.embedding"][text]
            rows.append(research.dit(w, x, 0.0, research.blocks_visible(len(text), BLOCK))[first:])
        return torch.cat(rows)
    sigma = torch.tensor(-math.log1p(-(1 - EPS) * float(time[0]))).float().item()
    if name == "sedd":
        return research.sedd(w, noisy, sigma)
    return research.dit(w, w["vocab_embed.embedding"][noisy], sigma if name == "duo" else 0.0)


def term(name, z, clean, noisy, t):
    """What one token adds to ln p, written out; `z` are the logits of its position as a list."""
    if name in ("mdlm", "bd3-lm"):
        if noisy != MASK:
            return 0.0
        return (z[clean] - math.log(sum(math.exp(v) for v in z[:SMALL]))) / t
    if name == "sedd":
        if noisy != MASK:
            return 0.0
        sigma = -math.log1p(-(1 - EPS) * t)
        r = 1 / math.expm1(sigma)
        speed = (1 - EPS) / (1 - (1 - EPS) * t)
        return -speed * (sum(math.exp(v) for v in z[:SMALL]) - r * z[clean] + r * (math.log(r) - 1))
    a = 1 - (1 - EPS) * t
    total = sum(math.exp(v) for v in z)
    y = [SMALL * a * (j == clean) + 1 - a for j in range(SMALL)]
    w = [SMALL * a * math.exp(v) / total + 1 - a for v in z]
    n = noisy
    inner = sum(y[j] / y[n] * math.log(w[n] * y[j] / (w[j] * y[n])) for j in range(SMALL))
    # alpha' is negative, and the expression a bound of -ln p
    return (1 - EPS) / (SMALL * a) * (SMALL / y[n] - SMALL / w[n] - inner)


class TestTight:
    """Where the model is exact, the bound's mean over texts is minus their entropy: one token, p(token) known."""

    P = torch.tensor((0.55, 0.3, 0.15), dtype=torch.float64)

    @pytest.mark.parametrize("process", [Masking(MASK), Masking(MASK, 0.0), Absorbing(MASK), Uniform()], ids=repr)
    def test_entropy(self, process):
        p, total = self.P, 0.0
        nodes = 801
        for i in range(nodes):
            # trapezoids in ln t, since the integrands are largest near 0
            u = i / (nodes - 1)
            t = FIRST_TIME ** (1 - u)
            weight = t * math.log(1 / FIRST_TIME) / (nodes - 1) * (0.5 if i in (0, nodes - 1) else 1.0)
            changed = float(process.replaced(torch.tensor(t, dtype=torch.float64)))
            total += weight * self.at(process, p, t, changed)
        entropy = -(p * p.log()).sum().item()
        # what lies before the first time is not part of it
        assert -entropy * 1.003 < total < -entropy * 0.98

    def at(self, process, p, t, changed):
        """Mean over clean and noisy tokens of the terms at one time."""
        total, time = 0.0, torch.full((1,), t, dtype=torch.float64)
        for clean in range(SMALL):
            others = {MASK: changed}
            if isinstance(process, Uniform):
                others = {n: changed / SMALL for n in range(SMALL)}
            others[clean] = others.get(clean, 0.0) + 1 - changed
            for noisy, q in others.items():
                if not bool(process.scores(torch.tensor([noisy]))):
                    continue
                z = self.exact(process, p, noisy, changed, t)
                total += p[clean].item() * q * process.terms(
                    z[None], torch.tensor([clean]), torch.tensor([noisy]), time
                ).item()  # fmt: skip
        return total

    def exact(self, process, p, noisy, changed, t):
        """What an exact model says of a noisy token."""
        nothing = torch.tensor([-50.0], dtype=torch.float64)
        if isinstance(process, Uniform):
            return p.log()  # Duo's model tells the token from the other positions, not from the noisy one
        if isinstance(process, Absorbing):
            return torch.cat((p.log() + math.log((1 - changed) / changed), nothing))
        return torch.cat((p.log(), nothing))


def bound_of(model, tokens, start):
    """A `Bound` of whole rows, as `log_likelihood` makes it."""
    adapted = adapt(model)
    cache = "block" if adapted.family.attention == "block" else "none"
    config = DecodingConfig(rule=default_config(adapted.family.preset).rule, cache=cache)
    adapted, config, special = prepare(adapted, config, {})
    lengths = torch.full((len(tokens),), tokens.shape[1] - start)
    return Bound(adapted, config, special, tokens, torch.zeros(len(tokens)), start, lengths, torch.arange(len(tokens)))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_on_the_same_noise(name, gradients, made):
    """Every token's terms, of texts with given noise at given times, against the restated model and formula."""
    w, model = made(name)
    w = research.double(w)
    tokens = torch.randint(0, SMALL, (2, 9), generator=torch.Generator().manual_seed(5))
    bound = bound_of(model, tokens, 3)
    for sample in range(2):
        noisy, time = bound._noisy(sample, 2)
        with torch.set_grad_enabled(gradients):
            out = bound.terms(noisy, time, gradients)
        assert out.requires_grad == gradients and (noisy[:, :3] == tokens[:, :3]).all()
        for row in range(2):
            z = says(name, w, noisy[row], tokens[row], time[row]).tolist()
            expected = [
                term(name, z[i], int(tokens[row, i]), int(noisy[row, i]), float(time[row, i])) if i >= 3 else 0.0
                for i in range(9)
            ]
            torch.testing.assert_close(out[row].detach(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert (noisy != tokens).any()


def exact(name, w, prompt, answer, nodes=61):
    """The mean over all times and all noise, by Gauss' rule in t and an enumeration of the noisy answers."""
    grid = [math.cos(math.pi * (i + 0.5) / nodes) for i in range(nodes)]
    t_of = [FIRST_TIME + (1 - FIRST_TIME) * (x + 1) / 2 for x in grid]
    weight = [math.pi / nodes * math.sqrt(1 - x * x) / 2 for x in grid]  # Chebyshev's, made to integrate over [-1, 1]
    total = 0.0
    for t, share in zip(t_of, weight):
        changed = t if name == "bd3-lm" else (1 - EPS) * t
        for text in itertools.product(*((a, MASK) for a in answer.tolist())):
            chance = math.prod(changed if n == MASK else 1 - changed for n in text)
            total += share * chance * value(name, w, prompt, answer, text, t)
    return total


def value(name, w, prompt, answer, text, t):
    noisy = torch.cat((prompt, torch.tensor(text)))
    clean = torch.cat((prompt, answer))
    z = says(name, w, noisy, clean, [t] * len(noisy)).tolist()
    return sum(
        term(name, z[len(prompt) + i], int(answer[i]), text[i], t) for i in range(len(text))
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mdlm", "sedd", "bd3-lm"])
def test_exact_over_all_noise(name, made):
    """An answer of two tokens (one block of BD3-LM's): the estimate is unbiased, and its error is what it says."""
    w, model = made(name)
    prompt, answer = torch.tensor([1, 2]), torch.tensor([0, 2])
    expected = exact(name, research.double(w), prompt, answer)
    rows = 16
    out = dk.log_likelihood(
        model, prompt.expand(rows, -1), answer.expand(rows, -1), num_samples=256, seed=torch.arange(rows),
        batch_size=2048,
    )  # fmt: skip
    mean, error = out.total.mean().item(), out.standard_error.pow(2).sum().sqrt().item() / rows
    assert abs(mean - expected) < numerics.MAX_NORMAL_SCORE * error < 0.3 * abs(expected)
    spread = out.total.std().item()  # of one estimate; samples are stratified, so that it may be less than stated
    assert spread < 1.6 * out.standard_error.mean().item()
    assert torch.equal(out.total, out.per_token.sum(1)) and out.num_forwards == 256


def test_exact_over_all_noise_of_duo(made):
    """The same where noise is other tokens: each of the nine noisy answers with its probability."""
    w, model = made("duo")
    w = research.double(w)
    prompt, answer = torch.tensor([1, 2]), torch.tensor([0, 2])
    nodes, expected = 61, 0.0
    for i in range(nodes):
        x = math.cos(math.pi * (i + 0.5) / nodes)
        t = FIRST_TIME + (1 - FIRST_TIME) * (x + 1) / 2
        share, changed = math.pi / nodes * math.sqrt(1 - x * x) / 2, (1 - EPS) * t
        for text in itertools.product(range(SMALL), repeat=2):
            chance = math.prod(changed / SMALL + (1 - changed) * (n == a) for n, a in zip(text, answer.tolist()))
            expected += share * chance * value("duo", w, prompt, answer, text, t)
    rows = 16
    out = dk.log_likelihood(
        model, prompt.expand(rows, -1), answer.expand(rows, -1), num_samples=256, seed=torch.arange(rows),
        batch_size=2048,
    )  # fmt: skip
    error = out.standard_error.pow(2).sum().sqrt().item() / rows
    assert abs(out.total.mean().item() - expected) < numerics.MAX_NORMAL_SCORE * error < 0.3 * abs(expected)


def test_blocks_of_one_token_are_exact(made):
    """The chain rule, with no spread at all."""
    w, model = made("bd3-lm", block_size=1)
    w = research.double(w)
    prompt, answer = torch.tensor([1, 0]), torch.tensor([2, 0, 0, 1])
    out = dk.log_likelihood(model, prompt, answer, num_samples=2, seed=1)
    text = torch.cat((prompt, answer))
    for i in range(4):
        seen = torch.cat((text[: 2 + i], torch.tensor([MASK])))
        x = w["vocab_embed.embedding"][seen]
        z = research.dit(w, x, 0.0, research.blocks_visible(len(seen), 1))[-1, :SMALL].log_softmax(0)
        assert abs(out.per_token[0, i] - z[answer[i]]) < 1e-5
    assert out.standard_error[0] < 1e-6


def test_stock_model_with_blocks(loaded):
    """Any model whose attention has blocks: SDAR's, token by token, against its restated forward."""
    checkpoint, model = loaded("sdar", checkpoints.sdar)
    prompt, answer = prompts(1, 3)[0], prompts(1, 4, seed=4)[0]
    out = dk.log_likelihood(model, prompt, answer, num_samples=1, block_length=1)
    text = torch.cat((prompt, answer))
    for i in range(4):
        seen = torch.cat((text[: 3 + i], torch.tensor([checkpoints.MASK])))
        visible = torch.ones(len(seen), len(seen)).tril().bool()
        z = checkpoint.double(seen[None], visible)[0, -1]
        z = z.index_fill(0, torch.tensor([checkpoints.MASK]), -torch.inf).log_softmax(0)
        assert abs(out.per_token[0, i] - z[answer[i]]) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_whatever_the_batch(name, batch_size, made):
    _, model = made(name)
    g = torch.Generator().manual_seed(8)
    parts = [tuple(torch.randint(0, SMALL, (n,), generator=g) for n in sizes) for sizes in ((4, 5), (7, 3), (2, 4))]
    ids = torch.stack([torch.cat((p.new_zeros(7 - len(p)), p)) for p, _ in parts])
    answers = torch.stack([torch.cat((a, a.new_zeros(5 - len(a)))) for _, a in parts])
    ids_mask = torch.stack([torch.arange(7) >= 7 - len(p) for p, _ in parts])
    answers_mask = torch.stack([torch.arange(5) < len(a) for _, a in parts])
    seeds = torch.tensor([5, 2**41, 77])
    out = dk.log_likelihood(
        model, ids, answers, ids_mask, answers_mask, seed=seeds, num_samples=5, batch_size=batch_size
    )
    for row, (prompt, answer) in enumerate(parts):
        alone = dk.log_likelihood(model, prompt, answer, seed=seeds[row : row + 1], num_samples=5)
        torch.testing.assert_close(out.per_token[row, : len(answer)], alone.per_token[0], rtol=1e-4, atol=1e-4)
        assert (out.per_token[row, len(answer) :] == 0).all()


@pytest.mark.parametrize(
    "name,method", [(name, "bound") for name in FAMILIES] + [("mdlm", "monte-carlo"), ("llama", "coupled")]
)
def test_gradients(name, method, made):
    """The same numbers as without, and gradients that differences of two estimates confirm."""
    model = lively() if name == "llama" else made(name)[1]
    prompt, answer = (prompts(1, 3), prompts(1, 4, seed=4)) if name == "llama" else (torch.tensor([[1, 2]]), torch.tensor([[0, 2, 1, 1]]))  # fmt: skip
    how = {"method": method, "num_samples": 6, "seed": 3}
    plain = dk.log_likelihood(model, prompt, answer, **how)
    assert not plain.total.requires_grad
    traced = dk.log_likelihood(model, prompt, answer, **how, gradients=True)
    torch.testing.assert_close(traced.per_token.detach(), plain.per_token, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        traced.total.sum().backward()
    weight = model.get_output_embeddings().weight if name == "llama" else model.backbone.blocks[0].attn_qkv.weight
    direction = weight.grad / weight.grad.norm()
    step = 1e-2
    ends = []
    for sign in (1, -1):
        weight.data.add_(sign * step * direction)
        ends.append(dk.log_likelihood(model, prompt, answer, **how).total.item())
        weight.data.sub_(sign * step * direction)
    assert abs((ends[0] - ends[1]) / (2 * step) - weight.grad.norm().item()) < 0.03 * weight.grad.norm().item()
    model.zero_grad()


class TestErrors:
    @pytest.mark.parametrize("options,match", [
        ({"method": "monte-carlo"}, r"model must have logits for the .* models of family 'duo' have none: use method='bound'"),
        ({"prompt_mask_probability": 0.5}, "prompt_mask_probability has no effect with method='bound'"),
        ({"block_length": 4}, "block_length has no effect for family 'duo', whose attention has no blocks"),
    ])  # fmt: skip
    def test_options(self, options, match, made):
        with pytest.raises(ValueError, match=match):
            dk.log_likelihood(made("duo")[1], torch.tensor([1]), torch.tensor([1]), **options)

    def test_families_without_a_bound(self):
        with pytest.raises(
            ValueError, match="method='bound' is not defined for models of family 'masked': use 'monte-carlo'"
        ):
            dk.log_likelihood(lively(), prompts(1, 2), prompts(1, 2), method="bound")
        model = lively()
        model.config.dlm_family = "fast-dllm-v2"
        with pytest.raises(ValueError, match="needs a model that predicts each token of a block at its own position"):
            dk.log_likelihood(model, prompts(1, 2), prompts(1, 2))
