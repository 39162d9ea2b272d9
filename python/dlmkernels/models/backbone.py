# SPDX-License-Identifier: Apache-2.0
"""Any torch module as a model that can be decoded: what it is called with, and what is made of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..window import AttentionWindow
from .adapt import LogitsModel, _valid
from .moment import Moment as Moment


@dataclass(frozen=True)
class BackboneInput:
    """What `Backbone` hands to its `call`. B is twice the batch under guidance.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`: the whole canvas.
    attention_mask : Tensor, optional
        int64 `[B, T]`, 0 for padding; None where there is none.
    positions : Tensor
        int64 `[B, T]`, counted from each request's first token.
    moment : Moment
        Where the decoding stands.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    moment: Moment

    @property
    def timesteps(self) -> Tensor:
        """Diffusion time t, float32 `[B]`, from 1 towards 0.

        It is that of the rule's own grid where the rule walks one (`Ancestral`, `UniformState`, …); else 1 - progress
        with rules that go block after block, and the share of masks with the others.
        """
        if self.moment.time is not None:
            return self.moment.time
        return self.moment.masked if self.moment.progress is None else 1 - self.moment.progress

    def sigma(self, eps: float = 1e-3) -> Tensor:
        """Total noise of the log-linear schedule at time t, ``-ln(1 - (1 - eps) t)``, float32 `[B]`.

        The time that MDLM (arXiv:2406.07524) and SEDD (arXiv:2310.16834) condition on.
        """
        return -torch.log1p(-(1 - eps) * self.timesteps)


class Backbone(LogitsModel):
    """A module of any kind, wrapped so that `generate` and `infill` can decode with it.

    The whole canvas is forwarded each time and the module attends by itself, so there is no KV reuse. It must see the
    whole canvas: nothing checks that here.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    call : callable, optional
        `call(module, inputs)` with a `BackboneInput` returns logits `[B, T, V]`: a tensor, a tuple or list whose first
        element they are, a mapping with the key "logits", or an object with `.logits`. None: `module(tokens)`, and
        `module(tokens, attention_mask=…)` where prompts are padded.
    vocab_size : int, optional
        V. None: what `module.config` says, or the first forward.
    max_length : int, optional
        Longest canvas that the module can encode.
    device : torch.device, optional
        None: that of the module's first parameter.

    Examples
    --------
    A model that is conditioned on the noise level, as MDLM and SEDD are:

    >>> model = dlmkernels.Backbone(net, lambda net, x: net(x.tokens, x.sigma()), vocab_size=50258)
    >>> out = dlmkernels.generate(model, ids, mask_token_id=50257, config="mdlm", steps=128)
    """

    embeds_by_token = False
    takes_time = True

    def __init__(
        self, module: nn.Module, call: Callable[[Any, BackboneInput], Any] | None = None, *,
        vocab_size: int | None = None, max_length: int | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
        if call is not None and not callable(call):
            raise TypeError(f"call must be a callable that takes the module and a BackboneInput; got {call!r}")
        for name, value in (("vocab_size", vocab_size), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
        super().__init__(module)
        self._call, self._vocab_size, self._longest = call or _plain_call, vocab_size, max_length
        self._device = None if device is None else torch.device(device)

    @property
    def config(self):
        return getattr(self.model, "config", None) or SimpleNamespace(vocab_size=self._vocab_size)

    @property
    def device(self):
        if self._device is not None:
            return self._device
        first = next(self.model.parameters(), None)
        if first is None:
            raise ValueError("device is needed: the module has no parameters that would show where it is")
        return first.device

    @property
    def vocab_size(self) -> int | None:
        return self._vocab_size or getattr(self.config, "vocab_size", None)

    @property
    def max_length(self) -> int | None:
        return self._longest or getattr(self.config, "max_position_embeddings", None)

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None, moment: Moment | None = None,
    ) -> Tensor:  # fmt: skip
        if embeds is not None:
            raise ValueError("embeddings cannot be passed to a Backbone: its call takes token ids")
        mask = None if window.kv_range is None else _valid(tokens, window.kv_range)
        if moment is None:
            moment = Moment(torch.ones(len(tokens), device=tokens.device))
        logits = _logits_of(self._call(self.model, BackboneInput(tokens, mask, positions, moment)))
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"call must return logits of shape [{tokens.shape[0]}, {tokens.shape[1]}, V]; got {list(logits.shape)}"
            )
        if self.vocab_size is not None and logits.shape[2] < self.vocab_size:
            raise ValueError(f"call must return {self.vocab_size} logits a position; got {logits.shape[2]}")
        return logits


def _plain_call(module, inputs: BackboneInput):
    if inputs.attention_mask is None:
        return module(inputs.tokens)
    return module(inputs.tokens, attention_mask=inputs.attention_mask)


def _logits_of(output) -> Tensor:
    """The logits in what a module returned."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "call must return logits: a tensor, a tuple with them first, a dict with 'logits', or an object with "
            f".logits; got {type(output).__name__}"
        )
    return found
