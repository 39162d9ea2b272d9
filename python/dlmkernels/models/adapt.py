# SPDX-License-Identifier: Apache-2.0
"""Make a loaded model decodable: one object with `hidden` and `logits`, whatever the model is."""

from __future__ import annotations

import copy
import importlib
import inspect
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
    """A model prepared for decoding. Parameters are shared with the model it was made from, and it is not changed.

    Any number of threads may decode with one model, or with one object of this class, and call the model itself
    meanwhile: what decodes is a second tree of modules beside the model (see `twin`).

    Attributes
    ----------
    model : PreTrainedModel
        The adapted model, without its wrappers.
    family : Family
        How models of its kind are decoded.
    reuses_kv : bool
        Whether a forward may take part of the canvas and find the rest in a cache.
    embeds_by_token : bool
        Whether a token's input embedding depends on nothing but the token.
    is_compiled : bool
        Whether its forward is compiled, which takes a while for every new shape.
    self_conditions : bool
        Whether a forward takes in what the one before it said of the same positions (`opinion` of `hidden`).
    takes_time : bool
        Whether a forward is told where its decoding stands (`moment` of `hidden`).
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
        """The modules that decode."""
        self._architecture.check_family(self.family.name)
        self._twin = twin_of(self.model, NAME)
        self._rotaries = rotary.fix_lengths(self._twin)
        self._head = self._architecture.head(self._twin)

    def renewed(self, family: Family | None = None) -> DiffusionModel:
        """The same of the model as it is now: attributes of its modules may have changed, an adapter been disabled.

        Itself if it is compiled, which it is as it was then.
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
        """The same with its forward compiled by torch.compile, as the model is now; each shape is compiled once.

        Raises
        ------
        ValueError
            When the model's forward is more than one stack of layers, its own, or depends on a request's length.
        """
        if type(self) is not DiffusionModel or self._rotaries:
            raise ValueError(
                f"compile cannot be used with {type(self.model).__name__}, which is not of a known type with one stack "
                "of layers and rotary frequencies that are the same for every request"
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
        """The same, whose layers compute what `AttentionWindow.layers` says; `experts`: see `layerwise.check`.

        Raises
        ------
        ValueError
            When its layers cannot be run in parts; the message names `cache`, which asks for it.
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
        """`dlmkernels.generate_batch` of this model."""
        return _engine().generate_batch(self, inputs, *args, **options)

    def init_continuous_batching(self, *args: Any, **options: Any):
        """`dlmkernels.engine.batch.init_continuous_batching` of this model: an `Engine`, not started yet."""
        return _engine().init_continuous_batching(self, *args, **options)

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where tokens are expected, and hidden states and logits returned."""
        return input_device(self.model)

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
    def reach(self) -> int | None:
        """Of models with blocks that go on beyond `max_length`: how many positions a block sees, itself included."""
        return None

    @property
    def block_length(self) -> int | None:
        """Length of the blocks the model was trained with, None where it has none or does not say."""
        return getattr(self.config, "block_size", None) or self.family.block_length

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings `[B, Q, hidden]` of tokens `[B, Q]`."""
        return self._twin.get_input_embeddings()(tokens).to(tokens.device)

    def rotations(self, lengths: Tensor) -> rotary.Rotations | None:
        """What `AttentionWindow.rotations` holds for requests of these lengths, integer `[B]`; None if of no account.

        A request's length counts everything from its first token to the end of its canvas.
        """
        if not self._rotaries:
            return None
        counts = lengths.tolist()
        return {id(module): module.groups(counts) for module in self._rotaries}

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
        window.attended.clear()  # a window may serve several forwards
        with rotary.use(window.rotations):
            hidden = self._twin.base_model(
                **inputs, position_ids=positions + self._offset, dlm_window=window, use_cache=False
            ).last_hidden_state
        self._check_attended(window, self.config.num_hidden_layers)
        return hidden.to(tokens.device)

    def _check_attended(self, window: AttentionWindow, layers: int) -> None:
        """Raise where layers did not call our attention function: nobody knows what they have seen."""
        if len(window.attended) < layers:
            raise ValueError(
                f"model: {layers - len(window.attended)} of its {layers} layers do not attend through transformers' "
                "attention interface, as though their attention was replaced: restore it before decoding"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., hidden]`."""
        return self._head(hidden).to(hidden.device)

    def linear_head(self) -> Tensor | None:
        """Weights `[V, hidden]` of the head if logits are hidden states times these and nothing else, else None.

        That is a linear layer of torch's own without a bias, where nothing that has been hung on it takes part.
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
        """The process group of a tensor-parallel model, whose ranks must make the same forwards; None of others."""
        return group_of(self.model)

    def head_shard(self) -> HeadShard | None:
        """This rank's part of the head of a tensor-parallel model, None where there is none that could be used alone.

        All ranks must ask for it together (see `parallel.head_shard`).
        """
        return head_shard(self._head) if type(self) is DiffusionModel else None


class EncoderDecoderModel(DiffusionModel):
    """DiffusionGemma, as in transformers: two stacks of layers that share their matrices.

    The encoder is causal and reads what is decided, its keys and values are the context. The decoder reads the open
    block, which sees the context and all of itself. Only the decoder conditions on its own last opinion, and each has
    its own scale for every layer, so that no one forward can be both. What images are read as comes in as embeddings.
    """

    self_conditions = True

    def __init__(self, model: PreTrainedModel, architecture: Architecture, family: Family):
        super().__init__(model, architecture, family)
        self.text_config = model.config.text_config
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
        is_context = window.causal_block == 1 or window.q_limit is not None
        stack = self._twin.model.encoder.language_model if is_context else self._twin.model.decoder
        if is_context and self._blank is not None:  # an image's place without the image
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
        """Mean embeddings `[N, hidden]` under softmax(logits / temperature), of logits `[N, V]`; 0 stands for 1.

        `temperature`: one number, or float32 `[P]`, of which each serves N / P consecutive rows.
        """
        table = self._twin.model.decoder.embed_tokens
        at = temperature if isinstance(temperature, Tensor) else torch.full((1,), temperature, device=logits.device)
        return ops.soft_embedding(logits, table.weight, temperature=at) * table.embed_scale.to(table.weight.dtype)


class TimedModel(DiffusionModel):
    """A model of `models.dit`: every forward is told the noise level of each row."""

    takes_time = True

    def _build(self) -> None:
        super()._build()
        #: a head that is put together from others, once for every decoding
        self._matrix: tuple[Tensor, Tensor] | None = None

    @property
    def reach(self) -> int | None:
        """BD3-LM's: positions are relative, so that its window of `max_length` moves on over a longer text."""
        return self.max_length if getattr(self.config, "block_size", None) else None

    def linear_head(self) -> None:
        """None: what `hidden` returns has further columns."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[…, V]` of what `hidden` returned."""
        twin: Any = self._twin
        if self._matrix is None and hasattr(twin, "head_matrix"):
            with torch.no_grad():
                self._matrix = twin.head_matrix()
        if self._matrix is None:
            return super().logits(hidden)
        weight, bias = self._matrix
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)

    def level(self, tokens: Tensor, moment: Moment | None) -> Tensor:
        """What the model is told of a forward of `tokens` `[B, Q]`, float32 `[B]`.

        The time is that of the rule's grid; of rules without one, the share of what is decoded that is still open.
        """
        if moment is None:
            if self.config.time != "none":
                raise ValueError(
                    f"model: {self.family.name} models are told the noise level, and this forward has none"
                )
            return torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        twin: Any = self._twin
        return twin.level(moment.masked if moment.time is None else moment.time)

    def gamma(self, time: Tensor) -> Tensor:
        """Of continuous models: the logarithm of noise power over signal power at times float64 of `[0, 1]`."""
        twin: Any = self._twin
        return twin.gamma(time)

    def told(self, time: Tensor) -> Tensor:
        """Of continuous models: what they are told at times float64 of `[0, 1]`; most of them gamma."""
        twin: Any = self._twin
        return twin.told(time) if hasattr(twin, "told") else twin.gamma(time)

    @property
    def says_vectors(self) -> bool:
        """Whether the model says clean vectors, off which tokens are read, and not logits."""
        return getattr(self.config, "says_vectors", False)

    def latent_table(self) -> Tensor:
        """Of continuous models: what each token is in the space that noise is added in, float32 `[V, width]`."""
        twin: Any = self._twin
        return twin.latent_table().float().contiguous()

    def hidden(
        self, tokens: Tensor, positions: Tensor, window: AttentionWindow, embeds: Tensor | None = None,
        opinion: Tensor | None = None, moment: Moment | None = None, level: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `DiffusionModel.hidden`, with what the noise level adds to the logits in further columns.

        `moment` says where the decoding stands, or `level` float32 `[B]` what the model is told. `embeds` and `opinion`
        of continuous models are noisy vectors `[B, Q, width]` and the last forward's mean of what they come from.
        """
        twin: Any = self._twin
        level = self.level(tokens, moment) if level is None else level
        x = self.embed(tokens) if embeds is None else embeds.to(twin.dtype)
        window.attended.clear()
        out = twin.base_model(x, level, positions, opinion=opinion, dlm_window=window).last_hidden_state
        self._check_attended(window, self.config.num_hidden_layers)
        return twin.readable(out, level, x).to(tokens.device)


class LogitsModel(DiffusionModel):
    """Any model that returns `.logits`: the whole canvas is forwarded each time and its own attention is used.

    Parameters
    ----------
    model : Module
        Without its wrappers.
    family : Family
    outermost : callable, optional
        What is called: the model with its wrappers. None: `model`.
    """

    reuses_kv = False

    def __init__(self, model, family: Family = FAMILIES["masked"], outermost=None):
        self.model, self.family = model, family
        self._outermost = model if outermost is None else outermost
        self._by_length = any(map(rotary.depends_on_length, model.modules()))
        #: whether the first canvas has to tell how the model attends
        self._is_undecided = False

    def _build(self) -> None:
        """Nothing: the model decodes itself."""

    def refuse_causal(self, canvas: Tensor | None = None) -> None:
        """Raise if the model attends causally, as short forwards show, or those of a `canvas` `[B, T]`.

        A model that cannot make short forwards is tried with the first canvas that it is to decode.
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
                f"model: {type(self.model).__name__} attends causally, so that a mask would not see what stands behind "
                "it. A diffusion language model must be loaded so that its attention is known: with dlmkernels.load, "
                "or by a stock class of transformers and dlmkernels.adapt(model, family=…); known types: "
                f"{known_types()}. If causal attention is what you want, decode dlmkernels.adapt(model, causal=True)"
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
        """Logits stand in for hidden states: their rows are picked the same way."""
        if self._is_undecided:
            self.refuse_causal(tokens)
        inputs = (tokens,) if embeds is None else ()
        named = {} if embeds is None else {"inputs_embeds": embeds}
        if window.kv_range is not None:
            if self._by_length:
                raise ValueError(
                    "input_ids: requests of different lengths cannot be decoded in one batch by "
                    f"{type(self.model).__name__}, whose rotary embedding depends on the longest of them: decode them "
                    "one by one"
                )
            named["attention_mask"] = _valid(tokens, window.kv_range)
        return self._outermost(*inputs, **named).logits.to(tokens.device)

    def linear_head(self) -> None:
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def _valid(tokens: Tensor, kv_range: Tensor) -> Tensor:
    """An attention mask int64 `[B, T]` of the columns in each row's range, int32 `[B, 2]`."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return ((columns >= kv_range[:, :1]) & (columns < kv_range[:, 1:])).long()


def _engine() -> Any:
    """The module of the engine, which knows of models; they ask for it by its name, when it is wanted."""
    return importlib.import_module("dlmkernels.engine.batch")


def adapt(
    model, *, family: str | None = None, causal: bool | None = None, compile: bool = False
) -> DiffusionModel:  # fmt: skip
    """Prepare a loaded model for decoding with our kernels.

    Parameters
    ----------
    model : PreTrainedModel
        Three kinds are known. A stock transformers model of a known architecture, loaded by whomever, decodes with
        KV reuse. So does a model of a published family loaded by its own code (`trust_remote_code`): its parameters
        are placed into the stock class of its architecture, without a copy (separate expert matrices excepted, which
        the stock class holds as one tensor). Any other module whose call returns `.logits` `[B, T, V]` decodes without
        KV reuse, through its own attention; a warning says so.

        It may be wrapped by `torch.compile`, by PEFT (whose adapters stay active) or for parallel execution, in any
        order: what is decoded is the model within, layer by layer and not compiled.
    family : str, optional
        How it is decoded (a key of `FAMILIES`). None: what its configuration says, else "masked".
    causal : bool, optional
        For models that decode through their own attention. None: three short forwards find out whether it is causal,
        and a model whose attention is causal is refused, since masks would then not see what stands behind them. True:
        causal attention is what is wanted. False: it is known to be bidirectional, nothing is tried.

    compile : bool
        Let torch.compile make its forward, on a GPU and on the CPU. That takes a while for every form of a step that a
        decoding has (a few), the first time; so keep what is returned. Steps then have their widest form. What is set
        on the model's modules later is not seen.

    Returns
    -------
    DiffusionModel
        Shares the model's parameters; the model itself is left as it is. Attributes that are set on the model's modules
        later (an adapter disabled, say) are seen by the next `generate`, `infill` or `adapt`.

    Raises
    ------
    TypeError
        When `model` is not a torch module or has no language-model head.
    ValueError
        When the family is not known, the model's configuration fits several, its attention is causal and not known to
        dlmkernels, or a wrapper changes what the model within computes.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    if compile:
        return adapt(model, family=family, causal=causal).compiled()
    if isinstance(model, DiffusionModel):
        _check_unused(causal, model)
        return model.renewed(FAMILIES[family] if family else None)
    within = unwrap(model)
    if not callable(getattr(within, "forward", None)):
        raise TypeError(f"model must be a torch module that returns logits; got {type(model).__name__}")
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
        what = f"knows model type '{model_type}' in its published form, which this {type(within).__name__} has not"
    if model_type in ARCHITECTURES:
        what = (
            f"knows model type '{model_type}' as {ARCHITECTURES[model_type].model_class}, not {type(within).__name__}"
        )
    # at this line, so that Python shows it once and not for every place that decodes
    warnings.warn(
        f"dlmkernels {what}: decoding forwards the whole canvas each step through the model's own attention (no KV "
        f"reuse). Known types: {known_types()}",
        stacklevel=1,
    )
    return adapted


def _adapt_known(model, family: str | None) -> DiffusionModel | None:
    """A model of a known architecture or published family, None if it is of neither."""
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


def _adapted(model: PreTrainedModel, architecture: Architecture, family: Family) -> DiffusionModel:
    kind = EncoderDecoderModel if architecture.two_stacks else TimedModel if architecture.timed else DiffusionModel
    return kind(model, architecture, family)


def unloaded(model: PreTrainedModel, family: str | None) -> DiffusionModel:
    """A stock model whose parameters have no values yet, as it will be decoded; for finding out what that takes."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not isinstance(model, architecture.load_class()):
        raise ValueError(f"model: {type(model).__name__} is none of the types that are known: {known_types()}")
    return _adapted(model, architecture, FAMILIES[family or architecture.family])


def _family_named(model) -> str | None:
    """The family of a published form that could not be read: its logits speak of the same positions all the same."""
    form = form_of(model.config.to_dict()) if isinstance(model, PreTrainedModel) else None
    return form.family if form is not None and isinstance(form.family, str) else None


def _check_unused(causal: bool | None, model: DiffusionModel) -> None:
    if causal is not None:
        raise ValueError(
            "causal is for models that decode through their own attention; what "
            f"{type(model.model).__name__} sees is chosen by its family, or by attention=… of generate; got {causal}"
        )


#: transformers changes settings of the process (torch's default dtype among them) while it builds a model.
_building = threading.Lock()


def _restock(model: PreTrainedModel, family: str | None) -> DiffusionModel | None:
    """A model of a published family as a stock one that shares its parameters.

    None, after a warning, if its configuration or its weights are not what they are in that family.
    """
    check_loaded(model, may_be_elsewhere=False)
    if group_of(model) is not None:
        raise ValueError(
            f"model: {type(model).__name__} is divided among ranks, and its parameters go into a stock class: load it "
            "with dlmkernels.load(…, distributed_config=…)"
        )
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        raise ValueError(
            f"model: {type(model).__name__} has adapters, and its parameters go into a stock class: merge "
            "them first (merge_and_unload of PEFT)"
        )
    try:
        how = plan(model.config.to_dict(), family)
        with _building, model.device:
            stock = from_pretrained(how, None, state_dict=state, dtype=model.dtype)
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
    return _adapted(stock, ARCHITECTURES[stock.config.model_type], how.family)
