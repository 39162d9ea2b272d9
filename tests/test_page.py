# SPDX-License-Identifier: Apache-2.0
"""The page on which decodings are watched: what it is told, that it loads nothing and trusts no text, what it shows."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import dlmkernels as dk
from dlmkernels.cli import main
from dlmkernels.trace import Event, Recording, Trace, text_of

GOLDEN = Path(__file__).parent / "golden" / "page.json"
HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "\u2028</title>", '"&quot;', "a\nb", "▁", "{{data}}"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Words:
    """A tokenizer of some texts."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.texts[i] for i in ids)


def made(texts=("zero", " one", " two", " three", " four", "[M]", " six")):
    """A decoding of seven columns, with everything that can happen in it; the first two are given, the mask is 5."""
    events = [
        Event(0, "commit", 2, 3, 0.5), Event(0, "commit", 4, 1, 0.99), Event(1, "remask", 2, 5),
        Event(1, "commit", 3, 4, 0.8), Event(2, "commit", 2, 6, 0.7), Event(2, "edit", 3, 2, 0.6),
        Event(3, "remove", 5, 5), Event(3, "insert", 4, 5), Event(3, "commit", 4, 3, 0.4), Event(4, "fill", 6, 0),
    ]  # fmt: skip
    begun = torch.tensor([[0, 1, 5, 5, 5, 5, 5]])
    recording = Recording(begun, begun == 5, (tuple(events),), ((2, 4),), 5)
    return Trace(
        torch.tensor([[0, 1, 6, 2, 3, 1, 0]]), torch.tensor([[-1, -1, 2, 1, 3, 0, -1]], dtype=torch.int32),
        torch.tensor([[0, 0, 0.7, 0.6, 0.4, 0.99, 0]]), 2, torch.tensor([0]), torch.tensor([6]), Words(texts), recording,
        torch.tensor([[[-1, -1]] * 2 + [[6, 0], [2, 4], [3, 1], [1, 2]] + [[-1, -1]]]),
        torch.tensor([[[0, 0]] * 2 + [[0.7, 0.2], [0.6, 0.3], [0.4, 0.3], [0.99, 0.01]] + [[1, 1]]]).log(),
        torch.tensor([[0, 0, 0.8, 0.9, 1.1, 0.05, 0]]),
    )  # fmt: skip


def told(page):
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_golden():
    """`tests/golden/page.json` is what the page was told when a person last looked at it."""
    assert told(made().html()) == json.loads(GOLDEN.read_text("utf-8"))


def test_loads_nothing_and_runs_its_own_script_alone():
    page = made().html(title="A <b>decoding</b> & more")
    assert "A &lt;b&gt;decoding&lt;/b&gt; &amp; more" in page and "<b>" not in page
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
        "style-src": f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'",
        "script-src": f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
    }  # fmt: skip
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page) and "innerHTML" not in script


def test_texts_of_tokens_are_text():
    page = made(HOSTILE).html()
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page.split("<body>")[1]
    assert list(told(page)["decodings"][0]["texts"].values()) == HOSTILE


def test_side_by_side_and_rows():
    trace = made()
    page = told(trace.html(beside=[trace, trace], names=["a", "b", "c"]))
    assert [d["name"] for d in page["decodings"]] == ["a", "b", "c"]
    assert [d["name"] for d in told(trace.html(beside=trace))["decodings"]] == ["decoding 1", "decoding 2"]
    with pytest.raises(ValueError, match="names must hold one name for each of the 2 decodings; got 'ab'"):
        trace.html(beside=trace, names="ab")
    assert "sandbox=&quot;" not in trace._repr_html_() and 'sandbox="allow-scripts"' in trace._repr_html_()


def test_titles_and_names_of_any_kind(tmp_path):
    trace = made()
    path = tmp_path / "page.html"
    trace.html(path, title="a\ud800b", names=["\udc00"])
    page = path.read_text("utf-8")
    assert "<title>a?b</title>" in page and told(page)["decodings"][0]["name"] == "?"
    for title in (None, 5):
        with pytest.raises(TypeError, match=f"title must be a string; got {title}"):
            trace.html(title=title)
    for names in (5, "a", {"a"}, ["a", "b"]):
        with pytest.raises(ValueError, match="names must hold one name for each of the 1 decodings; got"):
            trace.html(names=names)


def test_rows_and_steps():
    trace = made()
    assert trace.events(np.int64(0)) == trace.events(torch.tensor(0)) == trace.events()
    assert trace.start(np.int64(0)) == trace.start() and trace.bounds(np.int64(0)) == trace.bounds()
    calls = [
        trace.events, trace.order, trace.start, trace.bounds, lambda row: trace.plot("never.png", row=row),
        lambda row: trace.text(str, 0, row=row),
    ]  # fmt: skip
    for call in calls:
        for row in (1, -1, 5, True, 0.0, "x", None):
            with pytest.raises(ValueError, match=f"row must be an integer from 0 to 0; got {row!r}"):
                call(row)
    for step in ("x", -2, 0.5, None, True):
        with pytest.raises(ValueError, match=f"step must be the number of a forward pass, from 0, or -1; got {step!r}"):
            trace.canvas_at(step, 0)
    with pytest.raises(ValueError, match="mask_token_id must be a token id; got 'x'"):
        trace.canvas_at(0, "x")


