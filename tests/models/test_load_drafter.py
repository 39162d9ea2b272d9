# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of drafters are read, how their configurations are understood, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dlmkernels as dk
import drafter_checkpoints
from dlmkernels.models.draft_forms import read_form
from drafter_checkpoints import BLOCK, FORMS
from small_models import build


@pytest.fixture(scope="module")
def model():
    return build(seed=3)  # two layers


def written(folder, form="dflash", **options):
    return drafter_checkpoints.write(folder, form, taps=(0,), target_layers=2, **options)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, model, tmp_path):
    path, config, _ = written(tmp_path, form)
    form_read = dk.load_drafter(path, model).form
    assert form_read.taps == (0,) and form_read.block_size == BLOCK and form_read.mask_token_id == 96
    from_anchor = "dspark" in form or form == "speculators-reduced"
    assert form_read.drafts == (BLOCK if from_anchor else BLOCK - 1)
    expected = {"dflash-sliding": (False, True), "speculators-dflash": (False, True), "dflash-causal": (True, True)}
    assert form_read.causal == expected.get(form, (False, False))


def test_weights_are_the_targets_kind(tmp_path):
    model = build(seed=3).bfloat16()
    drafter = dk.load_drafter(written(tmp_path)[0], model)
    assert {p.dtype for p in drafter.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in drafter.module.parameters())


@pytest.mark.parametrize(("layers", "drafts", "taps"), [
    (36, 5, (1, 9, 17, 25, 33)), (36, 1, (18,)), (28, 5, (1, 7, 13, 19, 25)), (52, 8, (1, 8, 15, 22, 28, 35, 42, 49)),
])  # fmt: skip
def test_layers_that_are_seen_where_nothing_says_so(layers, drafts, taps):
    """Qwen3-8B's are those of its published drafter."""
    config = drafter_checkpoints.config_of("dflash", layers=drafts, target_layers=layers)
    del config["dflash_config"]["target_layer_ids"]
    assert read_form(config, layers, 97).taps == taps


def test_older_and_newer_places_of_fields():
    config = drafter_checkpoints.config_of("dflash")
    own = config["dflash_config"]
    config["block_size"] = own.pop("block_size") + 3
    config["num_target_layers"] = own.pop("num_target_layers")
    own |= {"input_embedding_scale": 2.0, "output_multiplier": 0.5, "final_logit_softcapping": 30}
    form = read_form(config, 4, 97)
    assert (form.block_size, form.embedding_scale, form.output_multiplier, form.softcap) == (BLOCK + 3, 2.0, 0.5, 30.0)


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["EagleModel"]}, r"architectures=\['EagleModel'\] and no speculators_model_type"),
    ({"speculators_model_type": "eagle3"}, "speculators_model_type='eagle3'; expected one of"),
    ({"hidden_size": 128}, "hidden_size"),
    ({"hidden_size": None}, "no hidden_size"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "layer_types|num_hidden_layers"),
    ({"intermediate_size": 2**31 - 1}, "intermediate_size"),
    ({"layer_types": ["linear_attention"] * 2}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "depend on the length"),
    ({"is_causal": "no"}, "is_causal='no'; expected true or false"),
    ({"dflash_config": [1]}, r"dflash_config=\[1\]; expected an object"),
    ({"dflash_config.block_size": 1}, "block_size=1; expected an integer from 2"),
    ({"dflash_config.block_size": 10**9}, "block_size=1000000000"),
    ({"dflash_config.mask_token_id": None}, "no mask_token_id: pass load_drafter"),
    ({"dflash_config.mask_token_id": 97}, "mask_token_id=97; expected an integer from 0 to 96"),
    ({"dflash_config.target_layer_ids": [1]}, r"target_layer_ids=\[1\]; expected numbers from 0 to 0"),
    ({"dflash_config.target_layer_ids": []}, r"target_layer_ids=\[\]; expected a non-empty list"),
    ({"dflash_config.target_layer_ids": [0, 0]}, "wrong shapes: fc.weight"),
    ({"dflash_config.num_target_layers": 36}, "num_target_layers=36; this target has 2 layers"),
    ({"dflash_config.projector_type": "domino"}, "projector_type='domino', which is not implemented"),
    ({"dflash_config.attention_sink_bias": True}, "attention_sink_bias=True, which is not implemented"),
    ({"dflash_config.lilicorr_layers": 2}, "lilicorr_layers=2, which is not implemented"),
    ({"dflash_config.output_multiplier": float("nan")}, "output_multiplier"),
])  # fmt: skip
def test_refused_configurations(change, message, model, tmp_path):
    config = drafter_checkpoints.config_of("dflash", taps=(0,), target_layers=2)
    weights = drafter_checkpoints.weights_of("dflash", config)
    for name, value in change.items():
        at, _, leaf = name.rpartition(".")
        (config[at] if at else config)[leaf] = value
    path, _, _ = written(tmp_path, config=config, weights=weights)
    with pytest.raises(ValueError, match=f"path_or_id: the drafter at .* cannot be loaded: .*(?:{message})"):
        dk.load_drafter(path, model)


