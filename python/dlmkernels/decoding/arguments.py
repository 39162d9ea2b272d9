# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors passed to `generate` and `infill`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from .checks import check_readable, id_range
from .config import DecodingConfig, SpecialTokens
from .resolve import check_block_by_block


def check_tokens(
    name: str, model: DiffusionModel, tokens: Tensor | None, attention_mask: Tensor | None, special: SpecialTokens,
    lowest: int = 0, mask_name: str = "attention_mask", side: str = "left",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the validated tokens `[B, T]` and the column at which each row starts, int32 `[B]`.

    Without an attention mask, the model's padding token at the left of a row counts as padding, unless it has another
    meaning too. `lowest`: the smallest valid id, 0, or -1 if that marks positions to decode. For messages: `mask_name`,
    the caller's name for the mask, and `side`, "right" if the caller has mirrored tokens that are padded on the right.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = f"a tensor of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be an int64 tensor of token ids; got {got}")
    if tokens.dim() == 1:
        tokens = tokens[None]
    if tokens.dim() != 2 or len(tokens) == 0:
        raise ValueError(f"{name} must have shape [batch, length] with batch at least 1; got {list(tokens.shape)}")
    if tokens.device != model.device:
        raise ValueError(f"{name} must be on the model's device {model.device}; got {tokens.device}")
    if tokens.numel() > 0:
        low, high = tokens.min().item(), tokens.max().item()
        if low < lowest or (model.vocab_size is not None and high >= model.vocab_size):
            open_too = ", or -1" if lowest < 0 else ""
            raise ValueError(
                f"{name} must hold ids {id_range(model.vocab_size)}{open_too}; got ids from {low} to {high}"
            )
    if attention_mask is None:
        return tokens, _infer_origin(name, tokens, special, mask_name)
    return tokens, _check_mask(name, tokens, attention_mask, mask_name, side)


def _check_mask(name: str, tokens: Tensor, attention_mask: Tensor, mask_name: str, side: str) -> Tensor:
    """Check the attention mask, and return the column at which each row starts, int32 `[B]`."""
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"{mask_name} must be a tensor; got {type(attention_mask).__name__}")
    if attention_mask.dim() == 1:
        attention_mask = attention_mask[None]
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"{mask_name} must have the shape of {name}, {list(tokens.shape)}; got {list(attention_mask.shape)}"
        )
    check_readable(mask_name, attention_mask)
    other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if len(other):
        raise ValueError(f"{mask_name} must hold 0 for padding and 1 for tokens; got {other[0].item()}")
    valid = attention_mask.to(tokens.device) != 0
    origin = (~valid).sum(1, dtype=torch.int32)
    if not torch.equal(valid, torch.arange(tokens.shape[1], device=tokens.device) >= origin[:, None]):
        what, then = ("prompts", "after") if side == "left" else ("answers", "before")
        raise ValueError(f"{mask_name} must be 0 for padding on the {side} and 1 {then} it: pad {what} on the {side}")
    is_empty = (origin == tokens.shape[1]) & (origin > 0)
    if is_empty.any():
        raise ValueError(f"{mask_name} leaves row {int(is_empty.nonzero()[0])} of {name} empty")
    return origin


def _infer_origin(name: str, tokens: Tensor, special: SpecialTokens, mask_name: str) -> Tensor:
    """Return the column at which each row starts, int32 `[B]`, after the padding tokens on its left."""
    nothing = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
    if special.padding is None or tokens.numel() == 0:
        return nothing
    leading = (tokens == special.padding).int().cumprod(1).sum(1, dtype=torch.int32)
    if special.padding_is_content:
        if (leading != leading[0]).any():
            warnings.warn(
                f"{name} may be padded with token {special.padding}, but nothing is treated as padding, since that "
                f"token can also be part of a text: pass {mask_name}, 0 for padding",
                UserWarning, stacklevel=4,
            )  # fmt: skip
        return nothing
    is_empty = leading == tokens.shape[1]
    if is_empty.any():
        raise ValueError(
            f"row {int(is_empty.nonzero()[0])} of {name} holds nothing but padding (token {special.padding}); pass "
            f"{mask_name} if that token is not padding"
        )
    return leading


