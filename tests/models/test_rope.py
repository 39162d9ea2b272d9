# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings whose frequencies depend on the length: a request has those of its own, alone and in a batch."""

import pytest
import torch
import transformers as hf

import dlmkernels as dk
import small_models
from dlmkernels import AttentionWindow, adapt, generate
from dlmkernels.models.adapt import DiffusionModel
from dlmkernels.models.rotary import RequestRotary

#: Length up to which both kinds are as they were trained.
ORIGINAL = 16
SCALINGS = {
    "dynamic": {"max_position_embeddings": ORIGINAL, "rope_parameters": {
        "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "longrope": {"max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_end(monkeypatch):
    """Canvases beyond the original length, whatever the configuration says of it."""
    monkeypatch.setattr(DiffusionModel, "max_length", 64)
    with torch.no_grad():
        yield


@pytest.fixture(params=SCALINGS)
def model(request):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**(small_models.DECODER | SCALINGS[request.param] | {"initializer_range": 0.3}))
    return hf.LlamaForCausalLM(config).eval()


def by_layer(types):
    """A model whose kinds of layers have scalings of their own, or none."""
    torch.manual_seed(0)
    rope = {
        kind: SCALINGS[name]["rope_parameters"] if name in SCALINGS else {"rope_type": "default", "rope_theta": 1e4}
        for kind, name in zip(("full_attention", "sliding_attention"), types)
    }
    fields = {"max_position_embeddings": ORIGINAL, "rope_parameters": rope, "sliding_window": 40,
              "layer_types": list(rope), "initializer_range": 0.3}  # fmt: skip
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**(small_models.DECODER | fields))).eval()


def own_logits(model, tokens):
    """The model's own forward of all of a canvas, where it finds the frequencies of the canvas's length."""
    return model(tokens, attention_mask=torch.zeros(len(tokens), 1, *2 * tokens.shape[1:])).logits


def our_logits(model, tokens, lengths=None, **window):
    adapted, positions = adapt(model), torch.arange(tokens.shape[1]).expand(tokens.shape)
    rotations = None if lengths is None else adapted.rotations(torch.tensor(lengths))
    return adapted.logits(adapted.hidden(tokens, positions, AttentionWindow(rotations=rotations, **window)))


@pytest.mark.parametrize("length", [ORIGINAL - 3, ORIGINAL, ORIGINAL + 1, 40])
def test_frequencies_are_those_of_the_model(model, length):
    """Up to the original length, and beyond it; whatever the model was called with before."""
    tokens = small_models.prompts(2, length)
    own = own_logits(model, tokens)
    for before in (40, 30, 5):  # the last resets what the model has kept of the others
        model(small_models.prompts(1, before))
        torch.testing.assert_close(our_logits(model, tokens), own, atol=2e-4, rtol=2e-4)
    assert torch.equal(own_logits(model, tokens), own)


def test_tables_are_those_of_the_stock_module(model):
    (module,) = (m for m in adapt(model)._twin.modules() if isinstance(m, RequestRotary))
    x = torch.zeros(1, 1, 64)
    for length in (5, ORIGINAL, ORIGINAL + 1, 40, 6):
        positions = torch.arange(length)[None]
        for ours, own in zip(module(x, positions), model.model.rotary_emb(x, positions)):
            assert torch.equal(ours, own)


def test_lengths_matter(model):
    """The tests here compare what differs."""
    tokens = small_models.prompts(1, 8)
    assert not torch.allclose(our_logits(model, tokens, [8]), our_logits(model, tokens, [40]), atol=1e-2)


def test_rows_have_their_own(model):
    tokens, lengths = small_models.prompts(4, 12), [12, 40, 13, 40]
    together = our_logits(model, tokens, lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row : row + 1], our_logits(model, tokens[row : row + 1], [length]))


