# SPDX-License-Identifier: Apache-2.0
"""Models whose forward torch.compile has made."""

import pytest
import torch

import dlmkernels as dk
from decodings import lively, ragged
from dlmkernels.models.families import FAMILIES

OPTIONS = {"rule": dk.Threshold(0.4), "max_new_tokens": 16, "block_length": 8, "eos_policy": "none"}


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "graphs"), [("dual", 3), ("none", 1)])
def test_the_same_tokens_from_one_graph_for_each_form(cache, graphs):
    """And no other graph for other requests. With a cache the first forward, which makes it, has one of its own."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = lively()
    compiled = dk.adapt(model, compile=True)
    for seed in (1, 2):
        _, ids, valid = ragged(seed=seed)
        want = dk.generate(model, ids, valid, cache=cache, **OPTIONS)
        out = dk.generate(compiled, ids, valid, cache=cache, **OPTIONS)
        assert torch.equal(out.sequences, want.sequences) and torch.equal(out.num_forwards, want.num_forwards)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_model_stays_what_it_is():
    compiled = dk.adapt(lively(), compile=True)
    assert compiled.is_compiled and dk.adapt(compiled) is compiled and dk.adapt(compiled, compile=True) is compiled
    other = dk.adapt(compiled, family="dream")
    assert not other.is_compiled and other.family is FAMILIES["dream"]


@pytest.mark.filterwarnings("ignore:dlmkernels does not know")
def test_what_cannot_be_compiled():
    class Logits(torch.nn.Module):
        def forward(self, tokens, **kwargs):
            return type("Output", (), {"logits": torch.zeros(*tokens.shape, 9)})()

    with pytest.raises(ValueError, match="compile cannot be used with Logits"):
        dk.adapt(Logits().eval(), causal=False, compile=True)
