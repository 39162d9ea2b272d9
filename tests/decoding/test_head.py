# SPDX-License-Identifier: Apache-2.0
"""Where logits come from makes no difference to what is decoded: whole, in slices under a budget, or never made."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import dlmkernels as dk
import numerics
from dlmkernels.decoding.head import MOST_ROWS, prefers_fused
from small_models import DECODER, KINDS, MASK, VOCAB, build, prompts

BLOCKS = {"cache": "block", "attention": "block"}
DRAWN = {"temperature": 0.8, "seed": 5}
#: of 8 rows, float32; the decodings below have 16 slots and more
SLICES = {"lm_head": "logits", "logits_budget": 8 * VOCAB * 4}
SETTINGS = {
    "threshold": {"rule": dk.Threshold(0.3)},
    "margin": {"rule": dk.Quota(), "score": "margin", "steps": 6, "cache": "dual"},
    "entropy": {"rule": dk.EntropyBound(1.0), "cache": "prefix"},
    "sampled": DRAWN | {"rule": dk.Quota(), "steps": 8},
    "tempered": DRAWN | {"distribution": "tempered", "rule": dk.Threshold(0.3), **BLOCKS},
    "top-k": DRAWN | {"top_k": 9, "rule": dk.Threshold(0.3)},
    "top-p": DRAWN | {"top_p": 0.8, "distribution": "filtered", "rule": dk.Threshold(0.3)},
    "both": DRAWN | {"top_k": 20, "top_p": 0.9, "top_p_first": True, "keep_crossing": False},
    "each its own": {"temperature": [0.0, 0.5, 1.0], "top_k": [0, 5, 9], "seed": 2, "rule": dk.Threshold(0.3)},
    "guided": {"cfg_scale": 0.7, "rule": dk.Threshold(0.3), "cache": "dual"},
    "guided, sampled": DRAWN | {"cfg_scale": 0.7, "rule": dk.Threshold(0.3)},
    "banned": DRAWN | {"suppress_token_ids": tuple(range(10, 60)), "rule": dk.Threshold(0.3)},
    "biased": {"logit_bias": {7: 3.0, 9: -2.0}, "rule": dk.Threshold(0.3)},
    "edits": {"rule": dk.TokenEditing(0.3, 0.2, 4)},
    "p of tokens": {"rule": dk.WideInNarrowOut(0.3, 0.4)},
    "p of argmax": {"rule": dk.Ancestral(), "temperature": 1.0, "seed": 5, "steps": 8},
    "p of argmax, guided": {"rule": dk.Ancestral(), "temperature": 1.0, "seed": 5, "steps": 8, "cfg_scale": 0.5},
    "shifted, seeded": {"attention": "causal", "logit_alignment": "shift", "cache": "block", "seeded": True},
    "pipeline": {"rule": dk.Pipeline(0.3, 0.3, 0.5), **BLOCKS, "logit_alignment": "shift"},
    "speculative": {"rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block"},
    "reordered": {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
}  # fmt: skip
#: what reads the logits themselves, and more than once
READERS = {
    "credit": {"rule": dk.CreditThreshold(0.3)},
    "smoothed": {"rule": dk.SmoothedThreshold(0.4)},
    "stable": {"rule": dk.StableThreshold(0.2, 0.5, 1)},
    "early": {"rule": dk.EarlyAnswer((2.5, 2.0, 1.5))},
    "split": {"rule": dk.SplitEditing(0.3, 0.2, 3, 90, 91)},
    "constrained": {"constraint": torch.arange(VOCAB) % 3 > 0, "rule": dk.Threshold(0.3)},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build(seed=3, sharpness=3.0)


def decode(model, rows=3, **options):
    options = {"max_new_tokens": 16, "eos_policy": "none"} | options
    if not isinstance(options.get("rule"), dk.Reordered):
        options = {"block_length": 8} | options
    return dk.generate(model, prompts(rows, 6), **options)


def assert_same(out, expected):
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.commit_step, expected.commit_step)
    numerics.assert_same_probabilities(out.confidence, expected.confidence)


@pytest.mark.parametrize("name", SETTINGS)
def test_fused_and_in_slices(model, name):
    expected = decode(model, lm_head="logits", **SETTINGS[name])
    assert_same(decode(model, lm_head="fused", **SETTINGS[name]), expected)
    assert_same(decode(model, **SLICES, **SETTINGS[name]), expected)


@pytest.mark.parametrize("name", READERS)
def test_rules_that_read_logits(model, name):
    expected = decode(model, **READERS[name])
    assert_same(decode(model, **SLICES, **READERS[name]), expected)
    with pytest.raises(ValueError, match=r"lm_head='fused' cannot be used here: .*(reads the logits|constraint)"):
        decode(model, lm_head="fused", **READERS[name])


def test_a_rule_that_does_not_say_that_it_reads_logits(model):
    class Likeliest(dk.Rule):
        def select(self, step):
            return step.select("threshold", parameter=0.3, score=step.logits().softmax(-1).amax(-1), need=1, fill=1)

    expected = decode(model, rule=Likeliest(), lm_head="logits")
    assert_same(decode(model, rule=Likeliest(), lm_head="fused"), expected)
    assert_same(decode(model, rule=Likeliest(), **SLICES), expected)


@pytest.mark.parametrize("wishes", [
    {"repetition_penalty": 1.3}, {"logits_processor": lambda ids, scores: scores - 0.1 * scores.relu()},
    {"top_logprobs": 3},
], ids=["penalty", "processor", "logprobs"])  # fmt: skip
def test_what_is_asked_between_logits_and_proposals(model, wishes):
    expected = decode(model, rule=dk.Threshold(0.3), lm_head="logits", **wishes)
    for options in ({"lm_head": "fused"}, SLICES):
        out = decode(model, rule=dk.Threshold(0.3), **options, **wishes)
        assert_same(out, expected)
        if "top_logprobs" in wishes:
            assert torch.equal(out.top_ids, expected.top_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_models(kind):
    """Those with more in their heads than one matrix are decoded by their logits."""
    model = build(kind)
    expected = decode(model, rule=dk.Threshold(0.3), lm_head="logits", **DRAWN)
    assert_same(decode(model, rule=dk.Threshold(0.3), **SLICES, **DRAWN), expected)
    if "bert" in kind or kind == "roberta":
        with pytest.raises(ValueError, match="is not a plain linear layer without a bias"):
            decode(model, rule=dk.Threshold(0.3), lm_head="fused")
    else:
        assert_same(decode(model, rule=dk.Threshold(0.3), lm_head="fused", **DRAWN), expected)


PUBLISHED = ("llada", "dream", "sdar", "llada2", "fast_dllm_v2", "nemotron", "wedlm", "llada_moe", "rnd1")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families(name, loaded):
    """By their own decoders."""
    stock = loaded(name.replace("_", "-"), getattr(checkpoints, name))[1]
    prompt = prompts(2, 6).clamp(max=stock.config.vocab_size - 8)
    outs = [
        dk.generate(stock, prompt, max_new_tokens=12, eos_policy="none", seed=3, **options)
        for options in ({"lm_head": "logits"}, {"lm_head": "fused"}, {"logits_budget": 1, "lm_head": "logits"})
    ]
    for out in outs[1:]:
        assert_same(out, outs[0])


@pytest.mark.parametrize("kind", ["bias", "hook", "scaled", "wrapped", "forward"])
def test_a_head_that_is_more_than_its_weights(kind):
    """It is decoded by its logits, and "auto" does not ask for anything else."""
    model = build(seed=3, sharpness=3.0)
    head = model.lm_head
    if kind == "bias":
        head.bias = nn.Parameter(torch.randn(VOCAB))
    elif kind == "hook":
        head.register_forward_hook(lambda module, args, out: 0.5 * out)
    elif kind == "scaled":
        head.forward = lambda x, own=head: 0.5 * nn.functional.linear(x, own.weight)
    elif kind == "wrapped":
        model.lm_head = nn.Sequential(head, nn.Softplus())
    else:
        torch.nn.utils.parametrizations.weight_norm(head)
    with pytest.raises(ValueError, match="not a plain linear layer"):
        decode(model, lm_head="fused")
    assert_same(decode(model, **SLICES), decode(model, lm_head="logits"))


OF_ANOTHER_KIND = {
    "soft-capped": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, final_logit_softcapping=3.0)),
    "scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**DECODER, logit_scale=0.3)),
    "divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**DECODER, logits_scaling=0.3)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_soft_caps_scales_and_tied_heads(kind):
    """The first three go by logits, in slices too; a tied head is a matrix like any other."""
    torch.manual_seed(4)
    model = OF_ANOTHER_KIND[kind]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    options = DRAWN | {"rule": dk.Threshold(0.3), "cache": "dual"}
    expected = decode(model, lm_head="logits", **options)
    assert_same(decode(model, **SLICES, **options), expected)
    if kind == "tied":
        assert_same(decode(model, lm_head="fused", **options), expected)
    else:
        with pytest.raises(ValueError, match="not a plain linear layer"):
            decode(model, lm_head="fused", **options)


class Largest(TorchDispatchMode):
    """The largest tensor with so many columns that any call makes, in elements."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.elements = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[-1] != self.columns:
                continue
            if x.untyped_storage().data_ptr() not in known:  # no view
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("options", [
    {}, {"cfg_scale": 0.5}, DRAWN | {"top_k": 5, "temperature": 0.7}, {"constraint": torch.arange(VOCAB) % 3 > 0},
    {"rule": dk.Ancestral(), "temperature": 1.0, "steps": 8},
], ids=["plain", "guided", "filtered", "constrained", "p of argmax"])  # fmt: skip
def test_the_budget_holds(model, options):
    """No call of a decoding makes a tensor of more logits than fit; without a budget some do."""
    for budget in (1, 3 * VOCAB * 4, 8 * VOCAB * 4):
        with Largest(VOCAB) as seen:
            decode(model, lm_head="logits", logits_budget=budget, **options)
        assert 0 < seen.elements * 4 <= max(budget, VOCAB * 4)
    with Largest(VOCAB) as seen:
        decode(model, lm_head="logits", **options)
    assert seen.elements * 4 > 8 * VOCAB * 4


