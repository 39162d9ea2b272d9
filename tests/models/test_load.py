# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: what is accepted, and that what is wrong is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dlmkernels as dk
from small_models import KINDS, build, prompts


@pytest.fixture
def checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = dk.load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    options = {"max_new_tokens": 8, "eos_policy": "none"}
    ids = prompts(2, 5)
    assert torch.equal(dk.generate(loaded, ids, **options).sequences, dk.generate(model, ids, **options).sequences)


def test_dtype_is_passed_on(checkpoint):
    assert dk.load(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def cut(path, end=-999):
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize("damage,match", [
    (lambda f: (f / "config.json").unlink(), r"no readable model configuration"),
    (lambda f: (f / "config.json").write_text("{"), r"no readable model configuration"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), r"no readable model configuration"),
    (lambda f: (f / "config.json").write_text("[1, 2]"), r"no readable model configuration at .*: config.json must contain a JSON object"),
    (lambda f: (f / "config.json").write_text("null"), r"no readable model configuration at .*: config.json must contain a JSON object"),
    (lambda f: edit_config(f, hidden_size="64"), r"its configuration has hidden_size='64'; expected an integer"),
    (lambda f: edit_config(f, num_attention_heads=7), r"not a multiple of the number of attention heads \(7\)"),
    (lambda f: edit_config(f, num_attention_heads=0), r"its configuration has num_attention_heads=0; expected 1"),
    (lambda f: edit_config(f, num_hidden_layers=9), r"num_hidden_layers=9, but its weights have 2 layers"),
    (lambda f: edit_config(f, vocab_size=50), r"wrong shapes: .*model.embed_tokens.weight \[\d+, 64\], expected \[50, 64\]"),
    (lambda f: edit_config(f, dlm_family="nobody"), r"dlm_family='nobody'; expected one of masked, "),
    (lambda f: edit_config(f, block_size=0), r"its configuration has block_size=0; expected an integer"),
    (lambda f: edit_config(f, model_type="llada3"), r"llada3"),
    (lambda f: edit_config(f, model_type="t5"), r"model_type='t5'; expected one of DUO, Dream, .*llama"),
    (lambda f: (f / "model.safetensors").unlink(), r"cannot be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors cannot be read: .*header too small"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), r"model\.safetensors cannot be read"),
    (lambda f: cut(f / "model.safetensors"), r"model\.safetensors cannot be read: .*file not fully covered"),
    (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), r"missing keys: model.norm.weight"),
    (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(2))), r"unexpected keys: extra"),
    (lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(3)})), r"wrong shapes: model.norm.weight \[3\], expected \[64\]"),
    (lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.tensor(1.0)})), r"wrong shapes: model.norm.weight \[\], expected \[64\]"),
], ids=["no config", "broken config", "not text", "list", "null", "type of a field", "heads", "no heads", "layers", "vocabulary",
        "family", "blocks", "unknown type", "other type", "no weights", "empty", "garbage", "truncated", "missing",
        "unexpected", "wrong shape", "scalar"])  # fmt: skip
def test_damaged_checkpoint(checkpoint, damage, match):
    damage(checkpoint)
    with pytest.raises(ValueError, match=match):
        dk.load(checkpoint)


SECOND, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"


def edit_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage,match", [
    (lambda f: (f / SECOND).unlink(), rf"{INDEX} names {SECOND}, but there is no such file"),
    (lambda f: cut(f / SECOND), rf"{SECOND} cannot be read: .*file not fully covered"),
    (lambda f: cut(f / SECOND, 20), rf"{SECOND} cannot be read: .*invalid header length"),
    (lambda f: (f / INDEX).write_text("{"), rf"{INDEX} is not a valid weight index: JSONDecodeError"),
    (lambda f: (f / INDEX).write_text("{}"), rf"{INDEX} is not a valid weight index: KeyError: 'weight_map'"),
    (lambda f: (f / INDEX).write_text("[]"), rf"{INDEX} is not a valid weight index: TypeError"),
    (lambda f: edit_index(f, **{"model.norm.weight": "nowhere.safetensors"}), rf"{INDEX} names nowhere.safetensors, but there is no such"),
    (lambda f: edit_index(f, **{"model.norm.weight": 3}), r"names 3; expected a file"),
], ids=["missing", "truncated", "header", "broken index", "empty index", "list", "names no file", "names no name"])  # fmt: skip
def test_damaged_shards(checkpoint, damage, match):
    whole = checkpoint / "model.safetensors"
    weights = load_file(whole)
    files = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in sorted(weights)[i::3]}, checkpoint / file, metadata={"format": "pt"})
    weight_map = {name: files[i % 3] for i, name in enumerate(sorted(weights))}
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()
    dk.load(checkpoint)
    damage(checkpoint)
    with pytest.raises(ValueError, match=match):
        dk.load(checkpoint)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="path_or_id"):
        dk.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"family": "lada"}, ValueError, r"^family must be one of masked, .*; got 'lada'\. Did you mean 'llada'\?$"),
        ({"dtype": "fp8"}, ValueError, r"^dtype must be a dtype of torch or its name, .*; got 'fp8'$"),
        ({"device": "cuda"}, TypeError, r"load does not accept device: pass device_map=…"),
    ],
)
def test_arguments_are_named(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        dk.load(checkpoint, **options)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_act": "nope"}, "'nope' is missing or unknown"),
    ({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "'x' is missing or unknown"),
    ({"num_key_value_heads": 0}, "its configuration has num_key_value_heads=0; expected 1 to"),
    ({"max_position_embeddings": -1}, "its configuration has max_position_embeddings=-1; expected 1 to"),
    ({"layer_types": 5}, "its configuration has layer_types=5; expected a list of strings"),
])  # fmt: skip
def test_fields_of_no_use(checkpoint, change, message):
    edit_config(checkpoint, **change)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        dk.load(checkpoint)


def test_arguments_of_no_use(checkpoint):
    for value in ("False", 1, None):
        with pytest.raises(TypeError, match=f"allow_pickle must be True or False; got {value!r}"):
            dk.load("demo", allow_pickle=value)
        with pytest.raises(TypeError, match=f"compile must be True or False; got {value!r}"):
            dk.adapt(dk.load("demo"), compile=value)
    with pytest.raises(ValueError, match="base has no effect: 'demo' is not an adapter, so it has no base model"):
        dk.load("demo", base="nonsense")
    with pytest.raises(ValueError, match=r"there is no folder 'a+…' \(5000 characters\), and the name is not a valid"):
        dk.load("a" * 5000)
    with pytest.raises(ValueError, match="there is no folder 'a--b', and the name is not a valid Hub id"):
        dk.load("a--b")
    with pytest.raises(ValueError, match="which contains a null character"):
        dk.load("a\0b")
    for family in ([], 5, "x"):
        with pytest.raises(ValueError, match=r"family must be one of masked, .*; got"):
            dk.adapt(dk.load("demo"), family=family)
    with pytest.raises(
        TypeError, match=r"model must be a torch module that returns logits; got the class \w+: pass an instance"
    ):
        dk.generate(type(dk.load("demo")), [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"unknown preset \[\]"):
        dk.preset([])


def test_pickle_is_refused(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        dk.load(checkpoint)


def test_remote_code_is_refused(checkpoint):
    with pytest.raises(ValueError, match="trust_remote_code"):
        dk.load(checkpoint, trust_remote_code=True)
