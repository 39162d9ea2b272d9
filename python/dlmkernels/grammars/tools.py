# SPDX-License-Identifier: Apache-2.0
"""Calls of functions in OpenAI's form: from the tools of a request to a schema, and from an answer to its calls.

A call that is required is an answer of its own: the JSON object `{"name": …, "arguments": {…}}`, whose schema
`call_schema` makes. Where the model may choose, it writes what its chat template has taught it; `split_calls` reads the
form of Hermes and Qwen, that object between `<tool_call>` and `</tool_call>`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)


def call_schema(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any] = "required"
) -> dict[str, Any]:
    """The JSON schema of a call of one of some tools.

    Parameters
    ----------
    tools : sequence of dict
        As in OpenAI's chat completions: `{"type": "function", "function": {"name": …, "parameters": …}}`.
    tool_choice : "required" or dict
        `{"type": "function", "function": {"name": …}}`: that one.

    Raises
    ------
    ValueError
        When there is no such tool.
    """
    functions = [tool["function"] for tool in tools]
    if not isinstance(tool_choice, str):
        name = tool_choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ValueError(f"tool_choice: there is no tool {name!r}")
    elif tool_choice != "required":
        raise ValueError(f"tool_choice must be 'required' or a function for a schema; got {tool_choice!r}")
    if not functions:
        raise ValueError("tools must hold at least one function")
    definitions: dict[str, Any] = {}
    calls = []
    for k, function in enumerate(functions):
        arguments = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        definitions[str(k)] = _moved(arguments, f"#/$defs/{k}")
        calls.append({
            "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{k}"}},
        })  # fmt: skip
    return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references are right when it stands elsewhere."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {
        name: one if name in ("const", "enum", "default", "examples") else _moved(one, to)
        for name, one in schema.items()
    }  # fmt: skip
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = to + schema["$ref"][1:]
    return moved


def tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls that an answer under `call_schema` makes, in OpenAI's form.

    Raises
    ------
    ValueError
        When the text is no such answer.
    """
    call = _call(text)
    if call is None:
        raise ValueError(f"the answer is no call of a function: {text!r:.200}")
    return [call]


def split_calls(text: str, names: Sequence[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """What an answer says, and which of the functions `names` it calls; what is no call stays text.

    Returns
    -------
    content : str or None
        None where there is nothing but calls.
    calls : list of dict
        In OpenAI's form.
    """
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        call = _call(found[1])
        if call is None or call["function"]["name"] not in names:
            return found[0]
        calls.append(call)
        return ""

    content = CALL.sub(take, text)
    return (content.strip() or None if calls else text), calls


def _call(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