def test_the_fused_head_makes_no_logits(model):
    with Largest(VOCAB) as seen:
        decode(model, lm_head="fused", rule=dk.Threshold(0.3))
    assert seen.elements == 0


def test_the_choice():
    """Large weights, as many rows as it is no slower for, and no filter over more than it has room for."""
    large = torch.empty(130_000, 256, device="meta")
    assert prefers_fused(large, 32, filters=False)
    assert not prefers_fused(large[:50_000], 32, filters=False)
    assert not prefers_fused(large, MOST_ROWS[torch.float32] + 1, filters=False)
    assert prefers_fused(large, 8, filters=True) and not prefers_fused(large, 32, filters=True)
    assert not prefers_fused(large.double(), 1, filters=False)


def test_auto_takes_the_fused_head():
    """At a vocabulary as large as models have, with no option at all."""
    model = build(seed=3, sharpness=3.0)
    torch.manual_seed(0)
    model.lm_head = nn.Linear(64, 270_000, bias=False)
    nn.init.normal_(model.lm_head.weight)
    model.model.embed_tokens = nn.Embedding(270_000, 64)
    model.config.vocab_size = 270_000
    expected = decode(copy.copy(model), rows=1, rule=dk.Threshold(0.001), lm_head="logits")
    with Largest(270_000) as seen:
        out = decode(model, rows=1, rule=dk.Threshold(0.001))
    assert seen.elements == 0
    assert_same(out, expected)