def test_without_a_recording():
    """What is known is when each of the final tokens was committed."""
    whole = made()
    trace = Trace(whole.tokens, whole.commit_step, whole.confidence, 2)
    (row,) = told(trace.html())["decodings"][0]["rows"]
    assert row["start"] == [0, 1, -1, -1, -1, -1, 0] and row["open"] == "0011110"
    assert [(e[0], e[2], e[3]) for e in row["events"]] == [(0, 5, 1), (1, 3, 2), (2, 2, 6), (3, 4, 3)]


def test_names_of_tokens():
    class Pieces(Words):
        def convert_ids_to_tokens(self, token):
            return "▁one" if token == 1 else "x"

    pieces = Pieces(["\ufffd", "one", "", "x"])
    assert [text_of(pieces, i) for i in range(5)] == ["[0]", " one", "[2]", "x", "[4]"]
    assert text_of(None, 7) == "7"


def test_command_line(tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["generate", "--model", "demo", "--trace", str(path)]) == 0
    (row,) = told(path.read_text("utf-8"))["decodings"][0]["rows"]
    printed = capsys.readouterr()
    assert len([e for e in row["events"] if e[1] == 0]) == 17 and str(path) in printed.err


# --- in a browser -----------------------------------------------------------------------------------------------------


def browse(path, at, tmp_path, *options):
    """The document that Chromium makes of a page, opened `at` a place."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=3000", *options, path if str(path).startswith("http") else f"file://{path}#{at}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not re.search(r"CONSOLE.*|Uncaught|Content Security Policy", done.stderr), done.stderr
    return done.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def cells(document):
    """Text and classes of each position of the first canvas."""
    (canvas,) = re.findall(r'<div class="canvas"[^>]*>(.*?)</div>', document, re.S)[:1]
    return [
        (html.unescape(text), set(names.split()))
        for names, text in re.findall(r'<span data-position="\d+" class="(.*?)"[^>]*>(.*?)</span>', canvas, re.S)
    ]


@needs_chromium
def test_shows_each_forward(tmp_path):
    path = tmp_path / "page.html"
    assert made().html(path) is None and path.read_text("utf-8") == made().html()
    now = {n: cells(browse(path, f"forward={n}", tmp_path, "--dump-dom")) for n in (0, 1, 2, 3, 4)}
    mask = "▁"
    assert [text for text, _ in now[0]] == ["zero", " one", mask, mask, mask, mask]
    assert [text for text, _ in now[1]] == ["zero", " one", " three", mask, " one", mask]
    assert [text for text, _ in now[2]] == ["zero", " one", mask, " four", " one", mask]
    assert [text for text, _ in now[3]] == ["zero", " one", " six", " two", " one", mask]
    assert [text for text, _ in now[4]] == ["zero", " one", " six", " two", " three", " one"]
    assert [i for i, (_, names) in enumerate(now[1]) if "fresh" in names] == [2, 4]
    assert [i for i, (_, names) in enumerate(now[3]) if "fresh" in names] == [2, 3]
    assert [i for i, (_, names) in enumerate(now[3]) if "edited" in names] == [2, 3]
    assert all(("given" in names) == (i < 2) for i, (_, names) in enumerate(now[2]))


@needs_chromium
def test_hostile_texts_are_shown_as_text(tmp_path):
    path = tmp_path / "page.html"
    made(HOSTILE).html(path, title="</title><script>alert(2)</script>")
    document = browse(path, "forward=4", tmp_path, "--dump-dom")
    assert [text for text, _ in cells(document)][:2] == [HOSTILE[0], HOSTILE[1]]
    assert document.count("<script") == 2 and "<h1>&lt;/title&gt;&lt;script&gt;" in document


@needs_chromium
def test_two_decodings_and_their_rows(tmp_path):
    from dlmkernels.demo import MODEL_DIR
    from dlmkernels.demo.tasks import TASKS

    model = dk.load(MODEL_DIR, dtype=torch.float32)
    ids = torch.stack([torch.from_numpy(p.ids) for p in TASKS["sudoku"].make(2, seed=3)])
    fast, slow = (
        dk.infill(model, ids, rule=rule, trace=True).trace for rule in (dk.EntropyBound(0.1), dk.Threshold(0.99))
    )
    path = tmp_path / "page.html"
    fast.html(path, beside=slow, names=["fast", "slow"])
    document = browse(path, "row=all", tmp_path, "--dump-dom")
    titles = re.findall(r"<h2>(\S+, row \d) <small>(\d+) of (\d+) tokens committed after (\d+) of (\d+)", document)
    assert [title for title, *_ in titles] == ["fast, row 1", "slow, row 1", "fast, row 2", "slow, row 2"]
    counts = [int(x) for trace in (fast, slow) for x in trace.commit_step.amax(1) + 1]
    assert [int(t[4]) for t in titles] == [counts[0], counts[2], counts[1], counts[3]]
    assert all(t[1] == t[2] and t[3] == t[4] for t in titles)
    browse(path, "row=2", tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,700")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_refused():
    with pytest.raises(TypeError, match="beside must be a Trace or several of them; got int"):
        made().html(beside=3)
    with pytest.raises(TypeError, match="beside must be a Trace or several of them; got list with int"):
        made().html(beside=[made(), 5])
    with pytest.raises(TypeError, match="beside must be a Trace or several of them; got str"):
        made().html(beside="")
    with pytest.raises(ValueError, match="row must be an integer from 0 to 0; got 1"):
        made().events(1)
