# SPDX-License-Identifier: Apache-2.0
"""A LLaMA-shaped model in plain torch, bidirectional, with the key/value reuse of Fast-dLLM.

Nothing of transformers' or our forward is used: RMSNorm, rotary embedding, grouped queries and SwiGLU are written from
their formulas, and keys and values are ordinary tensors that are cut and joined. It is what the decoders of
`published.py` run on, so an error in our attention, in our cache or in the adaptation of a model cannot hide in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

KeyValues = list[tuple[Tensor, Tensor]]


class PlainLlama:
    """Forward passes with the weights of a `LlamaForCausalLM`, in the dtype of those weights.

    Three kinds of forward differ in what they find in `cached`, the keys and values `[B, n, G, D]` of every layer:

    - `model(tokens)`: all positions; returns their keys and values beside the logits;
    - `model(tokens[:, s:], cached, start=s)`: positions from s on; of `cached` what stands left of s is seen (prefix
      cache);
    - `model(tokens[:, s:e], cached, start=s, keep_right=True)`: positions s to e; what `cached` holds on both sides of
      them is seen (dual cache).
    """

    def __init__(self, model):
        config = model.config
        self.weights = {name: p.detach() for name, p in model.state_dict().items()}
        self.num_layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.theta = config.head_dim, config.rope_parameters["rope_theta"]

    def __call__(
        self, tokens: Tensor, cached: KeyValues | None = None, start: int = 0, keep_right: bool = False,
        positions: Tensor | None = None, valid: Tensor | None = None, embeds: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:  # fmt: skip
        """Logits `[B, Q, V]` of `tokens` `[B, Q]`, which stand at columns start .. start + Q, and all keys and values.

        `positions` `[B, Q]` count from each request's first token (default: the columns); `valid` bool `[B, T]` says
        which columns may be attended to, T being all of them (default: every one); `embeds` `[B, Q, hidden]` stand in
        for the tokens' embeddings; `columns` `[Q]`, where given, are where the tokens stand, and of `cached` all others
        are seen.
        """
        end = start + tokens.shape[1]
        if columns is not None:
            positions = columns.expand(tokens.shape)
        if positions is None:
            positions = torch.arange(start, end).expand(tokens.shape)
        x = self.weights["model.embed_tokens.weight"][tokens] if embeds is None else embeds
        kept = []
        for i in range(self.num_layers):
            layer = f"model.layers.{i}."
            h = self._norm(x, layer + "input_layernorm")
            q, k, v = (
                self._linear(h, f"{layer}self_attn.{name}_proj").unflatten(-1, (-1, self.head_dim)) for name in "qkv"
            )
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            if cached is not None:
                old_k, old_v = cached[i]
            if columns is not None and cached is not None:
                k, v = (old.index_copy(1, columns, new) for old, new in ((old_k, k), (old_v, v)))
            elif cached is not None:
                right = end if keep_right else old_k.shape[1]
                k = torch.cat((old_k[:, :start], k, old_k[:, right:]), 1)
                v = torch.cat((old_v[:, :start], v, old_v[:, right:]), 1)
            kept.append((k, v))
            x = x + self._linear(self._attend(q, k, v, valid).flatten(2), layer + "self_attn.o_proj")
            h = self._norm(x, layer + "post_attention_layernorm")
            gate = torch.nn.functional.silu(self._linear(h, layer + "mlp.gate_proj"))
            x = x + self._linear(gate * self._linear(h, layer + "mlp.up_proj"), layer + "mlp.down_proj")
        return self._linear(self._norm(x, "model.norm"), "lm_head"), kept

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weights[name + ".weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding: element d of the first half and element d of the second are one complex number."""
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = positions[..., None, None].float() * frequency
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """`[B, Q, H, D]`: every query sees every valid key; query head h reads key head h // (H / G)."""
        q = q.unflatten(2, (self.groups, self.heads // self.groups))
        scores = torch.einsum("bqghd,bkgd->bghqk", q, k) / self.head_dim**0.5
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, None, :], -torch.inf)
        return torch.einsum("bghqk,bkgd->bqghd", torch.softmax(scores, -1), v).flatten(2, 3)
