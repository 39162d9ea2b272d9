# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods: against every mask written out, against a known joint distribution, and whatever the batch."""

import copy
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import dlmkernels as dk
import numerics
from decodings import lively
from dlmkernels.decoding import likelihood
from joint_model import Joint
from plain_llama import PlainLlama
from small_models import MASK, PAD, build, prompts

pytestmark = pytest.mark.filterwarnings("ignore:dlmkernels does not know:UserWarning")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def plain(model):
    return PlainLlama(model)


def logp(plain, prompt, answer, masked, shift=False):
    """ln p of the masked answer tokens, by position, from one forward."""
    tokens = torch.cat((prompt, answer))
    at = [len(prompt) + i for i in masked]
    z = plain(tokens.index_fill(0, torch.tensor(at), MASK)[None])[0][0]
    z = torch.cat((z[:1], z[:-1])) if shift else z
    z = torch.log_softmax(z.index_fill(1, torch.tensor([MASK]), -torch.inf), -1)
    return {i: z[j, tokens[j]].item() for i, j in zip(masked, at)}


def exact_bound(plain, prompt, answer):
    """Mean over l of the mean over all sets of l tokens of (L / l) sum ln p, token by token."""
    n = len(answer)
    out = torch.zeros(n, dtype=torch.float64)
    for size in range(1, n + 1):
        sets = list(itertools.combinations(range(n), size))
        for chosen in sets:
            for i, value in logp(plain, prompt, answer, list(chosen)).items():
                out[i] += value / size / len(sets)
    return out


def ragged_answers(lengths=(5, 3, 4), prompt_lengths=(4, 7, 2)):
    """Prompts and answers of different lengths, alone and padded to a batch."""
    parts = [(prompts(1, p, seed=p)[0], prompts(1, n, seed=50 + n)[0]) for p, n in zip(prompt_lengths, lengths)]
    left, right = max(prompt_lengths), max(lengths)
    ids = torch.stack([torch.cat((p.new_full((left - len(p),), PAD), p)) for p, _ in parts])
    answers = torch.stack([torch.cat((a, a.new_full((right - len(a),), PAD))) for _, a in parts])
    ids_mask = torch.stack([torch.arange(left) >= left - len(p) for p, _ in parts])
    answers_mask = torch.stack([torch.arange(right) < len(a) for _, a in parts])
    return parts, (ids, answers, ids_mask, answers_mask)


class TestMonteCarlo:
    def test_unbiased_for_every_token(self, model, plain):
        prompt, answer = prompts(1, 6)[0], prompts(1, 4, seed=3)[0]
        exact = exact_bound(plain, prompt, answer)
        n = 400
        rows = 4
        out = dk.log_likelihood(
            model, prompt.expand(rows, -1), answer.expand(rows, -1), num_samples=n, seed=torch.arange(rows),
            batch_size=64,
        )  # fmt: skip
        assert out.num_forwards == n and out.per_token.shape == (rows, 4)
        mean, error = out.total.mean(), out.standard_error.pow(2).sum().sqrt() / rows
        assert abs(mean - exact.sum()) < numerics.MAX_NORMAL_SCORE * error
        spread = (out.per_token - exact).abs().mean(0)
        assert (spread < numerics.MAX_NORMAL_SCORE * out.standard_error.mean()).all()
        assert torch.equal(out.total, out.per_token.sum(1))

    def test_tight_for_a_joint_distribution(self):
        """Where the conditionals are those of one joint distribution the bound is the log-likelihood itself."""
        joint = Joint(3, 3)
        texts = torch.tensor([[0, 1, 2], [2, 2, 1], [1, 0, 0]])
        out = dk.log_likelihood(joint, torch.zeros(3, 1, dtype=torch.int64), texts, num_samples=600, seed=5,
                                mask_token_id=3, batch_size=64)  # fmt: skip
        exact = joint.table.flatten()[joint.number(texts)].log()
        assert ((out.total - exact).abs() < numerics.MAX_NORMAL_SCORE * out.standard_error).all()

    def test_sizes_are_spread_evenly(self, model):
        """As many samples as tokens: every size once, so that an answer of one token has no spread at all."""
        out = dk.log_likelihood(model, prompts(2, 5), prompts(2, 1, seed=2), num_samples=7, seed=1)
        numerics.assert_same_probabilities(out.standard_error, torch.zeros(2, dtype=torch.float64))
        sizes = self.sizes(model, num_samples=6, method="monte-carlo")
        assert sizes.sort(1).values.tolist() == [[1, 2, 3, 4, 5, 6]] * 3
        assert not torch.equal(sizes[0], sizes[1]) or not torch.equal(sizes[1], sizes[2])
        assert self.sizes(model, num_samples=5, method="coupled").sort(1).values.tolist() == [[1, 2, 3, 4, 5]] * 3

    @pytest.mark.parametrize("method,largest", [("monte-carlo", 6), ("coupled", 5)])
    def test_a_single_size_is_any(self, model, method, largest):
        sizes = self.sizes(model, rows=600, num_samples=1, method=method)[:, 0]
        numerics.assert_distribution("sizes", sizes.bincount()[1:], [1 / largest] * largest)

    def sizes(self, model, rows=3, **options):
        """How many tokens of an answer of six each sample masks, `[rows, samples]`."""
        ids, answers = prompts(1, 5).expand(rows, -1), prompts(1, 6, seed=2).expand(rows, -1)
        with watched() as masks:
            dk.log_likelihood(model, ids, answers, seed=torch.arange(rows), batch_size=600, **options)
        counts = torch.stack([m.sum(1) for m in masks], 1)
        return counts if options["method"] == "monte-carlo" else counts[:, :-1:2]


