# SPDX-License-Identifier: Apache-2.0
"""Prepare loaded models for decoding, behind one interface (`hidden` and `logits`) for every kind of model."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..window import AttentionWindow
from . import layerwise, rotary
from .attention import NAME
from .checkpoint import check_flag
from .devices import check_loaded, input_device
from .families import ARCHITECTURES, FAMILIES, Architecture, Family
from .fields import longest_canvas
from .load import from_pretrained
from .moment import Moment
from .parallel import HeadShard, check_division, group_of, head_shard
from .probe import is_causal, short_text
from .published import FORMS, Question, form_of, known_types, plan
from .twin import twin_of
from .wrappers import unwrap


class DiffusionModel:
    """A model prepared for decoding. It shares the parameters of the original model, which is left unchanged.

    Any number of threads may decode with one model, or with one object of this class, while others call the model
    itself: decoding uses a second tree of modules that shares the parameters (see `twin`).

    Attributes
    ----------
    model : PreTrainedModel
        The adapted model, without wrappers.
    family : Family
        Family that determines how the model is decoded.
    reuses_kv : bool
        Whether a forward pass may process part of the canvas (prompt and answer positions) and read the keys and values
        of the rest from a KV cache.
    embeds_by_token : bool
        Whether a token's input embedding depends only on the token itself.
    is_compiled : bool
        Whether the forward pass is compiled. Each new shape then takes a while to compile.
    self_conditions : bool
        Whether the model uses self-conditioning: a forward pass takes the previous prediction for the same positions as
        input (`opinion` of `hidden`).
    takes_time : bool
        Whether a forward pass receives the progress of the decoding (`moment` of `hidden`).
    """

    reuses_kv = True
    embeds_by_token = True
    self_conditions = False
    takes_time = False
    is_compiled = False

    def __init__(self, model: PreTrainedModel, architecture: Architecture, family: Family):
        self.model, self.family, self._architecture = model, family, architecture
        self._offset = architecture.position_offset(model.config)
        self.reuses_kv = self.embeds_by_token = not architecture.whole_canvas(model.config)
        self._build()

    def _build(self) -> None:
        """Build the modules used for decoding."""
        self._architecture.check_family(self.family.name)
        self._twin = twin_of(self.model, NAME)
        self._rotaries = rotary.fix_lengths(self._twin)
        self._head = self._architecture.head(self._twin)

    def renewed(self, family: Family | None = None) -> DiffusionModel:
        """Return a copy that reflects the model's current state, such as changed attributes or a disabled adapter.

        A compiled model returns itself unless `family` is a different one, because compilation fixed its state.
        """
        if self.is_compiled and family in (None, self.family):
            return self
        new = copy.copy(self)
        new.is_compiled = False
        if family is not None:
            new.family = family
        new._build()
        return new

    def compiled(self) -> DiffusionModel:
        """Return a copy of the model in its current state whose forward pass is compiled, once for each shape.

        Raises
        ------
        ValueError
            If the model is of an unknown type, conditioned on the noise level, tensor-parallel, has more than one stack
            of layers, or has rotary frequencies that depend on the request's length.
        """
        if type(self) is not DiffusionModel or self._rotaries:
            raise ValueError(
                f"compile cannot be used with {type(self.model).__name__}; expected a model of a known type with one "
                "stack of layers and rotary frequencies that are the same for every request"
            )
        if self.group is not None:
            raise ValueError("compile cannot be used with a tensor-parallel model, whose layers wait for other ranks")
        new = self if self.is_compiled else self.renewed()
        if not new.is_compiled:
            base = new._twin.base_model
            base.forward = torch.compile(base.forward, dynamic=False)
            new.is_compiled = True
        return new

    def by_layers(self, cache: str, experts: bool = False) -> DiffusionModel:
        """Return a copy whose layers compute only what `AttentionWindow.layers` asks for.

        Parameters
        ----------
        cache : str
            Cache policy that needs this; named in error messages.
        experts : bool
            See `layerwise.check`.

        Raises
        ------
        ValueError
            If the model's layers cannot be run on part of the positions.
        """
        if type(self) is not DiffusionModel or self.is_compiled or self._rotaries:
            what = "is compiled" if self.is_compiled else f"is of class {type(self.model).__name__}"
            raise ValueError(
                f"cache='{cache}' needs a model that is not compiled, of a known type with one stack of layers and "
                f"rotary frequencies that are the same for every request; this one {what}"
            )
        layerwise.check(self._twin, cache, experts)
        new = self.renewed()
        layerwise.run_by_plan(new._twin)
        return new

    def generate_batch(self, inputs, *args: Any, **options: Any):
        """Call `dlmkernels.generate_batch` with this model."""
        return _engine().generate_batch(self, inputs, *args, **options)

    def init_continuous_batching(self, *args: Any, **options: Any):
        """Return an `Engine` for this model, not started yet (`dlmkernels.engine.batch.init_continuous_batching`)."""
        return _engine().init_continuous_batching(self, *args, **options)

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device on which the model expects tokens and returns hidden states and logits."""
        return input_device(self.model)

    @property
    def vocab_size(self) -> int | None:
        """Number of logits per position, or None if the configuration does not say."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Longest canvas, in tokens, that the position encoding supports, or None if the configuration does not say."""
        length = longest_canvas(self.config)
        return None if length is None else length - self._offset

    @property
    def reach(self) -> int | None:
        """Number of positions a block attends to, itself included, if the model can decode beyond `max_length`.

        None for all other models.
        """
        return None

    @property
    def block_length(self) -> int | None:
        """Length of the blocks the model was trained with, or None if it has none or the length is unknown."""
        return getattr(self.config, "block_size", None) or self.family.block_length

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input embeddings `[B, Q, hidden]` of `tokens` `[B, Q]`."""
        return self._twin.get_input_embeddings()(tokens).to(tokens.device)

    def rotations(self, lengths: Tensor) -> rotary.Rotations | None:
        """Return the value of `AttentionWindow.rotations` for requests of the given lengths, integer `[B]`.

        A request's length runs from its first token to the end of its canvas. Returns None if the model's rotary
        frequencies do not depend on it.
        """
        if not self._rotaries:
            return None
        counts = lengths.tolist()
        return {id(module): module.groups(counts) for module in self._rotaries}

    @property
    def rule_options(self) -> dict[str, Any]:
        """Options of the family's rule that the checkpoint specifies."""
        return {}

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run a forward pass and return the last hidden states `[B, Q, hidden]`.

        Parameters
        ----------
        tokens : Tensor
            int64 `[B, Q]`: the tokens to process.
        positions : Tensor
            int64 `[B, Q]`: their positions.
        window : AttentionWindow
            The positions each token attends to, and the KV cache.
        embeds : Tensor, optional
            `[B, Q, hidden]`: replaces the tokens' input embeddings.
        opinion : Tensor, optional
            `[B, Q, hidden]`, for models with self-conditioning: mean token embeddings under the distributions that the
            previous forward pass predicted.
        """
        inputs = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
        if not self.reuses_kv and window.kv_range is not None:
            # Only the embeddings use this mask; the window decides what is attended to.
            inputs["attention_mask"] = _valid(tokens, window.kv_range)
        window.attended.clear()  # a window may be used for several forward passes
        with rotary.use(window.rotations):
            hidden = self._twin.base_model(
                **inputs, position_ids=positions + self._offset, dlm_window=window, use_cache=False
            ).last_hidden_state
        self._check_attended(window, self.config.num_hidden_layers)
        return hidden.to(tokens.device)

    def _check_attended(self, window: AttentionWindow, layers: int) -> None:
        """Raise ValueError if some layers bypassed our attention function, so that what they attended to is unknown."""
        if len(window.attended) < layers:
            raise ValueError(
                f"model: {layers - len(window.attended)} of its {layers} layers did not use transformers' attention "
                "interface; their attention seems to have been replaced. Restore it before decoding"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., V]` of hidden states `[..., hidden]`."""
        return self._head(hidden).to(hidden.device)

    def linear_head(self) -> Tensor | None:
        """Return the head's weights `[V, hidden]` if the logits are exactly `hidden @ weights.T`, else None.

        This requires a plain `torch.nn.Linear` without a bias, forward hooks or a replaced forward.
        """
        head = getattr(self, "_head", None)
        if type(head) is not torch.nn.Linear or head.bias is not None or "forward" in head.__dict__:
            return None
        if head._forward_hooks or head._forward_pre_hooks or type(head.weight) is not torch.nn.Parameter:
            return None
        is_plain = head.weight.layout is torch.strided and head.weight.device == self.device
        return head.weight if is_plain and head.weight.is_contiguous() else None

    @property
    def group(self) -> Any:
        """Process group of a tensor-parallel model, whose ranks must run the same forward passes; None for others."""
        return group_of(self.model)

    def head_shard(self) -> HeadShard | None:
        """Return this rank's shard of a tensor-parallel model's head, or None if there is none that works on its own.

        All ranks must call this together (see `parallel.head_shard`).
        """
        return head_shard(self._head) if type(self) is DiffusionModel else None


