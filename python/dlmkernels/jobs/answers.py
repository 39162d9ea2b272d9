# SPDX-License-Identifier: Apache-2.0
"""Decode requests with an engine and yield their answers in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..engine.engine import Engine
from ..engine.request import RequestOutput, RequestStatus
from .lines import Line, LineError

#: Maximum number of requests per slot that are read from the input ahead of the next answer to be yielded.
AHEAD = 8


def answers(
    engine: Engine, lines: Iterable[Line | LineError], seed: int = 0, token_ids: bool = False, chat: bool = False
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Decode requests and yield their answers in input order.

    Parameters
    ----------
    engine : Engine
        An engine with a tokenizer that has not been started; this function runs its steps.
    lines : iterable of Line or LineError
        Requests. A LineError becomes an error record. At most eight requests per slot of the engine are read ahead, so
        the input may be arbitrarily long.
    seed : int
        Seed of the job; see `Line.seed`.
    token_ids : bool
        Whether records also contain the token ids of the answers.
    chat : bool
        Whether to wrap each text prompt in a chat with one user message.

    Yields
    ------
    dict
        `line`, `id` if the request has one, and either `text`, `finish_reason`, `prompt_tokens`, `completion_tokens`,
        `num_forwards` (and `token_ids`) or `error`. A line's record does not depend on what else is decoded.
    """
    done: dict[int, dict[str, Any]] = {}
    window = AHEAD * engine.slots
    source = iter(lines)
    place = taken = 0
    is_over = False
    while True:
        while not is_over and taken - place < window:
            line = next(source, None)
            if line is None:
                is_over = True
                break
            _take(engine, taken, line, done, seed, token_ids, chat)
            taken += 1
        while place in done:
            yield done.pop(place)
            place += 1
        if is_over and place == taken:
            return
        if place not in done and (is_over or taken - place >= window):
            engine.step()


def _take(
    engine: Engine, place: int, line: Line | LineError, done: dict[int, dict[str, Any]], seed: int, token_ids: bool,
    chat: bool,
) -> None:  # fmt: skip
    """Submit a request to the engine; its record is stored in `done[place]` when it has finished."""
    if isinstance(line, LineError):
        done[place] = {"line": line.number, "error": line.reason}
        return
    name = {"line": line.number} | ({} if line.id is None else {"id": line.id})

    def put(output: RequestOutput) -> None:
        if output.is_finished():
            done[place] = name | _record(output, engine, token_ids)

    prompt = [{"role": "user", "content": line.prompt}] if chat and isinstance(line.prompt, str) else line.prompt
    try:
        engine.add_request(prompt, result_handler=put, **line.options | {"seed": line.seed(seed)})
    except (ValueError, TypeError) as error:
        done[place] = name | {"error": " ".join(str(error).split())}


def _record(output: RequestOutput, engine: Engine, token_ids: bool) -> dict[str, Any]:
    if output.status is not RequestStatus.FINISHED:
        return {"error": output.error}
    tokens = output.tokens_before(engine.special_tokens.eos)
    record = {
        "text": output.text, "finish_reason": "length" if output.finish_reason == "length" else "stop",
        "prompt_tokens": len(output.prompt_ids), "completion_tokens": len(tokens), "num_forwards": output.num_forwards,
    }  # fmt: skip
    return record | ({"token_ids": tokens} if token_ids else {})
