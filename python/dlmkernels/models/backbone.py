# SPDX-License-Identifier: Apache-2.0
"""Decode with any torch module, by wrapping it in a `Backbone` that maps its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..window import AttentionWindow
from .adapt import LogitsModel, _valid, without_padding
from .moment import Moment as Moment


@dataclass(frozen=True)
class BackboneInput:
    """Inputs that `Backbone` passes to its `call`. Under classifier-free guidance, B is twice the batch size.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`: the whole canvas, that is, the prompt and answer positions.
    attention_mask : Tensor, optional
        int64 `[B, T]`: 1 for tokens and 0 for padding. None if there is no padding.
    positions : Tensor
        int64 `[B, T]`: positions, counted from each request's first token.
    moment : Moment
        Progress of the decoding.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    moment: Moment

    @property
    def timesteps(self) -> Tensor:
        """Diffusion time t, float32 `[B]`, decreasing from 1 towards 0.

        Taken from the rule's own time grid if it has one (`Ancestral`, `UniformState`, …). For other rules it is 1 -
        progress if decoding goes block by block, else the fraction of positions not yet committed.
        """
        if self.moment.time is not None:
            return self.moment.time
        return self.moment.masked if self.moment.progress is None else 1 - self.moment.progress

    def sigma(self, eps: float = 1e-3) -> Tensor:
        """Return the total noise of the log-linear schedule at time t, ``-ln(1 - (1 - eps) t)``, float32 `[B]`.

        MDLM (arXiv:2406.07524) and SEDD (arXiv:2310.16834) are conditioned on this value.
        """
        return -torch.log1p(-(1 - eps) * self.timesteps)


class Backbone(LogitsModel):
    """Wrapper that lets `generate` and `infill` decode with any module.

    Each forward pass processes the whole canvas (prompt and answer positions) with the module's own attention, so there
    is no KV-cache reuse. The module must attend to the whole canvas; this is not checked.

    Parameters
    ----------
    module : torch.nn.Module
        The module, in evaluation mode.
    call : callable, optional
        `call(module, inputs)`, with a `BackboneInput`, returns logits `[B, T, V]`: a tensor, a tuple or list whose
        first element is that tensor, a mapping with the key "logits", or an object with the attribute `logits`. If
        None, the call is `module(tokens)`, or `module(tokens, attention_mask=…)` if there is padding.
    vocab_size : int, optional
        Vocabulary size V. If None, it is taken from `module.config`, or from the logits. If the module returns more
        than V logits per position (for a vocabulary padded to a round number, say), those from V on are dropped.
    max_length : int, optional
        Maximum length of the canvas, in tokens. If None, `module.config.max_position_embeddings`, if it exists.
    device : torch.device, optional
        Device of the module's inputs. If None, that of its first parameter.

    Raises
    ------
    TypeError
        If `module` is not a torch module, `call` is not callable, or `device` is not a device.
    ValueError
        If `vocab_size` or `max_length` is not a positive integer, or torch does not know `device`.

    Examples
    --------
    Decode with a model that is conditioned on the noise level, such as MDLM or SEDD:

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
        self._device = None if device is None else _device(device)

    @property
    def config(self):
        return getattr(self.model, "config", None) or SimpleNamespace(vocab_size=self._vocab_size)

    @property
    def device(self):
        if self._device is not None:
            return self._device
        first = next(self.model.parameters(), None)
        if first is None:
            raise ValueError("device must be given, because the module has no parameters to infer it from")
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
            raise ValueError("a Backbone does not accept input embeddings: its call takes token ids")
        mask = None if window.kv_range is None else _valid(tokens, window.kv_range)
        if moment is None:
            moment = Moment(torch.ones(len(tokens), device=tokens.device))
        logits = _logits_of(self._call(self.model, BackboneInput(tokens, mask, positions, moment)))
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"call must return logits of shape [{tokens.shape[0]}, {tokens.shape[1]}, V]; got {list(logits.shape)}"
            )
        if self.vocab_size is not None and logits.shape[2] < self.vocab_size:
            raise ValueError(f"call must return at least {self.vocab_size} logits per position; got {logits.shape[2]}")
        return without_padding(logits, self.vocab_size)


def _device(device: Any) -> torch.device:
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name, such as 'cuda:0'; got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a torch.device or its name, such as 'cuda:0'; got {device!r}") from None


def _plain_call(module, inputs: BackboneInput):
    if inputs.attention_mask is None:
        return module(inputs.tokens)
    return module(inputs.tokens, attention_mask=inputs.attention_mask)


def _logits_of(output) -> Tensor:
    """Extract the logits from a module's output."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "call must return logits: a tensor, a tuple or list that starts with one, a dict with 'logits', or an "
            f"object with .logits; got {type(output).__name__}"
        )
    return found
