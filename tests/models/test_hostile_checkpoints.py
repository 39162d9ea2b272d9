# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random damage either load and decode or are refused, in seconds; never anything else."""

import json
import shutil
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import dlmkernels as dk
from dlmkernels.models import checkpoint as files
from small_models import build, prompts

SECONDS = 20  # on a machine that does other things, too
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
EDGES = [0, 1, -1, 2, 3, 7, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**63, 10**9, 10**30]
TEXTS = [
    "",
    "x",
    "llama",
    "float16",
    "../../x",
    "/etc/hostname",
    "kernels-community/x",
    "\0",
    "😀",
    "sdpa",
    "yarn",
    "none",
]
SCALARS = (
    st.none() | st.booleans() | st.sampled_from(EDGES) | st.integers(-300, 300) | st.floats() | st.sampled_from(TEXTS)
)  # fmt: skip
NAMES = st.sampled_from(
    ["rope_type", "factor", "rope_theta", "type", "", "quant_method", "0", "model_type", "hidden_size"]
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=5)
#: Fields that are not in the checkpoint and could matter.
MORE = [
    "attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config", "auto_map", "dtype",
    "torch_dtype", "rope_scaling", "rope_theta", "rope_parameters", "sliding_window", "layer_types", "num_labels",
    "id2label", "is_decoder", "text_config", "vision_config", "block_size", "bd_size", "dlm_family", "num_experts",
    "head_dim", "partial_rotary_factor", "pruned_heads", "transformers_weights", "configuration_files", "return_dict",
    "output_attentions", "output_hidden_states", "tie_word_embeddings", "per_layer_config", "fusion_config", "use_cache",
    "mask_token_id", "eos_token_id", "to_dict", "attribute_map", "sub_configs", "pretraining_tp", "max_length",
    "temperature", "chunk_size_feed_forward", "tp_plan", "name_or_path", "original_max_position_embeddings",
]  # fmt: skip
MAKERS = {"llada": checkpoints.llada, "llada2": checkpoints.llada2, "sdar": checkpoints.sdar, "rnd1": checkpoints.rnd1}


@pytest.fixture(scope="module", params=["llama", "bert", "llada", "llada2"])
def valid(request, tmp_path_factory):
    """A folder that holds a whole checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in MAKERS:
        MAKERS[request.param]().write(folder)
    else:
        build(request.param).save_pretrained(folder)
    dk.load(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Nothing is looked for outside of this machine."""
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", True)


def survives(folder, damage, **options):
    """Damage a copy; load and decode it, or see it refused. Returns whether it was loaded."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "model"
        shutil.copytree(folder, copy)
        damage(copy)
        start = time.perf_counter()
        try:
            model = dk.load(copy, **options)
            dk.generate(
                model, prompts(1, 4).clamp(max=model.get_input_embeddings().num_embeddings - 1), max_new_tokens=3
            )
        except (ValueError, TypeError, ImportError) as error:
            assert str(error).strip(), type(error)
            loaded = False
        else:
            loaded = True
        assert time.perf_counter() - start < SECONDS
        return loaded


@given(data=st.data())
def test_configuration(valid, data):
    config = json.loads((valid / "config.json").read_text())
    names = st.sampled_from([*config, *MORE])
    changes = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=2))
    left_out = data.draw(st.none() | st.sampled_from([*config]))
    changed = {name: value for name, value in (config | changes).items() if name != left_out}
    survives(valid, lambda folder: (folder / "config.json").write_text(json.dumps(changed)))


@given(file=st.sampled_from(["config.json", "generation_config.json", INDEX]), value=VALUES | st.binary(max_size=40))
def test_anything_in_place_of_a_file(valid, file, value):
    def damage(folder):
        if file == INDEX:
            (folder / WHOLE).unlink()
        (folder / file).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())

    loaded = survives(valid, damage)
    assert not loaded or file == "generation_config.json"


@given(at=st.integers(0, 3000), value=st.binary(min_size=1, max_size=12), end=st.none() | st.integers(0, 5000))
def test_bytes_of_the_weights(valid, at, value, end):
    def damage(folder):
        content = bytearray((folder / WHOLE).read_bytes())
        content[at : at + len(value)] = value
        (folder / WHOLE).write_bytes(content[:end])

    survives(valid, damage)


@given(data=st.data())
def test_header_of_the_weights(valid, data):
    content = (valid / WHOLE).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    tensor = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name"]))
    value = data.draw(
        VALUES | st.sampled_from(["F32", "F16", "I8", "BOOL"]) | st.lists(st.sampled_from(EDGES), max_size=4)
    )
    if key == "name":
        header[str(value)] = header.pop(tensor)
    else:
        header[tensor][key] = value
    text = json.dumps(header).encode()

    def damage(folder):
        (folder / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    survives(valid, damage)


@given(data=st.data())
def test_index(valid, data):
    names = st.sampled_from([WHOLE, "part.safetensors", "../x", "/etc/hostname", "", "config.json", "."])

    def damage(folder):
        (folder / WHOLE).rename(folder / "part.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "part.safetensors"}}
        index["weight_map"] |= data.draw(st.dictionaries(st.sampled_from("abc"), names | VALUES, max_size=2))
        index |= data.draw(st.dictionaries(st.sampled_from(["metadata", "weight_map"]), VALUES, max_size=1))
        (folder / INDEX).write_text(json.dumps(index))

    survives(valid, damage)


@given(
    changes=st.dictionaries(
        st.sampled_from(["lora_alpha", "r", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "peft_type",
                         "base_model_name_or_path", "target_modules", "modules_to_save", "use_dora"]), VALUES, max_size=2
    ),
    shapes=st.lists(st.lists(st.integers(0, 80), max_size=3), min_size=2, max_size=2) | st.just([[2, 48], [48, 2]]),
    module=st.sampled_from(["model.transformer.blocks.0.q_proj", "x", "model.transformer.wte", "(a+)+$"]),
)  # fmt: skip
def test_adapter(tmp_path_factory, changes, shapes, module):
    folder = tmp_path_factory.getbasetemp() / "for-adapters"
    if not folder.exists():
        folder.mkdir()
        checkpoints.llada().write(folder)
        (folder / "config.json").rename(folder / "config.json.base")

    def damage(copy):
        base = copy.parent / "base"
        shutil.copytree(copy, base)
        (base / "config.json.base").rename(base / "config.json")
        config = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": str(base)} | changes
        (copy / "adapter_config.json").write_text(json.dumps(config))
        matrices = {f"base_model.model.{module}.lora_{part}.weight": torch.zeros(s) for part, s in zip("AB", shapes)}
        save_file(matrices, copy / "adapter_model.safetensors")

    survives(folder, damage, family="llada")
