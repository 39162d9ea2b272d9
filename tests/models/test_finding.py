# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint and saying what is wrong with what was asked for; fields of its configuration by name."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR
from dlmkernels.models import checkpoint as files
from small_models import build, prompts

# --- where ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """`asked(error)`: from here on the hub answers so; returns the list of what it is asked for."""
    names = []

    def install(error):
        def model_info(self, name, **kwargs):
            names.append(name)
            raise error

        monkeypatch.setattr(files.HfApi, "model_info", model_info)
        return names

    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    return install


@pytest.mark.parametrize(
    "name", ["/nope", "./nope", "../nope", "~/nope", "a/b/c", "", "no pe", Path("nope"), Path("a/b")]
)
def test_what_can_be_no_hub_id_is_not_looked_for_there(name, asked):
    names = asked(AssertionError())
    with pytest.raises(ValueError, match=r"path_or_id: there is no folder '[^']*'$"):
        dk.load(name)
    assert names == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json' is a file; expected the folder that contains config\.json"):
        dk.load(tmp_path / "config.json")
    with pytest.raises(TypeError, match="path_or_id must be a folder or Hub id, as a string or path; got int"):
        dk.load(3)


def test_a_hub_that_does_not_answer_is_asked_once(asked):
    names, start = asked(ConnectionError("no route")), time.perf_counter()
    with pytest.raises(
        ValueError,
        match=r"no folder 'nope' and no downloaded model of that name in the cache, and the Hub cannot be reached \(ConnectionError\)",
    ):
        dk.load("nope")
    assert names == ["nope"] and time.perf_counter() - start < 10


def test_what_was_downloaded_before_is_used(asked, monkeypatch):
    asked(ConnectionError())
    monkeypatch.setattr(
        files, "try_to_load_from_cache", lambda name, file, **where: "/x" if file == "config.json" else None
    )
    assert files.locate("some/model", {"revision": "1"}) == ("some/model", {"revision": "1", "local_files_only": True})


@pytest.mark.parametrize("where", [{"local_files_only": True}, {}])
def test_downloads_switched_off(where, asked, monkeypatch):
    names = asked(AssertionError())
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", not where)
    with pytest.raises(ValueError, match="in the cache, and downloads are switched off"):
        dk.load("nope", **where)
    assert names == []


def test_what_the_hub_answers(asked):
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=404, headers={}, request=None, text="", url="")
    for kind, match in (
        (errors.RepositoryNotFoundError, "no folder 'nope', and no model of that name on the Hub"),
        (errors.RevisionNotFoundError, "'nope' has no revision 'x' on the Hub"),
        (errors.HfHubHTTPError, "the Hub responded with HTTP status 404"),
    ):
        asked(kind("…", response=response))
        with pytest.raises(ValueError, match=match):
            dk.load("nope", revision="x")


def test_the_demo_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    weights = dk.load(MODEL_DIR).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in dk.load("demo").state_dict().items())
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        dk.load("./demo")


@pytest.mark.parametrize("name", ["load", "generate", "infill", "adapt", "log_likelihood", "custom_generate"])
def test_without_transformers(name):
    code = f"""
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import dlmkernels as dk
try:
    dk.{name}
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f'dlmkernels.{name} needs transformers: pip install -U "dlmkernels[models]"' in out


# --- fields by name ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    return tmp_path


def test_fields_of_the_configuration(checkpoint):
    model = dk.load(checkpoint, max_position_embeddings=100, mask_token_id=7, rms_norm_eps=1e-3, dtype=torch.bfloat16)
    config = model.config
    assert (config.max_position_embeddings, config.mask_token_id, config.rms_norm_eps) == (100, 7, 1e-3)
    assert model.dtype == torch.bfloat16 and dk.adapt(model).max_length == 100
    ids = torch.full((1, 4), 9)
    assert dk.generate(model, ids, max_new_tokens=96).sequences.shape == (1, 100)
    with pytest.raises(ValueError, match="100"):
        dk.generate(model, ids, max_new_tokens=97)
    assert not (dk.generate(model, ids, max_new_tokens=8).generated == 7).any()


def test_fields_under_their_published_names(tmp_path):
    import checkpoints

    checkpoints.fast_dllm_v2().write(tmp_path)
    assert dk.adapt(dk.load(tmp_path, bd_size=4)).block_length == 4


def test_fields_inside_the_text_configuration():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaConfig"):
        pytest.skip("this transformers has no DiffusionGemma yet")
    from dlmkernels.models.published import plan

    raw = {
        "model_type": "diffusion_gemma",
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    }
    config = plan(raw, changes={"max_position_embeddings": 77, "canvas_length": 5}).config
    assert (config.text_config.max_position_embeddings, config.canvas_length) == (77, 5)
    assert config.text_config.num_hidden_layers == 2


@pytest.mark.parametrize("name,match", [
    ("max_positon_embeddings", "neither an argument of from_pretrained nor a field of LlamaConfig. Did you mean max_position_embeddings"),
    ("devicemap", "neither an argument of from_pretrained nor a field of LlamaConfig"),
    ("_attn_implementation", "neither"), ("to_dict", "neither"), ("auto_map", "neither"),
    ("state_dict", "load does not accept state_dict"), ("use_safetensors", "load does not accept use_safetensors: use allow_pickle"),
    ("dlm_family", "load does not accept dlm_family: use family"), ("config", "load does not accept config: pass configuration fields as keywords"),
])  # fmt: skip
def test_keywords_that_are_none(name, match, checkpoint):
    with pytest.raises(TypeError, match=match):
        dk.load(checkpoint, **{name: 1})


@pytest.mark.parametrize(
    "name,value", [("mask_token_id", "x"), ("max_position_embeddings", 1.5), ("num_hidden_layers", 10**9)]
)
def test_wrong_values_for_fields(name, value, checkpoint):
    with pytest.raises(ValueError, match=name):
        dk.load(checkpoint, **{name: value})


@pytest.mark.parametrize("rope,positions,length", [
    ({"rope_type": "default"}, 64, 64),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64, 64),
    ({"rope_type": "yarn", "factor": 4.0}, 64, 256),
    ({"rope_type": "linear", "factor": 2.0}, 64, 128),
    ({"rope_type": "dynamic", "factor": 2.0}, 64, 128),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32}, 64, 64),
], ids=str)  # fmt: skip
def test_rope_that_reaches_further(rope, positions, length):
    from transformers import LlamaConfig

    from dlmkernels.models.fields import longest_canvas

    assert (
        longest_canvas(LlamaConfig(max_position_embeddings=positions, rope_parameters=rope | {"rope_theta": 1e4}))
        == length
    )


def test_yarn_decodes_beyond_the_unscaled_length(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, mask_token_id=95, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, rope_parameters=rope,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, ids = dk.load(tmp_path), prompts(1, 56).clamp(max=94)
    assert dk.adapt(model).max_length == 256
    out = dk.generate(model, ids, max_new_tokens=200, eos_policy="none", steps=8)
    assert out.complete.all() and out.sequences.shape == (1, 256)
    with pytest.raises(ValueError, match="256"):
        dk.generate(model, ids, max_new_tokens=201)
