# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint may not do: choose code, name files elsewhere, describe a model that it does not hold."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import dlmkernels as dk
from small_models import build, prompts

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name,value", [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 3), ("num_hidden_layers", "x"), ("num_hidden_layers", -1),
    ("hidden_size", 10**12), ("hidden_size", 1000), ("hidden_size", [64]), ("intermediate_size", 10**9),
    ("vocab_size", 10**15), ("vocab_size", 0), ("num_attention_heads", 10**9), ("num_key_value_heads", "x"),
    ("head_dim", 10**9), ("max_position_embeddings", "x"), ("max_position_embeddings", 2**40),
    ("mask_token_id", "x"), ("mask_token_id", True), ("mask_token_id", 1.5), ("eos_token_id", {"a": "b"}),
    ("eos_token_id", [1, "x"]), ("pad_token_id", "x"), ("bos_token_id", [1]),
    ("rms_norm_eps", "x"), ("rms_norm_eps", float("nan")), ("initializer_range", float("inf")), ("rope_theta", "x"),
    ("torch_dtype", "load"), ("dtype", 3), ("block_size", "x"), ("block_size", 0), ("dlm_family", "nobody"),
    ("dlm_family", 3), ("model_type", ["llama"]), ("model_type", "t5"),
], ids=str)  # fmt: skip
def test_field_is_refused_by_name(checkpoint, name, value):
    changes = {"rope_parameters": None} if name == "rope_theta" else {}
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        dk.load(edit(checkpoint, **changes, **{name: value}))
    said = {"dlm_family": "family", "model_type": "model type", "num_attention_heads": "attention heads"}
    assert name in str(caught.value) or said.get(name, name) in str(caught.value)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("where", ["num_labels", "id2label"])
def test_what_is_of_no_use_takes_no_time(checkpoint, where):
    """transformers would list a thousand million labels."""
    value = 10**9 if where == "num_labels" else {"a": 1}
    dk.generate(dk.load(edit(checkpoint, **{where: value})), prompts(1, 4), max_new_tokens=2)


