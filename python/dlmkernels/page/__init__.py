# SPDX-License-Identifier: Apache-2.0
"""The pages on which decodings are watched: HTML files that load nothing, of decodings that are over or go on."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

#: Characters that could end the element the data stand in, or that JavaScript once took for line ends.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class LivePage(NamedTuple):
    """A page that follows a server.

    Attributes
    ----------
    html : str
    policy : str
        The content security policy that the page states itself, for the header of the response.
    """

    html: str
    policy: str


def page_of(data: dict[str, Any], title: str) -> str:
    """The page of what `trace.page_data` tells of decodings."""
    return _page("replay", data, title)[0]


def live_page(kinds: Sequence[str], source: str, title: str = "Decodings") -> LivePage:
    """A page of decodings that are being made, which it is told of by the server that it comes from.

    Parameters
    ----------
    kinds : sequence of str
        Names of events: `trace.KINDS`.
    source : str
        Path on the same server at which it reads `live.Live`'s messages: server-sent events with `data: ` and a JSON
        object each. Where the answer is status 401, the page asks for a key, which it sends as `Authorization: Bearer`.
    title : str
    """
    return _page("live", {"kinds": list(kinds), "decodings": [], "live": source}, title, "; connect-src 'self'")


def _page(name: str, data: dict[str, Any], title: str, more: str = "") -> LivePage:
    folder = files(__name__)
    style, page, panel, script = (
        (folder / file).read_text("utf-8") for file in ("page.css", f"{name}.html", "panel.js", f"{name}.js")
    )
    script = f'"use strict";\n(() => {{\n{panel}\n{script}}})();\n'
    rules = policy(style, script) + more
    values = {
        "title": html.escape(title), "policy": rules, "style": style, "script": script,
        "data": json.dumps(data, separators=(",", ":"), ensure_ascii=False).translate(ESCAPES),
    }  # fmt: skip
    before, *parts = page.split("{{")
    return LivePage(before + "".join(values[name] + rest for name, rest in (p.split("}}", 1) for p in parts)), rules)


def policy(style: str, script: str) -> str:
    """A content security policy under which this style and this script work, and nothing else does."""
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
