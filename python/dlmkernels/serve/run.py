# SPDX-License-Identifier: Apache-2.0
"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from ..engine.engine import Engine
from .app import create_app
from .limits import PatientProtocol
from .settings import Settings

#: Maximum number of connections; further ones get status 503.
MAX_CONNECTIONS = 2048
#: Seconds to send the final error responses after unfinished requests have been failed.
FAREWELL = 5.0


class Server(uvicorn.Server):
    """uvicorn's server, but on shutdown unfinished requests get time to finish, and an error response after that."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests and wait for unfinished ones, at most `Settings.drain_timeout` seconds."""
        service = self.config.app.state.service  # type: ignore[union-attr]
        draining = asyncio.ensure_future(service.bridge.drain(service.settings.drain_timeout))
        await super().shutdown(sockets)
        await draining


def make_server(engine: Engine, tokenizer: Any, settings: Settings, log_level: str = "warning") -> Server:
    """Create a server. Its method `run()` serves until SIGINT or SIGTERM."""
    protocol = type("Protocol", (PatientProtocol,), {"head_timeout": settings.body_timeout})
    config = uvicorn.Config(
        create_app(engine, tokenizer, settings), host=settings.host, port=settings.port, http=protocol, ws="none",
        loop="asyncio", log_level=log_level, access_log=False, server_header=False, timeout_keep_alive=30,
        limit_concurrency=MAX_CONNECTIONS, proxy_headers=False, h11_max_incomplete_event_size=32 << 10,
        timeout_graceful_shutdown=int(settings.drain_timeout + FAREWELL) + 1,
    )  # fmt: skip
    return Server(config)
