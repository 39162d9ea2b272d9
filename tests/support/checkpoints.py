# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints in the form in which each family is published: its `config.json` and names of weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import plain_models
from dlmkernels import AttentionWindow
from dlmkernels.models.adapt import adapt
from plain_models import LLADA, USUAL, PlainDecoder

VOCAB, MASK, EOS, PAD = 97, 96, 1, 0
HIDDEN, LAYERS, HEADS, GROUPS, HEAD_DIM, FFN = 48, 2, 6, 2, 8, 64
QWEN = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": LAYERS,
    "torch_dtype": "float32", "use_cache": False, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    "mask_token_id": MASK,
}  # fmt: skip


@dataclass
class Checkpoint:
    """A configuration and weights, and the plain model of them."""

    config: dict
    weights: dict[str, Tensor]
    plain: object
    double: object

    def write(self, folder: Path, shards: int = 1) -> Path:
        (folder / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.weights)
        if shards == 1:
            save_file(self.weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: self.weights[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Unit gain and more, norms and biases random too, so that much depends on context; a sharp head."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            weights[name] = 0.2 * x
        elif len(shape) == 1:
            weights[name] = 1 + 0.2 * x
        else:
            is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
            is_head = name.startswith(("lm_head", "diffusion_head", "model.transformer.ff_out"))
            gain = shape[-1] ** 0.5 if is_embedding else 4.5 if is_head else 2.0
            weights[name] = gain / shape[-1] ** 0.5 * x
    return weights


def decoder_shapes(names=USUAL, *, head_dim=HEAD_DIM, biases=(), qk_norm=False, groups=GROUPS, ffn=None) -> dict:
    """Names and shapes of a Llama-like decoder; `ffn(i)` gives those of a layer's feed-forward where it is not dense."""
    q, kv = HEADS * head_dim, groups * head_dim
    shapes = {names["embed"]: (VOCAB, HIDDEN), names["norm"]: (HIDDEN,), names["head"]: (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = names["layer"].format(i)
        parts = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
        parts |= {"first_norm": (HIDDEN,), "second_norm": (HIDDEN,)}
        if qk_norm:
            parts |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
        dense = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
        parts |= dense if ffn is None else {}
        shapes |= {layer + names[part]: shape for part, shape in parts.items()}
        shapes |= {f"{layer}{name}": shape for name, shape in (ffn(i) if ffn else {}).items()}
    out = {name + ".weight": shape for name, shape in shapes.items()}
    for i in range(LAYERS):
        for part in biases:
            name = names["layer"].format(i) + names[part]
            out[name + ".bias"] = out[name + ".weight"][:1]
    return out


def experts(count: int, size: int):
    """Shapes of a mixture of experts."""
    return lambda i: (
        {"mlp.gate": (count, HIDDEN)}
        | {
            f"mlp.experts.{e}.{name}": shape
            for e in range(count)
            for name, shape in (
                ("gate_proj", (size, HIDDEN)),
                ("up_proj", (size, HIDDEN)),
                ("down_proj", (HIDDEN, size)),
            )
        }
    )


def checkpoint(config: dict, shapes: dict, seed: int, kind=PlainDecoder, **plain) -> Checkpoint:
    weights = random_weights(shapes, seed)
    options = {"layers": LAYERS, "heads": HEADS, "groups": GROUPS, "eps": 1e-6, "theta": 1e6} | plain
    model = kind(weights, **options)
    return Checkpoint(config, weights, model, model.double())


def llada(seed: int = 0) -> Checkpoint:
    config = {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
        "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
        "block_group_size": 1, "block_type": "llama", "d_model": HIDDEN, "embedding_dropout": 0.0,
        "embedding_size": VOCAB, "eos_token_id": EOS, "flash_attention": False, "include_bias": False,
        "include_qkv_bias": False, "init_device": "meta", "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": MASK, "max_sequence_length": 512, "mlp_hidden_size": FFN,
        "mlp_ratio": 4, "multi_query_attention": None, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": LAYERS,
        "pad_token_id": PAD, "precision": "amp_bf16", "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True,
        "rope_theta": 500000.0, "scale_logits": False, "vocab_size": VOCAB, "weight_tying": False, "use_cache": False,
        "torch_dtype": "float32",
    }  # fmt: skip
    shapes = decoder_shapes(LLADA, groups=HEADS)
    return checkpoint(config, shapes, seed, names=LLADA, groups=HEADS, eps=1e-5, theta=5e5)


def llada_moe(seed: int = 0) -> Checkpoint:
    config = QWEN | {
        "architectures": ["LLaDAMoEModel"], "model_type": "llada", "num_experts": 6, "num_experts_per_tok": 2,
        "expert_intermediate_size": 24, "dense_intermediate_size": 80, "shared_expert_intermediate_size": None,
        "moe_layer_freq": [1] * LAYERS, "qk_layernorm": True, "norm_topk_prob": None, "clip_qkv": None,
        "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "partial_rotary_factor": 1,
        "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None, "attention_bias": False,
        "rms_norm_eps": 1e-5, "rope_theta": 50000, "num_key_value_heads": HEADS,
    }  # fmt: skip
    shapes = decoder_shapes(qk_norm=True, groups=HEADS, ffn=experts(6, 24))
    ffn = plain_models.softmax_experts(6, 2, normalised=False)
    return checkpoint(config, shapes, seed, groups=HEADS, eps=1e-5, theta=5e4, ffn=ffn)


def dream(seed: int = 0) -> Checkpoint:
    config = QWEN | {"architectures": ["DreamModel"], "model_type": "Dream"}
    return checkpoint(config, decoder_shapes(biases="qkv"), seed)


def rnd1(seed: int = 0) -> Checkpoint:
    config = QWEN | {
        "architectures": ["RND1LM"], "model_type": "rnd1", "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16, "moe_backend": "hf", "is_causal": False,
        "num_diffusion_steps": 256, "rope_scaling": False, "sliding_window": False, "attention_bias": False,
    }  # fmt: skip
    shapes = decoder_shapes(head_dim=16, qk_norm=True, ffn=experts(6, 24))
    return checkpoint(config, shapes, seed, ffn=plain_models.softmax_experts(6, 2, normalised=True))


def diffullama(seed: int = 0) -> Checkpoint:
    config = QWEN | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return checkpoint(config, decoder_shapes(), seed)


def diffugpt(seed: int = 0) -> Checkpoint:
    """As published: the parts of a GPT-2 under the names of the wrapper they were trained in."""
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": HIDDEN,
        "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256, "n_ctx": 256, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "eos_token_id": EOS, "bos_token_id": EOS, "mask_token_id": MASK,
        "pad_token_id": PAD, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
              "denoise_model.wpe.weight": (256, HIDDEN)}  # fmt: skip
    for name in ["ln_f", *(f"h.{i}.ln_{n}" for i in range(LAYERS) for n in (1, 2))]:
        shapes |= {f"denoise_model.{name}.weight": (HIDDEN,), f"denoise_model.{name}.bias": (HIDDEN,)}
    for i in range(LAYERS):
        for name, (rows, columns) in {"attn.c_attn": (HIDDEN, 3 * HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN),
                                      "mlp.c_fc": (HIDDEN, 4 * HIDDEN), "mlp.c_proj": (4 * HIDDEN, HIDDEN)}.items():  # fmt: skip
            prefix = f"denoise_model.h.{i}.{name}."
            shapes |= {prefix + "weight": (rows, columns), prefix + "bias": (columns,)}
    weights = random_weights(shapes, seed)
    where = {"layers": LAYERS, "heads": HEADS, "prefix": "denoise_model.", "embed": "embed_tokens", "head": "lm_head"}
    exact = {name: w.double() for name, w in weights.items()}
    return Checkpoint(config, weights, plain_models.gpt2(weights, **where), plain_models.gpt2(exact, **where))


def sdar(seed: int = 0, block_size: int | None = 4) -> Checkpoint:
    config = QWEN | {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "head_dim": 16, "block_size": block_size,
        "attention_bias": False, "attn_implementation": "flex_attention", "fuse_cross_entropy": True,
    }  # fmt: skip
    return checkpoint(config, decoder_shapes(head_dim=16, qk_norm=True), seed)


def sdar_moe(seed: int = 0) -> Checkpoint:
    config = sdar().config | {
        "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1,
        "block_size": None,
    }  # fmt: skip
    shapes = decoder_shapes(head_dim=16, qk_norm=True, ffn=experts(6, 24))
    return checkpoint(config, shapes, seed, ffn=plain_models.softmax_experts(6, 2, normalised=True))


LLADA2 = {
    "embed": "model.word_embeddings", "o": "attention.dense", "q_norm": "attention.query_layernorm",
    "k_norm": "attention.key_layernorm",
}  # fmt: skip


def llada2(seed: int = 0) -> Checkpoint:
    """First layer dense, 8 experts in 4 groups, rotary embedding of half of each head."""
    config = QWEN | {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 3, "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "rotary_dim": 8,
        "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "norm_head": False, "norm_topk_prob": True,
        "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "rope_theta": 600000,
        "embedding_dropout": 0.0, "output_dropout": 0.0, "output_router_logits": False, "router_dtype": "fp32",
    }  # fmt: skip
    names = USUAL | LLADA2

    def ffn(i: int) -> dict:
        sizes = {"gate_proj": (24, HIDDEN), "up_proj": (24, HIDDEN), "down_proj": (HIDDEN, 24)}
        if i == 0:
            return {f"mlp.{n}": s for n, s in {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN),
                                               "down_proj": (HIDDEN, FFN)}.items()}  # fmt: skip
        return experts(8, 24)(i) | {f"mlp.shared_experts.{n}": s for n, s in sizes.items()}

    shapes = decoder_shapes(names, head_dim=16, qk_norm=True, ffn=ffn)
    for i in range(LAYERS):
        for part in "qkv":
            del shapes[f"model.layers.{i}.{names[part]}.weight"]
        shapes[f"model.layers.{i}.attention.query_key_value.weight"] = ((HEADS + 2 * GROUPS) * 16, HIDDEN)
    shapes["model.layers.1.mlp.gate.expert_bias"] = (8,)
    experts_of = plain_models.grouped_experts(8, 4, 2, 3, 2.5, dense_layers=1)
    return checkpoint(
        config, shapes, seed, kind=plain_models.PlainLLaDA2, names=names, theta=6e5, rotary_dim=8, ffn=experts_of
    )


def fast_dllm_v2(seed: int = 0) -> Checkpoint:
    config = QWEN | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 8}
    return checkpoint(config, decoder_shapes(biases="qkv"), seed)


def a2d_qwen3(seed: int = 0) -> Checkpoint:
    made = sdar(seed)
    made.config |= {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "block_size": None}
    return made


def nemotron(seed: int = 0) -> Checkpoint:
    rope = {
        "rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    config = QWEN | {
        "architectures": ["NemotronLabsDiffusionModel"], "model_type": "nemotron_labs_diffusion", "head_dim": 16,
        "rope_parameters": rope, "block_size": 8, "dlm_paradigm": "block_diff", "rms_norm_eps": 1e-5,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    config = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    names = USUAL | {
        "embed": "encoder.embed_tokens", "norm": "encoder.norm", "head": "diffusion_head", "layer": "encoder.layers.{}."
    }  # fmt: skip
    made = checkpoint(
        config, decoder_shapes(names, head_dim=16), seed, kind=plain_models.PlainMinistral, names=names, eps=1e-5
    )
    for plain in (made.plain, made.double):
        plain.yarn = {"original": 8, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "beta": 0.1}
    return made


def i_dlm(seed: int = 0) -> Checkpoint:
    """SDAR's form, with blocks shorter than SDAR's."""
    return sdar(seed, block_size=3)


def wedlm(seed: int = 0, qk_norm: bool = True) -> Checkpoint:
    config = QWEN | {
        "architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "head_dim": 16, "qk_norm": qk_norm,
        "attention_bias": not qk_norm, "layer_types": ["full_attention"] * LAYERS,
    }  # fmt: skip
    return checkpoint(config, decoder_shapes(head_dim=16, qk_norm=qk_norm, biases="" if qk_norm else "qkv"), seed)


#: Families whose configuration does not name them.
UNNAMED = {"diffullama": "diffullama", "diffugpt": "diffullama"}


def write(tmp_path, make, change=None, **config):
    checkpoint = make()
    checkpoint.config |= config
    if change:
        change(checkpoint.weights)
    return checkpoint.write(tmp_path)


@torch.no_grad()
def our_logits(model, tokens, **window):
    adapted = adapt(model)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return adapted.logits(adapted.hidden(tokens, positions, AttentionWindow(**window)))


def llada_as_llama(seed: int = 0) -> Checkpoint:
    """LLaDA-V's language model: LLaDA under the names of Llama's fields and weights."""
    config = {name: QWEN[name] for name in QWEN if "window" not in name} | {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "num_experts": -1, "num_experts_per_tok": -1,
        "attention_bias": False, "pretraining_tp": 1, "moe_choice": "expert", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }  # fmt: skip
    return checkpoint(config, decoder_shapes(), seed, eps=1e-5, theta=5e5)


def with_vision(made: Checkpoint) -> Checkpoint:
    """A checkpoint as LLaVA-like models hold it: with weights that read images beside."""
    made.config |= {
        "model_type": "llava_llada",
        "mm_vision_tower": "x",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
    }
    made.weights |= {
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16),
        "model.mm_projector.0.weight": torch.zeros(HIDDEN, 16), "model.image_newline": torch.zeros(HIDDEN),
    }  # fmt: skip
    return made


def renamed(made: Checkpoint, model_type: str) -> Checkpoint:
    """The same under another model type."""
    made.config |= {"model_type": model_type}
    return made