@contextmanager
def watched():
    """What `log_likelihood` masks, one bool `[B, T]` after the other."""
    masks, real = [], likelihood._Task._forward

    def forward(self, some):
        masks.extend(some)
        return real(self, some)

    likelihood._Task._forward = forward
    try:
        yield masks
    finally:
        likelihood._Task._forward = real


class TestMeanField:
    @pytest.mark.parametrize("alignment", ["same", "shift"])
    def test_one_forward(self, model, alignment):
        """Of a model that would rather predict the mask: it has no part in the probabilities."""
        model = copy.deepcopy(model)
        model.lm_head.weight[MASK] = 2 * model.lm_head.weight[5:9].sum(0)
        plain = PlainLlama(model)
        parts, (ids, answers, ids_mask, answers_mask) = ragged_answers()
        out = dk.log_likelihood(
            model, ids, answers, ids_mask, answers_mask, method="mean-field", logit_alignment=alignment
        )
        assert out.num_forwards == 1 and out.standard_error.isnan().all()
        for row, (prompt, answer) in enumerate(parts):
            expected = logp(plain, prompt, answer, list(range(len(answer))), alignment == "shift")
            numerics.assert_same_probabilities(
                out.per_token[row, : len(answer)].exp(), torch.tensor(list(expected.values())).double().exp()
            )
            assert (out.per_token[row, len(answer) :] == 0).all()

    def test_masked_prompts(self, model, plain):
        """Some of the prompt is hidden in each sample, and all of it with probability 1."""
        prompt, answer = prompts(1, 6)[0], prompts(1, 4, seed=3)[0]
        options = {"method": "mean-field", "seed": 3}
        seen = dk.log_likelihood(model, prompt, answer, **options)
        hidden = dk.log_likelihood(model, prompt, answer, prompt_mask_probability=1.0, **options)
        partly = dk.log_likelihood(model, prompt, answer, prompt_mask_probability=0.5, num_samples=8, **options)
        blind = logp(plain, torch.full_like(prompt, MASK), answer, [0, 1, 2, 3])
        numerics.assert_same_probabilities(hidden.per_token[0].exp(), torch.tensor(list(blind.values())).double().exp())
        assert partly.num_forwards == 8 and partly.standard_error > 0
        assert len({round(x, 6) for x in (seen.total.item(), hidden.total.item(), partly.total.item())}) == 3


