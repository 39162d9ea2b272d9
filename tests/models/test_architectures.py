# SPDX-License-Identifier: Apache-2.0
"""Stock decoders and encoders beside their own attention, told to see everything: windows, caps, sinks, scales."""

import inspect

import pytest
import torch
import transformers as hf

import numerics
from dlmkernels import AttentionWindow, KVCache, adapt, generate
from dlmkernels.models.attention import WITHOUT_EFFECT, attention_forward
from dlmkernels.models.families import ARCHITECTURES

LENGTH, WINDOW = 33, 9
COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None, "mask_token_id": 96, "initializer_range": 0.2,
}  # fmt: skip
SLIDING = {"sliding_window": WINDOW}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
#: Fields of each model type that make its own features count.
KINDS = {
    "llama": {},
    "arcee": {},
    "apertus": ROPE,
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": MIXED | {"logit_scale": 0.3},
    "ernie4_5": {},
    "exaone4": MIXED,
    "gemma": {},
    "gemma2": MIXED | {"query_pre_attn_scalar": 30, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": MIXED | {"query_pre_attn_scalar": 30, "final_logit_softcapping": 3.0},
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": MIXED | ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": GRANITE,
    "granitemoe": GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "ministral": MIXED,
    "ministral3": SLIDING,
    "mistral": SLIDING,
    "mixtral": SLIDING | {"num_local_experts": 4},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS | {"num_experts": 4, "clip_qkv": 0.5},
    "phi": {},
    "phi3": SLIDING,
    "qwen2": MIXED | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": MIXED | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "seed_oss": {},
    "smollm3": MIXED | {"use_sliding_window": True, "no_rope_layers": [1, 1, 0, 1]},
    "starcoder2": SLIDING,
    "camembert": {"type_vocab_size": 1},
    "eurobert": {},
    "xlm-roberta": {"type_vocab_size": 1},
}
#: Those that are compared in other files, with more that is theirs.
ELSEWHERE = {
    "bert", "roberta", "modernbert", "esm", "llada2_moe", "diffusion_gemma", "dlm_dit", "dlm_plaid", "dlm_diffusion_lm",
    "dlm_ssd_lm",
}  # fmt: skip
#: Those whose every layer has the window, and one mask.
ONE_MASK = {"ministral3", "mistral", "mixtral", "phi3", "starcoder2"}


def build(kind):
    """A random model that has all that its architecture may have, wherever the result depends on it."""
    torch.manual_seed(0)
    model_class = getattr(hf, ARCHITECTURES[kind].model_class, None)
    if model_class is None:
        pytest.skip(f"this version of transformers has no {ARCHITECTURES[kind].model_class}")
    model = model_class(model_class.config_class(**(COMMON | KINDS[kind]))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(std=2)
    model.set_attn_implementation("eager")
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def span(first, last):
    return torch.arange(first, last).expand(2, -1)


def own_logits(model, tokens):
    """The model's own eager attention under masks that hide nothing, or what is outside of the window on both sides."""
    kind, positions = model.config.model_type, span(0, LENGTH)
    if kind in ("camembert", "xlm-roberta"):
        return model(tokens, position_ids=positions + model.config.pad_token_id + 1).logits
    everything = torch.zeros(2, 1, LENGTH, LENGTH, dtype=model.dtype)
    far = (positions[0][:, None] - positions[0]).abs() >= WINDOW
    near = everything.masked_fill(far, torch.finfo(model.dtype).min)
    mask = everything
    if kind in ONE_MASK:
        mask = near
    elif "sliding_window" in KINDS[kind]:
        mask = {"full_attention": everything, "sliding_attention": near}
    return model(tokens, attention_mask=mask, position_ids=positions).logits


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def test_every_architecture_is_compared():
    assert set(KINDS) | ELSEWHERE == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_full_and_block_forwards(kind):
    model = build(kind)
    tokens = torch.randint(2, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    peer, gold = own_logits(model, tokens), own_logits(model.double(), tokens)
    model.float()
    adapted, cache = adapt(model), KVCache(LENGTH)
    full = adapted.logits(adapted.hidden(tokens, span(0, LENGTH), AttentionWindow(cache=cache)))
    numerics.assert_close("full", full, gold, peer)
    first, last = 9, 17
    window = AttentionWindow(slots=span(first, last).int().contiguous(), cache=cache)
    block = adapted.logits(adapted.hidden(tokens[:, first:last], span(first, last), window))
    # beside the peer's worst error anywhere: in so few positions it may be small by chance
    within = peer.clone()
    within[:, first:last] = block
    numerics.assert_close("block", within, gold, peer)
    bare = adapted.logits(adapted.hidden(tokens, span(0, LENGTH), AttentionWindow()))
    numerics.assert_close("without a cache", bare, gold, peer)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
def test_decodes(kind):
    out = generate(build(kind), torch.tensor([[5, 6, 7]]), max_new_tokens=8, block_length=4, cache="prefix")
    assert out.complete.all() and out.generated.shape == (1, 8)


class TestWhatIsNotImplemented:
    """What a layer asks for beyond what is implemented is refused by name."""

    def call(self, **options):
        x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
        module = torch.nn.Identity()
        return attention_forward(module, x, x, x, None, dlm_window=AttentionWindow(), **options)

    @pytest.mark.parametrize(
        "options",
        [{"position_bias": torch.zeros(1, 2, 4, 4)}, {"head_mask": torch.ones(2)}, {"indices": torch.zeros(1)},
         {"cu_seq_lens_q": torch.tensor([0, 4])}, {"block_indices": torch.zeros(1)}, {"dropout": 0.1}],
        ids=lambda options: next(iter(options)),
    )  # fmt: skip
    def test_is_refused(self, options):
        with pytest.raises(ValueError, match=f"Identity uses the attention argument {next(iter(options))}"):
            self.call(**options)

    def test_what_has_no_effect_is_taken(self):
        plain = self.call()[0]
        given = dict.fromkeys(WITHOUT_EFFECT, 1) | {"head_mask": None, "dropout": 0.0}
        assert torch.equal(self.call(**given)[0], plain)

    def test_nothing_swallows_the_rest(self):
        names = set(inspect.signature(attention_forward).parameters)
        assert not names & WITHOUT_EFFECT

    def test_sinks_take_their_share(self):
        x, sinks = torch.randn(1, 2, 4, 8), torch.tensor([0.5, -1.0])
        out = attention_forward(torch.nn.Identity(), x, x, x, None, s_aux=sinks, dlm_window=AttentionWindow())[0]
        scores = x @ x.transpose(2, 3) / 8**0.5
        weights = torch.cat((scores, sinks[None, :, None, None].expand(1, 2, 4, 1)), -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(out.transpose(1, 2), weights @ x)
