# SPDX-License-Identifier: Apache-2.0
"""What a decoding returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..trace import Recording, Trace
from .stops import before_stop


@dataclass(frozen=True, repr=False)
class DecodingOutput:
    """Result of `generate` and `infill`.

    Attributes
    ----------
    sequences : Tensor
        int64 `[B, T]`: prompt and decoded tokens; left padding is kept.
    num_forwards : Tensor
        int32 `[B]`: model forwards each request took part in before it was finished.
    commit_step : Tensor
        int32 `[B, T]`: forward (from 0) at which a token was committed; -1 for given tokens, masks that are left, and
        padding, after an end token too, whatever was committed there before.
    confidence : Tensor
        float32 `[B, T]`: probability a token had when it was committed, 0 where `commit_step` is -1.
    complete : Tensor
        bool `[B]`: False where masks were left because their logits held no finite value, because the constraint
        refused every token, or because the rule selected nothing. A warning says which.
    prompt_length : int
        Columns before the first generated one (0 for `infill`).
    length : Tensor
        int32 `[B]`: column behind the last token of each row. What stands from there on is padding.
    origin : Tensor, optional
        int32 `[B]`: column at which each row starts, behind its padding on the left. None: at 0.
    tokenizer : optional
        The one that was given to `generate` or `infill`: what `text` uses.
    stop_strings : tuple of str
        Those that ended a row. `length` is behind the token that completes the first of them; `text` ends before it.
    top_ids, top_log_probability : Tensor, optional
        With `top_logprobs=k`, int64 and float32 `[B, T, k]`: the likeliest tokens of each position when it was last
        looked at before its token was committed, the likeliest first, and the logarithms of their probabilities; -1 and
        0 where `decoded` is False.
    entropy : Tensor, optional
        With `top_logprobs`, float32 `[B, T]`: entropy of the same distributions, in nats; 0 where `decoded` is False.
    recording : Recording, optional
        With `trace=True`: everything that happened, step by step.
    """

    sequences: Tensor
    num_forwards: Tensor
    commit_step: Tensor
    confidence: Tensor
    complete: Tensor
    prompt_length: int
    length: Tensor
    origin: Tensor | None = None
    tokenizer: Any = None
    top_ids: Tensor | None = None
    top_log_probability: Tensor | None = None
    stop_strings: tuple[str, ...] = ()
    entropy: Tensor | None = None
    recording: Recording | None = None

    def __repr__(self) -> str:
        batch, committed = len(self.sequences), int((self.commit_step >= 0).sum())
        return (
            f"DecodingOutput(batch={batch}, tokens={committed}, forwards={int(self.num_forwards.sum())}, "
            f"tokens_per_forward={float(self.tokens_per_forward.mean()):.2f}, complete={bool(self.complete.all())})"
        )

    def text(self, tokenizer=None, *, skip_special_tokens: bool = True, full: bool = False) -> list[str]:
        """What was decoded, as text: one string a row, without padding, up to the first of the stop strings.

        Parameters
        ----------
        tokenizer : optional
            Anything with transformers' `decode(ids, skip_special_tokens=…)`. None: the one that was given to `generate`
            or `infill`.
        skip_special_tokens : bool
            Leave out end tokens, masks that are left, and what else the tokenizer takes for special.
        full : bool
            The prompt as well.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if not hasattr(tokenizer, "decode"):
            raise ValueError(
                "tokenizer is needed to turn ids into text: out.text(tokenizer), or dlmkernels.generate(…, "
                f"tokenizer=tokenizer); got {tokenizer!r}"
            )
        answers = self._texts(tokenizer, self.prompt_length, skip_special_tokens)
        whole = self._texts(tokenizer, 0, skip_special_tokens) if full else answers
        behind = [len(text) - len(before_stop(text, self.stop_strings)) for text in answers]
        return [text[: len(text) - count] for text, count in zip(whole, behind)]

    def _texts(self, tokenizer, start: int, skip_special_tokens: bool) -> list[str]:
        """Each row from column `start` on, without padding, as text."""
        columns = torch.arange(self.sequences.shape[1], device=self.sequences.device)
        first = torch.full_like(self.length, start)
        if self.origin is not None:
            first = torch.maximum(first, self.origin)
        shown = (columns >= first[:, None]) & (columns < self.length[:, None])
        return [
            tokenizer.decode(tokens[keep].tolist(), skip_special_tokens=skip_special_tokens)
            for tokens, keep in zip(self.sequences.cpu(), shown.cpu())
        ]

    @property
    def generated(self) -> Tensor:
        """`sequences` without the prompt."""
        return self.sequences[:, self.prompt_length :]

    @property
    def decoded(self) -> Tensor:
        """Which tokens the decoding has chosen, bool `[B, T]`.

        False for what was given, for masks that are left, and for padding: before the prompt, after an end token, and
        behind `length`. So padding is told apart from the same id among the decoded tokens.
        """
        return self.commit_step >= 0

    @property
    def tokens_per_forward(self) -> Tensor:
        """Decoded tokens over forwards, float32 `[B]`; 0 where there was nothing to decode."""
        return self.decoded.sum(1) / self.num_forwards.clamp(min=1)

    @property
    def log_probability(self) -> Tensor:
        """Logarithm of `confidence`, float32 `[B, T]`: what each token's probability was when it was committed.

        From the distribution the configuration names (`distribution`, by default the model's own); 0 where `decoded`
        is False. Their sum over a row is the logarithm of the product of the steps' choices, not of the row's
        likelihood: see `log_likelihood`.
        """
        return torch.where(self.decoded, self.confidence.log(), 0.0)

    @property
    def trace(self) -> Trace:
        """Which token was committed when, with pictures; with `generate(…, trace=True)` all that happened."""
        return Trace(
            self.sequences, self.commit_step, self.confidence, self.prompt_length, self.origin, self.length,
            self.tokenizer, self.recording, self.top_ids, self.top_log_probability, self.entropy,
        )  # fmt: skip

    def without_columns(self, count: int) -> DecodingOutput:
        """The same without the first `count` columns, which must be padding in all rows."""
        if count == 0:
            return self
        names = ("sequences", "commit_step", "confidence", "top_ids", "top_log_probability", "entropy")
        cut = {name: value[:, count:] for name in names if (value := getattr(self, name)) is not None}
        origin = None if self.origin is None else self.origin - count
        recording = None if self.recording is None else self.recording.without_columns(count)
        return replace(
            self, **cut, prompt_length=self.prompt_length - count, length=self.length - count, origin=origin,
            recording=recording,
        )  # fmt: skip

    def known_by(self, tokenizer) -> DecodingOutput:
        """The same with the tokenizer that `text` uses."""
        return self if tokenizer is None else replace(self, tokenizer=tokenizer)
