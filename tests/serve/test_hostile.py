# SPDX-License-Identifier: Apache-2.0
"""Bad requests of a hundred kinds: each is refused with a status, an error in OpenAI's shape and the parameter's name,
and the server answers the next one."""

import json
import socket
import time

import httpx
import pytest

from servers import PROMPT, SUM, serving

GOOD = {"model": "demo", "prompt": PROMPT, "max_tokens": 17}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 17}
KEY = "a-key-of-tests"


@pytest.fixture(scope="module")
def running():
    with serving(api_key=KEY, max_body_bytes=20_000, body_timeout=1.0, max_choices=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def check(response, status, param=None, words=""):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert words in error["message"], error
    return error


def without(body, name):
    return {key: value for key, value in body.items() if key != name}


COMPLETIONS = [
    ({"model": 5}, "model"), ({"model": None}, "model"), ({"model": ["demo"]}, "model"),
    ({"prompt": 5}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": {}}, "prompt"), ({"prompt": ""}, "prompt"),
    ({"prompt": [""]}, "prompt"), ({"prompt": ["A", 5]}, "prompt"), ({"prompt": [5, "A"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": [[1], ["A"]]}, "prompt"), ({"prompt": [[[1]]]}, "prompt"), ({"prompt": [None]}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"), ({"prompt": [2**70]}, "prompt"), ({"prompt": "1" * 90}, "prompt"),
    ({"prompt": ["A1+1="] * 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"), ({"max_tokens": [1]}, "max_tokens"), ({"max_tokens": 10**9}, "prompt"),
    ({"max_tokens": 2**80}, "max_tokens"),
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"temperature": 1e9}, "temperature"),
    ({"temperature": []}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"top_p": "all"}, "top_p"), ({"top_p": -0.1}, "top_p"),
    ({"top_k": 0}, "top_k"), ({"top_k": -1}, "top_k"), ({"top_k": 0.5}, "top_k"),
    ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 9}, "n"), ({"n": "two"}, "n"), ({"n": 2}, "n"), ({"n": 10**12}, "n"),
    ({"seed": 1.5}, "seed"), ({"seed": "x"}, "seed"), ({"seed": 2**64}, "seed"), ({"seed": [1]}, "seed"),
    ({"stop": ""}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 5}, "stop"), ({"stop": [5]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": {"a": 1}}, "stop"),
    ({"stream": "perhaps"}, "stream"), ({"stream": {}}, "stream"),
    ({"stream_options": {"drafts": True}}, "stream_options"), ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed"),
    ({"logprobs": -1}, "logprobs"), ({"logprobs": 21}, "logprobs"), ({"logprobs": "all"}, "logprobs"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"repetition_penalty": -2}, "repetition_penalty"),
    ({"suffix": 5}, "suffix"), ({"user": 5}, "user"), ({"rule": "threshold:0.5"}, "rule"), ({"steps": 4}, "steps"),
    ({"block_length": 4}, "block_length"), ({"best_of": 3}, "best_of"), ({"echo": True}, "echo"),
    ({"frequency_penalty": 1}, "frequency_penalty"), ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 10}}, "logit_bias"),
    ({"messages": []}, "messages"), ({"speed": "high"}, "speed"), ({"Prompt": "A"}, "Prompt"),
]  # fmt: skip
CHATS = [
    ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"), ({"messages": None}, "messages"),
    ({"messages": [5]}, "messages.0"), ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [{"role": "king", "content": "A"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content"),
    ({"messages": [{"role": "user", "content": "A", "mood": "good"}]}, "messages.0.mood"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_completion_tokens": 5}, None),
    ({"logprobs": 5}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [5]}, "tools.0"), ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
                                 "tools.0.function.name"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}],
      "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}}, "response_format"),
    ({"audio": {"voice": "x"}}, "audio"), ({"modalities": ["audio"]}, "modalities"), ({"prompt": "A"}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize("change", range(len(COMPLETIONS)))
def test_completions(client, change):
    fields, param = COMPLETIONS[change]
    check(client.post("/v1/completions", json=GOOD | fields), 400, param)


@pytest.mark.parametrize("change", range(len(CHATS)))
def test_chats(client, change):
    fields, param = CHATS[change]
    check(client.post("/v1/chat/completions", json=CHAT | fields), 400, param)


def test_fields_that_are_missing(client):
    check(client.post("/v1/completions", json=without(GOOD, "model")), 400, "model", "is missing")
    check(client.post("/v1/completions", json=without(GOOD, "prompt")), 400, "prompt", "is missing")
    check(client.post("/v1/chat/completions", json=without(CHAT, "messages")), 400, "messages", "is missing")


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b"null", b'"text"', b"{'model': 1}", b'{"model": "demo",}', b"\xff\xfe\x00", b"[" * 5000,
    b'{"temperature": NaN, "model": "demo", "prompt": "A"}', b'{"temperature": 1e999, "model": "demo", "prompt": "A"}',
    b'{"model": "demo", "prompt": "\\ud800"}',
])  # fmt: skip
def test_bodies_that_are_no_request(client, body):
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bodies_of_another_kind(client, kind):
    response = client.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": kind})
    check(response, 415, None, "application/json")