def check_prompt(tokens: Tensor, attention_mask: Tensor | None, special: SpecialTokens) -> None:
    """Raise a ValueError for prompts that hold mask tokens, which `infill` decodes, or that are padded on the right."""
    if (tokens == special.mask).any():
        raise ValueError(
            f"input_ids holds the mask token ({special.mask}): generate continues a prompt; use dlmkernels.infill to "
            "decode mask tokens anywhere"
        )
    if attention_mask is not None or special.padding is None or special.padding_is_content or tokens.numel() == 0:
        return
    is_padded = tokens[:, -1] == special.padding
    if is_padded.any():
        raise ValueError(
            f"input_ids ends with the padding token ({special.padding}) in row {int(is_padded.nonzero()[0])}, but the "
            "answer comes right after the prompt: pad prompts on the left (tokenizer.padding_side = 'left'), or pass "
            "attention_mask if the token belongs to the prompt"
        )


def as_ids(name: str, values: Any, device: torch.device) -> Tensor:
    """Return token ids in a list, or in a list of lists of one length, as a tensor; return a tensor unchanged."""
    if isinstance(values, Tensor):
        return values
    values = values.tolist() if hasattr(values, "tolist") else values
    is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) > 0
    several = is_list and all(isinstance(row, Sequence) and not isinstance(row, str | bytes) for row in values)
    rows = values if several else [values]
    if not is_list or any(not isinstance(i, Integral) or isinstance(i, bool) for row in rows for i in row):
        hint = ""
        if isinstance(values, str):
            hint = ": pass tokenizer(…, add_special_tokens=False)['input_ids']"
        raise ValueError(f"{name} must be token ids, in a list or an int64 tensor; got {values!r:.80}{hint}")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name} must have the same number of ids in each row; got {[len(row) for row in rows]}")
    return torch.tensor(values, dtype=torch.int64, device=device)


def check_given(
    model: DiffusionModel, given: Any, batch: int, config: DecodingConfig, special: SpecialTokens
) -> Tensor:  # fmt: skip
    """Check `given`, the fixed tokens of the answers, and return it as int64 `[B, max_new_tokens]`."""
    shapes = ((config.longest,), (batch, config.longest))
    given = as_ids("given", given, model.device)
    if given.dtype != torch.int64 or given.shape not in shapes:
        raise ValueError(
            f"given must be int64 of shape {list(shapes[1])} (max_new_tokens); got {given.dtype} of shape "
            f"{list(given.shape)}"
        )
    if given.device != model.device:
        raise ValueError(f"given must be on the model's device {model.device}; got {given.device}")
    low, high = given.min().item(), given.max().item()
    if low < -1 or (model.vocab_size is not None and high >= model.vocab_size):
        raise ValueError(f"given must hold ids {id_range(model.vocab_size)}, or -1; got ids from {low} to {high}")
    if special.mask >= 0 and bool((given == special.mask).any()):
        raise ValueError(f"given holds the mask token ({special.mask}): use -1 for each token that is to be decoded")
    check_block_by_block("given", config.rule)
    return given.expand(batch, -1)


def check_embeds(model: DiffusionModel, embeds: Tensor, pad: int) -> Tensor:
    """Check the input embeddings, and return placeholder tokens for their prompts, int64 `[B, P]`."""
    if not hasattr(model.model, "get_input_embeddings"):
        raise ValueError(f"inputs_embeds needs a transformers model; got {type(model.model).__name__}")
    table = model.model.get_input_embeddings()
    hidden = table.embedding_dim
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[2] != hidden or embeds.numel() == 0:
        got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"inputs_embeds must have shape [batch, length, {hidden}]; got {got}")
    if embeds.dtype != table.weight.dtype or embeds.device != model.device:
        raise ValueError(
            f"inputs_embeds must be {table.weight.dtype} on {model.device}; got {embeds.dtype} on {embeds.device}"
        )
    if not model.embeds_by_token:
        raise ValueError(
            "inputs_embeds cannot be used with this model: its embedding of a token depends on the whole sequence"
        )
    return torch.full(embeds.shape[:2], pad, dtype=torch.int64, device=embeds.device)


def check_is_streamer(streamer: Any) -> None:
    """Raise a TypeError for an object that has not the methods of transformers' streamers."""
    if not all(callable(getattr(streamer, method, None)) for method in ("put", "end")):
        raise TypeError(
            "streamer must have the methods put and end, such as transformers.TextStreamer(tokenizer), or be a list of "
            f"such objects; got {streamer!r:.80}"
        )


def seeds_of(seed: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Return the seed of each request, int64 `[B]`; drawn by torch if `seed` is None."""
    if seed is None:
        return torch.randint(2**63 - 1, (batch,), device="cpu").to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (batch,):
            raise ValueError(f"seed must be int64 of shape [{batch}]; got {seed.dtype} of shape {list(seed.shape)}")
        check_readable("seed", seed)
        return seed.to(device)
    return torch.full((batch,), seed, dtype=torch.int64, device=device)
