# SPDX-License-Identifier: Apache-2.0
"""Caches of features restated in plain torch, one request at a time, in float64.

Each is a model that remembers: a callable `model(tokens[1, T])` that returns logits `[1, T, V]`, for the decoders of
`published.py`. It has the weights of a stock Llama or Qwen and nothing of its forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plain_models import PlainDecoder


def plain(model) -> PlainDecoder:
    """A stock Llama or Qwen in plain torch, in float64."""
    config = model.config
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    return PlainDecoder(
        weights, layers=config.num_hidden_layers, heads=config.num_attention_heads, groups=config.num_key_value_heads,
        eps=config.rms_norm_eps, theta=config.rope_parameters["rope_theta"],
    ).double()  # fmt: skip


class PlainDLLMCache:
    """dLLM-Cache (Liu et al., arXiv:2506.06295, algorithms 1 to 3, and its program for LLaDA).

    The first layer is computed anew for all positions. In the others the prompt has keys, values and the outputs of
    attention and of feed-forward from the last forward whose number is a multiple of `prompt_interval`; the response
    the same with `response_interval`. In between, of the response all values are computed, and the rest at the
    `floor(share * n)` of its n positions whose values have the smallest cosine with those of the forward before.

    `slack`: by how little, relative to how much it had changed, the last position was chosen before the next.
    """

    def __init__(self, model, start: int, prompt_interval: int, response_interval: int, share: float):
        self.model, self.start = plain(model), start
        self.prompt_interval, self.response_interval, self.share = prompt_interval, response_interval, share
        self.step, self.slack = 0, math.inf
        self.kept: dict[int, dict[str, Tensor]] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        m = self.model
        prompt = self.step % self.prompt_interval == 0
        response = self.step % self.response_interval == 0
        x = m.w[m.names["embed"] + ".weight"][tokens]
        for number in range(m.layers):
            x = self._layer(number, x, prompt or number == 0, response or number == 0)
        self.step += 1
        return m.linear(m.norm(x, m.names["norm"]), m.names["head"]).float()

    def _layer(self, number: int, x: Tensor, prompt: bool, response: bool) -> Tensor:
        m, start, length = self.model, self.start, x.shape[1]
        layer = m.names["layer"].format(number)
        h = m.norm(x, layer + m.names["first_norm"])
        q, k, v = m.qkv(layer, h)
        positions = torch.arange(length)
        q, k = m.rotate(q, positions), m.rotate(k, positions)
        kept = self.kept.setdefault(number, {"k": k.clone(), "v": v.clone()})
        rows = list(range(start)) if prompt else []
        if response:
            rows += range(start, length)
        elif self.share > 0:
            rows += self._changed(kept["v"][:, start:], v[:, start:])
            kept["v"][:, start:] = v[:, start:]
        kept["k"][:, rows], kept["v"][:, rows] = k[:, rows], v[:, rows]
        attended = m.attend(q[:, rows], kept["k"], kept["v"], None).flatten(2)
        self._keep(kept, "attention", rows, m.linear(attended, layer + m.names["o"]), x)
        x = x + kept["attention"]
        h = m.norm(x[:, rows], layer + m.names["second_norm"])
        self._keep(kept, "feed-forward", rows, m.swiglu(h, layer), x)
        return x + kept["feed-forward"]

    @staticmethod
    def _keep(kept: dict[str, Tensor], name: str, rows: list[int], values: Tensor, x: Tensor) -> None:
        kept.setdefault(name, torch.full_like(x, torch.nan))[:, rows] = values

    def _changed(self, old: Tensor, new: Tensor) -> list[int]:
        cosine = torch.nn.functional.cosine_similarity(old.flatten(2), new.flatten(2), dim=-1)[0]
        order = cosine.argsort(stable=True).tolist()
        count = int(len(order) * self.share)
        if 0 < count < len(order):
            last, following = (1 - float(cosine[order[i]]) for i in (count - 1, count))
            self.slack = min(self.slack, (last - following) / last)
        return [self.start + i for i in order[:count]]


class PlainSparseCache:
    """Sparse-dLLM's eviction (Song et al., arXiv:2508.02558, section 4, and its program for LLaDA).

    A block's first two forwards take the whole canvas. In the second each layer scores the positions outside of the
    block by their rotated key's product with the block's mean rotated query, averaged over the heads, takes the maximum
    over `pool` neighbours (those left and right of the block being neighbours), and keeps the `floor(keep * n)` best of
    n. Later forwards take the block alone, which sees itself and these.

    `shift`: logits speak of the next position, so that forwards of the block take the position before it, too. `slack`:
    by how little the last position was kept before the next, where they are not equal.
    """

    def __init__(
        self, model, start: int, block: int, mask: int, keep: float, pool: int, shift: bool = False
    ):  # fmt: skip
        self.model, self.start, self.block, self.mask = plain(model), start, block, mask
        self.keep, self.pool, self.lead = keep, pool, int(shift)
        self.now, self.index, self.slack = -1, 0, math.inf
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        m = self.model
        first_mask = tokens[0, self.start :].tolist().index(self.mask)
        begin = self.start + first_mask // self.block * self.block
        self.now, self.index = begin, self.index + 1 if begin == self.now else 0
        end, first = min(begin + self.block, tokens.shape[1]), max(begin - self.lead, 0)
        rows = list(range(tokens.shape[1])) if self.index < 2 else list(range(first, end))
        x = m.w[m.names["embed"] + ".weight"][tokens[:, rows]]
        for number in range(m.layers):
            layer = m.names["layer"].format(number)
            q, k, v = m.qkv(layer, m.norm(x, layer + m.names["first_norm"]))
            q, k = m.rotate(q, torch.tensor(rows)), m.rotate(k, torch.tensor(rows))
            if self.index == 1:
                self._evict(number, q[:, begin:end], k, v, first, end)
            elif self.index > 1:
                k, v = (torch.cat(pair, 1) for pair in zip(self.kept[number], (k, v)))
            x = x + m.linear(m.attend(q, k, v, None).flatten(2), layer + m.names["o"])
            x = x + m.swiglu(m.norm(x, layer + m.names["second_norm"]), layer)
        logits = m.linear(m.norm(x, m.names["norm"]), m.names["head"]).float()
        out = torch.full((1, tokens.shape[1], logits.shape[2]), torch.nan)
        out[:, rows] = logits
        return out

    def _evict(self, number: int, q: Tensor, k: Tensor, v: Tensor, first: int, end: int) -> None:
        k, v = (torch.cat((x[:, :first], x[:, end:]), 1) for x in (k, v))
        heads = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        score = torch.einsum("hd,nhd->n", q[0].mean(0), heads[0]) / q.shape[2]
        half = self.pool // 2
        pooled = [float(score[max(i - half, 0) : i + half + 1].max()) for i in range(len(score))]
        order = sorted(range(len(pooled)), key=lambda i: (-pooled[i], i))
        count = int(len(pooled) * self.keep)
        if 0 < count < len(order) and (gap := pooled[order[count - 1]] - pooled[order[count]]) > 0:
            self.slack = min(self.slack, gap)
        self.kept[number] = k[:, order[:count]], v[:, order[:count]]
