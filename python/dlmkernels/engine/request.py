# SPDX-License-Identifier: Apache-2.0
"""A request on its way through the engine, and the outputs delivered to its owner."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ..decoding.config import DecodingConfig, SpecialTokens
from ..decoding.constraint import AnswerPlace
from ..decoding.processing import Wishes


class RequestStatus(IntEnum):
    """Status of a request. The first five values are those of transformers' continuous batching."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5


def id_of_copy(request_id: str, k: int) -> str:
    """Return the id of answer number `k` of a request, counted from 0."""
    return request_id if k == 0 else f"{request_id}__child#{k - 1}"


@dataclass
class RequestOutput:
    """State or result of a request: the fields of transformers' `GenerationOutput`, and details of the decoding.

    Attributes
    ----------
    request_id : str
    prompt_ids : list of int
        Tokens of the prompt.
    generated_tokens : list of int
        The answer, without padding after an end token and without the suffix. While the request is being decoded, only
        its leading tokens that can no longer change.
    logprobs : list of float
        Log-probability of each of these tokens when it was committed; 0 for given tokens.
    error : str, optional
        Why there is no complete answer. None if there is one.
    status : RequestStatus
    created_time : float
        When the request was added, by `time.perf_counter`.
    lifespan : tuple of float
        When the request got its slot, and when it ended, by `time.perf_counter`; -1 if that has not happened.
    timestamps : list of float, optional
        With `record_timestamps`, when each token was known to be final, by `time.perf_counter`.
    num_forwards : int
        Number of forward passes that the request took part in.
    commit_step : list of int
        Number of the forward pass, from 0, in which each token was committed; -1 for given tokens.
    confidence : list of float
        Probability of each token when it was committed; 0 for given tokens.
    complete : bool
        Whether every position of the answer has been decided.
    finish_reason : str, optional
        "length" (the whole answer was decoded), "eos" (it contains an end token), "stop" (it contains a stop string),
        "error" or "cancelled". None while the request is being decoded.
    text : str, optional
        `generated_tokens` as text, up to a stop string. None if the engine has no tokenizer. While the request is being
        decoded, its last characters may still change: a character can consist of several tokens.
    top_logprobs : list, optional
        With `top_logprobs=k`, k pairs of id and log-probability for each token, most likely first. None for given
        tokens.
    draft : list of int, optional
        With `drafts` or `on_step`, the current state of the whole answer, mask tokens included. None in the last
        output.
    draft_confidence : list of float, optional
        Probability of each token of `draft` when it was committed; 0 for mask tokens, given tokens and padding.
    time_to_first_block : float, optional
        Seconds from adding the request to the end of its first block.
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
        """Return whether this is the request's last output."""
        return self.status >= RequestStatus.FINISHED

    def tokens_before(self, ends: Collection[int]) -> list[int]:
        """Return the tokens of the answer before the first of the tokens `ends`; all of them if it contains none."""
        tokens = self.generated_tokens
        return tokens[: next((k for k, token in enumerate(tokens) if token in ends), len(tokens))]

    @property
    def tokens_per_forward(self) -> float:
        """Number of decoded tokens per forward pass; 0 before the first."""
        return sum(step >= 0 for step in self.commit_step) / max(self.num_forwards, 1)


@dataclass(eq=False)
class Request:
    """A request inside the engine, from its arrival to its delivery.

    Attributes
    ----------
    request_id : str
    prompt : list of int
    answer : list of int
        Tokens after the prompt at the start: -1 at each position to decode, and the suffix last.
    suffix_length : int
        Number of tokens at the end of `answer` that are the suffix.
    seed : int
        Seed of the request's random draws.
    config, special : DecodingConfig, SpecialTokens
        The fully resolved configuration, apart from the seed.
    config_key : hashable
        Equal for configurations whose requests can share forward passes.
    has_fixed_length : bool
        Whether requests must have the same answer length to share forward passes.
    wishes : Wishes
        Options that are not part of a configuration, such as a repetition penalty.
    stop_strings : tuple of str
        Texts that end the answer.
    streaming, drafts, record_timestamps : bool
        Which outputs and records the owner has asked for; see `Engine.add_request`.
    on_step : callable, optional
        Called with a `RequestOutput` after each step.
    alone : bool
        Whether the request must not share a program, because a step that it took part in has failed.
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
    #: number of tokens already shown to the owner
    shown: int = 0
    is_delivered: bool = False

    def place(self, vocab: int | None) -> AnswerPlace:
        """Return the columns of the answer in a row that begins with the prompt.

        With a suffix, no token ends the answer early, since it must continue up to the suffix.
        """
        start, length = len(self.prompt), len(self.answer) - self.suffix_length
        place = AnswerPlace.of(self.special, start, [start + length], vocab)
        return replace(place, eos=()) if self.suffix_length else place

    @property
    def is_watched(self) -> bool:
        """Whether the tokens of the request are read on the host during decoding."""
        return self.streaming or self.drafts or self.record_timestamps or bool(self.stop_strings or self.on_step)

    def output(self, status: RequestStatus, **fields: Any) -> RequestOutput:
        """Build an output with the given status and fields."""
        ended = time.perf_counter() if status >= RequestStatus.FINISHED else -1
        first = None if self.first_block is None else self.first_block - self.created_time
        return RequestOutput(
            self.request_id, list(self.prompt), status=status, created_time=self.created_time,
            lifespan=(self.started, ended), timestamps=list(self.timestamps) if self.record_timestamps else None,
            time_to_first_block=first, **fields,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Content of a slot, copied from the device: the columns after the request's prompt, without the suffix.

    Attributes
    ----------
    tokens, commit_step, confidence : sequence
        One value for each column.
    is_open : sequence of bool
        Columns that are still undecided.
    is_given : sequence of bool
        Columns whose token was fixed from the start.
    num_forwards : int
    final : int
        Number of columns, from the left, that are final.
    limit : int, optional
        Length of the answer, if the program determines it.
    top_logprobs : list, optional
        For each column, the k most likely ids and their log-probabilities.
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
        """Return how many of the first `columns` precede the padding: up to the last open, given or committed one."""
        columns = columns if self.limit is None else min(columns, max(self.limit, 0))
        is_token = [
            o or g or s >= 0
            for o, g, s in zip(self.is_open[:columns], self.is_given[:columns], self.commit_step[:columns])
        ]  # fmt: skip
        return len(is_token) - is_token[::-1].index(True) if True in is_token else 0
