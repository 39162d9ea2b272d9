# SPDX-License-Identifier: Apache-2.0
"""An image in the prompt, by the example: decoded as by a loop around the model's own forward."""

import importlib.util
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
import numerics
import published
from plain_llama import PlainLlama

SOURCE = Path(__file__).parents[2] / "examples" / "image_prompt.py"


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("image_prompt", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(seed):
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_against_the_models_own_forward(example, cache):
    """With the prefix cache in one block, which is exact: nothing stands before the image that changes."""
    model, tower, projector = example.build()
    before, after = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    prompt = example.embedded_prompt(model, tower, projector, before, image(3), after)
    assert prompt.shape == (1, 3 + 16 + 2, 64)
    length = prompt.shape[1]
    plain, words = PlainLlama(model), model.get_input_embeddings().weight

    def forward(tokens):
        embeds = torch.cat((prompt.expand(len(tokens), -1, -1), words[tokens[:, length:]]), 1)
        return plain(tokens, embeds=embeds)[0]

    canvas = torch.cat((torch.zeros(length, dtype=torch.int64), torch.full((10,), example.MASK)))
    request = published.llada(forward, canvas, length, example.MASK, steps=10)
    assert request.slack > numerics.TWO_PROGRAMS, "a near tie: this comparison needs another seed"
    options = {"config": "llada", "steps": 10, "max_new_tokens": 10}
    out = dk.generate(model, inputs_embeds=prompt, **options)
    assert torch.equal(out.generated[0], request.tokens[length:])
    assert torch.equal(out.commit_step[0, length:], request.commit_step[length:])
    if cache != "none":
        again = dk.generate(model, inputs_embeds=prompt, cache=cache, warmup=10, **options)
        assert torch.equal(again.sequences, out.sequences)


def test_the_image_matters(example):
    model, tower, projector = example.build()
    before, after = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    outs = [
        dk.generate(
            model, inputs_embeds=example.embedded_prompt(model, tower, projector, before, image(seed), after),
            config="llada", steps=12, max_new_tokens=12,
        ).generated
        for seed in (1, 2)
    ]  # fmt: skip
    assert not torch.equal(*outs)


def test_example_runs(example, capsys):
    example.main()
    printed = capsys.readouterr().out
    assert printed.count("21 vectors in") == 2 and len(set(printed.splitlines())) == 2
