# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters: small models that predict several next tokens of a causal target model at once.

A drafter uses the target's embeddings and usually its head. It sees the text through the outputs of some ("tapped")
layers of the target: one vector per token, from which each layer of the drafter computes a key and a value that it
keeps in its KV cache. A forward pass of the drafter processes one block: the last token followed by mask tokens.
Formulas: DFlash (arXiv:2602.06036), DSpark (arXiv:2607.05147), and the code published with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.utils import CONFIG_NAME, cached_file

from .. import ops
from ..cache import KVCache
from ..window import AttentionWindow
from . import fields
from .adapt import DiffusionModel, adapt
from .attention import NAME
from .checkpoint import QUIET, WHERE, check_flag, locate, read_object, weight_files, weight_shapes
from .draft_forms import DraftForm, read_form

#: weight names in other published forms, and the corresponding names here
RENAMED = {
    "encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight",
    "candidate_selector.predecessor_codebook.weight": "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook.weight": "candidate_selector.successor_codebook",
}  # fmt: skip
#: weights that are ignored: copies of the target's weights, and `t2d`, which is redundant with `d2t`
NOT_NEEDED = {"verifier_norm.weight", "verifier_lm_head.weight", "t2d"}
MASK_FILE = "mask_embedding.pt"


class Convolution(nn.Module):
    """DFlash 2: kernels of the convolutions before and after a sublayer, computed from the sublayer's input."""

    def __init__(self, width: int, taps: int, group: int):
        super().__init__()
        self.taps, self.group = taps, group
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernels `[B, W, taps, d]` for a sublayer's input and output, given its input `x` `[B, W, d]`."""
        change = self.kernel_projection(x).unflatten(-1, (2, self.taps, -1)).repeat_interleave(self.group, -1)
        kernels = self.base_kernel.to(x.dtype) + change
        return kernels[:, :, 0], kernels[:, :, 1]


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve `x` `[B, W, d]` along its rows: row t becomes the sum over o of kernel[t, o] x[t - o], zero-padded."""
    return sum(
        (functional.pad(x, (0, 0, o, 0))[:, : x.shape[1]] * kernel[:, :, o] for o in range(kernel.shape[2])),
        torch.zeros_like(x),
    )


class Selector(nn.Module):
    """DFlash 2: weights for scoring the likeliest tokens of each position given the preceding token."""

    def __init__(self, vocab: int, width: int, rank: int):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.hidden_projection = nn.Linear(width, rank, bias=False)


class Markov(nn.Module):
    """DSpark: correction of the logits that depends on the preceding token."""

    def __init__(self, how: str, vocab: int, known: int, width: int, rank: int):
        super().__init__()
        self.how = how
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, known, bias=False)
        if how == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        elif how == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def forward(self, hidden: Tensor, before: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the correction `[B, known]` to add to the logits, and the memory for the next row.

        `hidden` `[B, d]` are the rows' hidden states, `before` `[B, rank]` the embeddings of the preceding tokens, and
        `memory` `[B, rank]` is the memory returned for the previous row (None for the first row).
        """
        if self.how == "vanilla":
            return self.markov_w2(before), None
        if self.how == "gated":
            return self.markov_w2(torch.sigmoid(self.gate_proj(torch.cat((hidden, before), -1))) * before), None
        memory = torch.zeros_like(before) if memory is None else memory
        gate, candidate, said = self.joint_proj(torch.cat((memory, before, hidden), -1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return self.markov_w2(torch.tanh(said)), gate * memory + (1 - gate) * torch.tanh(candidate)


class Confidence(nn.Module):
    """DSpark: estimate of whether the target accepts a draft. Its weights are loaded but not used."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DraftModule(nn.Module):
    """Modules of a drafter, with the published weight names: stock Qwen3 layers and the form's additional modules."""

    def __init__(self, form: DraftForm, config: Qwen3Config, vocab: int, has_embedding: bool, has_head: bool):
        super().__init__()
        width, known = config.hidden_size, form.draft_vocab or vocab
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        self.fc = nn.Linear(len(form.taps) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, config.rms_norm_eps)
        if form.convolution is not None:
            for layer in self.layers:
                layer.attention_conv = Convolution(width, *form.convolution)
                layer.mlp_conv = Convolution(width, *form.convolution)
        if form.selector is not None:
            self.candidate_selector = Selector(vocab, width, form.selector[0])
        if form.markov is not None:
            self.markov_head = Markov(form.markov, vocab, known, width, form.rank)
        if form.confidence is not None:
            self.confidence_head = Confidence(width + (form.rank if form.confidence == "markov" else 0))
        if has_embedding:
            self.embed_tokens = nn.Embedding(vocab, width)
        if has_head:
            self.lm_head = nn.Linear(width, known, bias=False)
        if form.draft_vocab is not None:
            self.register_buffer("d2t", torch.empty(known, dtype=torch.int64))


class Drafter:
    """A drafter bound to its target model, as returned by `load_drafter` and accepted by `generate`.

    Attributes
    ----------
    form : DraftForm
        Configuration of the drafter.
    module : Module
        Its modules and weights.
    target : PreTrainedModel
        The model it drafts for, whose embeddings and head it shares unless it has its own.
    """

    def __init__(self, form: DraftForm, config: Qwen3Config, module: Any, target: DiffusionModel):
        self.form, self.module, self.target = form, module, target.model
        assert target.vocab_size is not None
        self.vocab = target.vocab_size
        device = target.device
        self._rotary = Qwen3RotaryEmbedding(config).to(device)
        self._width = config.head_dim
        keys = [layer.self_attn.k_proj for layer in module.layers]
        values = [layer.self_attn.v_proj for layer in module.layers]
        # All layers compute keys and values from the same vectors, so one matrix product serves them all.
        self._weight = torch.cat([x.weight for pair in zip(keys, values) for x in pair]).detach()
        self._bias = None
        if keys[0].bias is not None:
            self._bias = torch.cat([x.bias for pair in zip(keys, values) for x in pair]).detach()
        own: Any = getattr(module, "embed_tokens", None)
        self._table: Any = (self.target.get_input_embeddings() if own is None else own).weight
        self._head = getattr(module, "lm_head", None) or self.target.get_output_embeddings()
        self._ids: Tensor | None = None
        if form.draft_vocab is not None:
            self._ids = torch.arange(form.draft_vocab, device=device) + module.d2t
        #: measured step times in seconds, by number of rows and of drafts
        self.costs: dict[tuple[int, int], Tensor] = {}
        #: replaces the mask token's embedding: `[d]`, or one vector for each masked row of the block
        self.mask_embedding: Tensor | None = None

    def __repr__(self) -> str:
        form = self.form
        return f"<{form.kind} drafter of {form.drafts} tokens for {type(self.target).__name__}, taps {form.taps}>"

    def changed(self, **fields: Any) -> Drafter:
        """Return a copy with other fields in its form, such as `taps`, for experiments; training used the original."""
        other = object.__new__(Drafter)
        other.__dict__.update(self.__dict__, form=replace(self.form, **fields), costs={})
        return other

    # --- forwards ---------------------------------------------------------------------------------------------------

    def inject(self, taps: Tensor, slots: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Compute keys and values of the text from the outputs of the tapped layers, and write them into the cache.

        Parameters
        ----------
        taps : Tensor
            `[B, K, n d]`: outputs of the n tapped layers, concatenated.
        slots : Tensor
            int32 `[B, K]`: cache slot of each token; -1 writes nothing.
        positions : Tensor
            int64 `[B, K]`: position of each token in the text.
        cache : KVCache
            The drafter's cache.
        """
        module = self.module
        context = module.hidden_norm(module.fc(taps.to(module.fc.weight.dtype)))
        both = functional.linear(context, self._weight, self._bias)
        both = both.unflatten(-1, (len(module.layers), 2, -1, self._width))
        cos, sin = (x[:, :, None] for x in self._rotary(context, positions))
        for index, layer in enumerate(module.layers):
            k, v = layer.self_attn.k_norm(both[:, :, index, 0]), both[:, :, index, 1]
            k = k * cos + _half_turned(k) * sin
            k_cache, v_cache = cache.layer(index, k, v)
            ops.block_attention(k[:, :0], k, v, k_cache, v_cache, slots[:, :0], k_slots=slots)

    def hidden(self, anchor: Tensor, positions: Tensor, window: AttentionWindow) -> Tensor:
        """Return the hidden states `[B, W, d]` of a block: the token `anchor`, int64 `[B]`, followed by mask tokens.

        `positions`, int64 `[B, W]`, are the positions of its rows. Their keys and values are written to the window's
        slots.
        """
        module = self.module
        x = self._block(anchor, positions.shape[1])
        rotations = self._rotary(x, positions)
        causal = replace(window, causal_block=1)
        for layer, is_causal in zip(module.layers, self.form.causal):
            x = _forward_layer(layer, x, rotations, causal if is_causal else window)
        return module.norm(x)

    def _block(self, anchor: Tensor, rows: int) -> Tensor:
        """Return the block's embeddings `[B, W, d]`: raw rows of the table, without the target's own scaling."""
        mask = self._table[self.form.mask_token_id]
        if self.mask_embedding is not None:
            mask = self.mask_embedding.to(mask.dtype)
            mask = mask[: rows - 1] if mask.dim() == 2 else mask
        first = functional.embedding(anchor, self._table)[:, None]
        x = torch.cat((first, mask.expand(len(anchor), rows - 1, -1)), 1)
        return (x * self.form.embedding_scale).to(self.module.norm.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[N, known]` of hidden states `[N, d]`, for the tokens that the drafter's head knows."""
        logits = self._head(hidden)
        if self.form.output_multiplier != 1.0:
            logits = logits * self.form.output_multiplier
        if self.form.softcap > 0:
            logits = torch.tanh(logits / self.form.softcap) * self.form.softcap
        return logits

    def of_all(self, logits: Tensor) -> Tensor:
        """Expand logits of the tokens the head knows to `[N, V]`, with minus infinity for the target's other tokens."""
        if self._ids is None:
            return logits
        full = torch.full((len(logits), self.vocab), -torch.inf, dtype=logits.dtype, device=logits.device)
        return full.index_copy_(1, self._ids, logits)

    @property
    def is_sequential(self) -> bool:
        """Whether the distribution of each draft depends on the preceding drafts."""
        return self.form.markov is not None or self.form.selector is not None

    def given(
        self, logits: Tensor, hidden: Tensor, before: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return one row's logits `[B, V]` given the preceding tokens, and the memory for the next row.

        Parameters
        ----------
        logits : Tensor
            `[B, known]`: the row's logits without this dependence.
        hidden : Tensor
            `[B, d]`: its hidden states.
        before : Tensor
            int64 `[B]`: the preceding tokens.
        memory : Tensor, optional
            `[B, rank]`: the memory returned for the previous row, None for the first row.
        """
        if self.form.markov is not None:
            markov = self.module.markov_head
            change, memory = markov(hidden, markov.markov_w1(before).to(hidden.dtype), memory)
            return self.of_all(logits + change), memory
        if self.form.selector is not None:
            selector = self.module.candidate_selector
            best = ops.top_candidates(logits, self.form.selector[1])
            context = selector.predecessor_codebook[before] * selector.hidden_projection(hidden)
            ids = best.ids.clamp(min=0)
            edges = (context[:, None] * selector.successor_codebook[ids]).sum(-1).float()
            scores = torch.where(best.ids < 0, -torch.inf, best.values + edges)
            full = torch.full((len(logits), self.vocab), -torch.inf, dtype=torch.float32, device=logits.device)
            return full.scatter_reduce(1, ids, scores, "amax"), None
        return self.of_all(logits), None


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _forward_layer(layer: Any, x: Tensor, rotations: tuple[Tensor, Tensor], window: AttentionWindow) -> Tensor:
    """Run a stock layer, with the convolutions around its sublayers if it has any."""
    for norm, name, sublayer in (
        (layer.input_layernorm, "attention_conv", lambda a: _attend(layer, a, rotations, window)),
        (layer.post_attention_layernorm, "mlp_conv", layer.mlp),
    ):
        a = norm(x)
        conv: Any = getattr(layer, name, None)
        if conv is None:
            x = x + sublayer(a)
        else:
            before, after = conv.kernels(a)
            x = x + convolved(sublayer(convolved(a, before)), after)
    return x


def _attend(layer: Any, a: Tensor, rotations: tuple[Tensor, Tensor], window: AttentionWindow) -> Tensor:
    return layer.self_attn(
        hidden_states=a, position_embeddings=rotations, attention_mask=None, dlm_window=window
    )[0]  # fmt: skip


class Tapped:
    """A target model whose forward passes record the outputs of some of its layers.

    Attributes
    ----------
    model : DiffusionModel
        Copy of the target that shares its parameters and does the recording.
    """

    def __init__(self, target: DiffusionModel, taps: tuple[int, ...]):
        self.model, self._taps, self._found = target.renewed(), taps, dict[int, Tensor]()
        for index, layer in enumerate(layers_of(self.model)):
            if index in taps:
                self._listen(index, layer)

    def _listen(self, index: int, layer: nn.Module) -> None:
        forward = layer.forward

        def noted(*args: Any, **named: Any) -> Any:
            out = forward(*args, **named)
            self._found[index] = out[0] if isinstance(out, tuple) else out
            return out

        # This replaces the forward of our own twin, not of the user's module.
        layer.__dict__["forward"] = noted

    def take(self) -> Tensor:
        """Return and clear the outputs of the n tapped layers in the last forward pass, concatenated `[B, Q, n d]`."""
        found = torch.cat([self._found[index] for index in self._taps], -1)
        self._found.clear()
        return found


def layers_of(target: DiffusionModel) -> nn.ModuleList:
    """Return the layers of the twin that `target` decodes with.

    Raises
    ------
    ValueError
        If the layers cannot be found.
    """
    count = target.config.num_hidden_layers
    lists = [x for x in target._twin.base_model.children() if isinstance(x, nn.ModuleList) and len(x) == count]
    if len(lists) != 1:
        raise ValueError(f"target: the layers of {type(target.model).__name__} cannot be found, so none can be tapped")
    return lists[0]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_drafter(
    path_or_id: str | PathLike, target, *, mask_token_id: int | None = None, allow_pickle: bool = False, **where: Any
) -> Drafter:  # fmt: skip
    """Load a block-diffusion drafter for a causal model, to be used in `generate(target, …, drafter=drafter)`.

    Parameters
    ----------
    path_or_id : str or path
        A local folder or Hub id with `config.json` and safetensors weights: a DFlash, DFlash 2 or DSpark drafter, one
        of these in the form of the speculators library, or transformers' MuseGlimmerAssistant. "demo-drafter" is the
        drafter that ships with the package, for `dlmkernels.load("demo-causal")`.
    target : PreTrainedModel or DiffusionModel
        The causal model to draft for, of a known architecture. The drafter shares its embeddings and head; the model
        is not changed.
    mask_token_id : int, optional
        The mask token, if the configuration does not give it or gives a wrong one.
    allow_pickle : bool
        Whether `mask_embedding.pt`, if present, may be read with `torch.load(weights_only=True)`.
    **where
        `revision`, `token`, `cache_dir` and similar arguments, as in `load`.

    Returns
    -------
    Drafter
        The drafter, in the target's dtype and on its device.

    Raises
    ------
    TypeError
        If an argument is unknown or of the wrong type.
    ValueError
        If the checkpoint does not exist, its form is unknown, a configuration field is missing, out of range or not
        implemented, it does not fit the target, weights are missing, unexpected or of the wrong shape, or it has a
        `mask_embedding.pt` and `allow_pickle` is False.

    Notes
    -----
    No code from the checkpoint is run. The layers are those of transformers' Qwen3.
    """
    for name in where:
        if name not in WHERE:
            raise TypeError(
                f"load_drafter got an unexpected argument {name}; in addition to its own it accepts {', '.join(WHERE)}"
            )
    check_flag("allow_pickle", allow_pickle)
    if isinstance(target, type) or not callable(getattr(target, "forward", getattr(target, "hidden", None))):
        got = f"the class {target.__name__} itself" if isinstance(target, type) else type(target).__name__
        raise TypeError(f"target must be a causal language model; got {got}")
    adapted = adapt(target)
    _check_target(adapted)
    path, where = locate(path_or_id, where)
    try:
        found = read_object(path, CONFIG_NAME, where)
        if found is None:
            raise ValueError(f"there is no {CONFIG_NAME}")
        vocab = adapted.vocab_size
        assert vocab is not None
        form = read_form(found[0], adapted.config.num_hidden_layers, vocab, mask_token_id)
        drafter = _build(form, path, where, adapted, vocab)
        mask_file = cached_file(path, MASK_FILE, **where, **QUIET)
        if mask_file is not None:
            drafter.mask_embedding = _mask_embedding(mask_file, form, allow_pickle).to(adapted.device)
    except Exception as error:  # errors raised by stock configurations share no base class
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):
            said = f"{said} is missing or unknown"
        raise ValueError(f"path_or_id: the drafter at '{path}' cannot be loaded: {said}") from error
    return drafter


def _check_target(target: DiffusionModel) -> None:
    """Raise ValueError if `target` cannot be drafted for."""
    name = type(target.model).__name__
    if type(target) is not DiffusionModel or not target.reuses_kv:
        raise ValueError(f"target must be a causal model of a known type with one stack of layers; got {name}")
    if not type(target.model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"target must be a causal language model; got {name}")


def _build(
    form: DraftForm, path: str, where: Mapping[str, Any], target: DiffusionModel, vocab: int
) -> Drafter:  # fmt: skip
    """Build the drafter, checking that no weight is missing, unexpected or of the wrong shape."""
    files = weight_files(path, where)
    shapes = {RENAMED.get(name, name): shape for name, shape in weight_shapes(files).items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in NOT_NEEDED}
    if form.draft_vocab is None:
        shapes.pop("d2t", None)
    fields.check_sizes({name: value for name, value in form.layers.items() if name != "vocab_size"}, shapes)
    config = Qwen3Config(**form.layers, use_sliding_window=True, vocab_size=1, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = NAME
    width = target.config.hidden_size
    if config.hidden_size != width:
        raise ValueError(f"its configuration has hidden_size={config.hidden_size}; expected the target's, {width}")
    has_head = "lm_head.weight" in shapes
    if form.draft_vocab is not None and not has_head:
        raise ValueError(
            f"its configuration has draft_vocab_size={form.draft_vocab}, which requires an lm_head of its own, but its "
            "weights have none"
        )
    with torch.device("meta"):
        module = DraftModule(form, config, vocab, "embed_tokens.weight" in shapes, has_head)
    _check_weights(module, shapes)
    dtype = next(target.model.parameters()).dtype
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                own = RENAMED.get(name, name)
                if own in shapes:
                    weight = stored.get_tensor(name)
                    weights[own] = weight.to(target.device, weight.dtype if own == "d2t" else dtype)
    if form.draft_vocab is not None:
        _check_map(weights["d2t"], form.draft_vocab, vocab)
    module.load_state_dict(weights, assign=True)
    return Drafter(form, config, module.eval().requires_grad_(False), target)


def _check_weights(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    problems = []
    for kind, names in {"missing": wanted.keys() - shapes.keys(), "unexpected": shapes.keys() - wanted.keys()}.items():
        if names:
            problems.append(f"{kind} weights: {', '.join(sorted(names))}")
    wrong = [
        f"{name} {list(shapes[name])}, expected {list(wanted[name])}"
        for name in sorted(wanted.keys() & shapes.keys())
        if wanted[name] != tuple(shapes[name])
    ]
    if wrong:
        problems.append(f"wrong shapes: {'; '.join(wrong)}")
    if problems:
        raise ValueError("; ".join(problems))


def _check_map(d2t: Tensor, known: int, vocab: int) -> None:
    """Raise ValueError unless token i of the drafter maps to a distinct token i + d2t[i] of the target."""
    if d2t.dtype != torch.int64:
        raise ValueError(f"d2t must be int64; got {d2t.dtype}")
    ids = torch.arange(known, device=d2t.device) + d2t
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < known:
        raise ValueError(f"d2t must map the drafter's {known} tokens to distinct ones among the target's {vocab}")


def _mask_embedding(file: str, form: DraftForm, allow_pickle: bool) -> Tensor:
    if not allow_pickle:
        raise ValueError(f"it has a {MASK_FILE}, which is a pickle: pass allow_pickle=True to read the tensors in it")
    content = torch.load(file, map_location="cpu", weights_only=True)
    embedding = content.get("embedding") if isinstance(content, Mapping) else None
    width = form.layers["hidden_size"]
    shapes = {(width,), (1, width), (form.block_size - 1, width)}
    if not isinstance(embedding, Tensor) or tuple(embedding.shape) not in shapes:
        raise ValueError(
            f"{MASK_FILE} must contain a tensor 'embedding' of shape [{width}] or [{form.block_size - 1}, {width}]"
        )
    return embedding[0] if embedding.shape[0] == 1 and embedding.dim() == 2 else embedding