def test_the_engine(model):
    """Requests with and without slices; each is what `generate` makes of it."""
    options = {"max_new_tokens": 16, "block_length": 8, "eos_policy": "none", "rule": dk.Threshold(0.3)}
    ids = prompts(3, 6)
    for head in ({"lm_head": "fused"}, SLICES):
        with dk.Engine(model, slots=2, max_length=32, **options, **head) as engine:
            names = [engine.add_request(row.tolist()) for row in ids]
            answers = [engine.get_result(name).generated_tokens for name in names]
        expected = dk.generate(model, ids, **options, lm_head="logits")
        assert answers == expected.sequences[:, 6:].tolist()


def test_masks_that_the_fused_head_leaves_open(model):
    """Where a row has nothing to choose, it is told why as with logits."""
    options = {"suppress_token_ids": tuple(i for i in range(VOCAB) if i != MASK), "lm_head": "fused"}
    with pytest.warns(RuntimeWarning, match="NaN or -inf for every token"):
        assert not decode(model, **options).complete.any()


@pytest.mark.parametrize("rule", [dk.Strided(3), dk.Lengthening(0.3, first_length=4, growth=4, end_window=4)],
                         ids=lambda rule: type(rule).__name__)  # fmt: skip
@pytest.mark.parametrize("name,value", [("lm_head", "fused"), ("logits_budget", 1000)])
def test_rules_that_keep_all_logits(model, rule, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* has no effect with rule {type(rule).__name__}"):
        dk.generate(model, prompts(1, 6), rule=rule, max_new_tokens=8, **{name: value})


@pytest.mark.parametrize("options,message", [
    ({"lm_head": "cuda"}, "lm_head must be one of"), ({"logits_budget": 0}, "logits_budget must be"),
    ({"logits_budget": 1.5}, "logits_budget must be"),
])  # fmt: skip
def test_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        decode(model, **options)
