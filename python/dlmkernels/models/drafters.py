# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters: small models that guess the next tokens of a causal one, their target, all at once.

A drafter has no embedding and usually no head, those are the target's. Of the text it sees what some layers of the
target have made of it: one vector a token, from which every layer of the drafter makes a key and a value, kept in its
cache. What it forwards is a block, the last token and masks behind it. Formulas: DFlash (arXiv:2602.06036), DSpark
(arXiv:2607.05147), and the programs that they were published with.
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
from .checkpoint import QUIET, WHERE, locate, read_object, weight_files, weight_shapes
from .draft_forms import DraftForm, read_form

#: how others name what we name otherwise
RENAMED = {
    "encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight",
    "candidate_selector.predecessor_codebook.weight": "candidate_selector.predecessor_codebook",
    "candidate_selector.successor_codebook.weight": "candidate_selector.successor_codebook",
}  # fmt: skip
#: copies of the target's weights, and maps that say the same as `d2t`
NOT_NEEDED = {"verifier_norm.weight", "verifier_lm_head.weight", "t2d"}
MASK_FILE = "mask_embedding.pt"


class Convolution(nn.Module):
    """DFlash 2: the taps before and after a sublayer, whose kernels depend on the sublayer's input."""

    def __init__(self, width: int, taps: int, group: int):
        super().__init__()
        self.taps, self.group = taps, group
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels `[B, W, taps, d]` of the sublayer's input and output, of the input `x` `[B, W, d]`."""
        change = self.kernel_projection(x).unflatten(-1, (2, self.taps, -1)).repeat_interleave(self.group, -1)
        kernels = self.base_kernel.to(x.dtype) + change
        return kernels[:, :, 0], kernels[:, :, 1]


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Row t of `x` `[B, W, d]` becomes the sum over o of kernel[t, o] x[t - o]; before the first row there is none."""
    return sum(
        (functional.pad(x, (0, 0, o, 0))[:, : x.shape[1]] * kernel[:, :, o] for o in range(kernel.shape[2])),
        torch.zeros_like(x),
    )


class Selector(nn.Module):
    """DFlash 2: scores of the likeliest tokens in each place, given the one before."""

    def __init__(self, vocab: int, width: int, rank: int):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.hidden_projection = nn.Linear(width, rank, bias=False)


class Markov(nn.Module):
    """DSpark: what the token before adds to the logits."""

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
        """What is added to the logits, `[B, known]`, of rows `hidden` `[B, d]` behind embeddings `before` `[B, rank]`.

        `memory` `[B, rank]`: what the row before has handed on, None at the first.
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
    """DSpark: an estimate of whether the target accepts a draft. It is read with the others, and not used."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DraftModule(nn.Module):
    """The weights of a drafter under their published names: stock layers of Qwen3, and what is added to them."""

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
    """A drafter and the target it drafts for; what `load_drafter` returns and `generate` takes.

    Attributes
    ----------
    form : DraftForm
        What its configuration says.
    module : Module
        Its weights.
    target : PreTrainedModel
        The model it drafts for, whose embeddings and head it borrows.
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
        # keys and values of all layers are products of the same vectors: one product makes them
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
        #: seconds of steps with so many rows and drafts, where they were measured
        self.costs: dict[tuple[int, int], Tensor] = {}
        #: what stands in for the embedding of the mask, `[d]` or one for each row of the block
        self.mask_embedding: Tensor | None = None

    def __repr__(self) -> str:
        form = self.form
        return f"<{form.kind} drafter of {form.drafts} tokens for {type(self.target).__name__}, taps {form.taps}>"

    def changed(self, **fields: Any) -> Drafter:
        """The same with other fields of its form, such as `taps`: for experiments, as it was trained with its own."""
        other = object.__new__(Drafter)
        other.__dict__.update(self.__dict__, form=replace(self.form, **fields), costs={})
        return other

    # --- forwards ---------------------------------------------------------------------------------------------------

    def inject(self, taps: Tensor, slots: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Write keys and values of text into the cache, of what the tapped layers have made of it `[B, K, n d]`.

        `slots` int32 `[B, K]`: where they go, -1 nowhere; `positions` int64 `[B, K]`: their places in the text.
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
        """Hidden states `[B, W, d]` of the block whose first token is `anchor` int64 `[B]`, masks behind it.

        Its rows stand at `positions` int64 `[B, W]` and write into the window's slots.
        """
        module = self.module
        x = self._block(anchor, positions.shape[1])
        rotations = self._rotary(x, positions)
        causal = replace(window, causal_block=1)
        for layer, is_causal in zip(module.layers, self.form.causal):
            x = _forward_layer(layer, x, rotations, causal if is_causal else window)
        return module.norm(x)

    def _block(self, anchor: Tensor, rows: int) -> Tensor:
        """Embeddings `[B, W, d]`: rows of the table as they are, whatever the target's own module does with them."""
        mask = self._table[self.form.mask_token_id]
        if self.mask_embedding is not None:
            mask = self.mask_embedding.to(mask.dtype)
            mask = mask[: rows - 1] if mask.dim() == 2 else mask
        first = functional.embedding(anchor, self._table)[:, None]
        x = torch.cat((first, mask.expand(len(anchor), rows - 1, -1)), 1)
        return (x * self.form.embedding_scale).to(self.module.norm.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, known]` of hidden states `[N, d]`, of the tokens that its head knows."""
        logits = self._head(hidden)
        if self.form.output_multiplier != 1.0:
            logits = logits * self.form.output_multiplier
        if self.form.softcap > 0:
            logits = torch.tanh(logits / self.form.softcap) * self.form.softcap
        return logits

    def of_all(self, logits: Tensor) -> Tensor:
        """Logits `[N, V]` of the target's tokens, of those that the head knows; minus infinity for the others."""
        if self._ids is None:
            return logits
        full = torch.full((len(logits), self.vocab), -torch.inf, dtype=logits.dtype, device=logits.device)
        return full.index_copy_(1, self._ids, logits)

    @property
    def is_sequential(self) -> bool:
        """Whether what a draft is likely to be depends on the drafts before it."""
        return self.form.markov is not None or self.form.selector is not None

    def given(
        self, logits: Tensor, hidden: Tensor, before: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits `[B, V]` of a row with those of `logits`, behind the tokens int64 `[B]`; and what is handed on."""
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
    """A stock layer, and the convolutions around its sublayers if it has them."""
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
    """A target whose forwards leave behind what some of its layers put out.

    Attributes
    ----------
    model : DiffusionModel
        The same as the target, with parameters shared.
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

        # of the twin that this object alone decodes with, not of the user's module
        layer.__dict__["forward"] = noted

    def take(self) -> Tensor:
        """What the layers have put out in the last forward, side by side, `[B, Q, n d]`."""
        found = torch.cat([self._found[index] for index in self._taps], -1)
        self._found.clear()
        return found


def layers_of(target: DiffusionModel) -> nn.ModuleList:
    """The layers of the modules that decode.

    Raises
    ------
    ValueError
        When they cannot be found.
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
    """Load a block-diffusion drafter for a causal model, for `generate(target, …, drafter=drafter)`.

    Parameters
    ----------
    path_or_id : str or path
        A local folder or a hub id, with `config.json` and weights in safetensors: DFlash, DFlash 2, DSpark, the
        speculators library's form of these, or transformers' MuseGlimmerAssistant. "demo-drafter" is the one that
        comes with the package, for `dlmkernels.load("demo-causal")`.
    target : PreTrainedModel or DiffusionModel
        The causal model that it drafts for, of a known architecture. Its embeddings and its head are borrowed; it is
        not changed.
    mask_token_id : int, optional
        The token that stands for a mask, where the configuration does not say or says wrong.
    allow_pickle : bool
        Also read `mask_embedding.pt` with `torch.load(weights_only=True)`, where there is one.
    **where
        `revision`, `token`, `cache_dir` and the like, as in `load`.

    Returns
    -------
    Drafter
        In the target's dtype, on its device.

    Raises
    ------
    TypeError
        When an argument is unknown or of the wrong kind.
    ValueError
        When there is no such checkpoint, its form is not known, a field of its configuration is missing, out of range
        or not implemented, it does not fit the target, or weights are missing, unexpected or of another shape.

    Notes
    -----
    No code of the checkpoint is run. The layers are those of transformers' Qwen3.
    """
    for name in where:
        if name not in WHERE:
            raise TypeError(f"load_drafter takes no {name}; beside its own arguments it takes {', '.join(WHERE)}")
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
    except Exception as error:  # what the stock configurations raise has no common base
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):
            said = f"it lacks {said}"
        raise ValueError(f"path_or_id: the drafter at '{path}' cannot be loaded: {said}") from error
    return drafter


def _check_target(target: DiffusionModel) -> None:
    """Refuse what cannot be drafted for."""
    name = type(target.model).__name__
    if type(target) is not DiffusionModel or not target.reuses_kv:
        raise ValueError(f"target must be a causal model of a known type with one stack of layers; got {name}")
    if not type(target.model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"target must be a causal language model; got {name}")


def _build(
    form: DraftForm, path: str, where: Mapping[str, Any], target: DiffusionModel, vocab: int
) -> Drafter:  # fmt: skip
    """The drafter, its weights checked: nothing may be missing, left over or of another shape."""
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
        raise ValueError(f"its configuration has hidden_size={config.hidden_size}; the target's is {width}")
    has_head = "lm_head.weight" in shapes
    if form.draft_vocab is not None and not has_head:
        raise ValueError(f"its configuration has draft_vocab_size={form.draft_vocab}, and it has no lm_head of its own")
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
    """Token i of the drafter is token i + d2t[i] of the target, another for each."""
    if d2t.dtype != torch.int64:
        raise ValueError(f"d2t must be int64; got {d2t.dtype}")
    ids = torch.arange(known, device=d2t.device) + d2t
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) < known:
        raise ValueError(f"d2t must lead to {known} different tokens of the target's {vocab}")


def _mask_embedding(file: str, form: DraftForm, allow_pickle: bool) -> Tensor:
    if not allow_pickle:
        raise ValueError(f"it has a {MASK_FILE}, a pickle: pass allow_pickle=True, with which its tensors are read")
    content = torch.load(file, map_location="cpu", weights_only=True)
    embedding = content.get("embedding") if isinstance(content, Mapping) else None
    width = form.layers["hidden_size"]
    shapes = {(width,), (1, width), (form.block_size - 1, width)}
    if not isinstance(embedding, Tensor) or tuple(embedding.shape) not in shapes:
        raise ValueError(f"{MASK_FILE} must hold 'embedding' of shape [{width}] or [{form.block_size - 1}, {width}]")
    return embedding[0] if embedding.shape[0] == 1 and embedding.dim() == 2 else embedding
