# SPDX-License-Identifier: Apache-2.0
"""A request on its way through the engine, and what its owner is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ..decoding.config import DecodingConfig, SpecialTokens
from ..decoding.constraint import AnswerPlace
from ..decoding.processing import Wishes


class RequestStatus(IntEnum):
    """Where a request is in its life. The first five are those of transformers' continuous batching."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5


def id_of_copy(request_id: str, k: int) -> str:
    """What the answer number k of a request is called, from 0."""
    return request_id if k == 0 else f"{request_id}__child#{k - 1}"


@dataclass
class RequestOutput:
    """What has become of a request: the fields of transformers' `GenerationOutput`, and what a decoding knows beyond.

    Attributes
    ----------
    request_id : str
    prompt_ids : list of int
        Tokens of the prompt.
    generated_tokens : list of int
        The answer, without padding behind an end token and without the suffix. While the request is being decoded: as
        far as it is final, from the left.
    logprobs : list of float
        Logarithm of the probability that each of these tokens had when it was committed; 0 for given ones.
    error : str, optional
        Why there is no whole answer; None where there is one.
    status : RequestStatus
    created_time : float
        When the request came, by `time.perf_counter`.
    lifespan : tuple of float
        When it was given a slot and when it left it; -1 where it has not.
    timestamps : list of float, optional
        With `record_timestamps`: when each token was known to be final.
    num_forwards : int
        Model forwards that it took part in.
    commit_step : list of int
        Forward, from 0, at which each token was committed; -1 for given ones.
    confidence : list of float
        Probability that each token had then; 0 for given ones.
    complete : bool
        Whether every position of the answer was decided.
    finish_reason : str, optional
        "length": the whole answer was decoded; "eos": it has an end token; "stop": one of the stop strings; "error" or
        "cancelled". None while the request goes on.
    text : str, optional
        The answer as text, up to a stop string, where the engine has a tokenizer.
    top_logprobs : list, optional
        With `top_logprobs=k`: for each token k pairs of an id and its log-probability, the likeliest first; None for
        given ones.
    draft : list of int, optional
        With `drafts`: the whole answer as it stands, masks included; in outputs before the last one.
    draft_confidence : list of float, optional
        With it: the probability that each of these tokens had; 0 for masks, given tokens and padding.
    time_to_first_block : float, optional
        Seconds from the request's coming to the end of its first block.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    timestamps: list[float] | None = None
    num_forwards: int = 0
    commit_step: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    complete: bool = False
    finish_reason: str | None = None
    text: str | None = None
    top_logprobs: list[list[tuple[int, float]] | None] | None = None
    draft: list[int] | None = None
    draft_confidence: list[float] | None = None
    time_to_first_block: float | None = None

    def is_finished(self) -> bool:
        """Whether this is the last that is heard of the request."""
        return self.status >= RequestStatus.FINISHED

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that were decoded over forwards; 0 before the first."""
        return sum(step >= 0 for step in self.commit_step) / max(self.num_forwards, 1)


@dataclass(eq=False)
class Request:
    """A request as the engine keeps it, from its coming to its delivery.

    Attributes
    ----------
    request_id : str
    prompt : list of int
    answer : list of int
        Tokens that stand behind the prompt from the start, -1 where one is to be decoded; the suffix last.
    suffix_length : int
        How many of them are the suffix.
    seed : int
        What its random draws depend on.
    config, special : DecodingConfig, SpecialTokens
        How it is decoded, apart from its seed; nothing is left open.
    config_key : hashable
        The same for requests that are decoded alike.
    has_fixed_length : bool
        Whether only requests with equally long answers are decoded alike.
    wishes : Wishes
        What it asks for beyond a configuration.
    stop_strings : tuple of str
        Texts that end it.
    streaming, drafts, record_timestamps : bool
        What its owner wants to hear before the end.
    on_step : callable, optional
        Is called with a `RequestOutput` after each step.
    alone : bool
        Whether it must not share a program, since one that it was part of has failed.
    """

    request_id: str
    prompt: list[int]
    answer: list[int]
    suffix_length: int
    seed: int
    config: DecodingConfig
    special: SpecialTokens
    config_key: Hashable
    has_fixed_length: bool
    wishes: Wishes
    stop_strings: tuple[str, ...] = ()
    streaming: bool = False
    drafts: bool = False
    record_timestamps: bool = False
    on_step: Callable[[RequestOutput], Any] | None = None
    alone: bool = False
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    started: float = -1
    first_block: float | None = None
    timestamps: list[float] = field(default_factory=list)
    #: how many tokens its owner has been shown
    shown: int = 0
    is_delivered: bool = False

    def place(self, vocab: int | None) -> AnswerPlace:
        """Where the answer stands in a row that begins with its prompt.

        Before a suffix no token ends it: it has to come to the suffix.
        """
        start, length = len(self.prompt), len(self.answer) - self.suffix_length
        place = AnswerPlace.of(self.special, start, [start + length], vocab)
        return replace(place, eos=()) if self.suffix_length else place

    @property
    def is_watched(self) -> bool:
        """Whether its tokens are read while it is decoded."""
        return self.streaming or self.drafts or self.record_timestamps or bool(self.stop_strings or self.on_step)

    def output(self, status: RequestStatus, **fields: Any) -> RequestOutput:
        """What its owner is told now."""
        ended = time.perf_counter() if status >= RequestStatus.FINISHED else -1
        first = None if self.first_block is None else self.first_block - self.created_time
        return RequestOutput(
            self.request_id, list(self.prompt), status=status, created_time=self.created_time,
            lifespan=(self.started, ended), timestamps=list(self.timestamps) if self.record_timestamps else None,
            time_to_first_block=first, **fields,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What stands in a slot, read from the device: a request's columns behind its prompt, without the suffix.

    Attributes
    ----------
    tokens, commit_step, confidence : sequence
        Of each column.
    is_open : sequence of bool
        Where nothing has been decided.
    is_given : sequence of bool
        What stood there from the start.
    num_forwards : int
    final : int
        How many columns from the left are final.
    limit : int, optional
        How many columns belong to the answer, where the program says so.
    top_logprobs : list, optional
        For each column the k best ids and their log-probabilities.
    """

    tokens: Sequence[int]
    commit_step: Sequence[int]
    confidence: Sequence[float]
    is_open: Sequence[bool]
    is_given: Sequence[bool]
    num_forwards: int
    final: int
    limit: int | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def length(self, columns: int) -> int:
        """How many of the first `columns` are not padding: up to the last that is open, given or committed."""
        columns = columns if self.limit is None else min(columns, max(self.limit, 0))
        is_token = [
            o or g or s >= 0
            for o, g, s in zip(self.is_open[:columns], self.is_given[:columns], self.commit_step[:columns])
        ]  # fmt: skip
        return len(is_token) - is_token[::-1].index(True) if True in is_token else 0