class EncoderDecoderModel(DiffusionModel):
    """DiffusionGemma, as in transformers: an encoder and a decoder that share their weight matrices.

    The causal encoder reads the committed tokens; its keys and values are the context. The decoder reads the open
    block, which attends to the context and to all of itself. Only the decoder uses self-conditioning, and the two
    stacks have different scales in every layer, so one forward pass cannot serve as both. Images are passed as
    embeddings.
    """

    self_conditions = True

    def __init__(self, model: PreTrainedModel, architecture: Architecture, family: Family):
        super().__init__(model, architecture, family)
        self.text_config = model.config.text_config
        if self.text_config.use_bidirectional_attention == "all":
            raise ValueError(
                "model must have a causal encoder; its configuration has use_bidirectional_attention='all'"
            )
        # Up to transformers 5.17 the encoder replaces image tokens with padding; later versions keep them. The
        # signature of `get_placeholder_mask` tells which version this is.
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
        is_context = window.causal_block == 1 or window.q_limit is not None
        stack = self._twin.model.encoder.language_model if is_context else self._twin.model.decoder
        if is_context and self._blank is not None:  # replace image tokens with padding
            tokens = tokens.masked_fill(tokens == self._blank, self.text_config.pad_token_id)
        x = self.embed(tokens) if embeds is None else embeds
        if not is_context:
            x = stack.self_conditioning(x, torch.zeros_like(x) if opinion is None else opinion)
        kinds = self.text_config.layer_types
        window.attended.clear()
        with rotary.use(window.rotations):
            rotations = {kind: stack.rotary_emb(x, positions, kind) for kind in set(kinds)}
        for layer, kind in zip(stack.layers, kinds):
            x = layer(x, position_embeddings=rotations[kind], position_ids=positions, dlm_window=window)
        self._check_attended(window, len(stack.layers))
        return stack.norm(x).to(tokens.device)

    def mean_embedding(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Return the mean embeddings `[N, hidden]` under softmax(logits / temperature), for `logits` `[N, V]`.

        `temperature` is a number, or float32 `[P]` whose entries each apply to N / P consecutive rows. A temperature of
        0 means 1.
        """
        table = self._twin.model.decoder.embed_tokens
        at = temperature if isinstance(temperature, Tensor) else torch.full((1,), temperature, device=logits.device)
        return ops.soft_embedding(logits, table.weight, temperature=at) * table.embed_scale.to(table.weight.dtype)


class TimedModel(DiffusionModel):
    """A model whose forward pass receives the noise level of each batch row, such as those of `models.dit`."""

    takes_time = True

    def _build(self) -> None:
        super()._build()
        #: a combined head matrix and its bias, computed once for each decoding
        self._matrix: tuple[Tensor, Tensor] | None = None

    @property
    def reach(self) -> int | None:
        """`max_length` for BD3-LM, whose relative positions let a window of this length move along a longer text."""
        return self.max_length if getattr(self.config, "block_size", None) else None

    def linear_head(self) -> None:
        """Return None: the output of `hidden` has additional columns."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[…, V]` of the output of `hidden`."""
        twin: Any = self._twin
        if self._matrix is None and hasattr(twin, "head_matrix"):
            with torch.no_grad():
                self._matrix = twin.head_matrix()
        if self._matrix is None:
            return super().logits(hidden)
        weight, bias = self._matrix
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)

    def level(self, tokens: Tensor, moment: Moment | None) -> Tensor:
        """Return the noise level, float32 `[B]`, that the model receives for a forward pass over `tokens` `[B, Q]`.

        The diffusion time is taken from the rule's time grid. For rules without one, it is the fraction of the
        positions to be decoded that are not yet committed.
        """
        if moment is None:
            if self.config.time != "none":
                raise ValueError(
                    f"model: {self.family.name} models need the noise level, but this forward pass provides none"
                )
            return torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        twin: Any = self._twin
        return twin.level(moment.masked if moment.time is None else moment.time)

    def gamma(self, time: Tensor) -> Tensor:
        """Return the logarithm of noise power over signal power at times in `[0, 1]`, float64 (continuous models)."""
        twin: Any = self._twin
        return twin.gamma(time)

    def told(self, time: Tensor) -> Tensor:
        """Return the noise level that a continuous model receives at times in `[0, 1]`, float64; usually `gamma`."""
        twin: Any = self._twin
        return twin.told(time) if hasattr(twin, "told") else twin.gamma(time)

    @property
    def says_vectors(self) -> bool:
        """Whether the model predicts clean vectors, from which tokens are derived, rather than logits."""
        return getattr(self.config, "says_vectors", False)

    def latent_table(self) -> Tensor:
        """Return each token's vector in the space in which noise is added, float32 `[V, width]` (continuous models)."""
        twin: Any = self._twin
        return twin.latent_table().float().contiguous()

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None, moment: Moment | None = None, level: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Like `DiffusionModel.hidden`, with additional columns for the noise level's contribution to the logits.

        The noise level is computed from `moment`, the progress of the decoding, unless `level`, float32 `[B]`, is
        given. For continuous models, `embeds` `[B, Q, width]` are noisy vectors, and `opinion` is the previous forward
        pass's mean prediction of the clean vectors.
        """
        twin: Any = self._twin
        level = self.level(tokens, moment) if level is None else level
        x = self.embed(tokens) if embeds is None else embeds.to(twin.dtype)
        window.attended.clear()
        out = twin.base_model(x, level, positions, opinion=opinion, dlm_window=window).last_hidden_state
        self._check_attended(window, self.config.num_hidden_layers)
        return twin.readable(out, level, x).to(tokens.device)


class LogitsModel(DiffusionModel):
    """Any model that returns `.logits`. Each forward pass processes the whole canvas with the model's own attention.

    Parameters
    ----------
    model : Module
        The model without wrappers.
    family : Family
        Family that determines how the model is decoded.
    outermost : callable, optional
        The callable to run: the model with its wrappers. If None, `model`.
    """

    reuses_kv = False

    def __init__(self, model, family: Family = FAMILIES["masked"], outermost=None):
        self.model, self.family = model, family
        self._outermost = model if outermost is None else outermost
        self._by_length = any(map(rotary.depends_on_length, model.modules()))
        #: whether the model's attention must still be tested for causality, with the first canvas
        self._is_undecided = False

    def _build(self) -> None:
        """Do nothing: the model itself is called."""

    def refuse_causal(self, canvas: Tensor | None = None) -> None:
        """Raise ValueError if test forward passes on a short text, or on `canvas` `[B, T]`, show causal attention.

        If the model cannot process the short text, the test is postponed to the first canvas to be decoded.
        """
        special = (getattr(self.config, kind, None) for kind in ("pad_token_id", "mask_token_id", "eos_token_id"))
        avoid = {i for value in special for i in (value if isinstance(value, list) else [value])}
        every = range(self.vocab_size or 2)
        ids = [i for i in every if i not in avoid] or list(every)
        call = twin_of(self.model) if isinstance(self.model, torch.nn.Module) else self.model
        try:
            found = is_causal(call, short_text(ids, self.device) if canvas is None else canvas, ids)
        except Exception:
            if canvas is not None:
                raise
            self._is_undecided = True
            return
        self._is_undecided = False
        if found:
            raise ValueError(
                f"model: {type(self.model).__name__} attends causally, so mask tokens would not see the tokens after "
                "them. Load a diffusion language model with dlmkernels.load, or with its stock transformers class "
                f"followed by dlmkernels.adapt(model, family=…). Known model types: {known_types()}. If you do want "
                "causal attention, use dlmkernels.adapt(model, causal=True)"
            )

    @property
    def config(self):
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.config, "vocab_size", None)

    @property
    def block_length(self) -> int | None:
        return None

    def rotations(self, lengths: Tensor) -> None:
        return None

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the logits in place of hidden states; rows are selected from them in the same way."""
        if self._is_undecided:
            self.refuse_causal(tokens)
        inputs = (tokens,) if embeds is None else ()
        named = {} if embeds is None else {"inputs_embeds": embeds}
        if window.kv_range is not None:
            if self._by_length:
                raise ValueError(
                    "input_ids: requests of different lengths cannot share a batch with "
                    f"{type(self.model).__name__}, whose rotary embedding depends on the longest of them: decode them "
                    "one at a time"
                )
            named["attention_mask"] = _valid(tokens, window.kv_range)
        logits = self._outermost(*inputs, **named).logits.to(tokens.device)
        return without_padding(logits, self.vocab_size)

    def linear_head(self) -> None:
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def without_padding(logits: Tensor, vocab: int | None) -> Tensor:
    """Drop the logits `[B, T, W]` of ids from `vocab` on, which pad a vocabulary and are not tokens."""
    return logits if vocab is None or logits.shape[-1] <= vocab else logits[..., :vocab].contiguous()


