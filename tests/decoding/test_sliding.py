# SPDX-License-Identifier: Apache-2.0
"""BD3-LM beyond the length it was trained with: its window moves on, and what is in the cache stays as it was."""

import pytest
import torch

import dlmkernels as dk
import numerics
import research

BLOCK, LONGEST, MASK = research.BLOCK, 12, research.VOCAB - 1


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bd3-lm")
    return research.write("bd3-lm", folder, model_length=LONGEST), dk.load(folder)


def seen(length):
    """What each position sees, bool `[T, T]`: of the columns up to the end of its block, the last `LONGEST`.

    What a position keeps in the cache was computed when its block was decoded, of what the window held then.
    """
    end = (torch.arange(length) // BLOCK + 1)[:, None] * BLOCK
    column = torch.arange(length)
    return (column < end) & (column >= end - LONGEST)


def restated(w, prompt, length):
    """The tokens of a text of `length`, one a forward by confidence, in float64; and the least lead of a choice."""
    w, text, least = research.double(w), list(prompt), 1.0
    while len(text) < length:
        canvas = torch.tensor(text + [MASK] * (BLOCK - len(text) % BLOCK))
        first = len(canvas) - BLOCK
        while (canvas[first:] == MASK).any():
            logits = research.dit(w, w["vocab_embed.embedding"][canvas], 0.0, seen(len(canvas)))
            logits[:, MASK] = -torch.inf
            p, token = logits.softmax(-1).topk(2)
            sure = p[:, 0].masked_fill(canvas != MASK, -1)
            best = sure.topk(2).values
            place = int(sure.argmax())
            least = min(least, (best[0] - best[1]).item(), (p[place, 0] - p[place, 1]).item())
            canvas[place] = token[place, 0]
        text = canvas.tolist()
    return torch.tensor(text), least


@pytest.mark.parametrize("prompt", [[1], [3, 7, 1, 2, 9, 4], list(range(1, 12))], ids=len)
def test_published_window(made, prompt):
    w, model = made
    expected, least = restated(w, prompt, 3 * LONGEST)
    assert least > numerics.TWO_PROGRAMS, "a near tie: this comparison needs another seed"
    out = dk.generate(
        model, torch.tensor(prompt), rule=dk.Quota(), max_new_tokens=3 * LONGEST - len(prompt), eos_policy="none",
        cache="block",
    )  # fmt: skip
    assert torch.equal(out.sequences[0], expected)


def test_whatever_the_batch(made):
    _, model = made
    ids, valid = torch.tensor([[3, 8, 2, 5, 7], [0, 0, 0, 0, 9]]), torch.tensor([[1] * 5, [0, 0, 0, 0, 1]])
    how = {"max_new_tokens": 2 * LONGEST, "config": "bd3-lm", "eos_policy": "none"}
    together = dk.generate(model, ids, valid, seed=torch.tensor([4, 5]), **how)
    for i, prompt in enumerate(([3, 8, 2, 5, 7], [9])):
        alone = dk.generate(model, torch.tensor(prompt), seed=torch.tensor([4 + i]), **how)
        assert torch.equal(alone.generated[0], together.generated[i])


def test_what_is_refused(made):
    _, model = made
    ids = torch.tensor([[1, 2]])
    for options in ({"cache": "none"}, {"cfg_scale": 1.0}):
        with pytest.raises(ValueError, match=r"make a canvas of 2\d, longer .* of 12; only answers can go beyond it"):
            dk.generate(model, ids, max_new_tokens=20, **{"cache": "block"} | options)
    with pytest.raises(ValueError, match=r"longer than the model's max_position_embeddings of 12; only answers"):
        dk.generate(model, torch.arange(1, 15)[None], max_new_tokens=4, cache="block")
