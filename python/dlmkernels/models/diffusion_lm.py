# SPDX-License-Identifier: Apache-2.0
"""Diffusion-LM (Li et al., arXiv:2205.14217): a BERT that maps noisy vectors, rather than tokens, to clean vectors.

The modules have their published names, with the prefix `backbone.` except for the embedding table and the head, which
share a matrix. The trunk is transformers' own BERT encoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import BertEncoder

#: Times are passed to the model on a scale from 0 to this value, whatever the number of steps.
TIME_SCALE = 1000
#: Longest period of the time embedding.
LONGEST = 10_000
#: The square-root schedule starts as if this fraction of the steps had been taken; and the largest noise of one step.
OFFSET, MOST_BETA = 1e-4, 0.999


class DiffusionLMConfig(PreTrainedConfig):
    """Configuration of a `DiffusionLM`.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings : int
        Sizes of the BERT encoder and its embeddings.
    embed_dim : int
        Number of dimensions of the space in which noise is added (`in_channel` in the published code).
    time_dim : int
        Width of the sinusoidal time embedding (`num_channels` in the published code).
    noise_steps : int
        Number of diffusion steps in training.
    """

    model_type = "dlm_diffusion_lm"

    vocab_size: int = 821
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    embed_dim: int = 16
    time_dim: int = 128
    noise_steps: int = 2000
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    #: how the noise level is passed to the model, and that it predicts vectors rather than logits
    time: str = "index"
    says_vectors: bool = True


class Trunk(nn.Module):
    """The transformer, from noisy vectors and times to clean vectors."""

    def __init__(self, config: DiffusionLMConfig):
        super().__init__()
        width, dim = config.hidden_size, config.embed_dim
        self.config = config
        bert = BertConfig(
            vocab_size=1, hidden_size=width, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        bert._attn_implementation = config._attn_implementation or "sdpa"
        inner = 4 * config.time_dim
        self.time_embed = nn.Sequential(nn.Linear(config.time_dim, inner), nn.SiLU(), nn.Linear(inner, width))
        self.input_up_proj = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, width))
        self.input_transformers = BertEncoder(bert)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_down_proj = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))

    def forward(
        self, inputs_embeds: Tensor, level: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None,
        opinion: Tensor | None = None, **how: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Return clean vectors `[B, Q, embed_dim]`. Arguments are as in `dit.DiT`, but `opinion` is ignored."""
        half = self.config.time_dim // 2
        rate = torch.exp(-math.log(LONGEST) * torch.arange(half, dtype=torch.float32, device=level.device) / half)
        angle = level.float()[:, None] * rate
        time = self.time_embed(torch.cat((angle.cos(), angle.sin()), 1).to(inputs_embeds.dtype))
        x = self.position_embeddings(position_ids) + self.input_up_proj(inputs_embeds) + time[:, None]
        x = self.input_transformers(self.LayerNorm(x), attention_mask, **how).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.output_down_proj(x))


class DiffusionLM(PreTrainedModel):
    """Diffusion-LM with its embedding table and its head."""

    config_class = DiffusionLMConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "word_embedding.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"position_ids"]  # noqa: RUF012

    def __init__(self, config: DiffusionLMConfig):
        super().__init__(config)
        self.backbone = Trunk(config)
        self.word_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def kept(self, device: torch.device) -> Tensor:
        """Return the signal power that remains after each of the T steps of the square-root schedule, float64 `[T]`."""
        i = torch.arange(self.config.noise_steps + 1, dtype=torch.float64, device=device)
        power = 1 - torch.sqrt(i / self.config.noise_steps + OFFSET)
        return (power[1:] / power[:-1]).clamp(min=1 - MOST_BETA).cumprod(0)

    def gamma(self, time: Tensor) -> Tensor:
        """Return the logarithm of noise power over signal power at times from 0 (first step) to 1 (last step)."""
        index = (time * (self.config.noise_steps - 1)).round().long()
        power = self.kept(time.device)[index]
        return torch.log1p(-power) - power.log()

    def told(self, time: Tensor) -> Tensor:
        """Return the noise level that the model receives: the step number, scaled to 1000 steps."""
        steps = self.config.noise_steps
        return (time * (steps - 1)).round() * (TIME_SCALE / steps)

    def latent_table(self) -> Tensor:
        """Return each token's vector in the space in which noise is added, `[V, embed_dim]`."""
        return self.word_embedding.weight

    def readable(self, hidden: Tensor, level: Tensor, inputs_embeds: Tensor) -> Tensor:
        return hidden

    def head(self, readable: Tensor) -> Tensor:
        """Return the logits `[…, V]` for clean vectors `[…, embed_dim]`."""
        return F.linear(readable, self.lm_head.weight, self.lm_head.bias)

    def forward(
        self, inputs_embeds: Tensor, timesteps: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, **kwargs: Any,
    ) -> BaseModelOutput:  # fmt: skip
        """Predict clean vectors from noisy ones.

        Parameters
        ----------
        inputs_embeds : Tensor
            `[B, T, embed_dim]`: noisy vectors.
        timesteps : Tensor
            `[B]`: step number of each batch row, scaled to 1000 steps.
        attention_mask : Tensor, optional
            Mask for the attention function. If None, all positions are attended to.
        position_ids : Tensor, optional
            `[B, T]`: positions. If None, 0, 1, ….

        Returns
        -------
        BaseModelOutput
            `last_hidden_state` `[B, T, embed_dim]`: clean vectors.

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
            raise ValueError(
                f"timesteps must be the step number of each batch row, of shape [{len(inputs_embeds)}]; got {got}"
            )
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        positions = (positions if position_ids is None else position_ids).expand(inputs_embeds.shape[:2])
        return self.backbone(inputs_embeds, timesteps.float(), positions, attention_mask)
