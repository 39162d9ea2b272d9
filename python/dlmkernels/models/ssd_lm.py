# SPDX-License-Identifier: Apache-2.0
"""SSD-LM (Han, Kumar and Tsvetkov, arXiv:2210.17432): a RoBERTa that reads distributions over tokens.

A noisy position is a vector of V numbers. What is read of it is the mean of a table of its own under their softmax, and
a linear function of the time; a decided position is read as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM


class SSDLMConfig(RobertaConfig):
    """A RoBERTa's configuration, and

    Attributes
    ----------
    block_size : int
        Tokens that are decoded together, after everything before them.
    simplex_scale : float
        K: a clean token is the vector with K in its place and -K elsewhere.
    """

    model_type = "dlm_ssd_lm"

    block_size: int = 25
    simplex_scale: float = 5.0
    mask_token_id: int | None = None


class SSDLMForDiffusion(RobertaForMaskedLM):
    """RoBERTa with the two layers that read noisy positions."""

    config_class = SSDLMConfig
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"roberta\.pooler"]  # noqa: RUF012

    def __init__(self, config: SSDLMConfig):
        super().__init__(config)
        self.embed_sum = nn.Linear(config.vocab_size, config.hidden_size, bias=False)
        self.timestep = nn.Linear(1, config.hidden_size)
        self.post_init()

    def simplex_table(self) -> Tensor:
        """What the mean of a noisy position is taken of, `[V, hidden]`."""
        return self.embed_sum.weight.T.contiguous()

    def time_embedding(self, progress: Tensor) -> Tensor:
        """What times `[…]`, from 1 to 0, add to noisy positions: `[…, hidden]`."""
        return self.timestep(progress[..., None].to(self.timestep.weight.dtype))


def kept_power(steps: int, device: torch.device) -> Tensor:
    """What is left of the signal's power after 0, 1, …, `steps` steps of the cosine schedule, float64."""
    t = torch.arange(steps + 1, dtype=torch.float64, device=device) / steps
    power = torch.cos((t + 1e-4) / (1 + 1e-4) * torch.pi / 2) ** 2
    return power / power[0]
