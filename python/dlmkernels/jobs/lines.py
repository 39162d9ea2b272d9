# SPDX-License-Identifier: Apache-2.0
"""Lines of an input file: one JSON object with a prompt each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: the three ways to give a prompt
PROMPTS = ("prompt", "messages", "token_ids")


class LineError(ValueError):
    """A line that is no request.

    Attributes
    ----------
    number : int
        Which line, from 1.
    reason : str
    """

    def __init__(self, number: int, reason: str):
        super().__init__(f"line {number}: {reason}")
        self.number, self.reason = number, reason


@dataclass(frozen=True)
class Line:
    """A request.

    Attributes
    ----------
    number : int
        Which line of the file it is, from 1.
    id : str or int, optional
        What it is called.
    prompt : str, list of dict or list of int
        A text, a chat or token ids.
    options : dict
        What it says beside: arguments of `Engine.add_request`.
    """

    number: int
    id: str | int | None
    prompt: Any
    options: dict[str, Any] = field(default_factory=dict)

    def seed(self, seed: int) -> int:
        """The seed of its random draws: its own, or one that follows from the job's seed and its id or number.

        So an answer does not depend on which process decodes it, on its neighbours, or on where a job was resumed. With
        an id it does not depend on the line's place in the file either.
        """
        if "seed" in self.options:
            return self.options["seed"]
        name = json.dumps([seed, self.number if self.id is None else str(self.id)])
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _is_integer(value: Any, low: int, high: int = 2**63 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


# field -> what it must be, and in words
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda v: _is_text(v) or _is_integer(v, -(2**63)), "a text that is not empty or an integer"),
    "prompt": (_is_text, "a text that is not empty"),
    "messages": (lambda v: isinstance(v, list) and bool(v) and all(map(_is_message, v)),
                 'a list of messages, each with "role" and "content"'),
    "token_ids": (lambda v: isinstance(v, list) and bool(v) and all(_is_integer(i, 0) for i in v),
                  "a list of integers that are not negative"),
    "max_new_tokens": (lambda v: _is_integer(v, 1), "an integer of at least 1"),
    "seed": (lambda v: _is_integer(v, -(2**63)), "an integer of 64 bits"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "top_k": (lambda v: _is_integer(v, 1), "an integer of at least 1"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and of at most 1"),
    "stop": (lambda v: _is_text(v) or (isinstance(v, list) and all(map(_is_text, v))), "a text or a list of texts"),
}  # fmt: skip


def read_line(number: int, text: str | bytes) -> Line:
    """A request from a line of JSON.

    Parameters
    ----------
    number : int
        Which line it is, from 1.
    text : str or bytes
        `{"prompt": "…"}`, or `messages` (a chat) or `token_ids` in its place; beside it `id`, `max_new_tokens`, `seed`,
        `temperature`, `top_k`, `top_p`, `stop`.

    Raises
    ------
    LineError
        When it is no such object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(number, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise LineError(number, f"must be a JSON object; got {type(found).__name__}")
    for name, value in found.items():
        if name not in FIELDS:
            raise LineError(number, f"'{name}' is not a field of a request; known: {', '.join(FIELDS)}")
        is_right, what = FIELDS[name]
        if not is_right(value):
            raise LineError(number, f"{name} must be {what}; got {_short(value)}")
    given = [name for name in PROMPTS if name in found]
    if len(given) != 1:
        raise LineError(number, f"must have one of {', '.join(PROMPTS)}; got {' and '.join(given) or 'none'}")
    options = {name: value for name, value in found.items() if name not in (*PROMPTS, "id", "stop")}
    if found.get("stop"):
        options["stop_strings"] = found["stop"]
    return Line(number, found.get("id"), found[given[0]], options)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
