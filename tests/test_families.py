# SPDX-License-Identifier: Apache-2.0
"""Every family from its published form: loaded, compared with a plain model, decoded like its published decoder."""

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import published
from checkpoints import EOS, HIDDEN, MASK, VOCAB
from dlmkernels import AttentionWindow
from dlmkernels.models.adapt import adapt
from small_models import prompts
from test_published import assert_rows_same, assert_same

FULL = {
    "llada": checkpoints.llada, "llada-moe": checkpoints.llada_moe, "dream": checkpoints.dream,
    "rnd1": checkpoints.rnd1, "diffullama": checkpoints.diffullama, "diffugpt": checkpoints.diffugpt,
}  # fmt: skip
#: Families whose configuration does not name them.
UNNAMED = {"diffullama": "diffullama", "diffugpt": "diffullama"}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(name)`: the checkpoint of a family and the model loaded from it, once."""
    done = {}

    def get(name, make):
        if name not in done:
            checkpoint = make()
            folder = checkpoint.write(tmp_path_factory.mktemp(name))
            done[name] = checkpoint, dk.load(folder, family=UNNAMED.get(name))
        return done[name]

    return get


def our_logits(model, tokens, **window):
    adapted = adapt(model)
    with adapted.attached():
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return adapted.logits(adapted.hidden(tokens, positions, AttentionWindow(**window)))


@pytest.mark.parametrize("name", FULL)
class TestFull:
    def test_logits(self, name, loaded):
        checkpoint, model = loaded(name, FULL[name])
        tokens = prompts(2, 23)
        numerics.assert_close("logits", our_logits(model, tokens), checkpoint.double(tokens), checkpoint.plain(tokens))

    def test_facts(self, name, loaded):
        checkpoint, model = loaded(name, FULL[name])
        family = adapt(model).family
        assert family.name == UNNAMED.get(name, name) and family.attention == "full"
        assert family.logit_alignment == ("shift" if name in ("dream", "rnd1", "diffullama", "diffugpt") else "same")
        assert model.config.mask_token_id == MASK and not model.training

    def test_published_decoder(self, name, loaded):
        """LLaDA's decoder for families read in place, Dream's for shifted ones; by default where it is the default."""
        checkpoint, model = loaded(name, FULL[name])
        if adapt(model).family.logit_alignment == "same":
            restated = lambda c, s: published.llada(checkpoint.plain, c, s, MASK, steps=8)  # noqa: E731
            assert_rows_same(model, restated, 16, steps=8, seed=2)
        else:
            restated = lambda c, s: published.dream(checkpoint.plain, c[None], MASK, steps=6)[0]  # noqa: E731
            config = dk.preset("dream", temperature=0.0, top_p=1.0)
            assert_rows_same(model, restated, 16, config=config, steps=6, seed=2)

    @pytest.mark.parametrize("cache", ["prefix", "dual"])
    def test_decodes_with_kv_reuse(self, name, cache, loaded):
        _, model = loaded(name, FULL[name])
        out = dk.generate(
            model, prompts(2, 6), cache=cache, rule=dk.Threshold(0.5), max_new_tokens=16, block_length=8, top_p=1.0,
            temperature=0.0,
        )  # fmt: skip
        assert out.complete.all()

    def test_saved_again(self, name, loaded, tmp_path):
        """What `load` returns is a stock model: transformers alone reads what it saves, and so does `load`."""
        _, model = loaded(name, FULL[name])
        model.save_pretrained(tmp_path)
        tokens = prompts(1, 9)
        again = dk.load(tmp_path)
        assert adapt(again).family == adapt(model).family
        assert torch.equal(our_logits(again, tokens), our_logits(model, tokens))
        stock, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for (name, a), (_, b) in zip(model.state_dict().items(), stock.state_dict().items()):
            assert torch.equal(a, b), name


# --- facts that tell families apart, ids, refusals -------------------------------------------------------------------


def write(tmp_path, make, change=None, **config):
    checkpoint = make()
    checkpoint.config |= config
    if change:
        change(checkpoint.weights)
    return checkpoint.write(tmp_path)


class TestFacts:
    def test_one_model_type_two_families(self):
        """LLaDA-8B and LLaDA-MoE are both of type 'llada'."""
        from dlmkernels.models.published import plan

        dense, moe = plan(checkpoints.llada().config), plan(checkpoints.llada_moe().config)
        assert (dense.family.name, dense.model_class.__name__) == ("llada", "LlamaForCausalLM")
        assert (moe.family.name, moe.model_class.__name__) == ("llada-moe", "Qwen3MoeForCausalLM")
        assert plan(checkpoints.llada_moe().config | {"model_type": "lladamoe"}).family.name == "llada-moe"

    def test_dense_layers_of_a_mixture(self, tmp_path):
        config = checkpoints.llada_moe().config | {"moe_layer_freq": [0, 1]}
        from dlmkernels.models.published import plan

        assert plan(config).config.mlp_only_layers == [0] and plan(config).config.intermediate_size == 80

    @pytest.mark.parametrize("name,changes,match", [
        ("llada", {"block_type": "sequential"}, r"block_type='sequential'.*'llama'"),
        ("llada", {"include_qkv_bias": True}, r"include_qkv_bias=True"),
        ("llada", {"alibi": True}, r"alibi=True"),
        ("llada", {"d_model": None}, r"lacks d_model"),
        ("llada-moe", {"shared_expert_intermediate_size": 32}, r"shared_expert_intermediate_size=32"),
        ("llada-moe", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ("llada-moe", {"moe_router_enable_expert_bias": True}, r"moe_router_enable_expert_bias=True"),
        ("dream", {"use_sliding_window": True}, r"use_sliding_window=True"),
    ])  # fmt: skip
    def test_what_the_stock_class_does_not_do(self, name, changes, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            dk.load(write(tmp_path, FULL[name], **changes))

    @pytest.mark.parametrize("name", FULL)
    def test_weights_that_do_not_fit(self, name, tmp_path):
        last = sorted(FULL[name]().weights)[-1]
        with pytest.raises(ValueError, match="missing keys"):
            dk.load(write(tmp_path, FULL[name], lambda w: w.pop(last)), family=UNNAMED.get(name))
        with pytest.raises(ValueError, match=r"unexpected keys: model\.extra"):
            dk.load(
                write(tmp_path, FULL[name], lambda w: w.update({"model.extra": torch.zeros(2)})),
                family=UNNAMED.get(name),
            )

    @pytest.mark.parametrize("name", FULL)
    def test_weights_of_another_shape(self, name, tmp_path):
        def damage(weights):
            key = next(k for k in weights if weights[k].dim() == 1)
            weights[key] = torch.zeros(HIDDEN + 8)

        with pytest.raises(ValueError, match=r"wrong shapes: \S+ \[56\], expected \[\d+\]"):
            dk.load(write(tmp_path, FULL[name], damage), family=UNNAMED.get(name))

    def test_mislabelled(self, tmp_path):
        """The weights of one family under the configuration of another."""
        other = checkpoints.dream()
        with pytest.raises(ValueError, match=r"unexpected keys: .*self_attn.k_proj.bias"):
            dk.load(write(tmp_path, checkpoints.llada, lambda w: (w.clear(), w.update(other.weights))))

    def test_family_is_checked(self, tmp_path):
        with pytest.raises(ValueError, match=r"family must be one of masked, .*'lada'"):
            dk.load(write(tmp_path, checkpoints.llada), family="lada")

    def test_shards(self, tmp_path):
        checkpoint = checkpoints.llada_moe()
        model = dk.load(checkpoint.write(tmp_path, shards=3))
        tokens = prompts(1, 9)
        numerics.assert_close("logits", our_logits(model, tokens), checkpoint.double(tokens), checkpoint.plain(tokens))
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ValueError, match="model-00002-of-00003"):
            dk.load(tmp_path)

    def test_pickle_is_read_when_asked_for(self, tmp_path):
        checkpoint = checkpoints.dream()
        checkpoint.write(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(checkpoint.weights, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            dk.load(tmp_path)
        assert dk.load(tmp_path, allow_pickle=True).config.dlm_family == "dream"


class TestIds:
    """What the family knows of its tokenizer holds for its own vocabulary alone."""

    @staticmethod
    def special(raw, family=None, **generation):
        """Ids that decoding a model of this configuration would use; no weights are made."""
        from transformers import GenerationConfig

        from dlmkernels.decoding.config import DecodingConfig
        from dlmkernels.decoding.generate import _special_tokens
        from dlmkernels.models.published import plan

        how = plan(raw, family)

        class Described:
            family, config, vocab_size = how.family, how.config, how.config.vocab_size
            model = type("M", (), {"generation_config": GenerationConfig(**generation)})

        return _special_tokens(Described, DecodingConfig())

    def test_ids_of_the_family(self):
        raw = checkpoints.llada().config | {"vocab_size": 126464, "embedding_size": 126464, "eos_token_id": 126081}
        for mask in (None, 126336):
            special = self.special(raw | {"mask_token_id": mask})
            assert special.mask == 126336 and special.eos == [126081, 126348]

    def test_ids_of_the_configuration_come_first(self):
        """iLLaDA has the form of LLaDA, another tokenizer and another mask."""
        special = self.special(checkpoints.llada().config | {"mask_token_id": 5})
        assert special.mask == 5 and special.eos == [EOS]
        with pytest.raises(ValueError, match="mask_token_id is not in the model's configuration"):
            self.special(checkpoints.llada().config | {"mask_token_id": None})

    def test_all_stop_ids_count(self):
        special = self.special(checkpoints.dream().config, eos_token_id=[7, EOS])
        assert special.eos == [EOS, 7]

    def test_logits_beyond_the_tokenizer_are_forbidden(self):
        special = self.special(checkpoints.dream().config | {"vocab_size": 152064, "mask_token_id": None})
        assert special.banned == [151666, *range(151667, 152064)]
        assert self.special(checkpoints.dream().config).banned == [MASK]

    def test_forbidden_ids_are_not_generated(self, tmp_path, monkeypatch):
        """Even where they are the most likely by far."""
        from dataclasses import replace

        from dlmkernels.models import families

        model = dk.load(write(tmp_path, checkpoints.dream))
        model.lm_head.weight[90:] *= 10
        free = dk.generate(model, prompts(2, 6), max_new_tokens=8)
        assert (free.generated >= 90).any()
        small = replace(families.FAMILIES["dream"], num_tokens=90, vocab_size=VOCAB, eos_token_ids=())
        monkeypatch.setitem(families.FAMILIES, "dream", small)
        assert (dk.generate(model, prompts(2, 6), max_new_tokens=8).generated < 90).all()


def test_defaults_are_the_familys(tmp_path):
    """`generate` without a configuration runs the decoder the family was published with."""
    model = dk.load(write(tmp_path, checkpoints.dream))
    ids, options = prompts(2, 6), {"max_new_tokens": 12, "steps": 6, "seed": 3}
    ours = dk.generate(model, ids, **options)
    assert torch.equal(ours.commit_step, dk.generate(model, ids, config=dk.preset("dream"), **options).commit_step)
    plain = dk.generate(model, ids, config=dk.DecodingConfig(), **options)
    assert not torch.equal(ours.commit_step, plain.commit_step)


# --- models that their own code has loaded ---------------------------------------------------------------------------


def foreign(checkpoint):
    """A model as its own code would build it: another class, the published configuration and names of weights."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class ForeignConfig(PreTrainedConfig):
        model_type = checkpoint.config["model_type"]

    class ForeignModel(PreTrainedModel):
        config_class = ForeignConfig

        def __init__(self, config):
            super().__init__(config)
            for name, weight in checkpoint.weights.items():
                *path, leaf = name.split(".")
                module = self
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_parameter(leaf, torch.nn.Parameter(weight))
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, tokens):
            raise AssertionError("its own code is not called")

    return ForeignModel(ForeignConfig(**checkpoint.config)).eval()


@pytest.mark.parametrize("name", ["llada", "dream", "llada-moe"])
def test_foreign_model_shares_its_parameters(name, loaded, recwarn):
    checkpoint, model = loaded(name, FULL[name])
    other = foreign(checkpoint)
    adapted = adapt(other)
    assert adapted.reuses_kv and adapted.family.name == name and not recwarn.list
    tokens = prompts(2, 11)
    assert torch.equal(our_logits(adapted, tokens), our_logits(model, tokens))
    own = {p.data_ptr() for p in other.parameters()}
    shared = [n for n, p in adapted.model.named_parameters() if p.data_ptr() in own]
    copied = [n for n, p in adapted.model.named_parameters() if p.data_ptr() not in own]
    assert shared and all(".experts." in n for n in copied) and bool(copied) == (name == "llada-moe")


# --- protein language models -----------------------------------------------------------------------------------------


def esm(position, token_dropout):
    import transformers

    torch.manual_seed(5)
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=1, mask_token_id=32, eos_token_id=2, token_dropout=token_dropout,
        position_embedding_type=position, emb_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.EsmForMaskedLM(config).eval()
    for name, p in model.named_parameters():
        p.normal_(std=1.0 if "embed" in name else 3.0 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.2)
    return model


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("position", ["rotary", "absolute"])
class TestEsm:
    """With token dropout embeddings are scaled by the share of masks in the row: only whole rows can be forwarded."""

    def test_logits(self, position, token_dropout, tmp_path):
        model = esm(position, token_dropout)
        model.save_pretrained(tmp_path)
        loaded = dk.load(tmp_path)
        tokens = torch.randint(4, 32, (2, 19))
        tokens[0, 3:9] = tokens[1, 12] = 32
        exact = esm(position, token_dropout).double()
        numerics.assert_close("logits", our_logits(loaded, tokens), exact(tokens).logits, model(tokens).logits)

    def test_decodes_like_a_published_decoder(self, position, token_dropout):
        model = esm(position, token_dropout)
        ids = [torch.randint(4, 30, (n,)) for n in (5, 9)]
        batch = torch.stack([torch.cat((ids[0].new_full((4,), 1), ids[0])), ids[1]])
        valid = torch.stack([torch.arange(9) >= 4, torch.ones(9, dtype=torch.bool)])
        out = dk.generate(model, batch, valid.long(), max_new_tokens=8, steps=4, eos_policy="none")
        for row, prompt in enumerate(ids):
            canvas = torch.cat((prompt, prompt.new_full((8,), 32)))
            request = published.llada(lambda t: model(t).logits, canvas, len(prompt), 32, steps=4)
            assert_same(out, row, request)

    def test_kv_reuse_only_where_it_can_be(self, position, token_dropout):
        model = esm(position, token_dropout)
        if token_dropout:
            with pytest.raises(ValueError, match=r"cache='dual'.*token_dropout"):
                dk.generate(model, torch.full((1, 4), 5), cache="dual")
            return
        tokens, cache = torch.randint(4, 32, (2, 19)), dk.KVCache(19)
        full = our_logits(model, tokens, cache=cache)
        adapted, columns = adapt(model), torch.arange(7, 12).expand(2, 5)
        with adapted.attached():
            window = AttentionWindow(slots=columns.int().contiguous(), cache=cache)
            part = adapted.logits(adapted.hidden(tokens[:, 7:12], columns, window))
        numerics.assert_close("block", part, esm(position, False).double()(tokens).logits[:, 7:12], full[:, 7:12])