def test_model_of_more_weights_than_there_are(checkpoint):
    """Every size is one that some weight has, and their product is more than any machine holds."""
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"extra": torch.zeros(1, 10**6)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit(checkpoint, intermediate_size=10**6, head_dim=10**6, num_attention_heads=64, num_key_value_heads=64)
    with pytest.raises(ValueError, match=r"wrong shapes: model.layers.0.mlp"):
        dk.load(checkpoint)
    for name in list(weights):
        if "self_attn" in name:
            del weights[name]
    save_file(weights | {"extra": torch.zeros(1, 10**6)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit(checkpoint, intermediate_size=96)
    with pytest.raises(ValueError, match=r"describes a model of \d+ parameters, but its weights have at most"):
        dk.load(checkpoint)


# --- code -------------------------------------------------------------------------------------------------------------

ELSEWHERE = "kernels-community/x"


@pytest.fixture
def no_kernels(monkeypatch):
    """Every way of transformers to fetch a kernel ends here."""
    from transformers.integrations import hub_kernels

    def fetched(*args, **kwargs):
        raise AssertionError(f"a kernel was asked for: {args}")

    for name in ("get_kernel", "load_and_register_attn_kernel", "lazy_load_kernel"):
        if hasattr(hub_kernels, name):
            monkeypatch.setattr(hub_kernels, name, fetched)


@pytest.mark.parametrize("changes", [
    {"attn_implementation": ELSEWHERE}, {"_attn_implementation": ELSEWHERE},
    {"_attn_implementation_internal": ELSEWHERE}, {"attn_implementation": {"": ELSEWHERE}},
    {"experts_implementation": "sonicmoe"}, {"_experts_implementation": "deepgemm"},
    {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}},
    {"use_kernels": True, "kernel_config": {"RMSNorm": ELSEWHERE}}, {"fusion_config": {"patch_embeddings": True}},
    {"transformers_weights": "../other.safetensors"}, {"custom_generate": ELSEWHERE},
    {"configuration_files": ["config.5.0.0.json", "../../config.5.0.0.json"]}, {"_commit_hash": "x"},
    {"to_dict": 3, "from_pretrained": 3, "attribute_map": {"a": "b"}, "sub_configs": {}, "__class__": 3},
    {"distributed_config": {"tp_plan": "auto"}, "tp_plan": "auto", "base_model_tp_plan": {"layers.*": "colwise"}},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_only_the_user_chooses_an_implementation(changes, checkpoint, no_kernels):
    expected = dk.load(checkpoint)
    found = dk.load(edit(checkpoint, **changes))
    ids = prompts(1, 5)
    assert found.config._attn_implementation == expected.config._attn_implementation
    assert type(found) is type(expected) and callable(found.config.to_dict)
    options = {"max_new_tokens": 4, "eos_policy": "none"}
    assert torch.equal(dk.generate(found, ids, **options).sequences, dk.generate(expected, ids, **options).sequences)


def test_the_user_may_choose_an_implementation(checkpoint):
    edit(checkpoint, attn_implementation=ELSEWHERE)
    assert dk.load(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"


def test_configurations_inside_others(no_kernels):
    from dlmkernels.models.fields import heeded

    raw = {"text_config": {"attn_implementation": ELSEWHERE, "hidden_size": 8, "vision_config": {"_x": 1}}, "a": 1}
    assert heeded(raw) == {"text_config": {"hidden_size": 8, "vision_config": {}}, "a": 1}


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "metal", "eetq", "fbgemm_fp8", "gguf", "nobody", None, 3])
def test_quantisers_that_fetch_code(method, checkpoint, no_kernels):
    with pytest.raises(ValueError, match=r"asks for the quantizer .*, pass quantization_config"):
        dk.load(edit(checkpoint, quantization_config={"quant_method": method}))
    with pytest.raises(ValueError, match=r"asks for the quantizer"):
        dk.load(
            edit(checkpoint, quantization_config=None, text_config={"quantization_config": {"quant_method": method}})
        )


def test_quantisers_that_are_installed_libraries(checkpoint):
    """They are transformers' affair: here, that the library is not installed."""
    edit(checkpoint, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match=r"bitsandbytes|accelerate"):
        dk.load(checkpoint)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../{}", "/{}", "x/../../{}", "..\\{}", "C:{}", "", "a\0b", 3, None, ["{}"]], ids=repr
)  # fmt: skip
def test_index_names_files_of_the_checkpoint_alone(name, checkpoint):
    whole = checkpoint / "model.safetensors"
    weights = load_file(whole)
    save_file(weights, checkpoint / "part.safetensors", metadata={"format": "pt"})
    whole.rename(checkpoint.parent / "private.safetensors")
    if isinstance(name, str):
        outside = str(checkpoint.parent / "private.safetensors")
        name = name.format(outside[1:] if name.startswith("/") else "private.safetensors")
    weight_map = dict.fromkeys(weights, "part.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dk.load(checkpoint)
    weight_map["model.norm.weight"] = name
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=INDEX):
        dk.load(checkpoint)


def test_links_are_followed(checkpoint):
    """The hub's cache consists of them."""
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(checkpoint.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../blobs/{i}")
    dk.load(checkpoint)


@pytest.mark.parametrize("change,match", [
    ({"base_model_name_or_path": "../model"}, "expected a Hub id or the absolute path"),
    ({"base_model_name_or_path": "{}/../model"}, "expected a Hub id or the absolute path"),
    ({"base_model_name_or_path": "~/model"}, "expected a Hub id or the absolute path"),
    ({"base_model_name_or_path": 3}, "expected a Hub id or the absolute path"),
    ({"lora_alpha": "x"}, "lora_alpha='x'"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"alpha_pattern": {"([a-z_.0-9]+)+!": 1}}, "alpha_pattern"),
    ({"alpha_pattern": {".*.*.*.*.*.*.*.*!": 1}}, "alpha_pattern"),
    ({"alpha_pattern": 3}, "alpha_pattern=3"),
], ids=str)  # fmt: skip
def test_adapter(change, match, checkpoint):
    folder = checkpoint.parent / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": str(checkpoint)}
    matrices = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.zeros(shape)
        for part, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(matrices, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    dk.load(folder)
    change = {k: v.format(checkpoint) if isinstance(v, str) else v for k, v in change.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=match):
        dk.load(folder)
    assert time.perf_counter() - start < 10
    # an adapter of an adapter
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is itself an adapter"):
        dk.load(folder)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_generation_config(name, checkpoint):
    (checkpoint / "generation_config.json").write_text(json.dumps({name: "x"}))
    with pytest.raises(ValueError, match=name):
        dk.load(checkpoint)
