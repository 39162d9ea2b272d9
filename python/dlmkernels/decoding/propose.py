# SPDX-License-Identifier: Apache-2.0
"""Turn logits into what a rule sees: a proposed token and its statistics at each position, packed into a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.adapt import DiffusionModel
from ..window import TokenWindow
from .calls import token_confidence
from .checks import id_range
from .config import DecodingConfig, SpecialTokens
from .ends import ENDS, is_end
from .head import Head
from .hidden_rows import HiddenRows, Logits
from .scores import score_named
from .standing import Standing
from .state import State
from .step import Step, constant


class Proposer:
    """Computes proposals and their statistics for the slots of a window, and builds the steps that rules see."""

    def __init__(self, model: DiffusionModel, state: State, config: DecodingConfig, special: SpecialTokens):
        self.model, self.state, self.config, self.special = model, state, config, special
        self.rule = config.rule
        device = state.tokens.device

        def number(value, dtype, is_wanted):
            if isinstance(value, Tensor):  # one value for each request
                return value
            return torch.full((1,), value, dtype=dtype, device=device) if is_wanted(value) else None

        needs = config.rule.needs | score_named(config.score).needs
        self.never = torch.tensor(special.banned, dtype=torch.int64, device=device)
        self._ends = torch.tensor(special.eos, dtype=torch.int64, device=device)
        self._own_ends = state.parameters.get(ENDS)
        #: whether the rule determines the sampling temperature of each step
        self.has_temperature = config.rule.temperature(0, 1) is not None
        temperature = number(config.temperature, torch.float32, lambda t: t > 0 or self.has_temperature)
        #: sampling temperature if the rule does not determine it: one number, or float32 [S]
        self.temperature: Any = config.temperature
        #: whether tokens are sampled in at least some requests
        self.samples = temperature is not None
        self.options: dict[str, Any] = {
            "cfg_scale": number(config.cfg_scale, torch.float32, lambda s: s > 0),
            "banned": self.never if special.banned else None,
            "temperature": temperature,
            "top_k": number(config.top_k, torch.int32, lambda k: k > 0),
            "top_p": number(config.top_p, torch.float32, lambda p: p < 1),
            "top_p_first": config.top_p_first,
            "keep_crossing": config.keep_crossing,
            "distribution": config.distribution,
            "with_margin": "margin" in needs,
            "with_entropy": "entropy" in needs,
        }
        #: turns hidden states into logits, or into `HiddenRows` that stand in for them
        self.head = Head(model, config, self.options["top_k"] is not None or self.options["top_p"] is not None)
        if self.samples:
            self.options |= {"seed": state.seed, "step": state.step}
        self.reads_current = "p_current" in needs
        self._numbers: dict[int, Tensor] = {}
        self._nothing = torch.full((), -1, dtype=torch.int32, device=device)
        deferred = list(config.defer_token_ids)
        #: arguments that are the same for all steps
        self._common: dict[str, Any] = {
            "canvas": state, "proposer": self, "score_of": score_named(config.score),
            "order_temperature": config.order_temperature,
            "deferred": torch.tensor(deferred, device=device) if deferred else None,
        }  # fmt: skip
        #: float32 [V]: added to all logits; set at the first logits if the model does not report its vocabulary size
        self.bias: Tensor | None = None
        if model.vocab_size is not None:
            self._set_bias(model.vocab_size)

    def _set_bias(self, vocab: int) -> None:
        if self.config.logit_bias is not None and self.bias is None:
            self.bias = bias_tensor(self.config.logit_bias, vocab, self.state.tokens.device)
            self.options["bias"] = self.bias

    def __call__(
        self, logits: Logits, window: TokenWindow, row_map: Tensor | None = None, bias: Tensor | None = None,
        temperature: float | Tensor | None = None, allowed: Tensor | None = None, redraw: Tensor | None = None,
    ) -> ops.TokenConfidence:  # fmt: skip
        """Compute the statistics of the window's N = B * W slots from logits `[R, V]`, or `[2 R, V]` with guidance.

        Parameters
        ----------
        row_map : Tensor, optional
            int32 `[N]`: row of the logits for each slot, -1 for an unused slot. If None, each slot has its own row, in
            order.
        bias : Tensor, optional
            float32 `[V]` or `[P, V]`: added to the logits besides the configured bias.
        temperature : float or Tensor, optional
            One number, or float32 `[B]`. If None, the configured temperature.
        allowed : Tensor, optional
            int32 bitmasks of the tokens that may be proposed, as in `Step.allowed`.
        redraw : Tensor, optional
            int32 `[B, W]`: how many of each slot's proposals have been refused in this step.
        """
        self._set_bias(logits.shape[1])
        if row_map is None or redraw is not None:
            used = window.used.flatten()
            row_map = torch.where(used, self._rows(used.numel()) if row_map is None else row_map, self._nothing)
        options = dict(self.options)
        if bias is not None:
            options["bias"] = bias if self.bias is None else bias + self.bias
        if allowed is not None:
            options["bitmask"] = allowed if allowed.dim() == 1 else allowed.flatten(0, 1)
        if temperature is not None:
            options["temperature"] = (
                temperature if isinstance(temperature, Tensor) else constant(temperature, torch.float32, logits.device)
            )
        if "seed" in options:
            options["position"] = window.request_positions.flatten()
            options["redraw"] = None if redraw is None else redraw.flatten()
        if self.reads_current:
            current = self.state.tokens.gather(1, window.positions.clamp(min=0).long()).flatten()
            options["given"] = torch.where(window.used.flatten(), current, -1)
        if isinstance(logits, HiddenRows):
            return logits.confidence(row_map, options)
        uncond = None
        if self.config.cfg_scale > 0:
            logits, uncond = logits.chunk(2)
        return token_confidence(logits, row_map=row_map, uncond_logits=uncond, **options)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Return which of the tokens int64 `[B, W]` are end tokens, each row's own if they differ by row."""
        return torch.isin(tokens, self._ends) if self._own_ends is None else is_end(tokens, self._own_ends)

    def _rows(self, count: int) -> Tensor:
        """Return the numbers from 0 to `count` - 1, int32."""
        if count not in self._numbers:
            self._numbers[count] = torch.arange(count, dtype=torch.int32, device=self.state.tokens.device)
        return self._numbers[count]

    def step(
        self, logits: Logits, window: TokenWindow, standing: Standing, row_map: Tensor | None = None,
        memory: dict[str, Tensor] | None = None, allowed: Tensor | None = None, room: Tensor | None = None,
    ) -> Step:  # fmt: skip
        """Build a step from logits `[R, V]`, or `[2 R, V]` with guidance. Other arguments are as in `Step`."""
        eligible = window.used
        if self.rule.slots != "open":
            index = window.positions - standing.block_start[:, None]
            is_open = self.state.is_open.gather(1, window.positions.clamp(min=0).long())
            eligible = eligible & is_open & (index >= 0) & (index < standing.block_length[:, None])
        temperature: float | Tensor | None = None
        if self.has_temperature:
            temperature = standing.tables.look_up("temperature", self._temperature, standing.step, torch.float32)
        stats = self(logits, window, row_map, temperature=temperature, allowed=allowed)
        return Step(
            stats=stats, window=window, eligible=eligible, standing=standing, raw_logits=logits, row_map=row_map,
            sampling_temperature=self.temperature if temperature is None else temperature, allowed=allowed,
            memory={} if memory is None else memory, room=room, **self._common,
        )  # fmt: skip

    def _temperature(self, index: int, num_steps: int) -> float:
        value = self.rule.temperature(index, num_steps)
        assert value is not None
        return value

    def clean(self, logits: Logits, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the logits of some rows as `token_confidence` sees them before temperature: with guidance and bias.

        The result is float32 `[n, V]`. With `ids` int64 `[n]`, it is float32 `[n]`: the logit of one token in each row,
        none of which may be a banned token.
        """

        def pick(rows: Tensor) -> Tensor:
            if isinstance(logits, HiddenRows):
                return logits.rows(rows) if ids is None else logits.of_tokens(rows, ids)
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
    """Return `DecodingConfig.logit_bias` as a float32 tensor `[vocab]`."""
    if isinstance(bias, Tensor):
        if len(bias) != vocab:
            raise ValueError(f"logit_bias must have shape [{vocab}], one number for each logit; got {list(bias.shape)}")
        return bias.to(device, torch.float32)
    if bias and max(bias) >= vocab:
        raise ValueError(f"logit_bias must have token ids {id_range(vocab)} as keys; got {max(bias)}")
    full = torch.zeros(vocab, dtype=torch.float32, device="cpu")
    for i, value in bias.items():
        full[i] = value
    return full.to(device)
