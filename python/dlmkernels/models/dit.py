# SPDX-License-Identifier: Apache-2.0
"""The transformer that SEDD, MDLM, BD3-LM, Duo and LangFlow share: every layer is modulated by the noise level.

DiT (Peebles and Xie, arXiv:2212.09748) with rotary positions, as SEDD (Lou et al., arXiv:2310.16834) first used it for
text. The modules have the names under which all five publish their weights, behind the prefix `backbone.`. What differs
between them is in `DiTConfig`: which number tells the noise level, what is made of the last layer's output, and what a
position sees.
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

#: What the time embedding is made of: how many frequencies, and the longest period.
FREQUENCIES, LONGEST = 128, 10_000
ROPE_BASE = 10_000
NORM_EPS = 1e-5

TIMES = ("sigma", "none", "gamma")
HEADS = ("logits", "score", "flow")
NOISES = ("loglinear", "gumbel")


class DiTConfig(PreTrainedConfig):
    """Sizes of a `DiTForDiffusionLM`, and what it is told and tells.

    Attributes
    ----------
    vocab_size : int
        Columns of the head, the mask's among them where there is one.
    hidden_size, cond_dim, num_hidden_layers, num_attention_heads, max_position_embeddings : int
        The feed-forward layers have four times the hidden size; `cond_dim` is the width of the time embedding.
    block_size : int, optional
        Length of the blocks of BD3-LM: a position sees its own block and those before it. None: everything.
    time : {"sigma", "none", "gamma"}
        What number the model is told: the total noise sigma = -ln(alpha) (SEDD, Duo, MDLM where it is conditioned on
        time), none (MDLM and BD3-LM as published, whose time embedding is that of 0), or gamma, the logarithm of noise
        power over signal power (LangFlow).
    head : {"logits", "score", "flow"}
        logits: those of the clean token. score: logarithms of SEDD's concrete score, scaled by the noise level. flow:
        LangFlow's logits, to which the noisy embeddings add their products with the embedding table.
    noise : {"loglinear", "gumbel"}
        Schedule. loglinear: alpha = 1 - (1 - noise_eps) t. gumbel: quantiles of gamma, see `GumbelSchedule`.
    noise_eps : float
    self_conditioning : bool
        Whether the input takes in the mean embeddings under what the last forward said.
    normalized_embedding : bool
        Whether embeddings are rows of the table brought to length sqrt(hidden_size).
    clean_context : bool
        Of LangFlow: whether the model was trained with given tokens (a prompt) free of noise, as in DiffuSeq (Gong et
        al., arXiv:2210.08933). False, as published: given tokens have as much noise as the others.
    gumbel_loc, gumbel_scale, gumbel_cutoff : float
        Of the schedule before training; location and scale of a checkpoint are among its weights.
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
    """Raise ValueError, naming the field, if a configuration is of no model that can be built."""
    for name, allowed in (("time", TIMES), ("head", HEADS), ("noise", NOISES)):
        if getattr(config, name) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"config.{name} must be {expected}; got {getattr(config, name)!r}")
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(
            f"config.hidden_size must be an even multiple of num_attention_heads; got {hidden} and {heads}"
        )
    if (config.time == "gamma") != (config.head == "flow") or (config.noise == "gumbel") != (config.head == "flow"):
        raise ValueError(
            "config.head='flow', time='gamma' and noise='gumbel' belong together; got "
            f"{config.head!r}, {config.time!r} and {config.noise!r}"
        )


# --- parts -----------------------------------------------------------------------------------------------------------


class TokenTable(nn.Module):
    """The embedding table, a bare parameter; with `normalized`, of rows of length sqrt(hidden)."""

    def __init__(self, rows: int, width: int, normalized: bool):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))
        self.embedding_dim, self.normalized = width, normalized

    @property
    def weight(self) -> Tensor:
        """The rows that tokens are embedded as, `[V, hidden]`."""
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
    """A linear layer that begins training at zero."""


