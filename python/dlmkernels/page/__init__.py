# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages that show decodings: replays of finished ones, and a live view of a server's."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

#: Characters that could close the element with the data, or that older JavaScript treats as line ends.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class LivePage(NamedTuple):
    """A page and its content security policy.

    Attributes
    ----------
    html : str
    policy : str
        The content security policy, for the header of the response. The page also contains it.
    """

    html: str
    policy: str


def page_of(data: dict[str, Any], title: str) -> str:
    """Return the page that replays the decodings in `data`, which comes from `trace.page_data`."""
    return _page("replay", data, title)[0]


def live_page(kinds: Sequence[str], source: str, title: str = "Decodings") -> LivePage:
    """Return a page that shows decodings in progress, as reported by the server that delivers it.

    Parameters
    ----------
    kinds : sequence of str
        Names of the kinds of events: `trace.KINDS`.
    source : str
        Path on the same server from which the page reads the messages of `live.Live`, as server-sent events with one
        JSON object each. On status 401 the page asks for an API key and sends it as `Authorization: Bearer`.
    title : str
    """
    return _page("live", {"kinds": list(kinds), "decodings": [], "live": source}, title, "; connect-src 'self'")


def _page(name: str, data: dict[str, Any], title: str, more: str = "") -> LivePage:
    if not isinstance(title, str):
        raise TypeError(f"title must be a string; got {title!r}")
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
    text = before + "".join(values[name] + rest for name, rest in (p.split("}}", 1) for p in parts))
    # half of a surrogate pair, in a title or a token, has no UTF-8 form
    return LivePage(text.encode("utf-8", "replace").decode("utf-8"), rules)


def policy(style: str, script: str) -> str:
    """Return a content security policy that allows only this style and this script."""
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
