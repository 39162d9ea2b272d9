# SPDX-License-Identifier: Apache-2.0
"""S2D2: what a block model drafts and verifies itself is what it says with blocks of one position."""

import pytest
import torch

import checkpoints
import dlmkernels as dk
from checkpoints import MASK, PAD
from dlmkernels.decoding.programs.self_verified import bits, visibilities
from small_models import prompts


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["sdar", "calm"])
def model(request, tmp_path_factory):
    """A random model, and one whose layers say less than its embeddings, so that drafts are often right."""
    checkpoint = checkpoints.sdar()
    if request.param == "calm":
        for name, weight in checkpoint.weights.items():
            if "o_proj" in name or "down_proj" in name:
                weight *= 0.15
        row = checkpoint.weights["model.embed_tokens.weight"]
        row[MASK] = row[5] * 0.8
    return dk.load(checkpoint.write(tmp_path_factory.mktemp(request.param)))


def batch():
    rows = [prompts(1, n, seed=n)[0] for n in (3, 8, 6)]
    ids = torch.stack([torch.cat((r.new_full((8 - len(r),), PAD), r)) for r in rows])
    return rows, ids, torch.stack([torch.arange(8) >= 8 - len(r) for r in rows]).long()


@pytest.mark.parametrize("grid", ["absolute", "prompt"])
@pytest.mark.parametrize("block_length", [2, 4, 7])
def test_is_block_length_one(block_length, grid, model):
    rows, ids, valid = batch()
    options = {"max_new_tokens": 19, "eos_policy": "none", "temperature": 0.0, "top_k": 0, "top_p": 1.0,
               "attention": "block", "cache": "block", "block_grid": grid}  # fmt: skip
    plain = dk.generate(model, ids, valid, rule=dk.Quota(), score="position", block_length=1, **options)
    out = dk.generate(model, ids, valid, rule=dk.S2D2(), block_length=block_length, **options)
    assert torch.equal(out.sequences, plain.sequences) and out.complete.all()
    for i, row in enumerate(rows):
        alone = dk.generate(model, row, rule=dk.S2D2(), block_length=block_length, **options)
        assert torch.equal(alone.generated[0], out.generated[i]) and alone.num_forwards[0] == out.num_forwards[i]


def test_drafts_are_accepted(model):
    """At least sometimes, and by each request at its own pace; what is drawn does not depend on how many are drafted."""
    options = {"max_new_tokens": 24, "eos_policy": "none", "attention": "block", "cache": "block", "temperature": 1.0,
               "top_k": 0, "top_p": 1.0, "seed": torch.arange(6), "rule": dk.S2D2()}  # fmt: skip
    few, many = (dk.generate(model, prompts(6, 5), block_length=n, **options) for n in (2, 6))
    assert torch.equal(few.sequences, many.sequences)
    assert (many.num_forwards <= 48).all() and many.num_forwards.sum() < 6 * 48


@pytest.mark.parametrize("options", [
    {"eos_token_id": tuple(range(20, 40))}, {"eos_policy": "none", "constraint": torch.arange(97) % 3 > 0},
], ids=["end tokens", "constraint"])  # fmt: skip
def test_options(options, model):
    options = options | {"max_new_tokens": 18, "attention": "block", "cache": "block", "temperature": 0.0, "top_k": 0,
                         "top_p": 1.0}  # fmt: skip
    plain = dk.generate(model, prompts(4, 5), rule=dk.Quota(), score="position", block_length=1, **options)
    out = dk.generate(model, prompts(4, 5), rule=dk.S2D2(), block_length=4, **options)
    assert torch.equal(out.sequences, plain.sequences)


def test_visibilities():
    drafting, verifying = visibilities(3)
    assert drafting.tolist() == [[0b0001], [0b1111], [0b1111], [0b1111]]
    assert verifying.tolist() == [[0b001], [0b011], [0b111], [0b001000], [0b010001], [0b100011]]
    rows = torch.rand(5, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    words = bits(rows)
    assert words.shape == (5, 3)
    for i in range(70):
        assert torch.equal(((words[:, i // 32].long() >> (i % 32)) & 1).bool(), rows[:, i])


def test_refusals(model):
    ids = prompts(1, 5)
    with pytest.raises(ValueError, match="rule S2D2 needs attention='block', cache='block'"):
        dk.generate(model, ids, rule=dk.S2D2(), cache="none")
    with pytest.raises(ValueError, match="block_length must be at least 2 with rule S2D2; got 1"):
        dk.generate(model, ids, rule=dk.S2D2(), cache="block", block_length=1)
    with pytest.raises(ValueError, match="input_ids must hold at least one token with rule S2D2"):
        dk.generate(model, ids[:, :0], rule=dk.S2D2(), cache="block")
