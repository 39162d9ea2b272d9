# SPDX-License-Identifier: Apache-2.0
"""Nothing depends on the default device: `torch.set_default_device("cuda")` may stand in any program.

Here the default is "meta", whose tensors have no values: whatever is made there by mistake cannot go unnoticed.
"""

import ast
from pathlib import Path

import pytest
import torch

import dlmkernels as dk
import numerics
from dlmkernels.demo import MODEL_DIR
from small_models import MASK, build, prompts

PYTHON = Path(dk.__file__).parent
# Functions of torch that make a tensor, or a generator, on the default device unless they are told another.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace", "normal",
    "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "Generator",
}  # fmt: skip


def without_device(path):
    """Calls of the factories that name no device: `line: call`.

    Not those of parameters and buffers: transformers builds a model on the device that it has made the default.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    makers = ("nn.Parameter", "self.register_buffer")
    parameters = [id(x) for node in calls if ast.unparse(node.func) in makers for x in node.args]
    for node in calls:
        if id(node) in parameters:
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            generator = node.func.attr == "Generator" and node.args
            if of_torch and not named and not generator:
                yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(PYTHON.rglob("*.py")), ids=lambda p: p.relative_to(PYTHON).as_posix())
def test_every_factory_is_told_its_device(path):
    assert list(without_device(path)) == []


def test_the_look_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("torch.ones(2)\ntorch.ones(2, device=d)\nx.new_ones(2)\ntorch.full(\n  (2,), 3)\nnp.ones(2)\n")
    assert list(without_device(file)) == ["1: torch.ones(2)", "4: torch.full((2,), 3)"]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("options", [
    {"rule": dk.Threshold(0.5), "cache": "dual"}, {"rule": dk.Quota(), "temperature": 0.7, "top_k": 5, "seed": 1},
    {"rule": dk.EntropyBound(), "cache": "prefix", "cfg_scale": 1.0}, {"rule": dk.Threshold(0.5), "cache": "delayed"},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "block", "logit_alignment": "shift"},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "causal-context", "seeded": True},
    {"rule": dk.TokenEditing(0.3, 0.2), "eos_policy": "fill"}, {"rule": dk.Backtracking(2)},
    {"rule": dk.AncestralRemask(eta=0.3), "steps": 16, "seed": 2}, {"rule": dk.RenoisedEntropyBound(steps=4), "seed": 1},
    {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
    {"rule": dk.Strided(3), "attention": "causal", "logit_alignment": "shift", "cache": "block"},
    {"rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block"},
    {"rule": dk.Pipeline(0.5), "attention": "block", "logit_alignment": "shift", "cache": "block"},
    {"rule": dk.EntropyPipeline(1.0), "cache": "prefix", "refresh_interval": 3},
    {"rule": dk.Quota(), "score": "random", "temperature": 1.0, "seed": 4},
], ids=str)  # fmt: skip
def test_decoding(model, options):
    ids = prompts(2, 6)
    common = {"max_new_tokens": 16, "block_length": 8, "eos_policy": "none"}
    options = {name: value for name, value in common.items() if name not in options["rule"].ignores} | options
    here = dk.generate(model, ids, **options)
    with torch.device("meta"):
        there = dk.generate(model, ids, **options)
    for name in ("sequences", "commit_step", "num_forwards", "complete"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    numerics.assert_same_probabilities(here.confidence, there.confidence)


def test_a_seed_that_is_drawn(model):
    """Without a seed one is drawn, from the CPU's generator whatever the default device is."""
    options = {"max_new_tokens": 16, "temperature": 1.0, "eos_policy": "none"}
    ids = prompts(1, 6)

    def tokens():
        torch.manual_seed(5)
        return dk.generate(model, ids, **options).sequences

    here = tokens()
    with torch.device("meta"):
        assert torch.equal(tokens(), here)


def test_infilling_and_likelihood(model):
    ids = prompts(2, 12)
    ids[:, 4:9] = MASK

    def results():
        out = dk.infill(model, ids, rule=dk.Threshold(0.5), eos_policy="none")
        return out.sequences, dk.log_likelihood(
            model, out.sequences[:, :4], out.sequences[:, 4:], seed=0, num_samples=8
        )

    (tokens, likelihood) = results()
    with torch.device("meta"):
        tokens_there, likelihood_there = results()
    assert torch.equal(tokens, tokens_there)
    assert repr(likelihood) == repr(likelihood_there) and "meta" not in repr(likelihood_there)


def test_loaded_model():
    model = dk.load(MODEL_DIR, dtype=torch.float32)
    ids = torch.full((1, 20), model.config.mask_token_id)
    here = dk.infill(model, ids, rule=dk.Threshold(0.9)).sequences
    with torch.device("meta"):
        assert torch.equal(dk.infill(model, ids, rule=dk.Threshold(0.9)).sequences, here)
