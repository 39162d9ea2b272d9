# SPDX-License-Identifier: Apache-2.0
"""Forms in which families are published beside their first: every logit against the plain model of its weights."""

from types import SimpleNamespace

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
from checkpoints import our_logits, renamed, with_vision
from small_models import prompts

FORMS = {
    "llada, Llama's names": ("llada", checkpoints.llada_as_llama),
    "llava_llada, LLaDA-V": ("llada", lambda: with_vision(checkpoints.llada_as_llama())),
    "llava_llada, LaViDa": ("llada", lambda: with_vision(checkpoints.llada())),
    "fastdllm_llada": ("llada", lambda: renamed(checkpoints.llada(), "fastdllm_llada")),
    "lladamoe": ("llada-moe", lambda: renamed(checkpoints.llada_moe(), "lladamoe")),
    "fastdllm_dream": ("dream", lambda: renamed(checkpoints.dream(), "fastdllm_dream")),
    "llada21_moe": ("llada2", lambda: renamed(checkpoints.llada2(), "llada21_moe")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_logit(name, tmp_path):
    family, make = FORMS[name]
    checkpoint = make()
    model = dk.load(checkpoint.write(tmp_path))
    tokens = prompts(2, 17)
    visible = torch.ones(17, 17, dtype=torch.bool)
    assert model.config.dlm_family == family and not hasattr(model, "vision_tower")
    numerics.assert_close(
        "logits", our_logits(model, tokens), checkpoint.double(tokens, visible), checkpoint.plain(tokens, visible)
    )


def test_unknown_weights_are_refused_beside_the_eyes(tmp_path):
    checkpoint = with_vision(checkpoints.llada())
    checkpoint.weights["model.ears.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"unexpected keys: model\.ears\.weight$"):
        dk.load(checkpoint.write(tmp_path))


@pytest.mark.parametrize("change", [{"d_model": None}, {"block_type": "sequential"}, {"n_layers": 9}], ids=str)
def test_a_form_that_cannot_be_read_forbids_nothing(change):
    """A model that someone has loaded decodes through its own forward, and a warning says why."""
    from test_families import foreign

    checkpoint, table = checkpoints.llada(), torch.randn(97, 97, generator=torch.Generator().manual_seed(0))
    checkpoint.config |= change
    model = foreign(checkpoint)
    model.forward = lambda input_ids, **named: SimpleNamespace(logits=table[input_ids])  # what it is does not matter
    with pytest.warns(UserWarning, match=r"its configuration has model_type='llada', but it does not match"):
        out = dk.generate(model, prompts(1, 5), max_new_tokens=4, rule=dk.Quota())
    assert out.complete.all()


def test_a_question_is_still_asked():
    from test_families import foreign

    checkpoint = checkpoints.sdar(block_size=None)
    del checkpoint.config["attn_implementation"]
    model = foreign(checkpoint)
    with pytest.raises(ValueError, match="Pass family='sdar' or family='i-dlm'"):
        dk.adapt(model)