class TestCoupled:
    def test_every_token_once_a_pair(self, model, plain):
        """Each token's mean over all sizes and sets, each set with the one of the pair's forwards that masks it."""
        prompt, answer = prompts(1, 6)[0], prompts(1, 4, seed=3)[0]
        with watched() as masks:
            dk.log_likelihood(model, prompt, answer, method="coupled", num_samples=5, seed=9)
        assert len(masks) == 11 and masks[-1][0].tolist() == [False] * 6 + [True] * 4
        for one, other in zip(masks[:-1:2], masks[1::2]):
            assert torch.equal(one | other, masks[-1]) and not (one & other).any()
        n, expected = 4, torch.zeros(4, dtype=torch.float64)
        for size in range(1, n):
            sets = list(itertools.combinations(range(n), size))
            for chosen in sets:
                rest = [i for i in range(n) if i not in chosen]
                for i, value in (logp(plain, prompt, answer, list(chosen)) | logp(plain, prompt, answer, rest)).items():
                    expected[i] += value / len(sets) / (n - 1)
        full = torch.tensor(list(logp(plain, prompt, answer, [0, 1, 2, 3]).values()), dtype=torch.float64)
        pairs = 300
        out = dk.log_likelihood(model, prompt, answer, method="coupled", num_samples=pairs, seed=9, batch_size=64)
        assert out.num_forwards == 2 * pairs + 1
        mean = (expected * pairs + full) / (pairs + 1)
        assert abs(out.total[0] - mean.sum()) < numerics.MAX_NORMAL_SCORE * out.standard_error[0]
        assert ((out.per_token[0] - mean).abs() < numerics.MAX_NORMAL_SCORE * out.standard_error[0]).all()


@pytest.mark.parametrize("method", ["monte-carlo", "mean-field", "coupled"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_request_does_not_depend_on_its_batch(model, method, batch_size):
    """Alone, or padded on both sides beside others, in forwards of any size: the same masks, the same estimate."""
    parts, (ids, answers, ids_mask, answers_mask) = ragged_answers()
    seeds = torch.tensor([5, 2**41, 77])
    options = {"method": method, "num_samples": 6, "prompt_mask_probability": 0.3}
    out = dk.log_likelihood(model, ids, answers, ids_mask, answers_mask, seed=seeds, batch_size=batch_size, **options)
    for row, (prompt, answer) in enumerate(parts):
        alone = dk.log_likelihood(model, prompt, answer, seed=seeds[row : row + 1], **options)
        assert not numerics.far(out.per_token[row, : len(answer)], alone.per_token[0])
        assert (out.per_token[row, len(answer) :] == 0).all()


def test_absolute_positions_count_from_the_request():
    parts, batch = ragged_answers()
    model = build("bert")
    out = dk.log_likelihood(model, *batch, method="mean-field")
    for row, (prompt, answer) in enumerate(parts):
        alone = dk.log_likelihood(model, prompt, answer, method="mean-field").per_token[0]
        numerics.assert_same_probabilities(out.per_token[row, : len(answer)].exp(), alone.exp())


def test_mask_tokens_belong_into_prompts_and_padding_only(model):
    with pytest.raises(ValueError, match=r"answer holds the mask token \(96\), which is never predicted"):
        dk.log_likelihood(model, prompts(1, 4), torch.tensor([[5, MASK, 7]]), method="mean-field")
    with pytest.raises(ValueError, match=r"answer holds the mask token \(3\)"):
        dk.log_likelihood(Joint(3, 2), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0, 3]]), mask_token_id=3)
    out = [
        dk.log_likelihood(model, torch.tensor([[5, MASK]]), answer, answer_mask=mask, method="mean-field").total
        for answer, mask in (
            (torch.tensor([[5, 7]]), None), (torch.tensor([[5, 7, MASK]]), torch.tensor([[1, 1, 0]]))
        )
    ]  # fmt: skip
    assert torch.isfinite(out[0]).all()
    numerics.assert_same_probabilities(out[0].exp(), out[1].exp())


