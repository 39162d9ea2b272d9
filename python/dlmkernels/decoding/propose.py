# SPDX-License-Identifier: Apache-2.0
"""From logits to what a rule sees: proposals and their statistics, and the step that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel
from ..window import TokenWindow
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .constraint import Constrained
from .scores import score_named
from .step import RandomState, Step


class Proposer:
    """Language-model head and `token_confidence` on the slots of a window."""

    def __init__(self, model: DiffusionModel, canvas: Canvas, config: DecodingConfig, special: SpecialTokens):
        self.model, self.canvas, self.config, self.special = model, canvas, config, special
        device, batch = canvas.tokens.device, canvas.tokens.shape[0]

        def scalar(value, dtype, wanted):
            return torch.full((1,), value, dtype=dtype, device=device) if wanted else None

        self.seed = seeds_of(config.seed, batch, device)
        needs = config.rule.needs | score_named(config.score).needs
        self.never = torch.tensor(special.banned, dtype=torch.int64, device=device)
        self.ends = torch.tensor(special.eos, dtype=torch.int64, device=device)
        sampled = config.temperature > 0 or config.rule.temperature(0, 1) is not None
        self.options: dict[str, Any] = {
            "cfg_scale": scalar(config.cfg_scale, torch.float32, config.cfg_scale > 0),
            "banned": self.never if special.banned else None,
            "temperature": scalar(config.temperature, torch.float32, sampled),
            "top_k": scalar(config.top_k, torch.int32, config.top_k > 0),
            "top_p": scalar(config.top_p, torch.float32, config.top_p < 1),
            "top_p_first": config.top_p_first,
            "keep_crossing": config.keep_crossing,
            "distribution": config.distribution,
            "with_margin": "margin" in needs,
            "with_entropy": "entropy" in needs,
        }
        if sampled:
            self.options |= {"seed": self.seed, "step": canvas.step}
        self.reads_current = "p_current" in needs
        #: float32 [V]: what is added to all logits; where the model does not say how many there are, the first show it
        self.bias: Tensor | None = None
        if model.vocab_size is not None:
            self._set_bias(model.vocab_size)

    def _set_bias(self, vocab: int) -> None:
        if self.config.logit_bias is not None and self.bias is None:
            self.bias = bias_tensor(self.config.logit_bias, vocab, self.canvas.tokens.device)
            self.options["bias"] = self.bias

    def __call__(
        self, logits: Tensor, window: TokenWindow, bias: Tensor | None = None, temperature: float | None = None,
        allowed: Tensor | None = None, redraw: Tensor | None = None,
    ) -> ops.TokenConfidence:  # fmt: skip
        """Statistics of the N = B * W slots, in the window's order, from logits `[N or 2N, V]`.

        `bias` float32 `[V]` or `[P, V]` comes on top of the configured one; `redraw` int32 `[B, W]` counts what was
        refused in this step.
        """
        self._set_bias(logits.shape[1])
        rows = window.positions.numel()
        uncond = logits[rows:] if self.config.cfg_scale > 0 else None
        numbers = torch.arange(rows, dtype=torch.int32, device=logits.device)
        is_used = window.used.flatten()
        options = dict(self.options)
        if bias is not None:
            options["bias"] = bias if self.bias is None else bias + self.bias
        if allowed is not None:
            options["bitmask"] = allowed if allowed.dim() == 1 else allowed.flatten(0, 1)
        if temperature is not None:
            options["temperature"] = torch.full((1,), temperature, device=logits.device)
        if "seed" in options:
            options["position"] = window.request_positions.flatten()
            options["redraw"] = None if redraw is None else redraw.flatten()
        if self.reads_current:
            current = self.canvas.tokens.gather(1, window.positions.clamp(min=0).long()).flatten()
            options["given"] = torch.where(is_used, current, -1)
        row_map = torch.where(is_used, numbers, -1)
        return ops.token_confidence(logits[:rows], row_map=row_map, uncond_logits=uncond, **options)

    def clean(self, logits: Tensor, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of some rows as `token_confidence` sees them before temperature: guided, with the configured bias.

        Float32 `[n, V]`, or `[n]` those of one token each, which is not a banned one.
        """

        def pick(rows: Tensor) -> Tensor:
            return (logits[rows] if ids is None else logits[rows, ids]).float()

        z = pick(rows)
        if self.config.cfg_scale > 0:
            blind = pick(rows + len(logits) // 2)
            z = blind + (self.config.cfg_scale + 1) * (z - blind)
        if self.bias is not None:
            z = z + (self.bias if ids is None else self.bias[ids])
        z = z.nan_to_num(-torch.inf, torch.finfo(torch.float32).max, -torch.inf)
        return z.index_fill(1, self.never, -torch.inf) if ids is None else z


def bias_tensor(bias: Mapping[int, float] | Tensor, vocab: int, device: torch.device) -> Tensor:
    """`DecodingConfig.logit_bias` as a float32 tensor `[vocab]`."""
    if isinstance(bias, Tensor):
        if len(bias) != vocab:
            raise ValueError(f"logit_bias must have one number for each of the {vocab} logits; got {list(bias.shape)}")
        return bias.to(device, torch.float32)
    if bias and max(bias) >= vocab:
        raise ValueError(f"logit_bias must name ids from 0 to {vocab} - 1; got {max(bias)}")
    full = torch.zeros(vocab, dtype=torch.float32, device="cpu")
    for i, value in bias.items():
        full[i] = value
    return full.to(device)


class StepOptions:
    """What all steps of a decoding have in common."""

    def __init__(
        self, propose: Proposer, canvas: Canvas, config: DecodingConfig, constrained: Constrained | None = None
    ):
        self.propose, self.canvas, self.rule, self.constrained = propose, canvas, config.rule, constrained
        deferred = list(config.defer_token_ids)
        self.common: dict[str, Any] = {
            "random": RandomState(propose.seed, canvas.step),
            "score_of": score_named(config.score),
            "order_temperature": config.order_temperature,
            "deferred": torch.tensor(deferred, device=canvas.tokens.device) if deferred else None,
            "canvas": canvas,
            "proposer": propose,
        }

    def step(
        self, logits: Tensor, window: TokenWindow, start: Tensor, length: int, index: int, num_steps: int,
        open_at_start: Tensor, open_now: Tensor, progress: float, memory: dict[str, Tensor],
        room: Tensor | None = None,
    ) -> Step:  # fmt: skip
        """The step that these logits `[N or 2N, V]` make in the block of `length` columns from `start` `[B]` on."""
        eligible = window.used
        if self.rule.slots != "open":
            index_in_block = window.positions - start[:, None]
            is_open = self.canvas.is_open.gather(1, window.positions.clamp(min=0).long())
            eligible = eligible & is_open & (index_in_block >= 0) & (index_in_block < length)
        temperature = self.rule.temperature(index, num_steps)
        allowed = None if self.constrained is None else self.constrained.allowed(window, logits.shape[1])
        stats = self.propose(logits, window, temperature=temperature, allowed=allowed)
        return Step(
            stats=stats, window=window, eligible=eligible, index=index, num_steps=num_steps,
            open_at_start=open_at_start, open_now=open_now, block_start=start, block_length=length, progress=progress,
            memory=memory, room=room, raw_logits=logits, allowed=allowed,
            sampling_temperature=self.propose.config.temperature if temperature is None else temperature,
            **self.common,
        )  # fmt: skip


def seeds_of(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (batch,), device="cpu").to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(f"seed must be int64 of shape [{batch}]; got {seed.dtype} of shape {list(seed.shape)}")
        return seed.to(device)
    return torch.full((batch,), seed, dtype=torch.int64, device=device)
