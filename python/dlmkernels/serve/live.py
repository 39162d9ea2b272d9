# SPDX-License-Identifier: Apache-2.0
"""The page that shows a server's requests while they are being decoded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import anyio
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from ..page import live_page
from ..page.live import Live
from ..trace import KINDS

EVENTS = "/live/events"
#: Seconds between two polls for new messages.
INTERVAL = 0.1


class Viewers:
    """The open connections of the live page. While there are any, new requests report every step.

    Attributes
    ----------
    live : Live
    count : int
        Number of open connections.
    """

    def __init__(self, live: Live, is_open: Callable[[], bool]):
        self.live, self.count, self._is_open = live, 0, is_open

    async def events(self) -> AsyncIterator[str]:
        """Stream what happens as server-sent events, until the client disconnects or the server stops."""
        cursor = None
        self.count += 1
        try:
            while self._is_open():
                cursor, messages = self.live.since(cursor)
                for message in messages:
                    yield f"data: {json.dumps(message)}\n\n"
                if not messages:
                    yield ": nothing new\n\n"  # keep-alive; sending fails once the client is gone
                await anyio.sleep(INTERVAL)
        finally:
            self.count -= 1


def add_page(app: FastAPI, viewers: Viewers, name: str) -> None:
    """Add the routes of the page and of its event stream."""

    @app.get("/")
    async def page() -> Response:
        made = live_page(KINDS, EVENTS, f"{name}: decodings")
        return HTMLResponse(made.html, headers={"content-security-policy": made.policy, "cache-control": "no-store"})

    @app.get(EVENTS)
    async def events() -> Response:
        return StreamingResponse(
            viewers.events(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )  # fmt: skip