@pytest.mark.parametrize("change,match", [
    ({"method": "exact"}, "method must be one of .*'exact'"),
    ({"num_samples": 0}, "num_samples must be an integer of at least 1; got 0"),
    ({"batch_size": 0}, "batch_size must be an integer"),
    ({"prompt_mask_probability": 1.5}, "prompt_mask_probability must be a number from 0 to 1; got 1.5"),
    ({"answer": torch.zeros(2, 3)}, "answer must be an int64 tensor"),
    ({"answer": torch.full((3, 3), 5)}, "answer must have as many rows as prompt, 2; got 3"),
    ({"answer": torch.full((2, 3), 97)}, "answer must hold ids"),
    ({"answer_mask": torch.tensor([[0, 1, 1]] * 2)}, "answer_mask must be 0 for padding on the right and 1 before it"),
    ({"answer_mask": torch.tensor([[0, 0, 0]] * 2)}, "answer_mask leaves row 0 of answer empty"),
    ({"prompt": torch.full((2, 254), 5)}, "longer than the model's max_position_embeddings of 256"),
    ({"answer": torch.empty(2, 0, dtype=torch.int64)}, r"answer must hold at least one token in each row; got .*2, 0"),
    ({"answer": torch.tensor([5, 6])}, "answer must have as many rows as prompt, 2; got 1"),
    ({"answer_mask": [[1, 1, 1]] * 2}, "answer_mask must be a tensor; got list"),
    ({"answer_mask": torch.full((2, 3), 2)}, "answer_mask must hold 0 for padding and 1 for tokens; got 2"),
    ({"answer_mask": torch.tensor([[0, 1, 1]] * 2)}, "pad answers on the right$"),
    ({"prompt_mask": True}, "prompt_mask must be a tensor; got bool"),
    ({"prompt_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}, "prompt_mask must be 0 .* left and 1 after it: pad prompts"),
    ({"prompt_mask": torch.ones(2, 5, device="meta")}, "prompt_mask must be a dense tensor .* got one on .* meta"),
    ({"prompt_mask_probability": True}, "prompt_mask_probability must be a number from 0 to 1; got True"),
    ({"prompt_mask_probability": None}, "prompt_mask_probability must be a number from 0 to 1; got None"),
    ({"seed": 1.5}, "seed must be .*integer.*; got 1.5"), ({"seed": True}, "seed must be .*integer.*; got True"),
    ({"seed": "x"}, "seed must be .*integer.*; got 'x'"), ({"seed": 2**63}, "seed must be an? .*integer.*; got 9223"),
    ({"seed": torch.tensor([1.0, 2.0])}, r"seed must be int64 of shape \[2\]; got torch.float32"),
    ({"num_samples": True}, "num_samples must be an integer"), ({"batch_size": 1.5}, "batch_size must be an integer"),
    ({"gradients": "no"}, "gradients must be True or False; got 'no'"),
    ({"method": np.array([1])}, "method must be one of"),
    ({"ode_steps": 7}, "ode_steps=7 has no effect for models of family 'masked'"),
    ({"ode_steps": 0}, "ode_steps must be None or an integer of at least 1; got 0"),
    ({"exact_divergence": True}, "exact_divergence=True has no effect for models of family 'masked'"),
], ids=lambda v: None if isinstance(v, str) else ",".join(v))  # fmt: skip
def test_errors(model, change, match):
    arguments = {"prompt": prompts(2, 5), "answer": prompts(2, 3, seed=2)} | change
    with pytest.raises((ValueError, TypeError), match=match):
        dk.log_likelihood(model, **arguments)


def test_numbers_of_any_kind(model):
    prompt, answer = prompts(2, 5), prompts(2, 3, seed=2)
    for options, other in (
        ({"prompt_mask_probability": 1.0}, {"prompt_mask_probability": 1}),
        ({"prompt_mask_probability": 1.0}, {"prompt_mask_probability": torch.tensor(1)}),
        ({"batch_size": 2}, {"batch_size": np.int64(2)}), ({"seed": 4}, {"seed": np.int64(4)}),
    ):  # fmt: skip
        common = {"num_samples": np.int64(3), "seed": 4}
        want, got = (dk.log_likelihood(model, prompt, answer, **common | o) for o in (options, other))
        assert want.num_forwards == 3 and torch.equal(want.per_token, got.per_token)


def test_attention_must_be_full():
    """With blocks an answer's probability is a product over blocks, which these estimates are not."""
    model = build()
    model.config.dlm_family = "sdar"
    with pytest.raises(
        ValueError, match="model must have full attention for method='monte-carlo'; models of family 'sdar' have"
    ):
        dk.log_likelihood(model, prompts(1, 4), prompts(1, 4), method="monte-carlo")


def test_log_probability_of_an_output(model):
    out = dk.generate(model, prompts(2, 5), max_new_tokens=8, rule=dk.Threshold(0.5), eos_policy="none")
    assert (out.log_probability[:, :5] == 0).all()
    assert torch.equal(out.log_probability[:, 5:], out.confidence[:, 5:].log())
