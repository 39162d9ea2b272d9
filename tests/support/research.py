# SPDX-License-Identifier: Apache-2.0
"""The time-conditioned research models: small random checkpoints as published, and the transformer restated plainly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, COND, LAYERS, HEADS, LENGTH, BLOCK = 40, 48, 24, 2, 3, 64, 4
PUBLISHED = {
    "vocab_size": VOCAB, "model_length": LENGTH, "hidden_dim": HIDDEN, "cond_dim": COND, "n_blocks": LAYERS,
    "n_heads": HEADS, "dropout": 0.1, "return_dict": False, "torch_dtype": "float32", "transformers_version": "4.38.2",
}  # fmt: skip
#: `config.json` of each, as published
CONFIGS = {
    "mdlm": PUBLISHED | {
        "architectures": ["MDLM"], "model_type": "mdlm", "time_conditioning": False,
        "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    },
    "bd3-lm": PUBLISHED | {
        "architectures": ["BD3LM"], "model_type": "bd3lm", "block_size": BLOCK, "cross_attn": True,
        "attn_backend": "sdpa", "time_conditioning": False, "var_min": True, "sampling_eps_min": 1e-3,
        "sampling_eps_max": 0.999,
    },
    "duo": PUBLISHED | {"architectures": ["DUO"], "model_type": "DUO", "causal": False, "var_min": True},
    "sedd": {
        "ngpus": 8, "tokens": VOCAB - 1, "training": {"batch_size": 512, "weight": "standard", "ema": 0.9999},
        "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": "data"},
        "graph": {"type": "absorb", "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
        "eval": {"batch_size": 512, "perplexity": True}, "optim": {"lr": 3e-4, "eps": 1e-8}, "wandb_name": None,
        "model": {
            "name": "small", "type": "ddit", "hidden_size": HIDDEN, "cond_dim": COND, "length": LENGTH,
            "n_blocks": LAYERS, "n_heads": HEADS, "scale_by_sigma": True, "dropout": 0.1,
        },
    },
    "langflow": {
        "architectures": ["LangFlow"], "model_type": "LangFlow", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "cond_dim": COND, "n_blocks": LAYERS, "n_heads": HEADS, "dropout": 0.1, "model_length": LENGTH,
        "use_normalized_embedding": True, "embedding_norm_method": "layernorm", "self_conditioning": True,
        "use_bias": True, "gumbel_loc": 4.723, "gumbel_scale": 0.852, "gumbel_cutoff": 1e-5, "gumbel_entropy": 7.02,
        "torch_dtype": "float32",
    },
}  # fmt: skip


def shapes(name: str, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in their published order, without a prefix."""
    out = {
        "vocab_embed.embedding": (vocab, HIDDEN), "sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,),
        "sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,),
    }  # fmt: skip
    for i in range(LAYERS):
        block = {
            "norm1.weight": (HIDDEN,), "attn_qkv.weight": (3 * HIDDEN, HIDDEN), "attn_out.weight": (HIDDEN, HIDDEN),
            "norm2.weight": (HIDDEN,), "mlp.0.weight": (4 * HIDDEN, HIDDEN), "mlp.0.bias": (4 * HIDDEN,),
            "mlp.2.weight": (HIDDEN, 4 * HIDDEN), "mlp.2.bias": (HIDDEN,),
            "adaLN_modulation.weight": (6 * HIDDEN, COND), "adaLN_modulation.bias": (6 * HIDDEN,),
        }  # fmt: skip
        out |= {f"blocks.{i}.{leaf}": shape for leaf, shape in block.items()}
    out |= {
        "output_layer.norm_final.weight": (HIDDEN,), "output_layer.linear.weight": (vocab, HIDDEN),
        "output_layer.linear.bias": (vocab,), "output_layer.adaLN_modulation.weight": (2 * HIDDEN, COND),
        "output_layer.adaLN_modulation.bias": (2 * HIDDEN,),
    }  # fmt: skip
    if name == "langflow":
        out["self_cond_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    return out


def weights(name: str, seed: int = 0, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Random weights of unit gain and more, so that logits depend on much; without a prefix.

    Of a small vocabulary everything is likely enough to be counted.
    """
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for leaf, shape in shapes(name, vocab).items():
        x = torch.randn(shape, generator=generator)
        if leaf.endswith("bias"):
            out[leaf] = 0.2 * x
        elif len(shape) == 1:
            out[leaf] = 1 + 0.2 * x
        else:
            head = 4.0 if vocab == VOCAB else 1.0
            gain = shape[-1] ** 0.5 if leaf.startswith("vocab_embed") else head if "linear" in leaf else 1.5
            out[leaf] = gain / shape[-1] ** 0.5 * x
    return out


def write(name: str, folder: Path, seed: int = 0, vocab: int = VOCAB, **config) -> dict[str, Tensor]:
    """A checkpoint in its published form; its weights without a prefix."""
    plain = weights(name, seed, vocab)
    config |= {"tokens": vocab - 1} if name == "sedd" else {"vocab_size": vocab}
    prefix = "" if name == "sedd" else "backbone."
    stored = {prefix + leaf: w for leaf, w in plain.items()}
    # what is in the published files as well
    stored[f"{prefix}rotary_emb.inv_freq"] = 1e4 ** (-torch.arange(HIDDEN // HEADS // 2) / (HIDDEN // HEADS // 2))
    if name == "bd3-lm":
        stored |= {"backbone.sampling_eps_min": torch.tensor(1e-3), "backbone.sampling_eps_max": torch.tensor(0.999)}
    if name == "langflow":
        learnt = {"proposal.loc": 4.1, "proposal.scale": 0.7, "proposal.entropy": 6.5}
        stored |= {leaf: torch.tensor(value) for leaf, value in learnt.items()}
        plain |= {leaf: stored[leaf] for leaf in learnt}
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


# --- the transformer, restated ---------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _turn(x: Tensor, positions: Tensor) -> Tensor:
    """Each pair (i, i + D / 2) of `[T, H, D]` as one complex number, multiplied by a unit one."""
    half = x.shape[-1] // 2
    angle = positions.to(x.dtype)[:, None] * 1e4 ** (-torch.arange(half, dtype=x.dtype) / half)
    unit = torch.complex(angle.cos(), angle.sin())[:, None]
    z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * unit
    return torch.cat((z.real, z.imag), -1)


def dit(
    w: dict[str, Tensor], x: Tensor, level: float, visible: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Raw logits `[T, V]` of one row of input embeddings `[T, HIDDEN]` at noise `level`, in the dtype of the weights.

    `visible` bool `[T, T]`: which columns each row sees; None: all.
    """
    dtype = w["blocks.0.attn_qkv.weight"].dtype
    positions = torch.arange(len(x)) if positions is None else positions
    k = torch.arange(128, dtype=dtype)
    angle = level * 10000 ** (-k / 128)
    s = torch.cat((angle.cos(), angle.sin()))
    c = w["sigma_map.mlp.2.weight"] @ _silu(w["sigma_map.mlp.0.weight"] @ s + w["sigma_map.mlp.0.bias"])
    c = _silu(c + w["sigma_map.mlp.2.bias"])
    for i in range(LAYERS):
        b = {leaf.removeprefix(f"blocks.{i}."): v for leaf, v in w.items() if leaf.startswith(f"blocks.{i}.")}
        m = (b["adaLN_modulation.weight"] @ c + b["adaLN_modulation.bias"]).split(HIDDEN)
        h = _norm(x, b["norm1.weight"]) * (1 + m[1]) + m[0]
        q, k_, v = (part.unflatten(-1, (HEADS, -1)) for part in (h @ b["attn_qkv.weight"].T).chunk(3, -1))
        q, k_ = _turn(q, positions), _turn(k_, positions)
        scores = torch.einsum("qhd,khd->hqk", q, k_) / q.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        o = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v).flatten(1)
        x = x + m[2] * (o @ b["attn_out.weight"].T)
        h = _norm(x, b["norm2.weight"]) * (1 + m[4]) + m[3]
        h = _gelu(h @ b["mlp.0.weight"].T + b["mlp.0.bias"]) @ b["mlp.2.weight"].T + b["mlp.2.bias"]
        x = x + m[5] * h
    shift, scale = (w["output_layer.adaLN_modulation.weight"] @ c + w["output_layer.adaLN_modulation.bias"]).chunk(2)
    x = _norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def double(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.double() for name, v in w.items()}


def sedd(w: dict[str, Tensor], tokens: Tensor, sigma: float) -> Tensor:
    """Logarithms of the concrete score `[T, V]`."""
    z = dit(w, w["vocab_embed.embedding"][tokens], sigma)
    z = z - torch.log(torch.expm1(torch.tensor(sigma, dtype=z.dtype))) - torch.log(torch.tensor(z.shape[1] - 1.0))
    return z.scatter(1, tokens[:, None], 0.0)


def table(w: dict[str, Tensor]) -> Tensor:
    """LangFlow's embedding table `[V, HIDDEN]`: rows of length sqrt(HIDDEN)."""
    e = w["vocab_embed.embedding"]
    return e / e.pow(2).sum(1, keepdim=True).sqrt() * HIDDEN**0.5


def langflow(w: dict[str, Tensor], z: Tensor, gamma: float, opinion: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of noisy embeddings `[T, HIDDEN]`; alpha^2 = 1 / (1 + e^gamma), sigma^2 = 1 - alpha^2."""
    opinion = torch.zeros_like(z) if opinion is None else opinion
    x = z + torch.cat((z, opinion), 1) @ w["self_cond_proj.weight"].T
    power = torch.sigmoid(-torch.tensor(gamma, dtype=z.dtype))
    return dit(w, x, gamma) + power.sqrt() / (1 - power) * (z @ table(w).T)


def blocks_visible(length: int, block: int = BLOCK) -> Tensor:
    """Which columns each row of a block-causal canvas sees, bool `[T, T]`."""
    number = [i // block for i in range(length)]
    return torch.tensor([[b >= a for a in number] for b in number])


# --- Plaid -----------------------------------------------------------------------------------------------------------

LATENT = 6


def plaid_shapes() -> dict[str, tuple[int, ...]]:
    """Names of the weights in Plaid's four files, behind the names of the files."""
    out = {
        "noise_schedule.W1": (1024, 1), "noise_schedule.b1": (1024,), "noise_schedule.W2": (1, 1024),
        "gamma_bounds.gamma_0": (), "gamma_bounds.gamma_1": (), "embedding_matrix.matrix": (VOCAB, LATENT),
        "model.input_linear.weight": (HIDDEN, LATENT), "model.selfcond_linear.weight": (HIDDEN, LATENT),
        "model.gamma_linear.weight": (HIDDEN, 64),
    }  # fmt: skip
    for i in range(LAYERS):
        block = {
            "rmsnorm1.weight": (HIDDEN,), "attn_qkv.weight": (3 * HIDDEN, HIDDEN), "attn_out.weight": (HIDDEN, HIDDEN),
            "rmsnorm2.weight": (HIDDEN,), "mlp.fc1.weight": (4 * HIDDEN, HIDDEN), "mlp.fc2.weight": (HIDDEN, 4 * HIDDEN),
        }  # fmt: skip
        out |= {f"model.blocks.{i}.{leaf}": shape for leaf, shape in block.items()}
    return out | {
        "model.output_norm.weight": (HIDDEN,), "model.output_linear.weight": (VOCAB, HIDDEN),
        "model.output_linear.bias": (VOCAB,),
    }  # fmt: skip


def write_plaid(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """A small Plaid as published: four pickles of plain state dicts."""
    generator = torch.Generator().manual_seed(seed)
    w = {}
    for name, shape in plaid_shapes().items():
        x = torch.randn(shape, generator=generator)
        if name.startswith("model.") and len(shape) == 1:
            x = 0.2 * x if name.endswith("bias") else 1 + 0.2 * x
        elif name.startswith("model."):
            x = x * {"output_linear": 0.5, "selfcond_linear": 0.5}.get(name.split(".")[1], 1.5) / shape[-1] ** 0.5
        w[name] = x
    w |= {"gamma_bounds.gamma_0": torch.tensor(-2.6), "gamma_bounds.gamma_1": torch.tensor(5.5)}
    for file in ("noise_schedule", "gamma_bounds", "embedding_matrix", "model"):
        content = {name.removeprefix(f"{file}."): x for name, x in w.items() if name.startswith(f"{file}.")}
        if file == "model":
            content["rotary_emb.inv_freq"] = torch.ones(HIDDEN // HEADS // 2)
        torch.save(content, folder / f"{file}.pt")
    return w


def plaid_gamma(w: dict[str, Tensor], t: float) -> float:
    """Plaid's noise level at a time of [0, 1]."""

    def softplus(x):
        return (1 + x.double().exp()).log()

    def g(t):
        inner = torch.tanh(softplus(w["noise_schedule.W1"])[:, 0] * (t - 0.5) + w["noise_schedule.b1"].double())
        return (0.01 * softplus(w["noise_schedule.W2"])[0] * inner).sum()

    first, last = w["gamma_bounds.gamma_0"].double(), w["gamma_bounds.gamma_1"].double()
    return (first + (last - first) * (g(t) - g(0.0)) / (g(1.0) - g(0.0))).item()


def plaid_table(w: dict[str, Tensor]) -> Tensor:
    e = w["embedding_matrix.matrix"]
    return e / (e.pow(2).sum(1, keepdim=True).sqrt() + 1e-8)


def plaid(w: dict[str, Tensor], z: Tensor, gamma: float, opinion: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of noisy vectors `[T, LATENT]`."""
    dtype, positions = z.dtype, torch.arange(len(z))

    def rms(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    alpha2 = 1 / (1 + torch.tensor(gamma, dtype=dtype).exp())
    x = (z / (alpha2 / LATENT + 1 - alpha2).sqrt()) @ w["model.input_linear.weight"].T
    if opinion is not None:
        x = x + (LATENT**0.5 * opinion) @ w["model.selfcond_linear.weight"].T
    angle = torch.linspace(-5, 5, 32, dtype=dtype).exp() * gamma
    x = x + torch.cat((angle.sin(), angle.cos())) @ w["model.gamma_linear.weight"].T
    for i in range(LAYERS):
        b = f"model.blocks.{i}."
        h = rms(x, b + "rmsnorm1.weight") @ w[b + "attn_qkv.weight"].T
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in h.chunk(3, -1))
        scores = torch.einsum("qhd,khd->hqk", _turn(q, positions), _turn(k, positions)) / q.shape[-1] ** 0.5
        o = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v).flatten(1)
        x = x + LAYERS**-0.5 * (o @ w[b + "attn_out.weight"].T)
        h = _gelu(rms(x, b + "rmsnorm2.weight") @ w[b + "mlp.fc1.weight"].T) @ w[b + "mlp.fc2.weight"].T
        x = x + LAYERS**-0.5 * h
    x = _norm(x, w["model.output_norm.weight"]) * (256 / HIDDEN)
    logits = x @ w["model.output_linear.weight"].T + w["model.output_linear.bias"]
    return logits + alpha2.sqrt() / (1 - alpha2) * (z @ plaid_table(w).T)


# --- Diffusion-LM ----------------------------------------------------------------------------------------------------

TIME = 16


def write_diffusion_lm(path: Path, seed: int = 0) -> dict[str, Tensor]:
    """A small Diffusion-LM as published: a pickle of a plain state dict."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "word_embedding": (VOCAB, LATENT), "time_embed.0": (4 * TIME, TIME), "time_embed.2": (HIDDEN, 4 * TIME),
        "input_up_proj.0": (HIDDEN, LATENT), "input_up_proj.2": (HIDDEN, HIDDEN),
        "position_embeddings": (LENGTH, HIDDEN), "output_down_proj.0": (HIDDEN, HIDDEN),
        "output_down_proj.2": (LATENT, HIDDEN),
    }  # fmt: skip
    for i in range(LAYERS):
        layer = f"input_transformers.layer.{i}."
        for name in ("query", "key", "value"):
            shapes[f"{layer}attention.self.{name}"] = (HIDDEN, HIDDEN)
        shapes |= {
            layer + "attention.output.dense": (HIDDEN, HIDDEN), layer + "intermediate.dense": (2 * HIDDEN, HIDDEN),
            layer + "output.dense": (HIDDEN, 2 * HIDDEN),
        }  # fmt: skip
    w = {}
    for name, shape in shapes.items():
        gain = {"word_embedding": 2.5, "position_embeddings": HIDDEN**0.5, "output_down_proj.2": 3.0}.get(name, 1.5)
        w[f"{name}.weight"] = gain / shape[1] ** 0.5 * torch.randn(shape, generator=generator)
        if not name.endswith(("word_embedding", "position_embeddings")):
            w[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
    norms = [
        f"input_transformers.layer.{i}.{part}output.LayerNorm" for i in range(LAYERS) for part in ("attention.", "")
    ]
    for name in ["LayerNorm", *norms]:
        w[f"{name}.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=generator)
        w[f"{name}.bias"] = 0.2 * torch.randn(HIDDEN, generator=generator)
    w |= {"lm_head.weight": w["word_embedding.weight"], "lm_head.bias": 0.2 * torch.randn(VOCAB, generator=generator)}
    torch.save(w | {"position_ids": torch.arange(LENGTH)[None]}, path)
    return w


def diffusion_lm(w: dict[str, Tensor], z: Tensor, time: float) -> Tensor:
    """Clean vectors `[T, LATENT]` of noisy ones at a time of [0, 1000)."""

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    angle = time * torch.exp(-torch.tensor(1e4, dtype=z.dtype).log() * torch.arange(TIME // 2) / (TIME // 2))
    told = linear(_silu(linear(torch.cat((angle.cos(), angle.sin())), "time_embed.0")), "time_embed.2")
    x = linear(torch.tanh(linear(z, "input_up_proj.0")), "input_up_proj.2")
    x = norm(w["position_embeddings.weight"][: len(z)] + x + told, "LayerNorm")
    for i in range(LAYERS):
        layer = f"input_transformers.layer.{i}."
        q, k, v = (
            linear(x, f"{layer}attention.self.{name}").unflatten(-1, (HEADS, -1)) for name in ("query", "key", "value")
        )
        p = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -1)
        o = torch.einsum("hqk,khd->qhd", p, v).flatten(1)
        x = norm(x + linear(o, layer + "attention.output.dense"), layer + "attention.output.LayerNorm")
        h = linear(x, layer + "intermediate.dense")
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        x = norm(x + linear(h, layer + "output.dense"), layer + "output.LayerNorm")
    return linear(torch.tanh(linear(x, "output_down_proj.0")), "output_down_proj.2")


# --- SSD-LM ----------------------------------------------------------------------------------------------------------


def write_ssd_lm(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """A small SSD-LM as published: a RoBERTa's folder with a pickle, and two files of layers."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN, max_position_embeddings=LENGTH + 2, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.add_(0.2 * torch.randn_like(p))
        else:
            p.data.normal_(std=(2.0 if "embeddings" in name else 1.5) / p.shape[-1] ** 0.5)
    config.save_pretrained(folder)
    w = dict(model.state_dict())
    extra = {
        "embed_sum_layer": {"weight": 2.0 / HIDDEN**0.5 * torch.randn(HIDDEN, VOCAB)},
        "timestep_layer": {"weight": torch.randn(HIDDEN, 1) / HIDDEN**0.5, "bias": 0.1 * torch.randn(HIDDEN)},
    }
    torch.save({f"module.{name}": x for name, x in w.items()}, folder / "pytorch_model.bin")
    for file, content in extra.items():
        torch.save({f"module.{name}": x for name, x in content.items()}, folder / f"{file}.pt")
    return w | {f"{file}.{name}": x for file, content in extra.items() for name, x in content.items()}