def _valid(tokens: Tensor, kv_range: Tensor) -> Tensor:
    """Return an attention mask int64 `[B, T]` that is 1 at the columns within each row's range, int32 `[B, 2]`."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return ((columns >= kv_range[:, :1]) & (columns < kv_range[:, 1:])).long()


def _engine() -> Any:
    """Import the engine's module on demand; the engine imports models, so a top-level import would be circular."""
    return importlib.import_module("dlmkernels.engine.batch")


def adapt(
    model, *, family: str | None = None, causal: bool | None = None, compile: bool = False
) -> DiffusionModel:  # fmt: skip
    """Prepare a loaded model for decoding with our kernels.

    Parameters
    ----------
    model : PreTrainedModel
        There are three cases. A stock transformers model of a known architecture decodes with KV-cache reuse, however
        it was loaded. So does a model of a published family loaded with its own code (`trust_remote_code`): its
        parameters are placed into the architecture's stock class without copying (except separate expert matrices,
        which the stock class stores as one tensor). Any other module that returns `.logits` `[B, T, V]` decodes through
        its own attention, without KV-cache reuse; a warning says so.

        The model may be wrapped by `torch.compile`, PEFT (whose adapters stay active) or a parallelism wrapper, in any
        order. In the first two cases the wrapped model is decoded layer by layer, without the compilation.
    family : str, optional
        Family that determines how the model is decoded (a key of `FAMILIES`). If None, it is taken from the
        configuration, or the architecture's default family is used ("masked" for most).
    causal : bool, optional
        Only for models that decode through their own attention. If None, three short forward passes test whether it is
        causal; if so, the model is rejected, because mask tokens could not attend to the tokens after them. Pass True
        if causal attention is intended, or False to skip the test for a model known to be bidirectional.
    compile : bool
        Whether to compile the forward pass with torch.compile, on a GPU or the CPU. Each step shape of a decoding
        (there are a few) takes a while to compile the first time, so keep the returned object. Steps always use their
        widest shape, and later changes to the model's modules have no effect.

    Returns
    -------
    DiffusionModel
        The prepared model. It shares the parameters of `model`, which is left unchanged. Attributes set on the model's
        modules later (a disabled adapter, for example) take effect at the next `generate`, `infill` or `adapt`.

    Raises
    ------
    TypeError
        If `model` is not a torch module that returns logits, or has no language-model head, or `compile` or `causal` is
        not a bool.
    ValueError
        If the family is unknown, the configuration fits several families, the model decodes through its own attention
        and is causal, `causal` is given for a model that does not, `compile` cannot be used with the model, or a
        wrapper or adapter has an effect that cannot be followed.
    """
    if family is not None and (not isinstance(family, str) or family not in FAMILIES):
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    check_flag("compile", compile)
    if causal is not None:
        check_flag("causal", causal)
    if isinstance(model, type):
        raise TypeError(f"model must be a torch module that returns logits; got {_no_model(model)}")
    if compile:
        return adapt(model, family=family, causal=causal).compiled()
    if isinstance(model, DiffusionModel):
        _check_unused(causal, model)
        return model.renewed(FAMILIES[family] if family else None)
    within = unwrap(model)
    if isinstance(model, type) or not callable(getattr(within, "forward", None)):
        raise TypeError(f"model must be a torch module that returns logits; got {_no_model(model)}")
    known = _adapt_known(within, family)
    if known is not None:
        _check_unused(causal, known)
        return known
    adapted = LogitsModel(within, FAMILIES[family or _family_named(within) or "masked"], model)
    if causal is None:
        adapted.refuse_causal()
    model_type = getattr(adapted.config, "model_type", None) or type(within).__name__
    what = f"does not know model type '{model_type}'"
    if model_type in FORMS:
        what = f"knows model type '{model_type}' only in its published form, unlike this {type(within).__name__}"
    if model_type in ARCHITECTURES:
        what = (
            f"knows model type '{model_type}' as {ARCHITECTURES[model_type].model_class}, not {type(within).__name__}"
        )
    # stacklevel=1, so that Python shows the warning once rather than once per calling line
    warnings.warn(
        f"dlmkernels {what}: each step runs the whole canvas through the model's own attention, without KV-cache "
        f"reuse. Known model types: {known_types()}",
        stacklevel=1,
    )
    return adapted


