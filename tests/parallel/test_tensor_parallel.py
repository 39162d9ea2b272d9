# SPDX-License-Identifier: Apache-2.0
"""A model that is divided between two processes decodes what it decodes in one."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
import numerics
import parallel_ranks as ranks

pytest.importorskip("accelerate")  # transformers divides no model without it

DRAWN = {"temperature": 0.8, "seed": 5}
FULL = {"attention": "full"}
SHARDED = {
    "dual": {"rule": dk.Threshold(0.3), "cache": "dual"},
    "prefix": {"rule": dk.EntropyBound(2.0), "cache": "prefix"},
    "margin": {"rule": dk.Quota(), "score": "margin", "steps": 6},
    "sampled": DRAWN | {"rule": dk.Quota(), "steps": 8},
    "tempered": DRAWN | {"distribution": "tempered", "rule": dk.Threshold(0.3), "cache": "dual"},
    "each its own": {"temperature": [0.0, 0.5, 1.0], "seed": 2, "rule": dk.Threshold(0.3)},
    "guided": DRAWN | {"cfg_scale": 0.7, "rule": dk.Threshold(0.3), "cache": "dual"},
    "banned": DRAWN | {"suppress_token_ids": tuple(range(10, 600)), "rule": dk.Threshold(0.3)},
    "biased": {"logit_bias": {7: 3.0, 700: 4.0}, "rule": dk.Threshold(0.3)},
    "constrained": {"constraint": torch.arange(1000) % 3 > 0, "rule": dk.Threshold(0.3)},
    "edits": {"rule": dk.TokenEditing(0.3, 0.2, 4)},
    "p of argmax": {"rule": dk.Ancestral(), "temperature": 1.0, "seed": 5, "steps": 8},
    "over the budget": DRAWN | {"rule": dk.Ancestral(), "steps": 8, "logits_budget": 8192},
    "blocks": DRAWN | {"rule": dk.Threshold(0.3), "attention": "block", "cache": "block"},
    "shifted": {"attention": "causal", "logit_alignment": "shift", "cache": "block", "seeded": True},
}  # fmt: skip
GATHERED = {
    "filters": DRAWN | {"top_k": 9, "top_p": 0.9, "rule": dk.Threshold(0.3)},
    "reads logits": {"rule": dk.CreditThreshold(0.3)},
}
WISHES = {"penalty": {"repetition_penalty": 1.3}, "logprobs": {"top_logprobs": 3}}
MODELS = {"llama": FULL, "qwen2": FULL, "qwen3_moe": FULL, "llada": {}}


def decoding(kind, options, models, rank):
    return ranks.decode(models(kind), **MODELS[kind] | options)


def shares(models, rank):
    """Heads of attention in a cache, and tokens of a head, of this rank."""
    adapted = [dk.adapt(models(kind)) for kind in ("llama", "qwen2")]
    seen = []
    before = dk.KVCache.layer

    def layer(self, index, k, v):
        seen.append(before(self, index, k, v)[0].shape[2])
        return before(self, index, k, v)

    dk.KVCache.layer = layer
    try:
        ranks.decode(adapted[0], **FULL, cache="dual")
    finally:
        dk.KVCache.layer = before
    found = [model.head_shard() for model in adapted]
    return set(seen), [(shard.first, len(shard.weight), shard.vocab) for shard in found]


def traffic(models, rank):
    """Bytes that the library itself has a rank send to the others, by where a decoding's results come from."""
    import torch.distributed as dist

    found = {}
    before = dist.all_gather
    for name in ("auto", "sharded", "logits"):
        counted = []

        def gather(out, own, *args, _counted=counted, **options):
            _counted.append(own.numel() * own.element_size())
            return before(out, own, *args, **options)

        dist.all_gather = gather
        try:
            ranks.decode(models("qwen2"), **FULL, lm_head=name, rule=dk.Quota(), steps=4)
        finally:
            dist.all_gather = before
        found[name] = sum(counted)
    return found


def seeds_that_nobody_gave(models, rank):
    torch.manual_seed(rank)
    return ranks.decode(models("llama"), **FULL, temperature=1.0, rule=dk.Threshold(0.3))


def refusals(models, rank):
    model = models("llama")
    options = {"mask_token_id": ranks.MASK, "max_new_tokens": 8, **FULL}
    ids = ranks.requests()
    return {
        "ids": ranks.said(lambda: dk.generate(model, ids + rank, **options)),
        "shape": ranks.said(lambda: dk.generate(model, ids[: 1 + rank], **options)),
        "config": ranks.said(lambda: dk.generate(model, ids, **options, rule=dk.Threshold(0.5 + rank / 4))),
        "engine": ranks.said(lambda: dk.Engine(model, slots=2, max_length=32, **options)),
        "graphs": ranks.said(lambda: dk.generate(model, ids, **options, graphs=True)),
        "compile": ranks.said(lambda: dk.adapt(model, compile=True)),
        "filters": ranks.said(lambda: dk.generate(model, ids, **options, lm_head="sharded", temperature=1.0, top_k=5)),
        "vocabulary": ranks.said(lambda: ranks.decode(models("llada"), lm_head="sharded")),
        "heads": ranks.said(lambda: _with_heads(models, num_key_value_heads=1)),
    }


