# SPDX-License-Identifier: Apache-2.0
"""What stands before every endpoint: the key, the size of bodies, and the patience with slow clients."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import APIError
from .settings import LOOPBACK_NAMES, Settings

#: paths that need no key: whether the server lives, and the page that asks for the key
OPEN_PATHS = ("/health", "/")


class SlowClient(Exception):
    """A client that does not read what it has asked for."""


class Gate:
    """ASGI middleware: refuses what must not come in before anything of it is read.

    Parameters
    ----------
    app : ASGIApp
        What stands behind it.
    settings : Settings
    observe : callable
        Gets path, status and seconds of every request that has been answered.
    """

    def __init__(self, app: ASGIApp, settings: Settings, observe: Callable[[str, int, float], None]):
        self.app, self.settings, self.observe = app, settings, observe
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        name = f"req-{secrets.token_hex(8)}"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            with anyio.move_on_after(self.settings.write_timeout) as patience:
                await send(message)
            if patience.cancelled_caught:
                raise SlowClient

        try:
            headers = dict(scope["headers"])
            self._check(scope, headers)
            await self.app(scope, self._bounded(receive, headers), answer)
        except APIError as error:
            if status:
                raise
            await error.response(scope, receive, answer)
        except SlowClient:
            status = 499
        finally:
            self.observe(scope["path"], status, time.perf_counter() - started)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse a request by its head."""
        settings = self.settings
        if settings.is_local and not settings.open_to_all and not _names_this_machine(headers.get(b"host", b"")):
            # a page from elsewhere, whose name has been made to mean this machine
            raise APIError(403, "this server answers requests to localhost alone", code="wrong_host")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise APIError(401, "no valid API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise APIError(415, f"content-type must be application/json; got '{kind.decode('latin-1')}'")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > settings.max_body_bytes:
                raise self._too_long()

    def _too_long(self) -> APIError:
        return APIError(
            413, f"the body is longer than {self.settings.max_body_bytes} bytes", code="body_too_long"
        )  # fmt: skip

    def _bounded(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """`receive` for bodies that must be short enough and come soon enough."""
        deadline, size, is_read = anyio.current_time() + self.settings.body_timeout, 0, False

        async def bounded() -> Message:
            nonlocal size, is_read
            if is_read:  # what comes now is that the client has gone
                return await receive()
            try:
                with anyio.fail_after(max(deadline - anyio.current_time(), 0)):
                    message = await receive()
            except TimeoutError:
                raise APIError(
                    408, f"the body did not arrive within {self.settings.body_timeout:g} s", code="body_timeout"
                ) from None
            size += len(message.get("body", b""))
            is_read = not message.get("more_body", False)
            if size > self.settings.max_body_bytes:
                raise self._too_long()
            return message

        return bounded


def _names_this_machine(host: bytes) -> bool:
    """Whether a Host header names this machine."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name in LOOPBACK_NAMES or name.startswith("127.") or not name


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class PatientProtocol(H11Protocol):
    """Closes connections on which a request's head does not arrive in time, which uvicorn's own protocol never does."""

    #: seconds; set by `run`
    head_timeout = 30.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
