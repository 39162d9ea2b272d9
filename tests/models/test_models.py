# SPDX-License-Identifier: Apache-2.0
"""Stock models through our attention function: full forwards, KV reuse, padding."""

import pytest
import torch

import numerics
import small_models
from dlmkernels import AttentionWindow, KVCache, adapt
from small_models import KINDS, build, prompts

CAUSAL = ("llama", "qwen2", "qwen3", "qwen3_moe")


def own_logits(model, tokens, valid=None):
    """The model's own attention with everything visible, in the model's dtype: the peer and, in float64, the gold."""
    kind = model.config.model_type
    if valid is None:
        valid = torch.ones_like(tokens)
    if kind not in CAUSAL:
        kwargs = {"attention_mask": valid}
        if kind == "modernbert":
            kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
        elif kind == "roberta":
            kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0) + model.config.pad_token_id + 1
        else:
            kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
        return model(tokens, **kwargs).logits
    batch, length = tokens.shape
    mask = torch.zeros(batch, 1, length, length, dtype=model.dtype)
    mask.masked_fill_(valid[:, None, None] == 0, torch.finfo(model.dtype).min)
    return model(tokens, attention_mask=mask, position_ids=(valid.cumsum(1) - 1).clamp(min=0)).logits


def our_logits(model, tokens, window, positions):
    adapted = adapt(model)
    return adapted.logits(adapted.hidden(tokens, positions, window))


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return build(request.param)


def span(first, last, batch=3):
    return torch.arange(first, last).expand(batch, -1)


def gold_and_peer(model, tokens, valid=None):
    peer = own_logits(model, tokens, valid)
    gold = own_logits(model.double(), tokens, valid)
    model.float()
    return gold, peer


class TestForward:
    def test_full_forward(self, model):
        tokens = prompts(3, 33)
        gold, peer = gold_and_peer(model, tokens)
        numerics.assert_close("logits", our_logits(model, tokens, AttentionWindow(), span(0, 33)), gold, peer)

    def test_model_is_left_as_it_was(self, model):
        before = model.config._attn_implementation
        our_logits(model, prompts(3, 8), AttentionWindow(), span(0, 8))
        assert model.config._attn_implementation == before

    def test_left_padding(self, model):
        tokens = prompts(3, 24)
        pads = torch.tensor([0, 5, 11], dtype=torch.int32)
        valid = (torch.arange(24) >= pads[:, None]).long()
        tokens = tokens.masked_fill(valid == 0, small_models.PAD)
        kv_range = torch.stack((pads, torch.full_like(pads, 24)), 1)
        positions = (torch.arange(24) - pads[:, None]).clamp(min=0)
        ours = our_logits(model, tokens, AttentionWindow(kv_range=kv_range), positions)
        gold, peer = gold_and_peer(model, tokens, valid)
        keep = valid.bool()
        numerics.assert_close("logits", ours[keep], gold[keep], peer[keep])

    @pytest.mark.parametrize("first,last", [(0, 8), (9, 17), (32, 33), (20, 33)])
    def test_block_against_cache(self, model, first, last):
        """A block forwarded against a cache of the same canvas gives the full forward's rows."""
        tokens = prompts(3, 33)
        cache = KVCache(33)
        full = our_logits(model, tokens, AttentionWindow(cache=cache), span(0, 33))
        slots = span(first, last).int().contiguous()
        block = our_logits(model, tokens[:, first:last], AttentionWindow(slots=slots, cache=cache), span(first, last))
        gold, peer = gold_and_peer(model, tokens)
        numerics.assert_close("logits", block, gold[:, first:last], peer[:, first:last])
        numerics.assert_close("logits", full, gold, peer)

    def test_changed_block_is_seen(self, model):
        """Rows are scattered before they are attended to: the block's new tokens count, the old ones are gone."""
        old, new = prompts(3, 33), prompts(3, 33, seed=2)
        cache = KVCache(33)
        our_logits(model, old, AttentionWindow(cache=cache), span(0, 33))
        # every slot rewritten, in two halves: what remains is a function of the new canvas only where layer inputs are
        for first, last in ((0, 16), (16, 33)):
            slots = span(first, last).int().contiguous()
            our_logits(model, new[:, first:last], AttentionWindow(slots=slots, cache=cache), span(first, last))
        k, v = cache.layer(0, None, None)
        fresh = KVCache(33)
        our_logits(model, new, AttentionWindow(cache=fresh), span(0, 33))
        torch.testing.assert_close((k, v), fresh.layer(0, None, None))


class TestAdapt:
    def test_parameters_are_shared(self):
        model = build()
        assert adapt(model).model is model

    def test_headless_model(self):
        with pytest.raises(TypeError, match=r"language-model head.*LlamaForCausalLM"):
            adapt(build().model)

    def test_not_a_model(self):
        with pytest.raises(TypeError, match=r"torch module that returns logits; got .llama.: load it first"):
            adapt("llama")

    def test_unknown_type_warns_and_decodes_without_cache(self):
        class Odd(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(8, 8)

            def forward(self, tokens):
                return type("Out", (), {"logits": self.table(tokens)})()

        with pytest.warns(UserWarning, match="does not know model type 'Odd'"):
            assert not adapt(Odd()).reuses_kv
