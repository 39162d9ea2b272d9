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


@pytest.mark.parametrize("damage,match", [
    (lambda f: (f / "config.json").unlink(), r"no readable model configuration"),
    (lambda f: (f / "config.json").write_text("{"), r"no readable model configuration"),
    (lambda f: edit_config(f, model_type="llada3"), r"llada3"),
    (lambda f: edit_config(f, model_type="t5"), r"model type 't5'; known types: Dream, .*llama"),
    (lambda f: (f / "model.safetensors").unlink(), r"cannot be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), r"cannot be loaded"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-999]), r"cannot be loaded"),
    (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), r"missing keys: model.norm.weight"),
    (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(2))), r"unexpected keys: extra"),
    (lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(3)})), r"wrong shapes: model.norm.weight \[3\], expected \[64\]"),
], ids=["no config", "broken config", "unknown type", "other type", "no weights", "garbage", "truncated", "missing",
        "unexpected", "wrong shape"])  # fmt: skip
def test_damaged_checkpoint(checkpoint, damage, match):
    damage(checkpoint)
    with pytest.raises(ValueError, match=match):
        dk.load(checkpoint)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="path_or_id"):
        dk.load(tmp_path / "nothing")


def test_pickle_is_refused(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        dk.load(checkpoint)


def test_remote_code_is_refused(checkpoint):
    with pytest.raises(ValueError, match="trust_remote_code"):
        dk.load(checkpoint, trust_remote_code=True)
