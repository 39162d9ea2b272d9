# SPDX-License-Identifier: Apache-2.0
"""What is said of memory before anything is loaded, beside what is there when it is."""

import json

import numpy as np
import pytest
import torch

import checkpoints
import dlmkernels as dk
from dlmkernels.cli import main
from dlmkernels.planning import _Alive, read_bytes
from small_models import KINDS, build


def measured(model, batch, columns, length):
    """Bytes alive at most in a real forward beside its cache, and of the cache."""
    adapted, cache = dk.adapt(model), dk.KVCache(length, batch)
    positions = torch.arange(columns).expand(batch, columns)
    window = dk.AttentionWindow(positions.int().contiguous(), cache=cache)
    with torch.no_grad(), _Alive() as alive:
        adapted.hidden(torch.zeros(batch, columns, dtype=torch.int64), positions, window)
    return alive.most - cache.num_bytes, cache.num_bytes


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("qwen3_moe", "modernbert")])
def test_what_a_real_forward_has_in_memory(kind):
    model = build(kind)
    plan = dk.plan(model, 3, 40, block_length=8)
    forward, cache = measured(model, 3, 40, 40)
    assert plan.cache == cache == 3 * 40 * 2 * 2 * 16 * (2 if kind in ("llama", "qwen2", "qwen3") else 4) * 4
    assert abs(plan.forward - forward) <= 0.02 * forward
    assert abs(plan.step - measured(model, 3, 8, 40)[0]) <= 0.05 * plan.step
    weights = {id(p): p for p in model.parameters()}.values()
    assert plan.parameters == sum(p.numel() for p in weights)
    assert plan.weights == sum(x.numel() * x.element_size() for x in [*weights, *model.buffers()])
    assert plan.logits == 3 * 8 * 97 * 4


@pytest.mark.parametrize("kind", ["qwen3_moe", "modernbert"])
def test_estimated_where_shapes_depend_on_values(kind):
    model = build(kind)
    plan = dk.plan(model, 3, 40, block_length=8)
    forward, cache = measured(model, 3, 40, 40)
    assert plan.cache == cache and forward / 3 < plan.forward < forward * 3 and plan.step * 5 == plan.forward


def test_without_a_cache_and_with_a_budget():
    model = build("llama")
    plan = dk.plan(model, 2, 32, cache=False, logits_budget=3 * 97 * 4)
    assert plan.cache == 0 and plan.step == plan.forward and plan.logits == 3 * 97 * 4
    assert plan.total == plan.weights + max(plan.forward, plan.logits) and plan.block_length == 32


@pytest.mark.parametrize("make", [checkpoints.llada, checkpoints.dream, checkpoints.sdar, checkpoints.llada2])
def test_published_forms_of_which_the_configuration_alone_is_there(make, tmp_path):
    folder = checkpoints.write(tmp_path, make)
    loaded = dk.load(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    plan = dk.plan(folder, 2, 16, dtype="float32")
    assert plan.parameters == sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values())
    half = dk.plan(folder, 2, 16, dtype=torch.bfloat16)
    assert half.parameters == plan.parameters and half.cache * 2 == plan.cache


def test_what_came_is_named():
    for value in ("0.5", "-5G", 0):
        with pytest.raises(ValueError, match=f"memory must be a number of bytes, at least 1; got {value!r}"):
            read_bytes("memory", value)
    assert read_bytes("memory", torch.tensor(7)) == read_bytes("memory", np.int64(7)) == 7


def test_numbers_of_any_kind():
    plan = dk.plan("demo", 2, 64, block_length=8)
    for kind in (np.int64, torch.tensor):
        assert dk.plan("demo", kind(2), kind(64), block_length=kind(8), logits_budget=kind(256 << 20)) == plan
    assert dk.plan("demo", 2, 64, block_length=8, dtype="torch.float32") == dk.plan(
        "demo", 2, 64, block_length=8, dtype=torch.float32
    )
    assert plan.longest(10**400) > 10**380


def test_longest():
    plan = dk.plan("demo", batch=4, length=64)
    longest = plan.longest(plan.total)
    assert 60 <= longest <= 64 and plan.longest(plan.weights) == 0
    assert plan.longest("1G") > 1000 * longest // 64


@pytest.mark.parametrize(
    "text,value", [("24G", 24 << 30), ("1.5 GiB", 3 << 29), ("100", 100), ("512kb", 512 << 10), (7, 7)]
)
def test_units(text, value):
    assert read_bytes("memory", text) == value


@pytest.mark.parametrize("value", ["", "G", "many", "-1", 0, True, 1.5, "1e", "inf", "nan", "1e400", "1e400T"])
def test_no_bytes(value):
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        read_bytes("memory", value)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"batch": 0}, "batch must be an integer of at least 1; got 0"),
        ({"length": 257}, "length must be at most 256, the model's maximum; got 257"),
        ({"block_length": 0}, "block_length must be None or an integer of at least 1; got 0"),
        ({"logits_budget": "x"}, "logits_budget must be a number of bytes, such as 24G; got 'x'"),
        ({"family": "x"}, "'x'"),
        *(
            ({"dtype": dtype}, "dtype must be None or a floating-point dtype, such as 'bfloat16'; got")
            for dtype in ("x", "Tensor", "int32", torch.int32, 5, 0, "", False, {})
        ),
    ],
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        dk.plan("demo", **options)


def test_kinds_of_caches_are_not_its_business():
    with pytest.raises(TypeError, match="cache must be True or False; got 'none'"):
        dk.plan("demo", cache="none")


def test_unknown_models(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        dk.plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        dk.plan(tmp_path)


def test_command_line(capsys):
    assert main(["plan", "--model", "demo", "--batch", "2", "--length", "82", "--memory", "1G"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch 2, 82 tokens each, blocks of 82" and lines[-1].startswith("1G is enough for 256 tokens")
    assert main(["plan", "--model", "demo", "--memory", "lots"]) == 2
