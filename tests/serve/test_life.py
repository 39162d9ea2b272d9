# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, too many requests, requests that take too long, and servers that are told to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import dlmkernels as dk
from dlmkernels.serve import Settings
from servers import PROMPT, SUM, serving

BODY = {"model": "demo", "prompt": PROMPT, "max_tokens": 17}


class Slow:
    """The demo model, each of whose forwards takes a while."""

    def __init__(self, seconds):
        self.model = dk.load("demo")
        # hooks of the model as a whole are not called: the decoder and the head are forwarded one after the other
        self.model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(seconds))


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def slow():
    """One slot, and a second for an answer."""
    options = {"rule": dk.Quota(), "steps": 12, "cache": "none"}
    with serving(slots=1, model=Slow(0.1).model, max_waiting=2, engine=options) as running:
        yield running


def ask(running, stream=False, timeout=30.0, **more):
    return httpx.post(running.url + "/v1/completions", json=BODY | {"stream": stream} | more, timeout=timeout)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(slow, stream):
    engine = slow.service.engine
    cancelled = engine.metrics().cancelled
    text = json.dumps(BODY | {"stream": stream}).encode()
    with socket.create_connection(slow.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(text) + text)  # fmt: skip
        until(lambda: engine.metrics().running == 1)
    until(lambda: engine.metrics().cancelled == cancelled + 1)
    until(lambda: slow.service.bridge.live == 0)
    assert not slow.service.bridge.groups and engine.metrics().running == 0


def test_too_many_requests_are_refused_and_the_others_answered(slow):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(slow, max_tokens=12), range(6)))
    counts = [answer.status_code for answer in answers]
    assert counts.count(429) == 3 and counts.count(200) == 3
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
    assert ask(slow, prompt=[PROMPT] * 4).status_code == 400  # more than could ever be


def test_requests_that_take_too_long_end():
    options = {"rule": dk.Quota(), "steps": 24, "cache": "none"}
    with serving(slots=1, model=Slow(0.1).model, request_timeout=0.6, engine=options) as running:
        answer, stream = ask(running, max_tokens=24), ask(running, True, max_tokens=24)
        until(lambda: running.service.bridge.live == 0)
        assert running.service.engine.metrics().cancelled == 2
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    last = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")][-1]
    assert last["error"]["code"] == "timeout" and stream.text.endswith("data: [DONE]\n\n")


def test_a_client_that_does_not_read_is_cut_off():
    body = json.dumps(BODY | {"stream": True, "stream_options": {"drafts": True}}).encode()
    with serving(write_timeout=0.3, max_length=96, engine={"rule": dk.Quota(), "block_length": 16}) as running:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(running.address)
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n").encode()  # fmt: skip
        for _ in range(40):  # one after the other on one connection: much more than the buffers hold
            connection.sendall(head + body)
        until(lambda: running.service.bridge.live == 0 and not running.service.bridge.groups)
        assert ask(running).json()["choices"][0]["text"] == SUM
        connection.close()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_requests_in_flight_are_finished_before_the_end():
    model = Slow(0.05).model
    with serving(model=model, engine={"rule": dk.Quota()}, drain_timeout=20.0) as running:
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(ask, running, stream) for stream in (False, True) * 3]
            until(lambda: running.service.bridge.live == 6)
            running.server.should_exit = True
            texts = [answer.result() for answer in answers]
        assert [answer.status_code for answer in texts] == [200] * 6
        assert all(SUM in "".join(c["text"] for c in choices_of(answer)) for answer in texts)


def choices_of(answer):
    if answer.headers["content-type"].startswith("application/json"):
        return answer.json()["choices"]
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]


def test_requests_that_take_longer_than_the_end_are_told():
    model = Slow(0.5).model
    with serving(model=model, engine={"rule": dk.Quota()}, drain_timeout=0.5) as running:
        with ThreadPoolExecutor(2) as pool:
            whole, stream = pool.submit(ask, running), pool.submit(ask, running, True)
            until(lambda: running.service.bridge.live == 2)
            running.server.should_exit = True
        assert whole.result().status_code == 503 and whole.result().json()["error"]["code"] == "shutting_down"
        assert '"code": "shutting_down"' in stream.result().text


def test_the_command_line(tmp_path):
    """`dlmkernels serve` until SIGTERM, with a request in flight."""
    command = [sys.executable, "-m", "dlmkernels", "serve", "--model", "demo", "--port", "0", "--slots", "2"]
    environment = os.environ | {"DLMKERNELS_API_KEY": "k", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = process.stderr.readline().split(" at ")[1].split()[0]
        headers = {"authorization": "Bearer k"}
        until(lambda: _is_up(url))
        assert httpx.get(url + "v1/models").status_code == 401
        done = {}
        thread = threading.Thread(target=lambda: done.update(
            answer=httpx.post(url + "v1/completions", json=BODY, headers=headers, timeout=30)))  # fmt: skip
        thread.start()
        thread.join(0.02)
        thread.join(30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
        assert done["answer"].json()["choices"][0]["text"] == SUM


def _is_up(url):
    try:
        return httpx.get(url + "health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(("options", "words"), [
    (("--host", "0.0.0.0"), "may be reachable from other machines"), (("--port", "70000"), "65535"),
    (("--api-key", "a b"), "without spaces"), (("--max-waiting", "-1"), "non-negative"),
    (("--request-timeout", "0"), "positive"), (("--rule", "best"), "unknown rule"), (("--top-p", "2"), "--top-p"),
    (("--drain-timeout", "nan"), "positive"),
])  # fmt: skip
def test_options_that_cannot_be(capsys, options, words, monkeypatch):
    from dlmkernels.cli import main

    monkeypatch.delenv("DLMKERNELS_API_KEY", raising=False)
    assert main(["serve", "--model", "demo", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys):
    from dlmkernels.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--model", str(Path("/nowhere")), "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


def test_other_machines_are_let_in_where_that_is_said():
    assert not Settings("m", host="0.0.0.0", api_key="k").is_local
    assert not Settings("m", host="192.0.2.1", open_to_all=True).is_local
    assert Settings("m", host="127.8.8.8").is_local and Settings("m", host="::1").is_local
