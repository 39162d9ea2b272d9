# SPDX-License-Identifier: Apache-2.0
"""The page of decodings that are being made: what readers are told, and what it shows, in a browser too."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import dlmkernels as dk
from decodings import lively
from dlmkernels.page import live as live_module
from dlmkernels.page import live_page
from dlmkernels.page.live import Live
from dlmkernels.trace import KINDS
from engines import engine_for
from small_models import EOS, MASK, prompts
from test_page import HOSTILE, Words, browse, cells, needs_chromium


def replayed(messages):
    """What a page shows after some messages: the tokens of each decoding, and why it has ended."""
    shown = {}
    for message in messages:
        kind, name = message["type"], message.get("id")
        if kind == "reset":
            shown = {}
        elif kind == "begin":
            shown[name] = [list(message["row"]["start"]), None]
        elif kind == "gone":
            del shown[name]
        else:
            for _, _, place, token, _ in message["events"]:
                shown[name][0][place] = token
            shown[name][1] = message.get("reason")
    return shown


def watched(live, count=3, **options):
    """Outputs of some requests of a small engine, which a live page is told of as they come."""
    options = {"rule": dk.Threshold(0.4)} | options
    engine = engine_for(dk.adapt(lively()), slots=2, **options)
    found = {}

    def hear(output):
        live.put(output)
        found[output.request_id] = output

    for k in range(count):
        prompt = prompts(1, 4 + k, seed=k)[0].tolist()
        engine.add_request(prompt, f"r{k}", 12, drafts=True, result_handler=hear, seed=k)
    while engine.step():
        pass
    return found


@pytest.mark.parametrize("rule", [dk.Threshold(0.4), dk.Backtracking(2), dk.TokenEditing(0.4, 0.3)], ids=str)
def test_events_lead_to_what_was_answered(rule):
    live = Live(None, MASK, (EOS,))
    begun, nothing = live.since()
    assert nothing == [{"type": "reset"}]
    found = watched(live, rule=rule)
    cursor, messages = live.since(begun)
    for shown in (replayed(messages), replayed(live.since()[1])):
        assert shown.keys() == found.keys()
        for name, (tokens, reason) in shown.items():
            assert tokens == found[name].prompt_ids + found[name].generated_tokens and reason == "length"
    assert live.since(cursor) == (cursor, [])
    committed = [e for m in messages if m["type"] == "step" for e in m["events"] if e[1] == KINDS.index("commit")]
    assert committed and all(0 < event[4] <= 1 for event in committed)
    assert {e[0] for m in messages if m["type"] in ("step", "end") for e in m["events"]} >= {0, 1}


def test_answers_that_end_early_are_filled():
    live = Live(None, MASK, (EOS,))
    ends = torch.zeros(97, dtype=torch.bool)
    ends[[5, EOS]] = True
    found = watched(live, 2, eos_policy="fill", constraint=ends)
    assert any(EOS in output.generated_tokens for output in found.values())
    for name, (tokens, reason) in replayed(live.since()[1]).items():
        output = found[name]
        assert (
            tokens[: len(output.prompt_ids) + len(output.generated_tokens)]
            == output.prompt_ids + output.generated_tokens
        )
        assert reason == output.finish_reason


def test_few_are_kept_and_the_oldest_that_is_over_gives_way():
    live = Live(None, MASK, kept=2)
    watched(live, 5)
    assert len(replayed(live.since()[1])) == 2


def test_a_reader_that_falls_behind_is_told_everything(monkeypatch):
    live = Live(None, MASK)
    live._messages = live_module.deque(maxlen=4)
    begun, _ = live.since()
    watched(live, 3)
    for late in (live.since(begun)[1], live.since(10**9)[1]):
        assert late[0] == {"type": "reset"} and replayed(late) == replayed(live.since()[1])


def test_long_decodings_are_not_kept_whole(monkeypatch):
    monkeypatch.setattr(live_module, "MOST_EVENTS", 5)
    live = Live(None, MASK)
    watched(live, 1)
    assert sum(len(m.get("events", ())) for m in live.since()[1]) == 5


def test_the_page_talks_to_its_server_alone():
    page, policy = live_page(KINDS, "/live/events", "A <b>")
    assert policy.endswith("; connect-src 'self'") and policy.startswith("default-src 'none'; ")
    assert f'content="{policy}"' in page and "A &lt;b&gt;" in page and "innerHTML" not in page
    assert page.count("<script") == 2 and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


# --- in a browser -----------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A page, and the messages of its server's `live`, for those who have the key."""

    def do_GET(self):
        page, policy = live_page(KINDS, "/live/events", "Live")
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/":
            self.answer(200, "text/html; charset=utf-8", page.encode(), policy)
        elif self.path != "/live/events":
            self.answer(404, "text/plain", b"")
        elif self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.answer(401, "text/plain", b"")
        else:
            told = "".join(f"data: {json.dumps(message)}\n\n" for message in self.server.live.since()[1])
            self.answer(200, "text/event-stream", told.encode())

    def answer(self, status, kind, body, policy=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if policy:
            self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.key = [], None
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()


def visited(server, tmp_path, *options):
    return browse(
        f"http://127.0.0.1:{server.server_port}/",
        "",
        tmp_path,
        "--virtual-time-budget=20000",
        *(options or ("--dump-dom",)),
    )


@needs_chromium
def test_shows_what_is_decoded_and_takes_texts_for_texts(server, tmp_path):
    texts = [HOSTILE[k % len(HOSTILE)] + str(k) for k in range(97)]
    server.live = Live(Words(texts), MASK, (EOS,))
    found = watched(server.live, 2)
    document = visited(server, tmp_path)
    newest = [text for text, _ in cells(document)]
    last = list(found.values())[-1] if "r1" not in found else found["r1"]
    assert [t.replace("⏎\n", "\n") for t in newest] == [texts[i] for i in last.prompt_ids + last.generated_tokens]
    assert document.count("<script") == 2 and re.findall(r"<h2>(\w+) ", document) == ["r1", "r0"]
    assert "ended: length" in document and "alert(1)</script>" not in document.split("<main")[1].split("</main>")[0]
    assert {path for path, _ in server.asked} <= {"/", "/live/events", "/favicon.ico"}


@needs_chromium
def test_shows_masks_of_what_goes_on(server, tmp_path):
    server.live = Live(None, MASK)
    draft = [7, MASK, 9, MASK]
    server.live.put(dk.RequestOutput("r", [4, 5], draft=draft, draft_confidence=[0.5, 0.0, 0.9, 0.0], num_forwards=1))
    document = visited(server, tmp_path)
    shown = cells(document)
    assert [text.strip() for text, _ in shown] == ["4", "5", "7", "▁", "9", "▁"]
    assert [i for i, (_, names) in enumerate(shown) if "fresh" in names] == [2, 4]
    assert (
        "2 of 4 tokens committed after 1 of 1 forwards" in document
        and "ended" not in document.split("<main")[1].split("</main>")[0]
    )


@needs_chromium
def test_asks_for_a_key(server, tmp_path):
    server.live, server.key = Live(None, MASK), "secret"
    document = visited(server, tmp_path)
    assert "This server requires an API key." in document and re.search(r'<form id="login">', document)
    assert all(key is None for _, key in server.asked)
