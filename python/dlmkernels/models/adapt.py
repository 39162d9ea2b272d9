# SPDX-License-Identifier: Apache-2.0
"""Make a loaded model decodable: one object with `hidden` and `logits`, whatever the model is."""

from __future__ import annotations

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..window import AttentionWindow
from .attention import use_block_attention
from .families import ARCHITECTURES, FAMILIES, Architecture, Family
from .fields import longest_canvas
from .load import from_pretrained
from .published import Question, form_of, known_types, plan


class DiffusionModel:
    """A model prepared for decoding. Parameters are shared with the model it was made from, and it is not changed.

    Attributes
    ----------
    model : PreTrainedModel
        The adapted model.
    family : Family
        How models of its kind are decoded.
    reuses_kv : bool
        Whether a forward may take part of the canvas and find the rest in a cache.
    embeds_by_token : bool
        Whether a token's input embedding depends on nothing but the token.
    self_conditions : bool
        Whether a forward takes in what the one before it said of the same positions (`opinion` of `hidden`).
    """

    reuses_kv = True
    embeds_by_token = True
    self_conditions = False

    def __init__(self, model: PreTrainedModel, architecture: Architecture, family: Family):
        self.model, self.family = model, family
        self._head = architecture.head(model)
        self._offset = architecture.position_offset(model.config)
        self.reuses_kv = self.embeds_by_token = not architecture.whole_canvas(model.config)

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
        length = longest_canvas(self.config)
        return None if length is None else length - self._offset

    @property
    def block_length(self) -> int | None:
        """Length of the blocks the model was trained with, None where it has none or does not say."""
        return getattr(self.config, "block_size", None) or self.family.block_length

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the model's layers attend through our kernels."""
        return use_block_attention(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings `[B, Q, hidden]` of tokens `[B, Q]`."""
        return self.model.get_input_embeddings()(tokens)

    @property
    def rule_options(self) -> dict[str, Any]:
        """Fields of the family's rule that come with the checkpoint."""
        return {}

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states `[B, Q, hidden]` of the rows `tokens` int64 `[B, Q]` standing at `positions` `[B, Q]`.

        `embeds` `[B, Q, hidden]`, where given, stands in for the tokens' own input embeddings. `opinion`
        `[B, Q, hidden]`, for models with self-conditioning: mean embeddings under what the last forward said.
        """
        inputs = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
        if not self.reuses_kv and window.kv_range is not None:
            # for the embeddings alone: visibility is the window's
            inputs["attention_mask"] = _valid(tokens, window.kv_range)
        return self.model.base_model(
            **inputs, position_ids=positions + self._offset, dlm_window=window, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., hidden]`."""
        return self._head(hidden)


class EncoderDecoderModel(DiffusionModel):
    """DiffusionGemma, as in transformers: two stacks of layers that share their matrices.

    The encoder is causal and reads what is decided, its keys and values are the context. The decoder reads the open
    block, which sees the context and all of itself. Only the decoder conditions on its own last opinion, and each has
    its own scale for every layer, so that no one forward can be both. Images are not read.
    """

    self_conditions = True

    def __init__(self, model: PreTrainedModel, architecture: Architecture, family: Family):
        super().__init__(model, architecture, family)
        self.text_config = model.config.text_config
        architecture.check_family(family.name)
        if self.text_config.use_bidirectional_attention == "all":
            raise ValueError(
                "model must have a causal encoder; its configuration has use_bidirectional_attention='all'"
            )
        # Up to transformers 5.17 the encoder reads padding in an image's place, later the image's token itself. The
        # two are told apart by what the function that finds those places is called with.
        finds = inspect.signature(model.model.encoder.get_placeholder_mask).parameters
        self._blank = None if "image_features" in finds else model.config.image_token_id

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def max_length(self) -> int | None:
        return longest_canvas(self.text_config)

    @property
    def block_length(self) -> int:
        return self.config.canvas_length

    @property
    def rule_options(self) -> dict[str, Any]:
        published = self.model.generation_config
        sampler = getattr(published, "sampler_config", None)
        values = {
            name: getattr(source, theirs, None)
            for name, source, theirs in (
                ("bound", sampler, "entropy_bound"), ("t_min", published, "t_min"), ("t_max", published, "t_max"),
                ("stability", published, "stability_threshold"), ("entropy", published, "confidence_threshold"),
                ("steps", published, "max_denoising_steps"),
            )
        }  # fmt: skip
        return {name: value for name, value in values.items() if value is not None}

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        is_context = window.causal_block == 1
        stack = self.model.model.encoder.language_model if is_context else self.model.model.decoder
        if is_context and self._blank is not None:  # an image's place without the image
            tokens = tokens.masked_fill(tokens == self._blank, self.text_config.pad_token_id)
        x = self.embed(tokens) if embeds is None else embeds
        if not is_context:
            x = stack.self_conditioning(x, torch.zeros_like(x) if opinion is None else opinion)
        kinds = self.text_config.layer_types
        rotations = {kind: stack.rotary_emb(x, positions, kind) for kind in set(kinds)}
        for layer, kind in zip(stack.layers, kinds):
            x = layer(x, position_embeddings=rotations[kind], position_ids=positions, dlm_window=window)
        return stack.norm(x)

    def mean_embedding(self, logits: Tensor, temperature: float) -> Tensor:
        """Mean embeddings `[N, hidden]` under softmax(logits / temperature), of logits `[N, V]`; 0 stands for 1."""
        table = self.model.model.decoder.embed_tokens
        at = torch.full((1,), temperature, device=logits.device)
        return ops.soft_embedding(logits, table.weight, temperature=at) * table.embed_scale.to(table.weight.dtype)


class LogitsModel(DiffusionModel):
    """Any model that returns `.logits`: the whole canvas is forwarded each time and its own attention is used."""

    reuses_kv = False

    def __init__(self, model):
        self.model, self.family, self._offset = model, FAMILIES["masked"], 0

    @property
    def config(self):
        return getattr(self.model, "config", None)

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.config, "vocab_size", None)

    @property
    def block_length(self) -> int | None:
        return None

    def attached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits stand in for hidden states: their rows are picked the same way."""
        inputs = (tokens,) if embeds is None else ()
        named = {} if embeds is None else {"inputs_embeds": embeds}
        if window.kv_range is not None:
            named["attention_mask"] = _valid(tokens, window.kv_range)
        return self.model(*inputs, **named).logits

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def _valid(tokens: Tensor, kv_range: Tensor) -> Tensor:
    """An attention mask int64 `[B, T]` of the columns in each row's range, int32 `[B, 2]`."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return ((columns >= kv_range[:, :1]) & (columns < kv_range[:, 1:])).long()


