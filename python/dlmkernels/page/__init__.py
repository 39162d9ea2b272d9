# SPDX-License-Identifier: Apache-2.0
"""The page on which decodings are watched: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

#: Characters that could end the element the data stand in, or that JavaScript once took for line ends.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page_of(data: dict[str, Any], title: str) -> str:
    """The page of what `trace.page_data` tells of decodings."""
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
