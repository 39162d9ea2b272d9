# SPDX-License-Identifier: Apache-2.0
"""Generate the table in docs/models.md of how much memory published models need.

    python scripts/model_memory.py            # print the table
    python scripts/model_memory.py --write    # replace the table in docs/models.md, between its two markers

The sizes are those of the published configurations. `dlmkernels.plan` builds each model without allocating its weights,
so neither weights nor network access are needed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dlmkernels as dk

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- begin: python scripts/model_memory.py --write -->", "<!-- end -->"

#: Pairs of batch size and tokens per request, including the prompt.
LOADS = ((1, 1024), (1, 4096), (16, 4096))

QWEN3 = {
    "model_type": "sdar", "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B = QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
EXPERTS_30B = QWEN3 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
QWEN2_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLADA2 = {
    "model_type": "llada2_moe", "vocab_size": 157184, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 256,
    "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "rotary_dim": 64, "use_bias": False,
    "use_qkv_bias": False, "use_qk_norm": True, "norm_head": False, "norm_topk_prob": True,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "rope_theta": 600000, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 16384, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_labs_diffusion", "vocab_size": 131072, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "block_size": 32,
    "dlm_paradigm": "block_diff", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published model: its name on the Hub, the sizes in its configuration, and its block length."""

    name: str
    config: dict[str, Any]
    block_length: int
    family: str | None = None


MODELS = (
    Published("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", QWEN3 | {
        "model_type": "a2d-qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    }, 32, family="a2d-bd3lm"),
    Published("dllm-hub/ModernBERT-large-chat-v0.1", {
        "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 1024, "intermediate_size": 2624,
        "num_hidden_layers": 28, "num_attention_heads": 16, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    }, 32),
    Published("JetLM/SDAR-4B-Chat", QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "block_size": 4,
    }, 4),
    Published("JetLM/SDAR-8B-Chat", QWEN3_8B | {"block_size": 4}, 4),
    Published("JetLM/SDAR-30B-A3B-Chat", EXPERTS_30B | {
        "model_type": "sdar_moe", "mlp_only_layers": [], "decoder_sparse_step": 1, "block_size": 4,
    }, 4),
    Published("GSAI-ML/LLaDA-8B-Instruct", {
        "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False, "layer_norm_type": "rms",
        "block_type": "llama", "activation_type": "silu", "rope": True, "torch_dtype": "bfloat16",
    }, 32),
    Published("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", {
        "model_type": "lladamoe", "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "expert_intermediate_size": 1024, "dense_intermediate_size": 8192, "intermediate_size": 8192,
        "hidden_act": "silu", "moe_layer_freq": [1] * 16, "qk_layernorm": True, "rms_norm_eps": 1e-5,
        "rope_theta": 50000, "max_position_embeddings": 8192, "tie_word_embeddings": False, "attention_bias": False,
        "torch_dtype": "bfloat16",
    }, 32),
    Published("inclusionAI/LLaDA2.1-mini", LLADA2 | {
        "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 16,
        "moe_intermediate_size": 512,
    }, 32),
    Published("inclusionAI/LLaDA2.1-flash", LLADA2 | {
        "hidden_size": 4096, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 32,
        "moe_intermediate_size": 1024,
    }, 32),
    Published("Dream-org/Dream-v0-Instruct-7B", QWEN2_7B | {"model_type": "Dream"}, 32),
    Published("Efficient-Large-Model/Fast_dLLM_v2_7B", QWEN2_7B | {"model_type": "Fast_dLLM_Qwen", "bd_size": 32}, 32),
    Published("nvidia/Nemotron-Labs-Diffusion-3B", NEMOTRON | {
        "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
    }, 32),
    Published("nvidia/Nemotron-Labs-Diffusion-8B", NEMOTRON | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
    }, 32),
    Published("yifanyu/I-DLM-8B", QWEN3_8B | {"block_size": 3}, 4),
    Published("tencent/WeDLM-8B-Instruct", QWEN3_8B | {"model_type": "wedlm", "qk_norm": True}, 16),
    Published("radicalnumerics/RND1-Base-0910", EXPERTS_30B | {"model_type": "rnd1", "moe_backend": "hf"}, 256),
)  # fmt: skip


def plans(model: Published) -> list[dk.MemoryPlan]:
    """Return the memory plan of a model for each of `LOADS`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config))
        return [
            dk.plan(folder, batch, length, block_length=model.block_length, family=model.family)
            for batch, length in LOADS
        ]


def row(model: Published) -> str:
    """Return a model's row of the table."""
    made = plans(model)
    sizes = [made[0].weights, *(plan.total for plan in made)]
    cells = [f"`{model.name}`", f"{made[0].parameters / 1e9:.2f}", *(f"{size / 2**30:.1f}" for size in sizes)]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the whole table as Markdown."""
    loads = " | ".join(f"{batch} × {length:,}" for batch, length in LOADS)
    head = f"| model | parameters (billions) | weights | {loads} |\n|{'---|' * (3 + len(LOADS))}"
    return "\n".join([head, *map(row, MODELS)])


def main() -> None:
    made = table()
    if sys.argv[1:] == ["--write"]:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", "utf-8")
    else:
        print(made)


if __name__ == "__main__":
    main()