@pytest.mark.parametrize("types", [("longrope", "dynamic"), ("longrope", "none"), ("none", "dynamic")], ids="-".join)
def test_scalings_by_layer(types):
    model, tokens = by_layer(types), small_models.prompts(3, 12)
    (module,) = (m for m in adapt(model)._twin.modules() if isinstance(m, RequestRotary))
    together = our_logits(model, tokens, [12, 20, 40])
    for row, length in enumerate((12, 20, 40)):
        alone = our_logits(model, tokens[row : row + 1], [length])
        assert torch.equal(together[row : row + 1], alone)
        assert torch.allclose(alone, our_logits(model, tokens[row : row + 1]), atol=1e-2) == (length == 12)
    x, positions = torch.zeros(1, 1, 64), torch.arange(30)[None]
    for kind in ("full_attention", "sliding_attention"):
        for ours, own in zip(module(x, positions, kind), model.model.rotary_emb(x, positions, kind)):
            assert torch.equal(ours, own)


OPTIONS = {"eos_policy": "none", "block_length": 4}


def batch():
    """Prompts of 3, 9 and 21 tokens, padded on the left."""
    lengths = (3, 9, 21)
    ids = torch.zeros(3, 21, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 21 - length :] = small_models.prompts(1, length, seed=row)[0]
    return ids, (torch.arange(21) >= 21 - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "options",
    [{"cache": "none"}, {"cache": "prefix"}, {"cache": "dual"}, {"cache": "delayed"}, {"cfg_scale": 0.5},
     {"attention": "block", "cache": "none"}, {"attention": "block", "cache": "block"},
     {"attention": "block", "block_grid": "absolute", "cache": "block", "block_length": 8},
     {"rule": dk.Lengthening(first_length=4, growth=2, end_window=2)}],
    ids=str,
)  # fmt: skip
def test_tokens_do_not_depend_on_the_batch(model, options):
    ids, valid = batch()
    options = OPTIONS | {"max_new_tokens": 12} | options
    together = generate(model, ids, valid, **options)
    for row in range(3):
        alone = generate(model, ids[row : row + 1][:, valid[row].bool()], **options)
        assert torch.equal(together.generated[row : row + 1], alone.generated)


@pytest.mark.parametrize("grid", ["absolute", "prompt"])
@pytest.mark.parametrize("new", [8, 24])
def test_block_cache_is_exact(model, grid, new):
    ids, valid = batch()
    options = OPTIONS | {"attention": "block", "block_grid": grid, "max_new_tokens": new}
    without = generate(model, ids, valid, cache="none", **options)
    for fuse in (True, False):
        cached = generate(model, ids, valid, cache="block", fuse_commit=fuse, **options)
        assert torch.equal(cached.sequences, without.sequences)


def test_infilling_that_grows(model):
    """What a row may become is its length, however long the others may."""
    mask = small_models.MASK
    tokens = torch.tensor([[5, mask, 6, mask, mask, 7, 8, 9], [5, 6, mask, mask, mask, mask, mask, mask]])
    # what the model would put there is what makes a mask two
    expand = int(dk.infill(model, tokens[:1], steps=1, eos_policy="none").sequences[0, 1])
    options = {"rule": dk.Expanding(expand, budget=6), "max_new_tokens": 12, "eos_policy": "none"}
    together = dk.infill(model, tokens, **options)
    assert together.length.max() > 8
    for row in range(2):
        alone = dk.infill(model, tokens[row : row + 1], **options)
        length = int(alone.length[0])
        assert int(together.length[row]) == length
        assert torch.equal(together.sequences[row, :length], alone.sequences[0, :length])


def test_likelihood(model):
    prompt, valid = batch()
    answer = small_models.prompts(3, 6, seed=9)
    together = dk.log_likelihood(model, prompt, answer, prompt_mask=valid, num_samples=3, seed=0)
    for row in range(3):
        alone = dk.log_likelihood(
            model, prompt[row : row + 1][:, valid[row].bool()], answer[row : row + 1], num_samples=3, seed=0
        )
        torch.testing.assert_close(together.per_token[row], alone.per_token[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_attends_by_itself_is_refused():
    class Own(hf.LlamaForCausalLM):
        pass

    config = hf.LlamaConfig(**(small_models.DECODER | SCALINGS["dynamic"]))
    config.model_type = "own"
    model = Own(config).eval()
    with pytest.warns(UserWarning, match="does not know model type 'own'"):
        adapted = adapt(model, causal=True)
    ids, valid = batch()
    with pytest.raises(ValueError, match="requests of different lengths cannot share a batch with Own"):
        generate(adapted, ids, valid, max_new_tokens=4)
