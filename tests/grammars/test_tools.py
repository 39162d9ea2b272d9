# SPDX-License-Identifier: Apache-2.0
"""Calls of functions: a schema for what must be called, and calls from what was answered."""

import json

import jsonschema
import pytest

from dlmkernels.grammars.schema import pattern_of
from dlmkernels.grammars.tools import call_schema, split_calls, tool_calls

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"$ref": "#/$defs/name"}, "$ref": {"type": "null"}},
    "$defs": {"name": {"type": "string"}}, "additionalProperties": False,
}}}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_schema_of_any_call():
    schema = call_schema([WEATHER, CLOCK])
    pattern_of(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"name": "weather", "arguments": {"city": "Rome"}}) and check({"name": "clock", "arguments": {}})
    assert not check({"name": "weather", "arguments": {"city": 3}}) and not check({"name": "x", "arguments": {}})
    assert not check({"name": "clock", "arguments": {"a": 1}}) and not check({"name": "clock"})


def test_schema_of_one_call():
    schema = call_schema([WEATHER, CLOCK], {"type": "function", "function": {"name": "clock"}})
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"name": "clock", "arguments": {}}) and not check({"name": "weather", "arguments": {"city": "Rome"}})


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([CLOCK], {"type": "function", "function": {"name": "x"}}, "must name one of the tools; got 'x'"),
        (5, "required", "tools must be a list of tools; got 5"), ([5], "required", r"tools\[0\] must be .*; got 5"),
        ([CLOCK, {"function": {}}], "required", r"tools\[1\] must be .*'name': .*; got {'function': {}}"),
        ([CLOCK], {}, "must be 'required' or name a function; got {}"), ([CLOCK], 5, "name a function; got 5"),
        ([CLOCK], {"function": {"name": []}}, "must be 'required' or name a function; got"),
        ([CLOCK], "auto", "must be 'required' or name a function"), ([], "required", "at least one function"),
    ],
)  # fmt: skip
def test_refused(tools, choice, message):
    with pytest.raises(ValueError, match=message):
        call_schema(tools, choice)


def test_calls_of_an_answer():
    (call,) = tool_calls('{"name": "weather", "arguments": {"city": "Zürich"}}')
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Zürich"}'}
    for text in ("", "{", "[1]", '{"name": 3}', '{"name": "a", "arguments": "b"}', "[" * 100_000):
        with pytest.raises(ValueError, match="must be a function call"):
            tool_calls(text)


def test_calls_within_text():
    text = (
        'First.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><tool_call>{"name":"weather"}</tool_call>'
    )
    content, calls = split_calls(text, ["clock", "weather"])
    assert content == "First." and [call["function"]["name"] for call in calls] == ["clock", "weather"]
    assert len({call["id"] for call in calls}) == 2 and json.loads(calls[1]["function"]["arguments"]) == {}
    assert split_calls(text.removeprefix("First.\n"), ["clock", "weather"])[0] is None
    for other in ("plain ", "<tool_call>{</tool_call>", '<tool_call>{"name": "rm"}</tool_call>', "<tool_call>"):
        assert split_calls(other, ["clock"]) == (other, [])
