# SPDX-License-Identifier: Apache-2.0
"""Heads whose width is no multiple of eight: padded for the op, in all that a decoding does with it."""

import copy

import pytest
import torch
import transformers

import dlmkernels as dk
import numerics
import small_models
from dlmkernels import AttentionWindow
from plain_llama import PlainLlama


@pytest.fixture(scope="module", params=[20, 10])
def model(request):
    torch.manual_seed(0)
    config = small_models.DECODER | {"head_dim": request.param, "hidden_size": 40}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=1.2)
    return made


@torch.no_grad()
def test_every_logit(model):
    ids = small_models.prompts(2, 13)
    gold, peer = (PlainLlama(m)(ids)[0] for m in (copy.deepcopy(model).double(), model))
    adapted = dk.adapt(model)
    positions = torch.arange(13).expand(2, -1)
    numerics.assert_close("logits", adapted.logits(adapted.hidden(ids, positions, AttentionWindow())), gold, peer)


def test_with_a_cache(model):
    """In one block, where the prefix cache is exact: the same as without."""
    ids, how = small_models.prompts(2, 9), {"rule": dk.Quota(), "max_new_tokens": 8, "block_length": 8}
    plain = dk.generate(model, ids, **how)
    kept = dk.generate(model, ids, cache="prefix", warmup=8, **how)
    assert torch.equal(plain.sequences, kept.sequences) and plain.complete.all()


def test_gradients(model):
    answer = small_models.prompts(1, 6, seed=3)
    out = dk.log_likelihood(model, small_models.prompts(1, 5), answer, num_samples=4, seed=1, gradients=True)
    same = dk.log_likelihood(model, small_models.prompts(1, 5), answer, num_samples=4, seed=1)
    torch.testing.assert_close(out.total.detach(), same.total, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.total.sum(), model.model.layers[0].self_attn.k_proj.weight)
    assert gradient.abs().sum() > 0


def test_a_shadow_block(model):
    """Which has an attention of its own: a request of a batch is what it is alone."""
    ids, how = small_models.prompts(2, 9), {"config": "wino", "max_new_tokens": 8}
    together = dk.generate(model, ids, **how)
    for row in range(2):
        assert torch.equal(dk.generate(model, ids[row], **how).generated[0], together.generated[row])
    assert together.complete.all() and (together.generated != small_models.MASK).all()
