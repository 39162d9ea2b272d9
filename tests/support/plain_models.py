# SPDX-License-Identifier: Apache-2.0
"""Published architectures in plain torch, on the weights of a checkpoint under its published names.

Neither transformers' nor our modelling, key maps or attention are used: a mistake in any of them cannot hide here.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Where the parts of a layer are found under the names that Llama, Qwen and most others use.
USUAL = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.{}.",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "first_norm": "input_layernorm",
    "second_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
LLADA = {
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
    "first_norm": "attn_norm", "second_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip


class PlainDecoder:
    """RMSNorm, rotary embedding, grouped queries, SwiGLU or experts; in the dtype of its weights.

    `names` are the parts' names, `ffn(self, layer, x)` replaces the dense feed-forward where given.
    """

    def __init__(
        self, weights: dict[str, Tensor], *, layers: int, heads: int, groups: int, eps: float, theta: float,
        names: dict[str, str] = USUAL, rotary_dim: int | None = None, ffn=None,
    ):  # fmt: skip
        self.w, self.names, self.ffn = weights, names, ffn
        self.layers, self.heads, self.groups, self.eps, self.theta = layers, heads, groups, eps, theta
        self.rotary_dim = rotary_dim

    def double(self) -> PlainDecoder:
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__
        twin.w = {name: w.double() if w.is_floating_point() else w for name, w in self.w.items()}
        return twin

    def __call__(
        self, tokens: Tensor, visible: Tensor | None = None, positions: Tensor | None = None,
        embeds: Tensor | None = None, kept: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits `[B, T, V]` of `tokens` `[B, T]` at `positions` `[T]` (default: 0, 1, …).

        Row i sees column j where `visible[i, j]` (default: all). `embeds` `[B, T, hidden]` stand in for the tokens'.
        `kept` are keys and values of every layer and column: those at `positions` are replaced, and all are seen; an
        empty one is filled.
        """
        x = self.w[self.names["embed"] + ".weight"][tokens] if embeds is None else embeds
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        for i in range(self.layers):
            layer = self.names["layer"].format(i)
            h = self.norm(x, layer + self.names["first_norm"])
            q, k, v = self.qkv(layer, h)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if kept is not None:
                if layer in kept:
                    k, v = (old.index_copy(1, positions, new) for old, new in zip(kept[layer], (k, v)))
                kept[layer] = k, v
            x = x + self.linear(self.attend(q, k, v, visible).flatten(2), layer + self.names["o"])
            h = self.norm(x, layer + self.names["second_norm"])
            x = x + (self.ffn(self, i, h) if self.ffn else self.swiglu(h, layer))
        return self.linear(self.norm(x, self.names["norm"]), self.names["head"])

    def qkv(self, layer: str, h: Tensor) -> list[Tensor]:
        q, k, v = (self.linear(h, layer + self.names[part]) for part in "qkv")
        split = [q.unflatten(-1, (self.heads, -1)), *(x.unflatten(-1, (self.groups, -1)) for x in (k, v))]
        for part, name in enumerate(("q_norm", "k_norm")):
            if layer + self.names.get(name, "-") + ".weight" in self.w:
                split[part] = self.norm(split[part], layer + self.names[name])
        return split

    def swiglu(self, x: Tensor, prefix: str, names: dict[str, str] | None = None) -> Tensor:
        names = names or self.names
        gate = self.linear(x, prefix + names["gate"])
        return self.linear(gate * torch.sigmoid(gate) * self.linear(x, prefix + names["up"]), prefix + names["down"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.w[name + ".weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of the first `rotary_dim` elements: d of their first half and d of their second turn."""
        dim = self.rotary_dim or x.shape[-1]
        angle = positions[:, None, None].float() * self.frequency(dim)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def frequency(self, dim: int) -> Tensor:
        return self.theta ** (-torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        q = q.unflatten(2, (self.groups, self.heads // self.groups))
        scores = torch.einsum("bqghd,bkgd->bghqk", q, k) / q.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return torch.einsum("bghqk,bkgd->bqghd", torch.softmax(scores, -1), v).flatten(2, 3)


EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def softmax_experts(count: int, chosen: int, normalised: bool):
    """Mixture of experts: the `chosen` most probable ones, weighted by their probabilities."""

    def ffn(model: PlainDecoder, layer: int, x: Tensor) -> Tensor:
        prefix = model.names["layer"].format(layer) + "mlp."
        p = torch.softmax(model.linear(x, prefix + "gate"), -1)
        best = p.sort(-1, descending=True).values[..., chosen - 1 : chosen]
        weight = torch.where(p >= best, p, 0.0)
        if normalised:
            weight = weight / weight.sum(-1, keepdim=True)
        outs = [model.swiglu(x, f"{prefix}experts.{e}.", EXPERT) for e in range(count)]
        return (torch.stack(outs, -1) * weight[..., None, :]).sum(-1)

    return ffn


def grouped_experts(count: int, groups: int, kept: int, chosen: int, scale: float, dense_layers: int):
    """LLaDA2: sigmoid scores; a bias takes part in the choice alone; the best groups by the sum of their two best."""

    def ffn(model: PlainDecoder, layer: int, x: Tensor) -> Tensor:
        prefix = model.names["layer"].format(layer) + "mlp."
        if layer < dense_layers:
            return model.swiglu(x, prefix, EXPERT)
        score = torch.sigmoid(model.linear(x, prefix + "gate"))
        biased = score + model.w[prefix + "gate.expert_bias"]
        by_group = biased.unflatten(-1, (groups, -1))
        value = by_group.sort(-1, descending=True).values[..., :2].sum(-1)
        in_best = value >= value.sort(-1, descending=True).values[..., kept - 1 : kept]
        biased = by_group.masked_fill(~in_best[..., None], -torch.inf).flatten(-2)
        weight = torch.where(biased >= biased.sort(-1, descending=True).values[..., chosen - 1 : chosen], score, 0.0)
        weight = scale * weight / weight.sum(-1, keepdim=True)
        outs = [model.swiglu(x, f"{prefix}experts.{e}.", EXPERT) for e in range(count)]
        routed = (torch.stack(outs, -1) * weight[..., None, :]).sum(-1)
        return routed + model.swiglu(x, prefix + "shared_experts.", EXPERT)

    return ffn


class PlainLLaDA2(PlainDecoder):
    """Queries, keys and values come from one matrix."""

    def qkv(self, layer: str, h: Tensor) -> list[Tensor]:
        heads = self.linear(h, layer + "attention.query_key_value").unflatten(-1, (self.heads + 2 * self.groups, -1))
        q, k, v = heads.split([self.heads, self.groups, self.groups], -2)
        return [self.norm(q, layer + self.names["q_norm"]), self.norm(k, layer + self.names["k_norm"]), v]


class PlainMinistral(PlainDecoder):
    """Rotary frequencies stretched as by YaRN (arXiv:2309.00071); queries grow with the logarithm of the position."""

    yarn: dict

    def frequency(self, dim: int) -> Tensor:
        base = self.theta ** (-torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
        low, high = (
            dim * torch.log(torch.tensor(self.yarn["original"] / (turns * 2 * torch.pi))).item()
            / (2 * torch.log(torch.tensor(self.theta)).item())
            for turns in (self.yarn["beta_fast"], self.yarn["beta_slow"])
        )  # fmt: skip
        low, high = max(int(low // 1), 0), min(int(-(-high // 1)), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return base / self.yarn["factor"] * ramp + base * (1 - ramp)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        far = torch.arange(q.shape[1]) // self.yarn["original"]
        scale = (1 + self.yarn["beta"] * torch.log(1 + far)).to(q)
        return super().attend(q * scale[:, None, None], k, v, visible)


def gpt2(w: dict[str, Tensor], layers: int, heads: int, prefix: str, embed: str, head: str):
    """GPT-2 that sees everything: LayerNorm, learnt positions, tanh GELU; its matrices stand transposed."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def conv(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def forward(tokens: Tensor) -> Tensor:
        x = w[embed + ".weight"][tokens] + w[prefix + "wpe.weight"][: tokens.shape[1]]
        for i in range(layers):
            layer = f"{prefix}h.{i}."
            q, k, v = (
                t.unflatten(-1, (heads, -1)).transpose(1, 2)
                for t in conv(norm(x, layer + "ln_1"), layer + "attn.c_attn").chunk(3, -1)
            )
            p = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
            x = x + conv((p @ v).transpose(1, 2).flatten(2), layer + "attn.c_proj")
            h = conv(norm(x, layer + "ln_2"), layer + "mlp.c_fc")
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
            x = x + conv(h, layer + "mlp.c_proj")
        return norm(x, prefix + "ln_f") @ w[head + ".weight"].T

    return forward
