# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: the tokens that the unconditional half of a batch sees in place of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import id_range, listed
from .config import DecodingConfig, SpecialTokens
from .inputs import filler, read_prompts
from .state import NegativePrompt, State, put


@dataclass(frozen=True)
class PromptPair:
    """A batch of prompts and one of negative prompts, both left-padded to the longer of the two lengths.

    Attributes
    ----------
    tokens, origin : Tensor
        int64 `[B, P]` and int32 `[B]`: the prompts, and the column at which each begins.
    negative : NegativePrompt, optional
        The negative prompts.
    added : int
        Number of padding columns that were added to the prompts.
    """

    tokens: Tensor
    origin: Tensor
    negative: NegativePrompt | None = None
    added: int = 0

    def widened(self, values: Tensor | None) -> Tensor | None:
        """Extend values `[B, P - added, …]` of the original columns to all P columns, with zeros in the added ones."""
        return None if values is None else pad(values, (0, 0) * (values.dim() - 2) + (self.added, 0))


def pair_prompts(
    tokens: Tensor, origin: Tensor, negative_prompt, tokenizer, config: DecodingConfig, special: SpecialTokens,
    vocab: int | None,
) -> PromptPair:  # fmt: skip
    """Pair prompts `[B, P]` with negative prompts of any length; None: mask tokens replace the prompts."""
    if negative_prompt is None:
        return PromptPair(tokens, origin)
    name, batch = "negative_prompt", len(tokens)
    if not config.cfg_scale > 0:
        raise ValueError(f"{name} needs classifier-free guidance: pass cfg_scale above 0; got {config.cfg_scale}")
    if isinstance(negative_prompt, Tensor):
        if negative_prompt.dtype != torch.int64 or negative_prompt.dim() not in (1, 2):
            raise ValueError(f"{name} must be int64 [P] or [B, P]; got {_shape(negative_prompt)}")
        negative_prompt = listed(name, negative_prompt)
    prompts = read_prompts(name, negative_prompt, None, tokenizer, tokens.device, filler(special))
    other, mask = prompts.tokens, prompts.attention_mask
    if len(other) not in (1, batch):
        raise ValueError(f"{name} must be one prompt or one for each of the {batch} requests; got {len(other)}")
    low, high = other.min().item(), other.max().item()
    if low < 0 or (vocab is not None and high >= vocab):
        raise ValueError(f"{name} must hold ids {id_range(vocab)}; got ids from {low} to {high}")
    start = torch.zeros(len(other), dtype=torch.int32, device=tokens.device)
    if mask is not None:
        start = (mask == 0).sum(1, dtype=torch.int32)
    width = max(tokens.shape[1], other.shape[1])
    added, missing = width - tokens.shape[1], width - other.shape[1]
    other = pad(other, (missing, 0), value=filler(special)).expand(batch, -1)
    return PromptPair(
        pad(tokens, (added, 0), value=filler(special)), origin + added,
        NegativePrompt(other, (start + missing).expand(batch).contiguous()), added,
    )  # fmt: skip


class Unconditional:
    """The canvas of the unconditional half: mask tokens in place of given tokens, or a negative prompt.

    Attributes
    ----------
    origin : Tensor
        int32 `[B]`: first column of each request in this half.
    tokens, replaced : Tensor
        int64 and bool `[B, T]`: the replacement tokens, and the columns in which they are used.
    """

    def __init__(self, canvas: State, mask_token: int):
        self._canvas, negative, width = canvas, canvas.negative, canvas.tokens.shape[1]
        if negative is None:
            self.origin, self.replaced = canvas.origin, torch.zeros_like(canvas.is_open)
            self.tokens = torch.full_like(canvas.tokens, mask_token)
            self.look()
        else:
            behind = width - negative.tokens.shape[1]
            self.origin, self.tokens = negative.origin, pad(negative.tokens, (0, behind))
            self.replaced = torch.zeros_like(canvas.is_open)
            self.replaced[:, : width - behind] = True

    def look(self, rows: Tensor | None = None) -> None:
        """Read from the state which tokens are given in rows bool `[B]`; None: in all rows."""
        if self._canvas.negative is None:
            put(self.replaced, ~self._canvas.is_open, rows)

    def see(self, tokens: Tensor) -> Tensor:
        """Return the tokens of the canvas, int64 `[B, T]`, as this half sees them."""
        return torch.where(self.replaced, self.tokens, tokens)


def _shape(x: Tensor) -> str:
    return f"{x.dtype} of shape {list(x.shape)}"
