# SPDX-License-Identifier: Apache-2.0
"""Answers with a form: JSON, JSON of a schema, calls of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from .errors import APIError
from .protocol import ChatRequest, ToolChoice


@dataclass(frozen=True)
class Structure:
    """What form an answer has, and how it is read.

    Attributes
    ----------
    constraint : Constraint, optional
        Holds the decoding to it.
    message : callable
        Fields of an assistant's message, from the text of an answer.
    is_whole : bool
        Whether it can be read only when all of it is there.
    """

    constraint: Any
    message: Callable[[str], dict[str, Any]]
    is_whole: bool


def as_text(text: str) -> dict[str, Any]:
    """An answer without any form."""
    return {"content": text}


async def structure_of(request: ChatRequest, tokenizer: Any) -> Structure:
    """The form that a chat asks for.

    Raises
    ------
    APIError
        400 where it cannot be had; the message says why.
    """
    format_, choice = request.response_format, request.tool_choice
    has_format = format_ is not None and format_.type != "text"
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if not tools or choice == "none":
        if not has_format:
            return Structure(None, as_text, False)
        assert format_ is not None
        schema = None if format_.json_schema is None else format_.json_schema.schema_
        return Structure(await _constraint(schema, tokenizer, "response_format"), as_text, False)
    if has_format:
        raise APIError(400, "response_format and tools cannot be combined: leave one out", "response_format")
    from ..grammars import tools as calls

    names = [tool["function"]["name"] for tool in tools]
    if choice in (None, "auto"):

        def chosen(text: str) -> dict[str, Any]:
            content, found = calls.split_calls(text, names)
            return {"content": content} | ({"tool_calls": found} if found else {})

        return Structure(None, chosen, True)
    named: Any = choice.model_dump() if isinstance(choice, ToolChoice) else choice
    constraint = await _constraint(calls.call_schema(tools, named), tokenizer, "tools")

    def required(text: str) -> dict[str, Any]:
        try:
            return {"content": None, "tool_calls": calls.tool_calls(text)}
        except ValueError:  # cut off by a stop string
            return {"content": text}

    return Structure(constraint, required, True)


async def _constraint(schema: dict[str, Any] | None, tokenizer: Any, param: str) -> Any:
    """What holds an answer to a schema; None: to any JSON object. It is compiled in another thread."""
    from .. import grammars

    def make() -> Any:
        return grammars.json_object(tokenizer) if schema is None else grammars.json_schema(schema, tokenizer)

    try:
        return await anyio.to_thread.run_sync(make)
    except (ImportError, ValueError, TypeError) as error:
        raise APIError(400, f"{param}: {error}", param) from error
