# SPDX-License-Identifier: Apache-2.0
"""The page on which a server's decodings are watched."""

import json
import threading

import httpx
import pytest

import dlmkernels as dk
from servers import PROMPT, SUM, serving

BODY = {"model": "demo", "prompt": PROMPT, "max_tokens": 17}


def messages(url, until, headers=None):
    """What the page is told, until a message of one kind has come."""
    found = []
    with httpx.stream("GET", url + "/live/events", headers=headers, timeout=30) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
                if found[-1]["type"] == until:
                    return found


@pytest.fixture(scope="module")
def running():
    with serving(engine={"rule": dk.Quota(), "steps": 17, "block_length": 17}) as running:
        yield running


def test_the_page_loads_nothing_and_says_so(running):
    page = httpx.get(running.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy and policy in page.text.replace(
        "&#x27;", "'")  # fmt: skip


def test_a_decoding_is_told_step_by_step(running):
    asked = threading.Timer(0.5, httpx.post, (running.url + "/v1/completions",), {"json": BODY, "timeout": 60})
    asked.start()
    found = messages(running.url, "end")
    asked.join()
    begin = next(message for message in found if message["type"] == "begin")
    events = [event for message in found for event in message.get("events", ())]
    texts = {key: text for message in found for key, text in message.get("texts", {}).items()}
    answer = {column: texts[str(token)] for _, _, column, token, _ in events}
    assert "".join(answer[column] for column in range(35, 52)) == SUM
    assert len(begin["row"]["start"]) == 52 and len({event[0] for event in events}) > 5


def test_nobody_who_watches_costs_nothing(running):
    assert running.service.viewers.count == 0
    httpx.post(running.url + "/v1/completions", json=BODY, timeout=60)
    assert all(message["type"] != "begin" or message["row"]["prompt"] for message in messages(running.url, "reset"))


def test_the_key_is_asked_for():
    with serving(api_key="k") as running:
        assert httpx.get(running.url + "/").status_code == 200
        assert httpx.get(running.url + "/live/events").status_code == 401
        assert messages(running.url, "reset", {"authorization": "Bearer k"})


def test_the_page_can_be_left_out():
    with serving(live=False) as running:
        assert httpx.get(running.url + "/").status_code == httpx.get(running.url + "/live/events").status_code == 404


def test_a_page_that_is_open_does_not_keep_the_server_from_ending(running):
    with serving() as other, httpx.stream("GET", other.url + "/live/events", timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        other.server.should_exit = True
        assert sum(1 for _ in lines) >= 0  # it comes to its end
        other.thread.join(20)
        assert not other.thread.is_alive()