@pytest.mark.parametrize(("form", "change", "message"), [
    ("dflash", lambda w: w.pop("fc.weight"), "missing weights: fc.weight"),
    ("dflash", lambda w: w.update(more=torch.ones(2)), "unexpected weights: more"),
    ("dflash", lambda w: w.update({"norm.weight": torch.ones(63)}), r"wrong shapes: norm.weight \[63\], expected \[64\]"),
    ("dflash2", lambda w: w.pop("candidate_selector.successor_codebook"), "missing weights: candidate_selector"),
    ("dspark", lambda w: w.pop("markov_head.markov_w2.weight"), "missing weights: markov_head.markov_w2.weight"),
    ("speculators-reduced", lambda w: w.update(d2t=w["d2t"] * 0 + 90), "must map the drafter's 40 tokens to distinct ones"),
    ("speculators-reduced", lambda w: w.update(d2t=w["d2t"].int()), "d2t must be int64"),
    ("speculators-reduced", lambda w: w.pop("lm_head.weight"), "requires an lm_head of its own"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_refused_weights(form, change, message, model, tmp_path):
    config = drafter_checkpoints.config_of(form, taps=(0,), target_layers=2)
    weights = drafter_checkpoints.weights_of(form, config)
    change(weights)
    path, _, _ = written(tmp_path, form, config=config, weights=weights)
    with pytest.raises(ValueError, match=message):
        dk.load_drafter(path, model)


def test_files(model, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        dk.load_drafter(tmp_path / "nowhere", model)
    with pytest.raises(TypeError, match="load_drafter got an unexpected argument trust_remote_code"):
        dk.load_drafter(tmp_path, model, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        dk.load_drafter(tmp_path, model)
    path, _, weights = written(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        dk.load_drafter(path, model)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        dk.load_drafter(path, model)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must contain a JSON object"):
        dk.load_drafter(path, model)


def test_parts_of_weights(model, tmp_path):
    """Weights in several files, as an index says."""
    path, _, weights = written(tmp_path)
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, path / f"part-{i}.safetensors")
    place = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    drafter = dk.load_drafter(path, model)
    assert torch.equal(drafter.module.fc.weight, weights["fc.weight"])


def test_mask_embedding(model, tmp_path):
    path, _, _ = written(tmp_path)
    own = torch.randn(64, generator=torch.Generator().manual_seed(1))
    torch.save({"embedding": own, "mask_token_id": 96}, path / "mask_embedding.pt")
    with pytest.raises(ValueError, match=r"mask_embedding\.pt, which is a pickle: pass allow_pickle=True"):
        dk.load_drafter(path, model)
    drafter = dk.load_drafter(path, model, allow_pickle=True)
    block = drafter._block(torch.tensor([5, 7]), 4)
    assert torch.equal(block[:, 0], model.get_input_embeddings().weight[[5, 7]])
    assert torch.equal(block[:, 1:], own.expand(2, 3, -1))
    torch.save({"embedding": own[:5]}, path / "mask_embedding.pt")
    with pytest.raises(ValueError, match="must contain a tensor 'embedding' of shape"):
        dk.load_drafter(path, model, allow_pickle=True)


def test_arguments_of_no_use(model, tmp_path):
    with pytest.raises(TypeError, match="target must be a causal language model; got NoneType"):
        dk.load_drafter(tmp_path, None)
    with pytest.raises(TypeError, match=r"target must be a causal language model; got the class \w+ itself"):
        dk.load_drafter(tmp_path, type(model))
    with pytest.raises(TypeError, match="allow_pickle must be True or False; got 'False'"):
        dk.load_drafter(tmp_path, model, allow_pickle="False")


def test_refused_targets(tmp_path):
    path, _, _ = written(tmp_path)
    with pytest.raises(ValueError, match="target must be a causal"):
        dk.load_drafter(path, build("bert"))
