# SPDX-License-Identifier: Apache-2.0
"""Translation of transformers' logits processors into options of `generate` and banned tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from .bitmask import without
from .config import DecodingConfig
from .resolve import check_block_by_block


def as_list(ids) -> list[int]:
    """Return ids (a tensor, one id, several ids, or None) as a list."""
    if isinstance(ids, Tensor):
        return ids.flatten().tolist()
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Bans:
    """Tokens that must not be generated, anywhere or at certain positions of the answer."""

    def __init__(self, prompt_length: int, length: int):
        self.prompt_length, self.length = prompt_length, length
        self.everywhere: list[int] = []
        #: tokens that are banned, or the only ones allowed, at certain positions; and the options that require it
        self.somewhere: list[tuple[list[int], slice]] = []
        self.only: list[tuple[list[int], slice]] = []
        self.reasons: list[str] = []

    def ban(self, reason: str, ids, first: int = 0, last: int | None = None) -> None:
        """Ban `ids` at positions `[first, last)` of the answer, or everywhere if `last` is None."""
        if last is None or (first <= 0 and last >= self.length):
            self.everywhere += as_list(ids)
        elif max(first, 0) < last:
            self.somewhere.append((as_list(ids), slice(max(first, 0), last)))
            self.reasons.append(reason)

    def force(self, reason: str, ids, position: int) -> None:
        """Allow only `ids` at one position of the answer."""
        self.only.append((as_list(ids), slice(position, position + 1)))
        self.reasons.append(reason)

    def options(self, model: DiffusionModel, ours: DecodingConfig) -> dict[str, Any]:
        """Return the bans as options of `generate`, to be combined with the configuration `ours`."""
        options: dict[str, Any] = {}
        if self.everywhere:
            options["suppress_token_ids"] = list(dict.fromkeys([*ours.suppress_token_ids, *self.everywhere]))
        if self.reasons:
            if ours.constraint is not None:
                raise ValueError(
                    f"{self.reasons[0]} cannot be used together with a constraint in decoding_config: include it in "
                    "that constraint"
                )
            if model.vocab_size is None:
                raise ValueError(f"{self.reasons[0]} needs a model whose configuration has a vocab_size")
            check_block_by_block(self.reasons[0], ours.rule)
            options["constraint"] = self._bitmask(model.vocab_size, model.device)
        return options

    def _bitmask(self, vocab: int, device: torch.device) -> Tensor:
        mask = torch.full((1, self.length, -(-vocab // 32)), -1, dtype=torch.int32, device=device)
        for ids, where in self.only:
            mask[:, where] = 0
            for i in ids:
                bit = 1 << i % 32
                mask[:, where, i // 32] |= bit - 2**32 if bit >= 2**31 else bit
        for ids, where in self.somewhere:
            part = mask[:, where]
            everywhere = torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)
            for i in ids:
                part = without(part, torch.full(part.shape[:2], i, device=part.device), everywhere)
            mask[:, where] = part
        return mask


def _bad_words(p, options: dict[str, Any], bans: Bans) -> None:
    for word in p.bad_word_ids:
        if len(word) != 1:
            raise ValueError(f"bad_words_ids: dlmkernels supports only words of a single token; got {word}")
        bans.ban("bad_words_ids", word)


def _top_p(p, options: dict[str, Any], bans: Bans) -> None:
    if p.min_tokens_to_keep != 1:
        raise ValueError(f"TopPLogitsWarper must have min_tokens_to_keep=1; got {p.min_tokens_to_keep}")
    options["top_p"] = p.top_p


#: How each class of processor is translated; the last two need no translation.
PROCESSORS: dict[str, Callable[[Any, dict[str, Any], Bans], Any]] = {
    "TemperatureLogitsWarper": lambda p, options, bans: options.update(temperature=p.temperature),
    "TopKLogitsWarper": lambda p, options, bans: options.update(top_k=p.top_k),
    "TopPLogitsWarper": _top_p,
    "SuppressTokensLogitsProcessor": lambda p, options, bans: bans.ban("suppress_tokens", p.suppress_tokens),
    "SuppressTokensAtBeginLogitsProcessor": lambda p, options, bans: bans.ban(
        "begin_suppress_tokens", p.begin_suppress_tokens, p.begin_index - bans.prompt_length,
        p.begin_index - bans.prompt_length + 1),
    "NoBadWordsLogitsProcessor": _bad_words,
    "MinLengthLogitsProcessor": lambda p, options, bans: bans.ban(
        "min_length", p.eos_token_id, 0, p.min_length - bans.prompt_length),
    "MinNewTokensLengthLogitsProcessor": lambda p, options, bans: bans.ban(
        "min_new_tokens", p.eos_token_id, 0, p.prompt_length_to_skip + p.min_new_tokens - bans.prompt_length),
    "ForcedEOSTokenLogitsProcessor": lambda p, options, bans: bans.force(
        "forced_eos_token_id", p.eos_token_id, bans.length - 1),
    "RepetitionPenaltyLogitsProcessor": lambda p, options, bans: options.update(repetition_penalty=p.penalty),
    "InfNanRemoveLogitsProcessor": lambda p, options, bans: None,
    "LogitNormalization": lambda p, options, bans: None,
}  # fmt: skip


def honour(processor, options: dict[str, Any], bans: Bans, samples: bool) -> None:
    """Translate a logits processor into options of `generate` or bans; raise a ValueError if that is not possible."""
    name = type(processor).__name__
    is_theirs = type(processor).__module__.startswith("transformers.")
    if not is_theirs or name not in PROCESSORS:
        raise ValueError(
            f"logits_processor: {name} cannot be used with dlmkernels, which decodes many positions at once, in any "
            "order. To restrict which tokens are allowed where, use the constraint of decoding_config"
        )
    if name.endswith("Warper") and not samples:
        raise ValueError(f"logits_processor: {name} has no effect without do_sample=True")
    PROCESSORS[name](processor, options, bans)
