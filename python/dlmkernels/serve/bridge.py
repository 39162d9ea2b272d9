# SPDX-License-Identifier: Apache-2.0
"""Between the event loop and the engine's thread: answers on their way, each in a mailbox of its own.

What the engine tells of a request while it is decoded always holds all that is final of it, so a mailbox keeps the
newest output alone: a client that reads slowly costs no memory.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread

from ..engine.engine import Engine
from ..engine.request import RequestOutput, id_of_copy
from .errors import APIError, stopped


@dataclass(eq=False)
class Answer:
    """One answer that is being decoded.

    Attributes
    ----------
    index : int
        Which choice of the request it is.
    latest : RequestOutput, optional
        The newest that is known of it.
    is_done : bool
    """

    index: int
    latest: RequestOutput | None = None
    is_done: bool = False


@dataclass(eq=False)
class Group:
    """The answers to one HTTP request.

    Attributes
    ----------
    id : str
        The first part of the ids of its engine requests.
    answers : dict
        By the id of their engine requests.
    """

    id: str
    answers: dict[str, Answer] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _news: dict[int, Answer] = field(default_factory=dict)

    def put(self, output: RequestOutput) -> None:
        """Take in what the engine tells; in the event loop."""
        answer = self.answers[output.request_id]
        if not answer.is_done:
            answer.latest, answer.is_done = output, output.is_finished()
            self._news[answer.index] = answer
            self._changed.set()

    async def news(self) -> AsyncIterator[Answer]:
        """Answers of which something new is known, until all are done."""
        told = {answer.index for answer in self._news.values()}
        left = sum(not answer.is_done or answer.index in told for answer in self.answers.values())
        while left:
            await self._changed.wait()
            self._changed.clear()
            news, self._news = self._news, {}
            for answer in news.values():
                left -= answer.is_done
                yield answer

    @property
    def outputs(self) -> list[RequestOutput]:
        """The last output of every answer, by their indices."""
        by_index = sorted(self.answers.values(), key=lambda answer: answer.index)
        return [answer.latest for answer in by_index if answer.latest is not None]


class Bridge:
    """Hands requests to the engine and their outputs to whoever waits for them.

    Attributes
    ----------
    limit : int
        How many answers may be on their way at once.
    is_open : bool
        Whether requests are taken.
    groups : dict
        The requests in flight, by id.
    """

    def __init__(self, engine: Engine, limit: int, observe: Callable[[RequestOutput], None] | None = None):
        self.engine, self.limit, self._observe = engine, limit, observe  # observe: in the engine's thread
        self.is_open = True
        self.groups: dict[str, Group] = {}
        self._live = 0
        self._counter = itertools.count()
        self._run = secrets.token_hex(4)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """Answers on their way."""
        return self._live

    async def submit(self, prompts: Sequence[Any], n: int, options: dict[str, Any]) -> Group:
        """Let the engine decode n answers to each prompt.

        Raises
        ------
        APIError
            400 when the engine refuses what is asked for, 429 when too many wait, 503 when the server ends.
        """
        count = len(prompts) * n
        if not self.is_open:
            raise stopped()
        if count > self.limit:
            raise APIError(400, f"at most {self.limit} answers at once; got {count}", "n")
        if self._live + count > self.limit:
            raise APIError(
                429, f"{self._live} answers are on their way, and at most {self.limit} may be: try again later",
                code="too_many_requests",
            )  # fmt: skip
        group = Group(f"{self._run}-{next(self._counter)}")
        self._live += count
        self._idle.clear()
        self.groups[group.id] = group
        try:
            for number, prompt in enumerate(prompts):
                await self._add(group, prompt, number, n, options)
        except BaseException:
            self._forget(count - len(group.answers))
            self.leave(group)
            raise
        return group

    async def _add(self, group: Group, prompt: Any, number: int, n: int, options: dict[str, Any]) -> None:
        """One prompt's answers. The engine reads the prompt in another thread, which may take a while."""
        loop = asyncio.get_running_loop()
        first = f"{group.id}-{number}"
        names = [id_of_copy(first, k) for k in range(n)]

        def hand_over(output: RequestOutput) -> None:
            if self._observe is not None:
                self._observe(output)
            loop.call_soon_threadsafe(self._take, group, output)

        def add() -> None:
            self.engine.add_request(
                prompt, first, num_return_sequences=n, result_handler=hand_over, **options
            )  # fmt: skip

        for k, name in enumerate(names):
            group.answers[name] = Answer(number * n + k)
        try:
            with anyio.CancelScope(shield=True):  # whether it is in the engine has to be known
                await anyio.to_thread.run_sync(add)
        except BaseException as error:
            for name in names:
                del group.answers[name]
            if isinstance(error, (ValueError, TypeError)):
                raise refused(error) from error
            if isinstance(error, RuntimeError):
                raise stopped() from error
            raise

    def _take(self, group: Group, output: RequestOutput) -> None:
        group.put(output)
        if output.is_finished():
            self._forget(1)

    def _forget(self, count: int) -> None:
        self._live -= count
        if not self._live:
            self._idle.set()

    def leave(self, group: Group) -> None:
        """Nobody waits for these answers any more: those that are not done are cancelled."""
        self.groups.pop(group.id, None)
        for name, answer in group.answers.items():
            if not answer.is_done:
                self.engine.cancel_request(name)

    async def drain(self, seconds: float) -> None:
        """Take no more requests; let those in flight finish for so long, and fail then."""
        self.is_open = False
        with anyio.move_on_after(seconds):
            await self._idle.wait()
        stop: Callable[[], None] = lambda: self.engine.stop(hard_stop=True)  # noqa: E731
        await anyio.to_thread.run_sync(stop)


#: what clients call what the engine's messages speak of
NAMES = {"input_ids": "prompt", "max_new_tokens": "max_tokens", "num_return_sequences": "n", "stop_strings": "stop"}

PARAMETERS = (*NAMES.values(), "temperature", "top_k", "top_p", "seed", "suffix", "repetition_penalty", "top_logprobs",
              "rule", "steps", "block_length")  # fmt: skip


def refused(error: Exception) -> APIError:
    """What the engine will not decode, as an answer to a client."""
    text = " ".join(str(error).split())
    for name, theirs in NAMES.items():
        text = text.replace(name, theirs)
    if "max_length" in text:
        return APIError(400, text, "prompt", "context_length_exceeded")
    first = text.partition(" ")[0].partition("=")[0]
    return APIError(400, text, first if first in PARAMETERS else None)
