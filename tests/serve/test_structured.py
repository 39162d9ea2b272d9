# SPDX-License-Identifier: Apache-2.0
"""Answers with a form, from a model with random weights: whatever it would say, it says JSON."""

import json

import openai
import pytest

import json_model
from servers import serving
from small_models import build

SCHEMA = {
    "type": "object", "required": ["n", "ok"], "additionalProperties": False,
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "required": ["x"], "additionalProperties": False, "properties": {"x": {"enum": [1, 2]}}}}}
    for name in ("f", "g")
]  # fmt: skip
ASK = {"model": "demo", "messages": [{"role": "user", "content": "AAA"}], "max_tokens": 48}


@pytest.fixture(scope="module")
def client():
    model, tokenizer = build(), json_model.tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with (
        serving(model=model, tokenizer=tokenizer, max_length=96) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    answer = client.chat.completions.create(**ASK, response_format=form, stream=stream)
    text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
    found = json.loads(text)
    assert set(found) == {"n", "ok"} and 0 <= found["n"] <= 99 and isinstance(found["ok"], bool)


def test_any_object(client):
    answer = client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_call_that_is_required(client, choice, stream):
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice, stream=stream)
    if stream:
        parts = [part.choices[0] for part in answer]
        calls, reason = [c for part in parts for c in part.delta.tool_calls or ()], parts[-1].finish_reason
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    (call,) = calls
    assert reason == "tool_calls" and call.type == "function" and call.id.startswith("call_")
    assert call.function.name in (("f", "g") if choice == "required" else ("g",))
    assert json.loads(call.function.arguments)["x"] in (1, 2)


def test_what_cannot_be_had(client):
    for more, words in (
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "cannot be combined"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}}, "thing"),
        ({"tools": TOOLS, "tool_choice": "required", "max_tokens": 3}, "token"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**ASK | more)


def test_a_model_that_may_call_says_what_it_says(client):
    answer = client.chat.completions.create(**ASK, tools=TOOLS)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content
