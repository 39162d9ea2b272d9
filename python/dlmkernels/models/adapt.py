# SPDX-License-Identifier: Apache-2.0
"""Make a loaded model decodable: one object with `hidden` and `logits`, whatever the model is."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..window import AttentionWindow
from .attention import use_block_attention
from .families import FAMILIES, UNKNOWN, Family


class DiffusionModel:
    """A model prepared for decoding. Parameters are shared with the model it was made from, and it is not changed.

    Attributes
    ----------
    model : PreTrainedModel
        The adapted model.
    family : Family
        What is known of its kind.
    reuses_kv : bool
        Whether a forward may take part of the canvas and find the rest in a cache.
    """

    reuses_kv = True

    def __init__(self, model: PreTrainedModel, family: Family):
        self.model, self.family = model, family
        self._head = family.head(model)
        self._offset = family.position_offset(model.config)

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device

    @property
    def vocab_size(self) -> int | None:
        """Number of logits, or None when the model does not say."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Longest canvas the model's position encoding was made for, or None when it does not say."""
        length = getattr(self.config, "max_position_embeddings", None)
        return None if length is None else length - self._offset

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model's layers attend through our kernels."""
        return use_block_attention(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings `[B, Q, hidden]` of tokens `[B, Q]`."""
        return self.model.get_input_embeddings()(tokens)

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None
    ) -> Tensor:
        """Last hidden states `[B, Q, hidden]` of the rows `tokens` int64 `[B, Q]` standing at `positions` `[B, Q]`.

        `embeds` `[B, Q, hidden]`, where given, stands in for the tokens' own input embeddings.
        """
        inputs = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
        return self.model.base_model(
            **inputs, position_ids=positions + self._offset, dlm_window=window, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., hidden]`."""
        return self._head(hidden)


class LogitsModel(DiffusionModel):
    """Any model that returns `.logits`: the whole canvas is forwarded each time and its own attention is used."""

    reuses_kv = False

    def __init__(self, model):
        self.model, self.family, self._offset = model, UNKNOWN, 0

    @property
    def config(self):
        return getattr(self.model, "config", None)

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.config, "vocab_size", None)

    def attached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None
    ) -> Tensor:
        """Logits stand in for hidden states: their rows are picked the same way."""
        inputs = (tokens,) if embeds is None else ()
        named = {} if embeds is None else {"inputs_embeds": embeds}
        if window.kv_range is not None:
            slots = torch.arange(tokens.shape[1], device=tokens.device)
            first, last = window.kv_range[:, :1], window.kv_range[:, 1:]
            named["attention_mask"] = ((slots >= first) & (slots < last)).long()
        return self.model(*inputs, **named).logits

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def adapt(model) -> DiffusionModel:
    """Prepare a loaded model for decoding with our kernels.

    Parameters
    ----------
    model : PreTrainedModel
        A stock transformers model with a language-model head: its type is one of `FAMILIES`, and it decodes with
        KV reuse. Any other module whose call returns `.logits` `[B, T, V]` decodes without KV reuse, through its own
        attention, which must be bidirectional; a warning says so once.

    Returns
    -------
    DiffusionModel
        Shares the model's parameters; the model itself is left as it is.

    Raises
    ------
    TypeError
        When `model` is not a torch module.
    """
    if isinstance(model, DiffusionModel):
        return model
    if not callable(getattr(model, "forward", None)):
        raise TypeError(f"model must be a torch module that returns logits; got {type(model).__name__}")
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type or "")
    if family is None or not isinstance(model, PreTrainedModel):
        warnings.warn(
            f"dlmkernels does not know model type '{model_type or type(model).__name__}': decoding forwards the "
            "whole canvas each step through the model's own attention (no KV reuse). Known types: "
            + ", ".join(FAMILIES),
            stacklevel=3,
        )
        return LogitsModel(model)
    if model.get_output_embeddings() is None:
        raise TypeError(
            f"model must have a language-model head: load it with {family.auto_class}; got {type(model).__name__}"
        )
    return DiffusionModel(model, family)
