# SPDX-License-Identifier: Apache-2.0
"""Connect the event loop and the engine's thread: submit requests, and collect the outputs of each answer.

Every output of the engine contains all final tokens of its request, so only the newest output of an answer is kept.
A client that reads slowly therefore costs no memory.
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
        Index of the answer among the choices of its HTTP request.
    latest : RequestOutput, optional
        The newest output of the engine for this answer.
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
        Prefix of the ids of its engine requests.
    answers : dict of str to Answer
        The answers by the ids of their engine requests.
    """

    id: str
    answers: dict[str, Answer] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _news: dict[int, Answer] = field(default_factory=dict)

    def put(self, output: RequestOutput) -> None:
        """Store an output of the engine. Must be called in the event loop."""
        answer = self.answers[output.request_id]
        if not answer.is_done:
            answer.latest, answer.is_done = output, output.is_finished()
            self._news[answer.index] = answer
            self._changed.set()

    async def news(self) -> AsyncIterator[Answer]:
        """Yield answers whenever they have a new output, until all are done."""
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
        """The newest output of every answer, sorted by index."""
        by_index = sorted(self.answers.values(), key=lambda answer: answer.index)
        return [answer.latest for answer in by_index if answer.latest is not None]


class Bridge:
    """Submits requests to the engine and passes their outputs to the tasks that wait for them.

    Attributes
    ----------
    limit : int
        Maximum number of unfinished answers.
    is_open : bool
        Whether new requests are accepted.
    groups : dict of str to Group
        The unfinished requests by id.
    """

    def __init__(self, engine: Engine, limit: int, observe: Callable[[RequestOutput], None] | None = None):
        self.engine, self.limit, self._observe = engine, limit, observe  # observe is called in the engine's thread
        self.is_open = True
        self.groups: dict[str, Group] = {}
        self._live = 0
        self._counter = itertools.count()
        self._run = secrets.token_hex(4)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """Number of unfinished answers."""
        return self._live

    async def submit(self, prompts: Sequence[Any], n: int, options: dict[str, Any]) -> Group:
        """Submit prompts to the engine, which decodes `n` answers to each.

        Raises
        ------
        APIError
            400 if the engine rejects the request, 429 if too many answers are unfinished, 503 if the server is
            shutting down.
        """
        count = len(prompts) * n
        if not self.is_open:
            raise stopped()
        if count > self.limit:
            raise APIError(400, f"a request may ask for at most {self.limit} answers; got {count}", "n")
        if self._live + count > self.limit:
            raise APIError(
                429, f"the server is busy with {self._live} answers, and {count} more would exceed its limit of "
                f"{self.limit}: try again later",
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
        """Submit one prompt. The engine prepares it in another thread, because that may take a while."""
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
            with anyio.CancelScope(shield=True):  # must complete, to know whether the engine has it
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
        """Drop a request that nobody waits for any longer, and cancel its unfinished answers."""
        self.groups.pop(group.id, None)
        for name, answer in group.answers.items():
            if not answer.is_done:
                self.engine.cancel_request(name)

    async def drain(self, seconds: float) -> None:
        """Stop accepting requests, give unfinished ones `seconds` to finish, then stop the engine, which fails them."""
        self.is_open = False
        with anyio.move_on_after(seconds):
            await self._idle.wait()
        stop: Callable[[], None] = lambda: self.engine.stop(hard_stop=True)  # noqa: E731
        await anyio.to_thread.run_sync(stop)


#: Names in the engine's messages -> the API's names of the same parameters.
NAMES = {"input_ids": "prompt", "max_new_tokens": "max_tokens", "num_return_sequences": "n", "stop_strings": "stop"}

PARAMETERS = (*NAMES.values(), "temperature", "top_k", "top_p", "seed", "suffix", "repetition_penalty", "top_logprobs",
              "rule", "steps", "block_length")  # fmt: skip


def refused(error: Exception) -> APIError:
    """Convert an error of `Engine.add_request` to an API error with the API's parameter names."""
    text = " ".join(str(error).split())
    for name, theirs in NAMES.items():
        text = text.replace(name, theirs)
    if "max_length" in text:
        return APIError(400, text, "prompt", "context_length_exceeded")
    first = text.partition(" ")[0].partition("=")[0]
    return APIError(400, text, first if first in PARAMETERS else None)
