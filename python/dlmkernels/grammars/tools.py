# SPDX-License-Identifier: Apache-2.0
"""Function calls in OpenAI's format: convert tools to a schema, and answers to calls.

If a call is required, the whole answer is the JSON object `{"name": …, "arguments": {…}}`, whose schema is made by
`call_schema`. If the model may choose, it writes calls in the format of its chat template. `split_calls` reads the
format of Hermes and Qwen: that object between `<tool_call>` and `</tool_call>`.
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
    """Return the JSON schema for a call of one of the given tools.

    Parameters
    ----------
    tools : sequence of dict
        Tools as in OpenAI's chat completions: `{"type": "function", "function": {"name": …, "parameters": …}}`.
    tool_choice : "required" or dict
        "required" allows a call of any tool; `{"type": "function", "function": {"name": …}}` only of that one.

    Raises
    ------
    ValueError
        If `tools` is empty or has an entry that is not such a tool, or `tool_choice` is not one of these values or
        names a tool that is not in `tools`.
    """
    functions = _functions(tools)
    if not isinstance(tool_choice, str):
        chosen = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
        name = chosen.get("name") if isinstance(chosen, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"tool_choice must be 'required' or name a function; got {tool_choice!r:.200}")
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ValueError(f"tool_choice must name one of the tools; got {name!r}")
    elif tool_choice != "required":
        raise ValueError(f"tool_choice must be 'required' or name a function; got {tool_choice!r}")
    if not functions:
        raise ValueError("tools must contain at least one function; got none")
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


def _functions(tools: Any) -> list[Mapping[str, Any]]:
    """Return the functions of the tools; raise ValueError if one is not in OpenAI's format."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"tools must be a list of tools; got {tools!r:.200}")
    functions = []
    for k, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"tools[{k}] must be {{'type': 'function', 'function': {{'name': …, 'parameters': …}}}}; "
                f"got {tool!r:.200}"
            )
        functions.append(function)
    return functions


def _moved(schema: Any, to: str) -> Any:
    """Adjust the references of a schema that is moved to the path `to`."""
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
    """Convert an answer that satisfies `call_schema` to calls in OpenAI's format.

    Raises
    ------
    ValueError
        If the text is not such an answer.
    """
    call = _call(text)
    if call is None:
        raise ValueError(f"the answer must be a function call; got {text!r:.200}")
    return [call]


def split_calls(text: str, names: Sequence[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """Split an answer into text and calls of the functions in `names`. Anything that is not such a call stays text.

    Returns
    -------
    content : str or None
        The text, or None if the answer consists of calls only.
    calls : list of dict
        Calls in OpenAI's format.
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
