# SPDX-License-Identifier: Apache-2.0
"""Guidance by a prompt of its own: what the unconditional half sees, with every cache and kind of attention."""

import pytest
import torch

import dlmkernels as dk
from dlmkernels.decoding.guidance import Unconditional, pair_prompts
from dlmkernels.decoding.state import NegativePrompt, State
from small_models import EOS, MASK, PAD, build, prompts

NEGATIVE = [[7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
RAGGED = [[20, 21, 22, 23, 24], [30, 31]]
OPTIONS = {"max_new_tokens": 12, "eos_policy": "none"}


def padded_left(rows):
    width = max(map(len, rows))
    return (torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
            torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))  # fmt: skip


def by_hand(model, prompt, negative, scale, n, bias=0.0):
    """One request: two forwards of BERT a step through its own attention, one token each."""
    answer = [MASK] * n
    for _ in range(n):
        z = []
        for before in (prompt, negative):
            with torch.no_grad():
                z.append(model(torch.tensor([before + answer])).logits[0, len(before) :].double())
        guided = z[1] + (scale + 1) * (z[0] - z[1]) + bias
        guided[:, MASK] = -torch.inf
        p, token = guided.softmax(1).max(1)
        p[[x != MASK for x in answer]] = -1
        best = int(p.argmax())
        answer[best] = int(token[best])
    return answer


@pytest.mark.parametrize("bias", [None, {5: 3.0, EOS: -9.0}])
def test_two_forwards_by_hand(bias):
    """Prompts of other lengths than the negative ones, longer and shorter; the bias comes after the guidance."""
    model = build("bert")
    ids, mask = padded_left(RAGGED)
    out = dk.generate(
        model, ids, mask, rule=dk.Quota(), cfg_scale=1.5, negative_prompt=NEGATIVE, logit_bias=bias, **OPTIONS
    )
    add = torch.zeros(97, dtype=torch.float64)
    for i, value in (bias or {}).items():
        add[i] = value
    for row in range(2):
        assert out.generated[row].tolist() == by_hand(model, RAGGED[row], NEGATIVE[row], 1.5, 12, add)
    assert torch.equal(out.sequences[:, :5], ids) and out.prompt_length == 5 and out.origin.tolist() == [0, 3]
    assert out.sequences.shape == out.commit_step.shape == out.confidence.shape == (2, 17)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed"])
@pytest.mark.parametrize("alignment", ["same", "shift"])
def test_as_many_masks_are_what_guidance_sees_without(cache, alignment):
    model, ids = build(), prompts(3, 6)
    options = {
        **OPTIONS, "cfg_scale": 0.7, "cache": cache, "block_length": 6, "rule": dk.Threshold(0.5),
        "logit_alignment": alignment,
    }  # fmt: skip
    masks = torch.full((1, 6), MASK)
    with_masks, without = (dk.generate(model, ids, negative_prompt=x, **options) for x in (masks, None))
    other = dk.generate(model, ids, negative_prompt=[5] * 6, **options)
    assert torch.equal(with_masks.sequences, without.sequences)
    assert torch.equal(with_masks.confidence, without.confidence)
    assert not torch.equal(other.sequences, without.sequences)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed"])
def test_a_request_does_not_depend_on_its_neighbours(cache):
    model = build()
    ids, mask = padded_left(RAGGED)
    options = {**OPTIONS, "cfg_scale": 0.7, "cache": cache, "block_length": 6, "rule": dk.Quota()}
    both = dk.generate(model, ids, mask, negative_prompt=NEGATIVE, **options)
    for row in range(2):
        alone = dk.generate(model, [RAGGED[row]], negative_prompt=[NEGATIVE[row]], **options)
        assert torch.equal(alone.generated[0], both.generated[row])


@pytest.mark.parametrize("grid", ["absolute", "prompt", "both-ways"])
@pytest.mark.parametrize("attention", ["block", "causal", "causal-context"])
def test_the_exact_cache_is_exact(attention, grid):
    """Where the halves of a batch begin in other columns, what is in the cache is still what a whole forward gives."""
    if grid != "absolute" and attention != "block":
        pytest.skip("the grid is that of block attention")
    model = build()
    ids, mask = padded_left(RAGGED)
    options = {**OPTIONS, "cfg_scale": 0.7, "attention": attention, "block_length": 4, "rule": dk.Quota()}
    if attention == "block":
        options["block_grid"] = grid
    cached, whole = (
        dk.generate(model, ids, mask, negative_prompt=NEGATIVE, cache=cache, **options) for cache in ("block", "none")
    )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.confidence, whole.confidence)
    longer = [[*[3] * 8, *row] for row in NEGATIVE]
    assert not torch.equal(
        dk.generate(model, ids, mask, negative_prompt=longer, cache="block", **options).sequences, cached.sequences
    )


def test_prompts_as_embeddings():
    model, ids = build(), prompts(2, 3)
    embeds = model.get_input_embeddings()(ids)
    options = {**OPTIONS, "cfg_scale": 0.7, "negative_prompt": NEGATIVE}
    by_ids, by_embeds = dk.generate(model, ids, **options), dk.generate(model, inputs_embeds=embeds, **options)
    assert torch.equal(by_ids.generated, by_embeds.generated)


def test_given_tokens_of_the_answer_are_seen_by_both():
    """Unlike guidance without a prompt of its own, which hides all that was given."""
    model, given = build("bert"), [-1] * 12
    given[4] = 40
    out = dk.generate(
        model, [RAGGED[0]], cfg_scale=1.0, negative_prompt=NEGATIVE[0], given=torch.tensor(given), rule=dk.Quota(),
        **OPTIONS,
    )  # fmt: skip
    assert out.generated[0, 4] == 40
    canvas = State.of(
        torch.tensor([[1, 2, MASK, 40]]), torch.tensor([[False, False, True, False]]), torch.tensor([0]),
        negative=NegativePrompt(torch.tensor([[8, 9]]), torch.tensor([0])),
    )  # fmt: skip
    assert Unconditional(canvas, MASK).see(canvas.tokens).tolist() == [[8, 9, MASK, 40]]


@pytest.mark.parametrize(
    ("negative", "options", "message"),
    [
        ([5, 6], {"cfg_scale": 0.0}, "cfg_scale above 0"),
        (torch.tensor([1.0]), {}, "int64"),
        ([[5], [6], [7]], {}, "each of the 2 requests"),
        ([97], {}, "from 0 to 96"),
        ("no", {}, "negative_prompt is text"),
        ([[]], {}, "negative_prompt"),
    ],
)
def test_negative_prompts_that_cannot_be(negative, options, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(build(), prompts(2, 4), negative_prompt=negative, **{"cfg_scale": 1.0, **options})


def test_pairs_have_one_width():
    config, special = dk.DecodingConfig(cfg_scale=1.0), dk.decoding.config.SpecialTokens(MASK, [EOS], PAD, [MASK])
    tokens, origin = torch.tensor([[4, 5]]), torch.tensor([0], dtype=torch.int32)
    pair = pair_prompts(tokens, origin, [7, 8, 9], None, config, special, 97)
    assert pair.tokens.tolist() == [[PAD, 4, 5]] and pair.origin.tolist() == [1] and pair.added == 1
    assert pair.negative.tokens.tolist() == [[7, 8, 9]] and pair.negative.origin.tolist() == [0]
