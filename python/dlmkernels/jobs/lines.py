# SPDX-License-Identifier: Apache-2.0
"""Parse the lines of an input file, each a JSON object with a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Fields that give the prompt; a line has exactly one of them.
PROMPTS = ("prompt", "messages", "token_ids")


class LineError(ValueError):
    """A line that is not a valid request.

    Attributes
    ----------
    number : int
        Line number, from 1.
    reason : str
        What is wrong with the line.
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
        Line number in the file, from 1.
    id : str or int, optional
        Identifier chosen by the user.
    prompt : str, list of dict or list of int
        A text, a chat or token ids.
    options : dict
        Its other fields, as arguments of `Engine.add_request`.
    """

    number: int
    id: str | int | None
    prompt: Any
    options: dict[str, Any] = field(default_factory=dict)

    def seed(self, seed: int) -> int:
        """Return the request's own seed or, without one, a seed derived from the job's `seed` and its id or number.

        This way, an answer does not depend on which process decodes it, on its batch, or on where a job was resumed.
        If the request has an id, the answer does not depend on its line number either.
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


# field -> check of its value, and a description of valid values
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda v: _is_text(v) or _is_integer(v, -(2**63)), "a non-empty string or a 64-bit integer"),
    "prompt": (_is_text, "a non-empty string"),
    "messages": (lambda v: isinstance(v, list) and bool(v) and all(map(_is_message, v)),
                 'a non-empty list of messages, each with "role" and "content"'),
    "token_ids": (lambda v: isinstance(v, list) and bool(v) and all(_is_integer(i, 0) for i in v),
                  "a non-empty list of non-negative integers"),
    "max_new_tokens": (lambda v: _is_integer(v, 1), "an integer of at least 1"),
    "seed": (lambda v: _is_integer(v, -(2**63)), "a signed 64-bit integer"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "top_k": (lambda v: _is_integer(v, 1), "an integer of at least 1"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "stop": (lambda v: _is_text(v) or (isinstance(v, list) and all(map(_is_text, v))),
             "a non-empty string or a list of them"),
}  # fmt: skip


def read_line(number: int, text: str | bytes) -> Line:
    """Parse a request from a line of JSON.

    Parameters
    ----------
    number : int
        Line number, from 1.
    text : str or bytes
        A JSON object with exactly one of `prompt` (text), `messages` (a chat) and `token_ids`, and optionally `id`,
        `max_new_tokens`, `seed`, `temperature`, `top_k`, `top_p` and `stop`.

    Returns
    -------
    Line

    Raises
    ------
    LineError
        If the line is not such an object. The message names the field.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(number, f"invalid JSON: {error}") from error
    if not isinstance(found, dict):
        raise LineError(number, f"must be a JSON object; got {type(found).__name__}")
    for name, value in found.items():
        if name not in FIELDS:
            raise LineError(number, f"unknown field '{name}'; known fields: {', '.join(FIELDS)}")
        is_right, what = FIELDS[name]
        if not is_right(value):
            raise LineError(number, f"{name} must be {what}; got {_short(value)}")
    given = [name for name in PROMPTS if name in found]
    if len(given) != 1:
        raise LineError(number, f"must have exactly one of {', '.join(PROMPTS)}; got {' and '.join(given) or 'none'}")
    options = {name: value for name, value in found.items() if name not in (*PROMPTS, "id", "stop")}
    if found.get("stop"):
        options["stop_strings"] = found["stop"]
    return Line(number, found.get("id"), found[given[0]], options)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