def _adapt_known(model, family: str | None) -> DiffusionModel | None:
    """Adapt a model of a known architecture or published family; return None for any other model."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is not None:
        if model.get_output_embeddings() is None:
            raise TypeError(
                "model must have a language-model head: load it with dlmkernels.load or "
                f"{architecture.model_class}; got {type(model).__name__}"
            )
        if isinstance(model, architecture.load_class()):
            check_loaded(model)
            check_division(model)
            name = family or getattr(config, "dlm_family", None) or architecture.family
            return _adapted(model, architecture, FAMILIES[name])
    return None if form_of(config.to_dict()) is None else _restock(model, family)


def _no_model(model: Any) -> str:
    """Describe an argument that is not a model, and what to pass instead."""
    if isinstance(model, str | os.PathLike):
        return f"{str(model)!r}: load it first, with dlmkernels.load({str(model)!r})"
    return f"the class {model.__name__}: pass an instance" if isinstance(model, type) else type(model).__name__


def _adapted(model: PreTrainedModel, architecture: Architecture, family: Family) -> DiffusionModel:
    kind = EncoderDecoderModel if architecture.two_stacks else TimedModel if architecture.timed else DiffusionModel
    return kind(model, architecture, family)


def unloaded(model: PreTrainedModel, family: str | None) -> DiffusionModel:
    """Adapt a stock model whose parameters have no values yet, to find out how much memory decoding it takes."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not isinstance(model, architecture.load_class()):
        raise ValueError(f"model must be of a known model type; got {type(model).__name__}. Known: {known_types()}")
    return _adapted(model, architecture, FAMILIES[family or architecture.family])


