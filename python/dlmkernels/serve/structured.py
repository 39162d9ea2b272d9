# SPDX-License-Identifier: Apache-2.0
"""Structured answers: JSON, JSON that satisfies a schema, and tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from .errors import APIError
from .protocol import ChatRequest, ToolChoice


@dataclass(frozen=True)
class Structure:
    """The structure of an answer, and how to parse it.

    Attributes
    ----------
    constraint : Constraint, optional
        Forces the decoding to follow the structure.
    message : callable
        Maps the text of an answer to fields of the assistant's message.
    is_whole : bool
        Whether an answer can only be parsed once it is complete.
    """

    constraint: Any
    message: Callable[[str], dict[str, Any]]
    is_whole: bool


def as_text(text: str) -> dict[str, Any]:
    """Return the message fields of a plain text answer."""
    return {"content": text}


async def structure_of(request: ChatRequest, tokenizer: Any) -> Structure:
    """Return the structure that a chat request asks for.

    Raises
    ------
    APIError
        400 if the structure is not supported; the message says why.
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
        except ValueError:  # the answer was cut off by a stop string
            return {"content": text}

    return Structure(constraint, required, True)


async def _constraint(schema: dict[str, Any] | None, tokenizer: Any, param: str) -> Any:
    """Compile the constraint for a schema (None: any JSON object) in another thread."""
    from .. import grammars

    def make() -> Any:
        return grammars.json_object(tokenizer) if schema is None else grammars.json_schema(schema, tokenizer)

    try:
        return await anyio.to_thread.run_sync(make)
    except (ImportError, ValueError, TypeError) as error:
        raise APIError(400, f"{param}: {error}", param) from error
