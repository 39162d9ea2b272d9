# SPDX-License-Identifier: Apache-2.0
"""The transformer shared by SEDD, MDLM, BD3-LM, Duo and LangFlow, in which the noise level modulates every layer.

It is DiT (Peebles and Xie, arXiv:2212.09748) with rotary positions, first used for text by SEDD (Lou et al.,
arXiv:2310.16834). The module names are those under which all five publish their weights, with the prefix `backbone.`.
`DiTConfig` selects what differs between them: how the noise level is expressed, how the head uses the last layer's
output, and what a position attends to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Number of frequencies and longest period of the time embedding.
FREQUENCIES, LONGEST = 128, 10_000
ROPE_BASE = 10_000
NORM_EPS = 1e-5

TIMES = ("sigma", "none", "gamma")
HEADS = ("logits", "score", "flow")
NOISES = ("loglinear", "gumbel")


class DiTConfig(PreTrainedConfig):
    """Configuration of a `DiTForDiffusionLM`: its sizes, the form of its noise level, and its head.

    Attributes
    ----------
    vocab_size : int
        Number of logits per position, including the mask token's if there is one.
    hidden_size, cond_dim, num_hidden_layers, num_attention_heads, max_position_embeddings : int
        `cond_dim` is the width of the time embedding. The width of the feed-forward layers is 4 * `hidden_size`.
    block_size : int, optional
        Block length of BD3-LM, in which a position attends to its own block and earlier ones. If None, all positions
        are attended to.
    time : {"sigma", "none", "gamma"}
        How the noise level is passed to the model. "sigma": the total noise, sigma = -ln(alpha) (SEDD, Duo, and MDLM
        with time conditioning). "none": not at all; the time embedding is always that of 0 (MDLM and BD3-LM as
        published). "gamma": the logarithm of noise power over signal power (LangFlow).
    head : {"logits", "score", "flow"}
        What the model outputs. "logits": logits of the clean token. "score": logarithms of SEDD's concrete score,
        scaled by the noise level. "flow": LangFlow's logits, which include products of the noisy embeddings and the
        embedding table.
    noise : {"loglinear", "gumbel"}
        Noise schedule. "loglinear": alpha = 1 - (1 - noise_eps) t. "gumbel": quantiles of gamma, see `GumbelSchedule`.
    noise_eps : float
        Signal that remains at t = 1 in the "loglinear" schedule.
    self_conditioning : bool
        Whether the input includes the mean embeddings under the distributions that the previous forward pass predicted.
    normalized_embedding : bool
        Whether embeddings are rows of the table scaled to length sqrt(hidden_size).
    clean_context : bool
        LangFlow only: whether the model was trained with noise-free given tokens (a prompt), as in DiffuSeq (Gong et
        al., arXiv:2210.08933). If False, as published, given tokens are as noisy as the others.
    gumbel_loc, gumbel_scale, gumbel_cutoff : float
        Parameters of the "gumbel" schedule. The location and scale are initial values; a checkpoint's weights include
        the trained ones.
    """

    model_type = "dlm_dit"

    vocab_size: int = 50258
    hidden_size: int = 768
    cond_dim: int = 128
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    block_size: int | None = None
    time: str = "sigma"
    head: str = "logits"
    noise: str = "loglinear"
    noise_eps: float = 1e-3
    self_conditioning: bool = False
    normalized_embedding: bool = False
    clean_context: bool = False
    gumbel_loc: float = 4.723
    gumbel_scale: float = 0.852
    gumbel_cutoff: float = 1e-5
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False


def check_config(config: DiTConfig) -> None:
    """Raise ValueError, naming the field, if a configuration is invalid."""
    for name, allowed in (("time", TIMES), ("head", HEADS), ("noise", NOISES)):
        if getattr(config, name) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"config.{name} must be {expected}; got {getattr(config, name)!r}")
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(
            "config.hidden_size must be an even multiple of num_attention_heads; got "
            f"hidden_size={hidden} and num_attention_heads={heads}"
        )
    if (config.time == "gamma") != (config.head == "flow") or (config.noise == "gumbel") != (config.head == "flow"):
        raise ValueError(
            "config.head='flow', time='gamma' and noise='gumbel' must be used together; got "
            f"head={config.head!r}, time={config.time!r} and noise={config.noise!r}"
        )


# --- parts -----------------------------------------------------------------------------------------------------------


class TokenTable(nn.Module):
    """The embedding table, stored as a bare parameter. If `normalized`, rows are scaled to length sqrt(hidden)."""

    def __init__(self, rows: int, width: int, normalized: bool):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))
        self.embedding_dim, self.normalized = width, normalized

    @property
    def weight(self) -> Tensor:
        """Embeddings of all tokens, `[V, hidden]`, after normalization if any."""
        if not self.normalized:
            return self.embedding
        rows = F.normalize(self.embedding.float(), dim=-1) * math.sqrt(self.embedding_dim)
        return rows.to(self.embedding.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.embedding)
        if not self.normalized:
            return rows
        return (F.normalize(rows.float(), dim=-1) * math.sqrt(self.embedding_dim)).to(rows.dtype)


class Zeroed(nn.Linear):
    """A linear layer whose weights are initialized to zero."""


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the noise level, followed by two layers; computed in float32 for weights of any dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        """Return embeddings `[B, width]` of noise levels float32 `[B]`."""
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=level.device)
        angle = level.float()[:, None] * torch.exp(-math.log(LONGEST) * k / FREQUENCIES)
        x = torch.cat((angle.cos(), angle.sin()), -1)
        with torch.autocast(level.device.type, enabled=False):
            return self._linear(2, F.silu(self._linear(0, x)))

    def _linear(self, i: int, x: Tensor) -> Tensor:
        layer: Any = self.mlp[i]
        return F.linear(x, layer.weight.float(), layer.bias.float())


class Norm(nn.Module):
    """LayerNorm with a weight but no bias, computed in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), eps=NORM_EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Modulate a norm's output by the noise level's shift and scale; return `[B, Q, hidden]` in `dtype`."""
    return (x * (1 + scale) + shift).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to `[B, H, Q, D]`: rotate elements i and i + D / 2 by angles `[B, 1, Q, D / 2]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention with plain matrix products, for attn_implementation="eager" (transformers' interface)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Block(nn.Module):
    """Attention and a feed-forward layer. The noise level modulates their inputs and gates their outputs."""

    is_causal = False

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_idx, self.num_heads = config, index, config.num_attention_heads
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = Zeroed(config.cond_dim, 6 * width)

    def forward(self, x: Tensor, c: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None, **how: Any) -> Tensor:
        dtype = self.attn_qkv.weight.dtype
        (shift, scale, gate), (shift_mlp, scale_mlp, gate_mlp) = (
            part.chunk(3, -1) for part in self.adaLN_modulation(c.to(dtype))[:, None].chunk(2, -1)
        )
        added = self.attend(modulated(self.norm1(x), shift, scale, dtype), turns, mask, **how)
        x = x + gate * added
        return x + gate_mlp * self.mlp(modulated(self.norm2(x), shift_mlp, scale_mlp, dtype))

    def attend(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None, **how: Any) -> Tensor:
        q, k, v = self.attn_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        out, _ = attention(
            self, rotate(q, *turns), rotate(k, *turns), v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0, **how
        )
        return self.attn_out(out.flatten(2))


class OutputLayer(nn.Module):
    """The final norm with its modulation, and the head."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = Norm(config.hidden_size)
        self.linear = Zeroed(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = Zeroed(config.cond_dim, 2 * config.hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the modulated final norm, the head's input, `[B, Q, hidden]`."""
        dtype = self.linear.weight.dtype
        shift, scale = self.adaLN_modulation(c.to(dtype))[:, None].chunk(2, -1)
        return modulated(self.norm_final(x), shift, scale, dtype)


class GumbelSchedule(nn.Module):
    """LangFlow's schedule: gamma is a quantile of a Gumbel distribution with learned location and scale."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(config.gumbel_loc, device=None))
        self.scale = nn.Parameter(torch.tensor(config.gumbel_scale, device=None))
        self.cutoff = config.gumbel_cutoff

    def forward(self, q: Tensor) -> Tensor:
        """Return gamma at quantiles q, in their dtype; it is constant beyond the cutoff at either end."""
        # The published code uses torch's Gumbel distribution, which clamps quantiles to just below 1.
        q = q.clamp(self.cutoff, 1 - self.cutoff) * (1 - torch.finfo(torch.float32).eps)
        gamma = self.loc.to(q.dtype) - self.scale.to(q.dtype) * (-q.log()).log()
        # the value that the published code uses at the quantile 1 - cutoff
        most = self.loc.to(q.dtype) - self.scale.to(q.dtype) * math.log(self.cutoff)
        return torch.minimum(gamma, most)


class DiT(nn.Module):
    """The transformer, from embeddings and noise levels to hidden states."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.vocab_embed = TokenTable(config.vocab_size, width, config.normalized_embedding)
        self.sigma_map = TimeEmbedding(config.cond_dim)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.output_layer = OutputLayer(config)
        if config.self_conditioning:
            self.self_cond_proj = Zeroed(2 * width, width, bias=False)

    def forward(
        self, inputs_embeds: Tensor, level: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None,
        opinion: Tensor | None = None, **how: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Return the hidden states `[B, Q, hidden]`, after the final norm.

        Parameters
        ----------
        inputs_embeds : Tensor
            `[B, Q, hidden]`: input embeddings.
        level : Tensor
            float32 `[B]`: noise level of each batch row, sigma or gamma.
        position_ids : Tensor
            `[B, Q]`: positions.
        attention_mask : Tensor, optional
            bool `[B, 1, Q, K]`: positions that each position attends to.
        opinion : Tensor, optional
            `[B, Q, hidden]`, for self-conditioning: mean embeddings under the distributions that the previous forward
            pass predicted. If None, zeros.
        **how
            Further arguments of the attention function.
        """
        x = inputs_embeds
        if self.config.self_conditioning:
            opinion = torch.zeros_like(x) if opinion is None else opinion.to(x.dtype)
            x = x + self.self_cond_proj(torch.cat((x, opinion), -1))
        c = F.silu(self.sigma_map(level))
        turns = self._turns(position_ids)
        # The residual stream stays in float32 even if the branches use fewer bits.
        x = x.float()
        for block in self.blocks:
            x = block(x, c, turns, attention_mask, **how)
        return BaseModelOutput(last_hidden_state=self.output_layer(x, c))

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the rotary embedding, each float32 `[B, 1, Q, D / 2]`."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        i = torch.arange(half, dtype=torch.float32, device=positions.device)
        angle = positions[:, None, :, None].float() * ROPE_BASE ** (-i / half)
        return angle.cos(), angle.sin()


# --- the model -------------------------------------------------------------------------------------------------------


class DiTForDiffusionLM(PreTrainedModel):
    """The published models of SEDD, MDLM, BD3-LM, Duo and LangFlow; `DiTConfig` selects which."""

    config_class = DiTConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    # weights that can be recomputed or are used only in training
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"rotary_emb\.inv_freq", r"sampling_eps_(min|max)", r"proposal\.entropy"
    ]  # fmt: skip

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        check_config(config)
        self.backbone = DiT(config)
        if config.noise == "gumbel":
            self.proposal = GumbelSchedule(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as published: modulations and the head start at zero."""
        if isinstance(module, nn.Linear):
            (nn.init.zeros_ if isinstance(module, Zeroed) else nn.init.xavier_uniform_)(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenTable):
            nn.init.kaiming_uniform_(module.embedding, a=math.sqrt(5))
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def set_input_embeddings(self, value: Any) -> None:
        self.backbone.vocab_embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def level(self, time: Tensor) -> Tensor:
        """Return the noise level float32 `[B]` (sigma, 0 or gamma) at diffusion times `[B]`, from 1 (noise) to 0."""
        if self.config.noise == "gumbel":
            return self.proposal(time.double()).float()
        if self.config.time == "none":
            return torch.zeros_like(time, dtype=torch.float32)
        return -torch.log1p(-(1 - self.config.noise_eps) * time.double()).float()

    def gamma(self, time: Tensor) -> Tensor:
        """Return the logarithm of noise power over signal power at quantiles `time`, in their dtype."""
        return self.proposal(time)

    def latent_table(self) -> Tensor:
        """Return each token's vector in the space in which noise is added, `[V, hidden]`."""
        return self.backbone.vocab_embed.weight

    def readable(self, hidden: Tensor, level: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Return the input of `head`: the hidden states `[B, Q, hidden]`, and columns that depend on the noise level.

        For head "score", there is one additional column with the logarithm that scales the score. For "flow", there are
        `hidden` additional columns: the noisy embeddings times alpha / sigma^2.
        """
        if self.config.head == "score":
            scale = -torch.log(torch.expm1(level)) - math.log(self.config.vocab_size - 1)
            return torch.cat((hidden, scale.to(hidden.dtype)[:, None, None].expand(*hidden.shape[:2], 1)), -1)
        if self.config.head == "flow":
            factor = ((F.softplus(-level) - level) / 2).exp()[:, None, None]
            return torch.cat((hidden, (factor * inputs_embeds).to(hidden.dtype)), -1)
        return hidden

    def head_matrix(self) -> tuple[Tensor, Tensor] | None:
        """Return the head as one matrix for the output of `readable`, and its bias; None unless the head is "flow"."""
        if self.config.head != "flow":
            return None
        linear = self.backbone.output_layer.linear
        return torch.cat((linear.weight, self.backbone.vocab_embed.weight), 1), linear.bias

    def head(self, readable: Tensor) -> Tensor:
        """Return the logits `[…, V]` for the output of `readable`."""
        linear, width = self.backbone.output_layer.linear, self.config.hidden_size
        if self.config.head == "logits":
            return linear(readable)
        logits, rest = linear(readable[..., :width]), readable[..., width:]
        return logits + (rest if self.config.head == "score" else F.linear(rest, self.backbone.vocab_embed.weight))

    def forward(
        self, input_ids: Tensor | None = None, timesteps: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None, self_condition: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        """Compute the logits, or the logarithms of the concrete score, for every position.

        Parameters
        ----------
        input_ids : Tensor, optional
            int64 `[B, T]`: tokens.
        timesteps : Tensor, optional
            float `[B]`: noise level of each batch row, sigma or gamma according to `config.time`. Ignored if that is
            "none".
        attention_mask : Tensor, optional
            `[B, T]`, 0 for padding; or bool `[B, 1, T, T]`, the positions that each position attends to. If None, all
            positions are attended to or, with `config.block_size`, a position's own block and earlier ones.
        inputs_embeds : Tensor, optional
            `[B, T, hidden]`: input embeddings, in place of `input_ids`.
        position_ids : Tensor, optional
            `[B, T]`: positions. If None, 0, 1, ….
        self_condition : Tensor, optional
            `[B, T, hidden]`: mean embeddings under the distributions that the previous forward pass predicted.

        Returns
        -------
        MaskedLMOutput
            `logits` `[B, T, V]`. With head "score", the entry of a position's current token is 0 if `input_ids` is
            given.

        Raises
        ------
        ValueError
            If the noise level is missing or of the wrong shape, `attention_mask` has the wrong shape, or not exactly
            one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds must be given; got "
                f"{'neither' if input_ids is None else 'both'}"
            )
        x = self.backbone.vocab_embed(input_ids) if inputs_embeds is None else inputs_embeds
        level = self._checked_level(timesteps, x)
        positions = torch.arange(x.shape[1], device=x.device) if position_ids is None else position_ids
        positions = positions.expand(x.shape[:2])
        mask = self._visible(x, attention_mask)
        hidden = self.backbone(x, level, positions, mask, self_condition).last_hidden_state
        logits = self.head(self.readable(hidden, level, x))
        if self.config.head == "score" and input_ids is not None:
            logits = logits.scatter(-1, input_ids[..., None], 0.0)
        return MaskedLMOutput(logits=logits)

    def _checked_level(self, timesteps: Tensor | None, x: Tensor) -> Tensor:
        name = self.config.time
        if name == "none":
            return torch.zeros(len(x), dtype=torch.float32, device=x.device)
        if timesteps is None:
            raise ValueError(f"timesteps must be {name} of each batch row, float of shape [{len(x)}]; got None")
        if not isinstance(timesteps, Tensor) or timesteps.shape != (len(x),):
            got = list(timesteps.shape) if isinstance(timesteps, Tensor) else type(timesteps).__name__
            raise ValueError(f"timesteps must be {name} of each batch row, a tensor of shape [{len(x)}]; got {got}")
        return timesteps.float()

    def _visible(self, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Return which positions each position attends to, bool `[B, 1, T, T]`, or None for all."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask.bool()
        visible = None
        if self.config.block_size is not None:
            block = torch.arange(x.shape[1], device=x.device) // self.config.block_size
            visible = (block[:, None] >= block)[None, None]
        if attention_mask is None:
            return visible if visible is None else visible.expand(len(x), -1, -1, -1)
        if attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {list(x.shape[:2])}, or [B, 1, T, T]; got {list(attention_mask.shape)}"
            )
        is_token = (attention_mask != 0)[:, None, None, :]
        # Padding attends to itself, so that no attention row is empty.
        here = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return (is_token if visible is None else is_token & visible) | here
