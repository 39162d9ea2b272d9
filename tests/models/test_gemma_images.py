# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma's images, as its own processor prepares them: against transformers' own `generate`."""

import pytest
import torch

import dlmkernels as dk
import numerics
import small_models

pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma yet")
from test_diffusion_gemma import CANVAS, PAD, VOCAB, TheirGenerate, build, prompts, published

IMAGE = VOCAB - 1
#: of an image: patches in a row and a column, and soft tokens that 3 by 3 patches make
SIDE = 6
TOKENS = (SIDE // 3) ** 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[None, "vision"], ids=["causal", "seeing all of itself"])
def model(request):
    """Images are causal as text is, or see all of themselves (as in the published checkpoint)."""
    made = build(use_bidirectional_attention=request.param)
    made.generation_config = published(bound=6.0)
    return made


def processed(seed, rows=((3, 6), (2, 4))):
    """What a processor returns: rows of text, an image and text, `(before, after)` tokens each, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    length = max(a + TOKENS + b for a, b in rows)
    ids, kinds, mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(3))
    ids.fill_(PAD)
    for row, (before, after) in enumerate(rows):
        first = length - before - TOKENS - after
        ids[row, first:] = prompts(1, length - first, seed + row)[0]
        image = slice(first + before, first + before + TOKENS)
        ids[row, image], kinds[row, image], mask[row, first:] = IMAGE, 1, 1
    place = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).flip(1)
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds,
        "pixel_values": torch.rand(len(rows), SIDE**2, 3 * 16**2, generator=generator),
        "image_position_ids": place.expand(len(rows), -1, -1),
    }  # fmt: skip


def theirs(model, inputs, seeds, length):
    inputs = dict(inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    return TheirGenerate(model, seeds)(ids, mask, max_new_tokens=length, **inputs).sequences


@pytest.mark.parametrize("length", [CANVAS, 2 * CANVAS])
def test_against_transformers(model, length):
    inputs, seeds = processed(1), torch.tensor([3, -8])
    expected = theirs(model, inputs, seeds, length)
    out = dk.generate(model, inputs, max_new_tokens=length, seed=seeds)
    assert torch.equal(out.sequences[:, : expected.shape[1]], expected[:, : out.sequences.shape[1]])


def test_what_images_are_matters(model):
    a, b = (
        dk.generate(
            model, {**processed(1), "pixel_values": processed(s)["pixel_values"]}, max_new_tokens=CANVAS, seed=1
        )
        for s in (1, 2)
    )
    assert not torch.equal(a.generated, b.generated)


def test_whether_an_image_sees_all_of_itself_matters():
    """In the model's own forward, so that the comparison above notices: hidden states of the first of its tokens."""
    inputs = processed(1, rows=((3, 6),))
    outs = []
    for kind in (None, "vision"):
        model = build(use_bidirectional_attention=kind)
        model.generation_config = published(bound=6.0)
        outs.append(dk.generate(model, inputs, max_new_tokens=CANVAS, seed=1).confidence)
    assert numerics.far(*outs)


def test_whatever_the_batch(model):
    inputs, seeds = processed(4), torch.tensor([3, 9])
    together = dk.generate(model, inputs, max_new_tokens=CANVAS, seed=seeds)
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = dk.generate(model, own, max_new_tokens=CANVAS, seed=seeds[row : row + 1])
        assert torch.equal(alone.generated[0], together.generated[row])


def test_copies(model):
    inputs = processed(4, rows=((3, 6),))
    out = dk.generate(model, inputs, max_new_tokens=CANVAS, seed=3, num_return_sequences=2)
    alone = dk.generate(model, inputs, max_new_tokens=CANVAS, seed=3)
    assert torch.equal(out.generated[0], alone.generated[0]) and len(out.generated) == 2


def test_errors(model):
    inputs = processed(1)
    with pytest.raises(ValueError, match="input_ids has 8 image tokens, but pixel_values yields 4 vectors"):
        few = {name: inputs[name][:1] for name in ("pixel_values", "image_position_ids")}
        dk.generate(model, inputs | few, max_new_tokens=CANVAS)
    with pytest.raises(ValueError, match="cfg_scale cannot be used with pixel_values"):
        dk.generate(model, inputs, max_new_tokens=CANVAS, cfg_scale=1.0, mask_token_id=4)
    if model.config.text_config.use_bidirectional_attention == "vision":
        with pytest.raises(ValueError, match=r"mm_token_type_ids of row 0 must have one entry .* 13 tokens; got 12"):
            short = {"mm_token_type_ids": inputs["mm_token_type_ids"][:, 1:], "attention_mask": None}
            dk.generate(model, inputs | short, max_new_tokens=CANVAS)
        narrow = build(use_bidirectional_attention="vision", sliding_window=3)
        with pytest.raises(ValueError, match="an image of 4 tokens does not fit into the model's sliding window of 3"):
            dk.generate(narrow, inputs, max_new_tokens=CANVAS)
    with pytest.raises(ValueError, match="input_ids holds pixel_values, which models of family 'masked' do not read"):
        dk.generate(small_models.build("llama"), inputs, max_new_tokens=4)
