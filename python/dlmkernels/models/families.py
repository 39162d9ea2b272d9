# SPDX-License-Identifier: Apache-2.0
"""Model families as data: what has to be known of a model beyond its stock transformers class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """How one kind of stock model is decoded.

    Attributes
    ----------
    name : str
    auto_class : str
        The transformers Auto class that loads it with its language-model head.
    head : callable
        `head(model)` returns the module that maps hidden states to logits.
    logit_alignment : {"same", "shift"}
        Whether the logits of position i are found in row i or in row i - 1.
    position_offset : callable
        `position_offset(config)`: what the model adds to a position before its embedding table.
    """

    name: str
    auto_class: str
    head: Callable[[Any], Callable[[Tensor], Tensor]]
    logit_alignment: str = "same"
    position_offset: Callable[[Any], int] = lambda config: 0


def _modernbert_head(model) -> Callable[[Tensor], Tensor]:
    return nn.Sequential(model.head, model.decoder)


DECODER = Family("decoder", "AutoModelForCausalLM", head=lambda model: model.lm_head)
BERT = Family("bert", "AutoModelForMaskedLM", head=lambda model: model.cls)
ROBERTA = Family("roberta", "AutoModelForMaskedLM", head=lambda model: model.lm_head,
                 position_offset=lambda config: config.pad_token_id + 1)  # fmt: skip
MODERNBERT = Family("modernbert", "AutoModelForMaskedLM", head=_modernbert_head)
UNKNOWN = Family("unknown", "AutoModel", head=lambda model: model)

# transformers' `config.model_type` -> family
FAMILIES: dict[str, Family] = {
    "llama": DECODER, "qwen2": DECODER, "qwen3": DECODER, "qwen3_moe": DECODER,
    "bert": BERT, "roberta": ROBERTA, "modernbert": MODERNBERT,
}  # fmt: skip