def _family_named(model) -> str | None:
    """Return the family of a published form that `_restock` could not convert; its logit alignment still applies."""
    form = form_of(model.config.to_dict()) if isinstance(model, PreTrainedModel) else None
    return form.family if form is not None and isinstance(form.family, str) else None


def _check_unused(causal: bool | None, model: DiffusionModel) -> None:
    if causal is not None:
        raise ValueError(
            f"causal must be None for {type(model.model).__name__}, whose attention is set by its family, or by "
            f"attention=… of generate; got {causal}. It is only for models that decode through their own attention"
        )


#: Held while transformers builds a model, because it changes process-wide settings such as torch's default dtype.
_building = threading.Lock()


def _restock(model: PreTrainedModel, family: str | None) -> DiffusionModel | None:
    """Convert a model of a published family to its stock class, sharing the parameters.

    Warns and returns None if its configuration or its weights do not match that family.
    """
    check_loaded(model, may_be_elsewhere=False)
    if group_of(model) is not None:
        raise ValueError(
            f"model: {type(model).__name__} is divided among ranks, so its parameters cannot be moved into the stock "
            "class: load it with dlmkernels.load(…, distributed_config=…)"
        )
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise ValueError(
            f"model: {type(model).__name__} has adapters, so its parameters cannot be moved into the stock class: "
            "merge them first (merge_and_unload of PEFT)"
        )
    try:
        how = plan(model.config.to_dict(), family)
        with _building, model.device:
            stock = from_pretrained(how, None, state_dict=state, dtype=model.dtype)
    except Question:
        raise
    except ValueError as error:
        warnings.warn(
            f"model: its configuration has model_type='{model.config.model_type}', but it does not match that type's "
            f"published form ({error}). Its own forward pass is used instead",
            stacklevel=4,
        )
        return None
    stock.generation_config = getattr(model, "generation_config", None)
    stock.train(model.training)
    return _adapted(stock, ARCHITECTURES[stock.config.model_type], how.family)
