# SPDX-License-Identifier: Apache-2.0
"""SSD-LM (Han, Kumar and Tsvetkov, arXiv:2210.17432): a RoBERTa whose inputs are distributions over tokens.

A noisy position is a vector of V logits. Its input embedding is the mean of a separate embedding table under their
softmax, plus a linear function of the time. Committed positions use RoBERTa's own token embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM


class SSDLMConfig(RobertaConfig):
    """Configuration of a RoBERTa, extended for SSD-LM.

    Attributes
    ----------
    block_size : int
        Number of tokens decoded together, given all tokens to their left.
    simplex_scale : float
        Scale K of the simplex. A clean token is the vector that is K at the token's index and -K elsewhere.
    """

    model_type = "dlm_ssd_lm"

    block_size: int = 25
    simplex_scale: float = 5.0
    mask_token_id: int | None = None


class SSDLMForDiffusion(RobertaForMaskedLM):
    """RoBERTa with two additional layers that embed noisy positions."""

    config_class = SSDLMConfig
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"roberta\.pooler"]  # noqa: RUF012

    def __init__(self, config: SSDLMConfig):
        super().__init__(config)
        self.embed_sum = nn.Linear(config.vocab_size, config.hidden_size, bias=False)
        self.timestep = nn.Linear(1, config.hidden_size)
        self.post_init()

    def simplex_table(self) -> Tensor:
        """Return the embedding table for noisy positions, `[V, hidden]`."""
        return self.embed_sum.weight.T.contiguous()

    def time_embedding(self, progress: Tensor) -> Tensor:
        """Return the contribution `[…, hidden]` of times `[…]`, from 1 to 0, to the embeddings of noisy positions."""
        return self.timestep(progress[..., None].to(self.timestep.weight.dtype))


def kept_power(steps: int, device: torch.device) -> Tensor:
    """Return the signal power left after 0, 1, …, `steps` steps of the cosine schedule, float64 `[steps + 1]`."""
    t = torch.arange(steps + 1, dtype=torch.float64, device=device) / steps
    power = torch.cos((t + 1e-4) / (1 + 1e-4) * torch.pi / 2) ** 2
    return power / power[0]