def _with_heads(models, **changes):
    model = models("qwen3_moe")
    before = model.config.num_key_value_heads
    model.config.num_key_value_heads = changes["num_key_value_heads"]
    try:
        dk.adapt(model)
    finally:
        model.config.num_key_value_heads = before


def likelihoods(models, rank):
    ids = ranks.requests()
    torch.manual_seed(rank)
    return dk.log_likelihood(models("llama"), ids[:, :3], ids[:, 3:], mask_token_id=ranks.MASK).per_token


TASKS = {
    **{f"llama, {name}": functools.partial(decoding, "llama", options) for name, options in (SHARDED | GATHERED).items()},
    **{f"llama, {name}": functools.partial(decoding, "llama", {"lm_head": "sharded"} | options) for name, options in WISHES.items()},
    **{
        f"{kind}, {head}": functools.partial(decoding, kind, DRAWN | {"lm_head": head, "rule": dk.Threshold(0.3), "cache": "dual"})
        for kind in MODELS for head in ("auto", "logits")
    },
    "shares": shares, "traffic": traffic, "seeds": seeds_that_nobody_gave, "likelihoods": likelihoods, "refusals": refusals,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        ranks.save(kind, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return ranks.run(folder, TASKS)


def assert_same(found, expected):
    for here, there in zip(found, expected):
        if here.is_floating_point():
            numerics.assert_same_probabilities(here, there)
        else:
            assert torch.equal(here, there)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, functools.partial)])
def test_two_ranks_decode_what_one_process_does(folder, found, name):
    kind, options = TASKS[name].args
    alone = ranks.decode(ranks.load(kind, folder), **MODELS[kind] | options | {"lm_head": "logits"})
    for rank in found:
        assert_same(rank[name], alone)
    assert all(torch.equal(a, b) for a, b in zip(*(rank[name] for rank in found)))


def test_each_rank_has_its_share_of_heads_and_tokens(found):
    for rank, (heads, shards) in enumerate(other["shares"] for other in found):
        assert heads == {1}  # of two key-value heads
        assert shards == [((0, 512, 1000), (512, 488, 1000))[rank], (512 * rank, 512, 1024)]


def test_ranks_exchange_words_in_place_of_logits(found):
    """184 bytes a row, where a row of half the vocabulary has 2,048."""
    rows = 3 * 8 * 4  # requests, slots of a block, steps
    for rank in found:
        sent = rank["traffic"]
        assert rows * 184 <= sent["sharded"] == sent["auto"] < 2 * rows * 184 + 100
        assert sent["logits"] < 100  # the layer of transformers gathers them


def test_seeds_that_nobody_gave_are_those_of_the_first_rank(found):
    first, second = (rank["seeds"] for rank in found)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_likelihoods(folder, found):
    first, second = (rank["likelihoods"] for rank in found)
    assert torch.equal(first, second)
    with torch.random.fork_rng():
        alone = likelihoods(lambda kind: ranks.load(kind, folder), 0)
    assert torch.allclose(first, alone, atol=1e-4)


@pytest.mark.parametrize("what, words", {
    "ids": "ValueError: all ranks of a tensor-parallel model must be given the same arguments; these differ: input_ids",
    "shape": "these differ: input_ids",
    "config": "these differ: config",
    "engine": "call generate on all ranks instead",
    "graphs": "steps cannot be captured",
    "compile": "compile cannot be used with a tensor-parallel model",
    "filters": "lm_head='sharded' cannot be used here: top_k and top_p need all logits",
    "vocabulary": "at least one chunk of 256 tokens for each rank",
    "heads": "its num_key_value_heads=1 must be divisible by tp_size=2",
}.items())  # fmt: skip
def test_refusals(found, what, words):
    for rank in found:
        assert words in rank["refusals"][what]


def test_a_model_of_one_process_has_no_shards(folder):
    with pytest.raises(ValueError, match=r"lm_head='sharded' cannot be used here: the model is not split"):
        ranks.decode(ranks.load("llama", folder), **FULL, lm_head="sharded")


def test_the_script_of_the_guide_under_torchrun(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "decode.py").write_text(code, encoding="utf-8")
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "decode.py",
    ]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["A1234567890123456+8765432109876544=10000000000000000"]
    assert "Warning: `torch" not in done.stderr
