# SPDX-License-Identifier: Apache-2.0
"""The page on which decodings are watched: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ..trace import KINDS, Trace

#: Characters that could end the element the data stand in, or that JavaScript once took for line ends.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page_of(traces: Sequence[Trace], names: Sequence[str] | None, title: str) -> str:
    """The page of one or more decodings, side by side; see `Trace.html`."""
    if names is None:
        names = [""] if len(traces) == 1 else [f"decoding {i + 1}" for i in range(len(traces))]
    if isinstance(names, str) or len(names) != len(traces):
        raise ValueError(f"names must hold one name for each of the {len(traces)} decodings; got {names!r}")
    data = {"kinds": KINDS, "decodings": [decoding(trace, name) for trace, name in zip(traces, names)]}
    folder = files(__name__)
    style, script, page = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js", "page.html"))
    values = {
        "title": html.escape(title), "policy": policy(style, script), "style": style, "script": script,
        "data": json.dumps(data, separators=(",", ":"), ensure_ascii=False).translate(ESCAPES),
    }  # fmt: skip
    before, *parts = page.split("{{")
    return before + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts))


def policy(style: str, script: str) -> str:
    """A content security policy under which this style and this script work, and nothing else does."""
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )


def decoding(trace: Trace, name: str) -> dict[str, Any]:
    """What the page is told of one decoding: its rows, and what the tokens in them are called."""
    rows = [row_of(trace, row) for row in range(len(trace.tokens))]
    ids = {token for row in rows for token in row["start"] if token >= 0}
    ids |= {event[3] for row in rows for event in row["events"]}
    ids |= {token for row in rows for choices in row["choices"].values() for token, _ in choices}
    mask = -1 if trace.recording is None else trace.recording.mask_token_id
    texts = {token: text_of(trace.tokenizer, token) for token in sorted(ids)}
    return {"name": str(name), "mask": mask, "texts": texts, "rows": rows}


def row_of(trace: Trace, row: int) -> dict[str, Any]:
    """One row as the page needs it. Events are [forward, number of the kind, position, token, confidence]."""
    tokens, is_open = trace.start(row)
    first, last = trace.bounds(row)
    events = [
        [e.forward, KINDS.index(e.kind), e.position, e.token, _short(e.confidence)] for e in trace.events(row)
    ]  # fmt: skip
    entropy: dict[int, float] = {}
    choices: dict[int, list[list[float]]] = {}
    if trace.top_ids is not None and trace.top_log_probability is not None:
        for position in (trace.commit_step[row] >= 0).nonzero().flatten().tolist():
            probability = trace.top_log_probability[row, position].exp().tolist()
            pairs = zip(trace.top_ids[row, position].tolist(), probability)
            choices[position] = [[token, _short(p)] for token, p in pairs]
            if trace.entropy is not None:
                entropy[position] = _short(float(trace.entropy[row, position]))
    return {
        "first": first, "prompt": max(trace.prompt_length, first), "last": last, "start": tokens,
        "open": "".join("01"[is_it] for is_it in is_open), "events": events, "entropy": entropy, "choices": choices,
        "blocks": [] if trace.recording is None else list(trace.recording.blocks[row]),
    }  # fmt: skip


def text_of(tokenizer: Any, token: int) -> str:
    """What a token is called: its text, with the space before it if it begins a word; its id without a tokenizer."""
    if tokenizer is None or token < 0:
        return str(token)
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # an id that the tokenizer does not know
        return f"[{token}]"
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece's mark of a word's beginning, dropped where a text begins
    return text if text and "\ufffd" not in text else f"[{token}]"


def _short(value: float) -> float:
    """Four digits; 0 for what JSON cannot hold."""
    return round(value, 4) if value == value and abs(value) != float("inf") else 0
