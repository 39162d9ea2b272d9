# SPDX-License-Identifier: Apache-2.0
"""lm_head_confidence on the small model of every family: the tokens of the model's own logits."""

import copy

import pytest
import torch

import checkpoints
import small_models
from dlmkernels import ops

PUBLISHED = {
    "llada": checkpoints.llada, "llada-moe": checkpoints.llada_moe, "dream": checkpoints.dream,
    "rnd1": checkpoints.rnd1, "diffullama": checkpoints.diffullama, "diffugpt": checkpoints.diffugpt,
    "sdar": checkpoints.sdar, "sdar-moe": checkpoints.sdar_moe, "llada2": checkpoints.llada2,
    "fast-dllm-v2": checkpoints.fast_dllm_v2, "nemotron": checkpoints.nemotron,
    "i-dlm": checkpoints.i_dlm, "wedlm": checkpoints.wedlm,
}  # fmt: skip
ROWS = 40


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


DRAWN = {
    "temperature": torch.tensor([0.8]), "seed": torch.arange(ROWS) + 5, "position": torch.arange(ROWS).int(),
    "step": i32(3),
}  # fmt: skip
SETTINGS = {
    "greedy": {},
    "sampled": DRAWN,
    "tempered": DRAWN | {"distribution": "tempered"},
    "top-k": DRAWN | {"top_k": i32(9)},
    "top-p": DRAWN | {"top_p": torch.tensor([0.9]), "distribution": "filtered"},
    "both": DRAWN | {"top_k": i32(20), "top_p": torch.tensor([0.9]), "top_p_first": True, "keep_crossing": False},
    "banned": DRAWN | {"banned": torch.tensor([3, 17])},
    "given": {"given": torch.arange(ROWS)},
}


def compare(model, dtype):
    """The tokens of all settings; a token may be another where two logits are within rounding of each other."""
    model = copy.deepcopy(model).to(dtype)
    head, seen = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = small_models.prompts(2, ROWS // 2)
    with torch.no_grad():
        logits = model(tokens).logits
    hook.remove()
    hidden, weight = seen[0].flatten(0, 1), head.weight.detach()
    logits = logits.flatten(0, 1)
    bias = None if head.bias is None else head.bias.detach().float()
    assert hidden.shape[0] == ROWS
    near = torch.finfo(dtype).eps * 16 * logits.float().abs().max()
    for name, arguments in SETTINGS.items():
        ours = ops.lm_head_confidence(hidden, weight, bias=bias, **arguments)
        theirs = ops.token_confidence(logits, **arguments)
        differ = ours.token != theirs.token
        assert differ.sum() <= (0 if dtype == torch.float32 else 2), name
        if "temperature" not in arguments:
            best = logits.float().gather(1, torch.stack((ours.token, theirs.token), 1))
            assert ((best[:, 0] - best[:, 1]).abs() <= near).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_stock_models(kind, dtype):
    compare(small_models.build(kind), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families(name, dtype, loaded):
    compare(loaded(name, PUBLISHED[name])[1], dtype)
