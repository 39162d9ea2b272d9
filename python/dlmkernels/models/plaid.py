# SPDX-License-Identifier: Apache-2.0
"""Plaid (Gulrajani and Hashimoto, arXiv:2305.18619): a transformer on low-dimensional noisy embeddings.

Noise is added to unit-length embeddings in a space of about 16 dimensions, with a learned schedule. The module names
are those of the four published weight files: `noise_schedule`, `gamma_bounds`, `embedding_matrix` and `model`, the last
of which has the prefix `backbone.` here.
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

from .dit import ROPE_BASE, Norm, plain_attention, rotate

#: Number of frequencies of the time embedding, which range from exp(-5) to exp(5).
FREQUENCIES, REACH = 32, 5.0
#: Epsilon of the root-mean-square norms.
EPS = 1e-5
#: Reference width for the scaling of the head.
HEAD_WIDTH = 256
HIDDEN_UNITS = 1024


class PlaidConfig(PreTrainedConfig):
    """Configuration of a `PlaidForDiffusionLM`.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings : int
        Sizes of the transformer.
    embed_dim : int
        Number of dimensions of the space in which noise is added.
    gamma_0, gamma_1 : float
        Initial values of the ends of the noise schedule. A checkpoint's weights include the trained ones.
    """

    model_type = "dlm_plaid"

    vocab_size: int = 32768
    hidden_size: int = 2048
    embed_dim: int = 16
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    max_position_embeddings: int = 1024
    gamma_0: float = -3.0
    gamma_1: float = 6.0
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    #: how the noise level is passed to the model, as in `dit.DiTConfig`
    time: str = "gamma"


class RootMeanSquare(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(self.weight.dtype)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and a feed-forward layer, whose outputs are scaled by 1 / sqrt(number of layers) before being added."""

    is_causal = False

    def __init__(self, config: PlaidConfig, index: int):
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_idx, self.num_heads = config, index, config.num_attention_heads
        self.share = config.num_hidden_layers**-0.5
        self.rmsnorm1 = RootMeanSquare(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.rmsnorm2 = RootMeanSquare(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None, **how: Any) -> Tensor:
        q, k, v = self.attn_qkv(self.rmsnorm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        out, _ = attention(
            self, rotate(q, *turns), rotate(k, *turns), v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0, **how
        )
        x = x + self.share * self.attn_out(out.flatten(2))
        return x + self.share * self.mlp(self.rmsnorm2(x))


class Readout(nn.Module):
    """The head. Its input is scaled by 256 / width (maximal update parametrization)."""

    def __init__(self, config: PlaidConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.scale = HEAD_WIDTH / config.hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * x, self.weight, self.bias)


class Plaid(nn.Module):
    """The transformer, from noisy vectors and noise levels to hidden states."""

    def __init__(self, config: PlaidConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.input_linear = nn.Linear(config.embed_dim, width, bias=False)
        self.selfcond_linear = nn.Linear(config.embed_dim, width, bias=False)
        self.gamma_linear = nn.Linear(2 * FREQUENCIES, width, bias=False)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.output_norm = Norm(width)
        self.output_linear = Readout(config)

    def forward(
        self, inputs_embeds: Tensor, level: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None,
        opinion: Tensor | None = None, **how: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Return hidden states `[B, Q, hidden]`. Arguments are as in `dit.DiT`, with vectors `[B, Q, embed_dim]`."""
        dim, gamma = self.config.embed_dim, level.float()[:, None, None]
        variance = torch.sigmoid(-gamma) / dim + torch.sigmoid(gamma)
        dtype = self.input_linear.weight.dtype
        x = self.input_linear((inputs_embeds / variance.sqrt()).to(dtype))
        if opinion is not None:
            x = x + self.selfcond_linear((math.sqrt(dim) * opinion).to(dtype))
        x = x + self.gamma_linear(self._time(level).to(dtype))[:, None]
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        i = torch.arange(half, dtype=torch.float32, device=x.device)
        angle = position_ids[:, None, :, None].float() * ROPE_BASE ** (-i / half)
        turns = angle.cos(), angle.sin()
        for block in self.blocks:
            x = block(x, turns, attention_mask, **how)
        return BaseModelOutput(last_hidden_state=self.output_norm(x))

    def _time(self, level: Tensor) -> Tensor:
        """Return the sinusoidal embedding of gamma `[B]`, float32 `[B, 64]`."""
        rate = torch.linspace(-REACH, REACH, FREQUENCIES, device=level.device).exp()
        angle = rate * level[:, None]
        return torch.cat((angle.sin(), angle.cos()), 1)


class Schedule(nn.Module):
    """A learned monotone function from time 0 to 1 onto 0 to 1, a tanh layer computed in float64."""

    def __init__(self):
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(HIDDEN_UNITS, 1, device=None))
        self.b1 = nn.Parameter(torch.randn(HIDDEN_UNITS, device=None))
        self.W2 = nn.Parameter(torch.randn(1, HIDDEN_UNITS, device=None))

    def forward(self, t: Tensor) -> Tensor:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)
        first, last = self._unscaled(ends)
        return (self._unscaled(t.double().flatten()).view(t.shape) - first) / (last - first)

    def _unscaled(self, t: Tensor) -> Tensor:
        w1, w2 = F.softplus(self.W1.double()), 0.01 * F.softplus(self.W2.double())
        return (torch.tanh((t[:, None] - 0.5) @ w1.T + self.b1.double()) @ w2.T)[:, 0]


class Bounds(nn.Module):
    """Learned values of gamma at times 0 and 1."""

    def __init__(self, config: PlaidConfig):
        super().__init__()
        self.gamma_0 = nn.Parameter(torch.tensor(config.gamma_0, device=None))
        self.gamma_1 = nn.Parameter(torch.tensor(config.gamma_1, device=None))


class UnitTable(nn.Module):
    """The embedding table, with rows normalized to length 1."""

    def __init__(self, config: PlaidConfig):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(config.vocab_size, config.embed_dim, device=None))
        self.embedding_dim = config.embed_dim

    @property
    def weight(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.matrix.float(), dim=1, keepdim=True)
        return (self.matrix / (norm + 1e-8)).to(self.matrix.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class PlaidForDiffusionLM(PreTrainedModel):
    """Plaid with its noise schedule and its embedding table."""

    config_class = PlaidConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: PlaidConfig):
        super().__init__(config)
        self.backbone = Plaid(config)
        self.noise_schedule, self.gamma_bounds = Schedule(), Bounds(config)
        self.embedding_matrix = UnitTable(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize linear layers; other modules initialize themselves."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding_matrix

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_linear

    def gamma(self, time: Tensor) -> Tensor:
        """Return the logarithm of noise power over signal power at times in `[0, 1]`, float64."""
        first, last = self.gamma_bounds.gamma_0.double(), self.gamma_bounds.gamma_1.double()
        return first + (last - first) * self.noise_schedule(time)

    def latent_table(self) -> Tensor:
        """Return each token's vector in the space in which noise is added, `[V, embed_dim]`."""
        return self.embedding_matrix.weight

    def readable(self, hidden: Tensor, level: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Return the input of `head`: the hidden states, concatenated with the noisy vectors times alpha / sigma^2."""
        factor = (torch.sigmoid(-level).sqrt() / torch.sigmoid(level))[:, None, None]
        return torch.cat((hidden, (factor * inputs_embeds).to(hidden.dtype)), -1)

    def head_matrix(self) -> tuple[Tensor, Tensor]:
        """Return the head as one matrix for the output of `readable`, and its bias, both float32."""
        readout = self.backbone.output_linear
        own, table = readout.scale * readout.weight.float(), self.embedding_matrix.weight.float()
        return torch.cat((own, table), 1), readout.bias.float()

    def head(self, readable: Tensor) -> Tensor:
        """Return the logits `[…, V]` for the output of `readable`."""
        width, readout = self.config.hidden_size, self.backbone.output_linear
        logits = readout(readable[..., :width].to(readout.weight.dtype))
        return logits + F.linear(readable[..., width:], self.embedding_matrix.weight.to(readable.dtype))

    def forward(
        self, inputs_embeds: Tensor, timesteps: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, self_condition: Tensor | None = None, **kwargs: Any,
    ) -> MaskedLMOutput:  # fmt: skip
        """Compute the logits for every position.

        Parameters
        ----------
        inputs_embeds : Tensor
            `[B, T, embed_dim]`: noisy vectors.
        timesteps : Tensor
            `[B]`: gamma of each batch row.
        attention_mask : Tensor, optional
            bool `[B, 1, T, T]`: positions that each position attends to. If None, all.
        position_ids : Tensor, optional
            `[B, T]`: positions. If None, 0, 1, ….
        self_condition : Tensor, optional
            `[B, T, embed_dim]`: mean embeddings under the distributions that the previous forward pass predicted.

        Returns
        -------
        MaskedLMOutput
            `logits` `[B, T, V]`.

        Raises
        ------
        ValueError
            If `timesteps` is missing or of the wrong shape, or `inputs_embeds` has the wrong shape.
        """
        dim = self.config.embed_dim
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != dim:
            raise ValueError(f"inputs_embeds must have shape [batch, length, {dim}]; got {list(inputs_embeds.shape)}")
        if not isinstance(timesteps, Tensor) or timesteps.shape != inputs_embeds.shape[:1]:
            got = list(timesteps.shape) if isinstance(timesteps, Tensor) else timesteps
            raise ValueError(f"timesteps must be gamma of each batch row, of shape [{len(inputs_embeds)}]; got {got}")
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        positions = (positions if position_ids is None else position_ids).expand(inputs_embeds.shape[:2])
        level = timesteps.float()
        out = self.backbone(inputs_embeds, level, positions, attention_mask, self_condition)
        return MaskedLMOutput(logits=self.head(self.readable(out.last_hidden_state, level, inputs_embeds)))
