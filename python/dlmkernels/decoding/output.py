# SPDX-License-Identifier: Apache-2.0
"""The result of a decoding run."""

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

    In the shapes below, B is the number of rows (one per request, or per copy of a request) and T the number of columns
    (prompt, answer and padding).

    Attributes
    ----------
    sequences : Tensor
        int64 `[B, T]`: the prompt followed by the decoded tokens, including any left padding.
    num_forwards : Tensor
        int32 `[B]`: number of forward passes each request took part in before it was finished.
    commit_step : Tensor
        int32 `[B, T]`: index of the forward pass (from 0) in which each token was committed. -1 for given tokens,
        remaining masks and padding, including padding that replaced tokens committed after an end token.
    confidence : Tensor
        float32 `[B, T]`: probability of each token when it was committed; 0 where `commit_step` is -1.
    complete : Tensor
        bool `[B]`: False for rows with remaining masks, because the logits there held no finite value, the constraint
        refused every token, or the rule selected nothing. A warning gives the reason.
    prompt_length : int
        Number of columns before the first generated one (0 for `infill`).
    length : Tensor
        int32 `[B]`: column after the last token of each row. Everything from there on is padding.
    origin : Tensor, optional
        int32 `[B]`: column of the first token of each row, after any left padding. If None, every row starts at 0.
    tokenizer : optional
        Tokenizer that was passed to `generate` or `infill`; the default for `text`.
    stop_strings : tuple of str
        The requested stop strings if any row ended at one of them, otherwise empty. In such a row, `length` is the
        column after the token that completes the first stop string, and `text` ends before that string.
    top_ids, top_log_probability : Tensor, optional
        With `top_logprobs=k`, int64 and float32 `[B, T, k]`: the k most likely tokens at each position, in descending
        order, and their log-probabilities, as of the last step in which the position was still open. -1 and 0 where
        `decoded` is False.
    entropy : Tensor, optional
        With `top_logprobs`, float32 `[B, T]`: entropy of the same distributions, in nats; 0 where `decoded` is False.
    recording : Recording, optional
        With `trace=True`: every event of the decoding, step by step.
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
        """Convert the decoded tokens to text: one string per row, without padding, cut at the first stop string.

        Parameters
        ----------
        tokenizer : optional
            Any object with a `decode(ids, skip_special_tokens=…)` method like that of transformers. If None, use the
            tokenizer that was passed to `generate` or `infill`.
        skip_special_tokens : bool
            Leave out end tokens, remaining masks and any other tokens that the tokenizer treats as special.
        full : bool
            Include the prompt.

        Returns
        -------
        list of str

        Raises
        ------
        ValueError
            If no tokenizer is available.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if not hasattr(tokenizer, "decode"):
            raise ValueError(
                "tokenizer is needed to turn token ids into text: call out.text(tokenizer), or pass "
                f"tokenizer=tokenizer to generate or infill; got {tokenizer!r}"
            )
        answers = self._texts(tokenizer, self.prompt_length, skip_special_tokens)
        whole = self._texts(tokenizer, 0, skip_special_tokens) if full else answers
        behind = [len(text) - len(before_stop(text, self.stop_strings)) for text in answers]
        return [text[: len(text) - count] for text, count in zip(whole, behind)]

    def _texts(self, tokenizer, start: int, skip_special_tokens: bool) -> list[str]:
        """Convert each row to text, from column `start` on and without padding."""
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
        """The generated part of `sequences`, without the prompt: int64 `[B, T - prompt_length]`."""
        return self.sequences[:, self.prompt_length :]

    @property
    def decoded(self) -> Tensor:
        """Mask of the tokens that were chosen by decoding, bool `[B, T]`.

        False for given tokens, for remaining masks, and for padding: before the prompt, after an end token, and from
        `length` on. This distinguishes padding from decoded tokens that happen to have the same id.
        """
        return self.commit_step >= 0

    @property
    def tokens_per_forward(self) -> Tensor:
        """Number of decoded tokens per forward pass, float32 `[B]`; 0 if there was nothing to decode."""
        return self.decoded.sum(1) / self.num_forwards.clamp(min=1)

    @property
    def log_probability(self) -> Tensor:
        """Log-probability of each token when it was committed (the logarithm of `confidence`), float32 `[B, T]`.

        The probability is taken under the distribution selected by `DecodingConfig.distribution` (by default the
        model's own). 0 where `decoded` is False. The sum over a row is not the log-likelihood of the row: each term is
        conditioned only on the tokens committed before its step. For likelihoods, see `log_likelihood`.
        """
        return torch.where(self.decoded, self.confidence.log(), 0.0)

    @property
    def trace(self) -> Trace:
        """History of the decoding: when each final token was committed, as data, text and pictures.

        With `generate(…, trace=True)` it covers every event, including edits and remasked tokens.
        """
        return Trace(
            self.sequences, self.commit_step, self.confidence, self.prompt_length, self.origin, self.length,
            self.tokenizer, self.recording, self.top_ids, self.top_log_probability, self.entropy,
        )  # fmt: skip

    def without_columns(self, count: int) -> DecodingOutput:
        """Return a copy without the first `count` columns, which must be padding in all rows."""
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
        """Return a copy whose `text` uses `tokenizer` by default, or the output itself if `tokenizer` is None."""
        return self if tokenizer is None else replace(self, tokenizer=tokenizer)