class TimeEmbedding(nn.Module):
    """Cosines and sines of a number through two layers; always in float32, whatever the weights are."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        """`[B, width]` of levels float32 `[B]`."""
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=level.device)
        angle = level.float()[:, None] * torch.exp(-math.log(LONGEST) * k / FREQUENCIES)
        x = torch.cat((angle.cos(), angle.sin()), -1)
        with torch.autocast(level.device.type, enabled=False):
            return self._linear(2, F.silu(self._linear(0, x)))

    def _linear(self, i: int, x: Tensor) -> Tensor:
        layer: Any = self.mlp[i]
        return F.linear(x, layer.weight.float(), layer.bias.float())


class Norm(nn.Module):
    """LayerNorm with a weight and no bias, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), eps=NORM_EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a norm gives, shifted and scaled by the noise level: `[B, Q, hidden]` in `dtype`."""
    return (x * (1 + scale) + shift).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, H, Q, D]`: element i turns with element i + D / 2, by angles `[B, 1, Q, D / 2]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' attention interface in two products, for attn_implementation="eager"."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Block(nn.Module):
    """Attention and a feed-forward layer. The noise level modulates what they read, and gates what they add."""

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
    """The last norm with its modulation, and the head."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = Norm(config.hidden_size)
        self.linear = Zeroed(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = Zeroed(config.cond_dim, 2 * config.hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """What the head reads, `[B, Q, hidden]`."""
        dtype = self.linear.weight.dtype
        shift, scale = self.adaLN_modulation(c.to(dtype))[:, None].chunk(2, -1)
        return modulated(self.norm_final(x), shift, scale, dtype)


class GumbelSchedule(nn.Module):
    """LangFlow's schedule: gamma as a quantile of a Gumbel distribution whose location and scale were learnt."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(config.gumbel_loc, device=None))
        self.scale = nn.Parameter(torch.tensor(config.gumbel_scale, device=None))
        self.cutoff = config.gumbel_cutoff

    def forward(self, q: Tensor) -> Tensor:
        """gamma at quantiles q, in their dtype; beyond the cutoff at either end it rests."""
        # the published program takes quantiles of torch's Gumbel distribution, whose uniform numbers end before 1
        q = q.clamp(self.cutoff, 1 - self.cutoff) * (1 - torch.finfo(torch.float32).eps)
        gamma = self.loc.to(q.dtype) - self.scale.to(q.dtype) * (-q.log()).log()
        # what the published program takes for the quantile 1 - cutoff
        most = self.loc.to(q.dtype) - self.scale.to(q.dtype) * math.log(self.cutoff)
        return torch.minimum(gamma, most)


class DiT(nn.Module):
    """Embeddings and noise levels in, hidden states out."""

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
        """Hidden states `[B, Q, hidden]` as the head reads them.

        Parameters
        ----------
        inputs_embeds : Tensor
            `[B, Q, hidden]`.
        level : Tensor
            float32 `[B]`: sigma or gamma of each row.
        position_ids : Tensor
            `[B, Q]`.
        attention_mask : Tensor, optional
            bool `[B, 1, Q, K]`.
        opinion : Tensor, optional
            `[B, Q, hidden]`, with self-conditioning: mean embeddings under what the last forward said; None: zeros.
        **how
            For the attention function.
        """
        x = inputs_embeds
        if self.config.self_conditioning:
            opinion = torch.zeros_like(x) if opinion is None else opinion.to(x.dtype)
            x = x + self.self_cond_proj(torch.cat((x, opinion), -1))
        c = F.silu(self.sigma_map(level))
        turns = self._turns(position_ids)
        # the residual stream stays in float32 where the branches have fewer bits
        x = x.float()
        for block in self.blocks:
            x = block(x, c, turns, attention_mask, **how)
        return BaseModelOutput(last_hidden_state=self.output_layer(x, c))

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding, float32 `[B, 1, Q, D / 2]`."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        i = torch.arange(half, dtype=torch.float32, device=positions.device)
        angle = positions[:, None, :, None].float() * ROPE_BASE ** (-i / half)
        return angle.cos(), angle.sin()


# --- the model -------------------------------------------------------------------------------------------------------


class DiTForDiffusionLM(PreTrainedModel):
    """The published models of SEDD, MDLM, BD3-LM, Duo and LangFlow, as `DiTConfig` says which."""

    config_class = DiTConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    # what can be computed, and what serves training alone
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
        """As published: modulations and the head begin at zero."""
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
        """What the model is told at diffusion time `time` `[B]`, from 1 (noise) to 0: sigma, 0 or gamma, float32."""
        if self.config.noise == "gumbel":
            return self.proposal(time.double()).float()
        if self.config.time == "none":
            return torch.zeros_like(time, dtype=torch.float32)
        return -torch.log1p(-(1 - self.config.noise_eps) * time.double()).float()

    def gamma(self, time: Tensor) -> Tensor:
        """The logarithm of noise power over signal power at quantiles `time`, in their dtype."""
        return self.proposal(time)

    def latent_table(self) -> Tensor:
        """What each token is in the space that noise is added in, `[V, hidden]`."""
        return self.backbone.vocab_embed.weight

    def readable(self, hidden: Tensor, level: Tensor, inputs_embeds: Tensor) -> Tensor:
        """What `head` reads: the hidden states `[B, Q, hidden]`, and beside them what the noise level adds to logits.

        score: one more column, the logarithm that scales the score. flow: as many columns again, the noisy embeddings
        times alpha / sigma^2.
        """
        if self.config.head == "score":
            scale = -torch.log(torch.expm1(level)) - math.log(self.config.vocab_size - 1)
            return torch.cat((hidden, scale.to(hidden.dtype)[:, None, None].expand(*hidden.shape[:2], 1)), -1)
        if self.config.head == "flow":
            factor = ((F.softplus(-level) - level) / 2).exp()[:, None, None]
            return torch.cat((hidden, (factor * inputs_embeds).to(hidden.dtype)), -1)
        return hidden

    def head_matrix(self) -> tuple[Tensor, Tensor] | None:
        """The head as one matrix for all that `readable` returns, and its bias; None where it is no such thing."""
        if self.config.head != "flow":
            return None
        linear = self.backbone.output_layer.linear
        return torch.cat((linear.weight, self.backbone.vocab_embed.weight), 1), linear.bias

    def head(self, readable: Tensor) -> Tensor:
        """Logits `[…, V]` of what `readable` returns."""
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
        """Logits, or logarithms of the concrete score, of every position.

        Parameters
        ----------
        input_ids : Tensor, optional
            int64 `[B, T]`.
        timesteps : Tensor, optional
            float `[B]`: sigma or gamma of each row, whichever `config.time` says. Without effect where that is "none".
        attention_mask : Tensor, optional
            `[B, T]`, 0 for padding; or bool `[B, 1, T, T]`, what each position sees. None: everything; with
            `config.block_size` its own block and those before it.
        inputs_embeds : Tensor, optional
            `[B, T, hidden]` in place of `input_ids`.
        position_ids : Tensor, optional
            `[B, T]`. None: 0, 1, ….
        self_condition : Tensor, optional
            `[B, T, hidden]`: mean embeddings under what the last forward said.

        Returns
        -------
        MaskedLMOutput
            `logits` `[B, T, V]`. Those of a score are 0 at the token that stands there.

        Raises
        ------
        ValueError
            When the noise level is missing or of the wrong shape, or neither or both of ids and embeddings are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
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
            raise ValueError(f"timesteps must be given: {name} of each row, float of shape [{len(x)}]")
        if not isinstance(timesteps, Tensor) or timesteps.shape != (len(x),):
            got = list(timesteps.shape) if isinstance(timesteps, Tensor) else type(timesteps).__name__
            raise ValueError(f"timesteps must be {name} of each row, a tensor of shape [{len(x)}]; got {got}")
        return timesteps.float()

    def _visible(self, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """What each position sees, bool `[B, 1, T, T]`; None: everything."""
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
        # padding sees itself, so that no row sees nothing
        here = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return (is_token if visible is None else is_token & visible) | here