def adapt(model, *, family: str | None = None) -> DiffusionModel:
    """Prepare a loaded model for decoding with our kernels.

    Parameters
    ----------
    model : PreTrainedModel
        Three kinds are known. A stock transformers model of a known architecture, loaded by whomever, decodes with
        KV reuse. So does a model of a published family loaded by its own code (`trust_remote_code`): its parameters
        are placed into the stock class of its architecture, without a copy (separate expert matrices excepted, which
        the stock class holds as one tensor). Any other module whose call returns `.logits` `[B, T, V]` decodes without
        KV reuse, through its own attention, which must be bidirectional; a warning says so once.
    family : str, optional
        How it is decoded (a key of `FAMILIES`). None: what its configuration says, else "masked".

    Returns
    -------
    DiffusionModel
        Shares the model's parameters; the model itself is left as it is.

    Raises
    ------
    TypeError
        When `model` is not a torch module or has no language-model head.
    ValueError
        When the family is not known, or the model's configuration fits several.
    """
    if isinstance(model, DiffusionModel):
        return model
    if not callable(getattr(model, "forward", None)):
        raise TypeError(f"model must be a torch module that returns logits; got {type(model).__name__}")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    architecture = ARCHITECTURES.get(model_type or "")
    if architecture is not None and isinstance(model, PreTrainedModel):
        if model.get_output_embeddings() is None:
            raise TypeError(
                "model must have a language-model head: load it with dlmkernels.load or "
                f"{architecture.model_class}; got {type(model).__name__}"
            )
        if isinstance(model, architecture.load_class()):
            name = family or getattr(config, "dlm_family", None) or architecture.family
            kind = EncoderDecoderModel if architecture.two_stacks else DiffusionModel
            return kind(model, architecture, FAMILIES[name])
    if isinstance(model, PreTrainedModel) and form_of(model.config.to_dict()) is not None:
        known = _restock(model, family)
        if known is not None:
            return known
    warnings.warn(
        f"dlmkernels does not know model type '{model_type or type(model).__name__}': decoding forwards the "
        "whole canvas each step through the model's own attention (no KV reuse). Known types: " + known_types(),
        stacklevel=3,
    )
    return LogitsModel(model)


def _restock(model: PreTrainedModel, family: str | None) -> DiffusionModel | None:
    """A model of a published family as a stock one that shares its parameters; None, after a warning, if its
    configuration or its weights are not what they are in that family."""
    try:
        how = plan(model.config.to_dict(), family)
        with model.device:
            stock = from_pretrained(how, None, state_dict=model.state_dict(), dtype=model.dtype)
    except Question:
        raise
    except ValueError as error:
        warnings.warn(
            f"model: its configuration says '{model.config.model_type}', but it cannot be read as one of those "
            f"({error}): its own forward is used",
            stacklevel=4,
        )
        return None
    stock.generation_config = getattr(model, "generation_config", None)
    stock.train(model.training)
    return DiffusionModel(stock, ARCHITECTURES[stock.config.model_type], how.family)
