# SPDX-License-Identifier: Apache-2.0
"""FOCUS against its plain restatement, alone and in ragged batches; what it saves; what it refuses."""

import pytest
import torch
import transformers as hf

import checkpoints
import dlmkernels as dk
import numerics
from decodings import LateCount, assert_same, enliven, lively, ragged
from dlmkernels.decoding.programs import base
from restated_features import focus, plain
from small_models import DECODER, MASK, build

STOCK = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
}  # fmt: skip
BLOCK, NEW = 8, 20
#: what all of these decodings have in common: the program's rule, blocks counted from the first token
OPTIONS = {
    "attention": "block", "block_grid": "absolute", "block_length": BLOCK, "max_new_tokens": NEW, "eos_policy": "none",
    "logit_alignment": "same", "rule": dk.Threshold(0.8),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def stock(kind, layers=4, seed=6):
    build_class, config_class = STOCK[kind]
    torch.manual_seed(seed)
    return enliven(build_class(config_class(**DECODER | {"num_hidden_layers": layers})).eval(), seed=seed)


@pytest.fixture(scope="module", params=STOCK)
def model(request):
    """Four layers, of which the last three compute some rows."""
    return stock(request.param)


@pytest.fixture(scope="module")
def one():
    return stock("qwen3")


def assert_rows_same(model, plain_model, cache, seed=0, threshold=0.8, block=BLOCK, **options):
    """Each prompt restated alone; `generate` for their padded batch, and for the first alone."""
    rows, ids, valid = ragged(seed=seed)
    options = OPTIONS | {"rule": dk.Threshold(threshold), "cache": cache, "block_length": block} | options
    out, alone = dk.generate(model, ids, valid, **options), dk.generate(model, rows[0], **options)
    for row, prompt in enumerate(rows):
        request = focus(
            plain_model, prompt, NEW, MASK, block=block, threshold=threshold, alpha=cache.alpha, delayed=cache.delayed
        )
        assert_same(out, row, request)
        if row == 0:
            assert_same(alone, 0, request)


@pytest.mark.parametrize("threshold, cache", [
    (0.8, dk.FocusCache()), (0.4, dk.FocusCache()), (0.8, dk.FocusCache(1.0)), (0.5, dk.FocusCache(2.5)),
    (0.8, dk.FocusCache(1.5, delayed=False)), (0.5, dk.FocusCache(float("inf"))),
], ids=str)  # fmt: skip
def test_restated(model, threshold, cache):
    assert_rows_same(model, plain(model), cache, threshold=threshold)


def test_longer_blocks(one):
    assert_rows_same(one, plain(one), dk.FocusCache(), block=16)


def test_finished_blocks_forwarded_apart(one):
    """The same tokens, with a forward more for each block that is finished, and for the prompt."""
    _, ids, valid = ragged()
    fused, apart = (dk.generate(one, ids, valid, **OPTIONS, cache="focus", fuse_commit=fuse) for fuse in (True, False))
    assert torch.equal(apart.sequences, fused.sequences) and (apart.num_forwards > fused.num_forwards).all()


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2"])
def test_published_models(tmp_path, family):
    """Loaded from their published form: SDAR, with experts as well, and LLaDA2.0."""
    checkpoint = getattr(checkpoints, family)()
    model = dk.load(checkpoint.write(tmp_path), family=family.removesuffix("_moe"))
    # without the temperature of its own preset
    assert_rows_same(model, checkpoint.double, dk.FocusCache(), config=dk.DecodingConfig())


@pytest.mark.parametrize("options", [
    {"rule": dk.Threshold(0.4)}, {"cfg_scale": 0.5}, {"temperature": 1.0, "seed": 3}, {"fuse_commit": False},
    {"block_grid": "prompt"}, {"rule": dk.Quota(), "eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
], ids=["threshold", "guided", "sampled", "apart", "grid", "ends"])  # fmt: skip
def test_without_approximation(one, options):
    """All positions, and nothing settled before its block is finished: the decisions of cache="block"."""
    _, ids, valid = ragged()
    want = dk.generate(one, ids, valid, **OPTIONS | options | {"cache": "block"})
    out = dk.generate(one, ids, valid, **OPTIONS | options | {"cache": dk.FocusCache(float("inf"), delayed=False)})
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    assert torch.equal(out.num_forwards, want.num_forwards)
    # not bit for bit: matrix products of another number of rows may round differently
    numerics.assert_same_probabilities(out.confidence, want.confidence)


ALONE = {
    "guided": {"cfg_scale": 0.5}, "sampled": {"temperature": 1.0, "seed": 3}, "lengths": {"max_new_tokens": (9, 20, 5)},
    "ends": {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    "own ends": {"eos_policy": "fill", "eos_token_id": ((20, 21, 22), tuple(range(30, 60)), (4, 5))},
    "grid of the prompt": {"block_grid": "prompt"}, "quota": {"rule": dk.Quota()},
    "dynamic": {"rule": dk.DynamicThreshold(0.5)}, "allowed": {"constraint": torch.arange(97) % 3 > 0},
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_alone_and_in_a_batch(one, name):
    rows, ids, valid = ragged()
    options = OPTIONS | {"cache": "focus", "rule": dk.Threshold(0.5)} | ALONE[name]
    out = dk.generate(one, ids, valid, **options)
    assert out.complete.all()
    for row, prompt in enumerate(rows):
        own = {
            name: options[name][row] for name in ("max_new_tokens", "eos_token_id")
            if isinstance(options.get(name), tuple) and isinstance(options[name][0], tuple | int)
            and len(options[name]) == len(rows)
        }  # fmt: skip
        alone = dk.generate(one, prompt, **options | own)
        pads = ids.shape[1] - len(prompt)
        end = pads + alone.sequences.shape[1]
        assert torch.equal(out.sequences[row, pads:end], alone.sequences[0])
        assert torch.equal(out.commit_step[row, pads:end], alone.commit_step[0])
        assert out.num_forwards[row] == alone.num_forwards[0]


def test_host_that_learns_late(one, monkeypatch):
    """As on a GPU: reports are known two steps after."""
    _, ids, valid = ragged()
    options = OPTIONS | {"cache": "focus", "rule": dk.Threshold(0.5)}
    want = dk.generate(one, ids, valid, **options)
    monkeypatch.setattr(base, "OpenCount", LateCount)
    out = dk.generate(one, ids, valid, **options)
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_come_and_go(one, deterministic):
    """In an engine of two slots; and all memory is there before the first request."""
    rows, *_ = ragged()
    options = {name: value for name, value in OPTIONS.items() if name != "max_new_tokens"}
    options |= {"cache": "focus", "rule": dk.Threshold(0.5)}
    with dk.Engine(one, slots=2, max_length=64, deterministic=deterministic, **options) as engine:
        before = engine.memory()
        numbers = [engine.add_request(row.tolist(), max_new_tokens=NEW) for row in rows]
        outputs = {number: list(engine.request_id_iter(number))[-1] for number in numbers}
        assert engine.memory().caches == before.caches > 0
    for number, row in zip(numbers, rows):
        want = dk.generate(one, row, **options, max_new_tokens=NEW).generated[0].tolist()
        assert outputs[number].generated_tokens == want


def test_given_tokens_inside_of_a_block(one):
    """What stands decided right of an open position that was dropped: nothing is read that was never written."""
    canvas = ragged((24,), seed=3)[0][0].clone()
    canvas[[2, 3, 4, 5, 9, 10, 11, 12, 17, 18, 20, 22]] = MASK
    options = {name: value for name, value in OPTIONS.items() if name != "max_new_tokens"}
    outputs = []
    for _ in range(2):
        torch.full((4_000_000,), torch.nan)  # memory that a cache may be given
        outputs.append(dk.infill(one, canvas, **options, cache=dk.FocusCache(1.0)))
    assert outputs[0].complete.all() and not outputs[0].confidence.isnan().any()
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_it_saves(one):
    """Rows that go through the feed-forward of each layer: a block of 16, one token a forward."""
    counts = [0] * 4
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, x, i=i: counts.__setitem__(i, counts[i] + x[0].shape[1]))
        for i, layer in enumerate(one.model.layers)
    ]
    options = OPTIONS | {"rule": dk.Quota(), "max_new_tokens": 16, "block_length": 16}
    for cache in ("block", "focus"):
        counts[:] = [0] * 4
        out = dk.generate(one, ragged((32,))[0][0], **options, cache=cache)
        assert out.num_forwards == 16
        if cache == "block":
            assert counts == [32 + 16 * 16] * 4
    for hook in hooks:
        hook.remove()
    assert counts[0] < 32 + 16 * 16 and counts[1] == counts[2] == counts[3] < 0.75 * counts[0]


@pytest.mark.parametrize("make, message", [
    (lambda: dk.FocusCache(0.5), "alpha must be a number of at least 1; got 0.5"),
    (lambda: dk.FocusCache(delayed=1), "delayed must be True or False; got 1"),
], ids=["alpha", "delayed"])  # fmt: skip
def test_bad_numbers(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("options, message", [
    ({"attention": "full"}, "cache='focus' needs attention='block'; got attention='full'"),
    ({"logit_alignment": "shift"}, "cache='focus' needs a model whose logits predict the token at their own position"),
    ({"sub_block_length": 4}, "cache='focus' decodes blocks as a whole: omit sub_block_length; got 4"),
    ({"rule": dk.TokenEditing(0.4, 0.3, 4)}, "cache='focus' needs a rule that never changes decided tokens; got TokenEditing"),
    ({"rule": dk.Quota(), "steps": 4}, "omit steps; got steps=4 with rule Quota"),
    ({"rule": dk.Pipeline(0.3, 0.3, 0.5)}, "cache='focus' needs a rule that decodes block by block"),
], ids=str)  # fmt: skip
def test_refused_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(build("qwen3"), ragged((5,))[0][0], **OPTIONS | options, cache="focus")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_models_refused(kind):
    with pytest.raises(ValueError, match="cache='focus' needs a model of type llama, qwen2, qwen3, qwen3_moe"):
        dk.generate(lively(kind), ragged((5,))[0][0], **OPTIONS, cache="focus")