def test_bodies_that_are_too_long(client):
    long = json.dumps(GOOD | {"user": "x" * 30_000})
    headers = {"content-type": "application/json"}
    assert check(client.post("/v1/completions", content=long, headers=headers), 413)["code"] == "body_too_long"
    pieces = (long[start : start + 1000].encode() for start in range(0, len(long), 1000))  # its length is not told
    check(client.post("/v1/completions", content=pieces, headers=headers), 413)


def test_paths_and_methods(client):
    check(client.get("/v1/completion"), 404, None, "there is no /v1/completion")
    check(client.get("/v1/../etc/passwd"), 404)
    check(client.get("/docs"), 404)
    check(client.get("/v1/completions"), 405, None, "does not support the method GET")
    check(client.delete("/v1/models"), 405)
    check(client.get("/v1/models/other"), 404, "model", "there is no model 'other'")
    check(client.post("/v1/completions", json=GOOD | {"model": "other"}), 404, "model")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"])
def test_keys_that_are_wrong(running, header):
    headers = {} if header is None else {"authorization": header}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nope")):
        response = httpx.request(method, running.url + path, headers=headers, json=GOOD if method == "POST" else None)
        assert check(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(running.url + "/health").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:80"])
def test_names_that_are_not_this_machine(running, host):
    response = httpx.get(running.url + "/health", headers={"host": host})
    check(response, 403, None, "localhost")


def send(running, data, wait=10.0):
    """What a server says to raw bytes, until it closes."""
    with socket.create_connection(running.address, timeout=wait) as connection:
        connection.sendall(data)
        said = b""
        while part := connection.recv(65536):
            said += part
        return said


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
JSON = b"Content-Type: application/json\r\n"


@pytest.mark.parametrize("data", [
    b"\r\n\r\n\r\n\r\nhello\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", HEAD + b"X: " + b"y" * 100_000,
    HEAD + JSON + b"Content-Length: -5\r\n\r\n", HEAD + JSON + b"Content-Length: five\r\n\r\n",
    HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
])  # fmt: skip
def test_what_is_no_http(running, data):
    said = send(running, data)
    assert said == b"" or said.split(b"\r\n")[0].split()[1][:1] in (b"4", b"5"), said


def test_slow_clients_are_cut_off(running):
    started = time.monotonic()
    assert send(running, b"GET /health HT") == b""  # a head that never ends
    assert send(running, b"") == b""
    said = send(running, HEAD + JSON + b"Content-Length: 100\r\n\r\n{")  # a body that never ends
    assert said.split(b"\r\n")[0].split()[1] == b"408" and b"body_timeout" in said
    assert 2.5 < time.monotonic() - started < 15


def test_the_server_still_answers(client, running):
    """The last of this file: nothing of the above is left behind."""
    answer = client.post("/v1/completions", json=GOOD).json()
    assert answer["choices"][0]["text"] == SUM
    assert running.service.bridge.live == 0 and not running.service.bridge.groups
    assert running.service.engine.metrics().failed == 0
