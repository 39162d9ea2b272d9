# SPDX-License-Identifier: Apache-2.0
"""Images in prompts, as prepared by the processor of DiffusionGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel, EncoderDecoderModel
from .config import DecodingConfig

#: Keys under which a processor returns image data in addition to the tokens.
PIXELS, PATCHES, KINDS = "pixel_values", "image_position_ids", "mm_token_type_ids"


class Images(NamedTuple):
    """Prompts with their images.

    Attributes
    ----------
    embeds : Tensor
        `[B, P, hidden]`: input embeddings of the prompts, with the image vectors in place of image tokens.
    limit : Tensor, optional
        int32 `[B, P]`: last column that each column may attend to. If None, the column itself.
    """

    embeds: Tensor
    limit: Tensor | None


def take_images(inputs: Any) -> tuple[Any, dict[str, Any] | None]:
    """Split a processor's output into the part without images and the image data (None if there is none)."""
    if not isinstance(inputs, Mapping) or inputs.get(PIXELS) is None:
        return inputs, None
    images = {name: inputs.get(name) for name in (PIXELS, PATCHES, KINDS, "attention_mask")}
    return {name: value for name, value in inputs.items() if name not in (PIXELS, PATCHES, KINDS)}, images


def embed_images(
    model: DiffusionModel, config: DecodingConfig, tokens: Tensor, origin: Tensor, images: dict[str, Any]
) -> Images:  # fmt: skip
    """Replace the image tokens of prompts int64 `[B, P]`, which start at column `origin`, by vectors of `images`.

    `images` is the image data returned by `take_images`.

    Raises
    ------
    ValueError
        If the model does not read images, if the number of image vectors differs from the number of image tokens, if
        an image is longer than the sliding window, or if guidance is on.
    """
    if not isinstance(model, EncoderDecoderModel):
        raise ValueError(
            f"input_ids holds {PIXELS}, which models of family '{model.family.name}' do not read: encode the image "
            "with the model's vision tower, and pass the prompt as inputs_embeds"
        )
    if config.cfg_scale > 0:
        raise ValueError(f"cfg_scale cannot be used with {PIXELS}; got {config.cfg_scale}")
    encoder: Any = model.model.model.encoder
    is_image = tokens == model.config.image_token_id
    embeds = model.embed(tokens)
    with torch.no_grad():
        patches = images[PATCHES]
        vectors = encoder.get_image_features(
            images[PIXELS].to(model.device), None if patches is None else patches.to(model.device), return_dict=True
        ).pooler_output.to(embeds)  # fmt: skip
    count, places = vectors.numel() // embeds.shape[2], int(is_image.sum())
    if count != places:
        raise ValueError(f"input_ids has {places} image tokens, but {PIXELS} yields {count} vectors")
    embeds = embeds.masked_scatter(is_image[..., None], vectors)
    return Images(embeds, _limit(model, tokens, origin, images))


def _limit(model: EncoderDecoderModel, tokens: Tensor, origin: Tensor, images: dict[str, Any]) -> Tensor | None:
    """Compute the last column that each column sees, int32 `[B, P]`, if all tokens of an image see each other.

    Returns None for models in which they do not, or if the processor returned no token types.
    """
    text = model.text_config
    if text.use_bidirectional_attention != "vision" or images[KINDS] is None:
        return None
    kinds, mask = (None if x is None else torch.as_tensor(x, device=tokens.device) for x in (
        images[KINDS], images["attention_mask"]
    ))  # fmt: skip
    assert kinds is not None
    is_image, length = torch.zeros_like(tokens, dtype=torch.bool), tokens.shape[1]
    for row, first in enumerate(origin.tolist()):
        own = kinds[row] if mask is None else kinds[row][mask[row] != 0]
        if len(own) != length - first:
            raise ValueError(
                f"{KINDS} of row {row} must have one entry for each of its {length - first} tokens; got {len(own)}"
            )
        is_image[row, first:] = (own == 1) | (own == 2)
    column = torch.arange(length, device=tokens.device).expand_as(tokens)
    behind = torch.where(is_image, length, column).flip(1).cummin(1).values.flip(1)
    before = torch.where(is_image, -1, column).cummax(1).values
    longest = int((behind - before - 1).max())
    if "sliding_attention" in text.layer_types and longest > text.sliding_window:
        raise ValueError(
            f"{PIXELS}: an image of {longest} tokens does not fit into the model's sliding window of "
            f"{text.sliding_window} tokens"
        )
    return torch.where(is_image, behind - 1, column).int()
