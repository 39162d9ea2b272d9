# SPDX-License-Identifier: Apache-2.0
"""Checks in front of every endpoint: API key, host, size of the body, and timeouts for slow clients."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import APIError
from .settings import LOOPBACK_NAMES, Settings

#: Paths that need no key: the health check, and the page, which asks the user for the key.
OPEN_PATHS = ("/health", "/")


class SlowClient(Exception):
    """Raised when a client does not read its response."""


class Gate:
    """ASGI middleware that rejects requests by their headers, before the application reads the body.

    Parameters
    ----------
    app : ASGIApp
        The application to protect.
    settings : Settings
    observe : callable
        Called with path, status and duration in seconds of every answered request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, observe: Callable[[str, int, float], None]):
        self.app, self.settings, self.observe = app, settings, observe
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        visit = Visit(self.settings, receive, send)
        try:
            self._check(scope, visit.read_headers(scope))
            await self.app(scope, visit.receive, visit.send)
        except APIError as error:
            visit.refusal = error
        except SlowClient:
            visit.status = 499
        try:
            if visit.refusal is not None and not visit.status:
                await visit.refusal.response(scope, receive, visit.send_now)
        finally:
            self.observe(scope["path"], visit.status, time.perf_counter() - started)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise APIError if the request's headers are not acceptable."""
        settings = self.settings
        if settings.is_local and not settings.open_to_all and not _names_this_machine(headers.get(b"host", b"")):
            # DNS rebinding: a web page whose host name was made to resolve to this machine
            raise APIError(403, "this server only accepts requests addressed to localhost", code="wrong_host")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise APIError(
                    401, "missing or invalid API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise APIError(415, f"content-type must be application/json; got '{kind.decode('latin-1')}'")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > settings.max_body_bytes:
                raise too_long(settings)


def too_long(settings: Settings) -> APIError:
    """Return the error for a request body that is too long."""
    return APIError(
        413, f"the body must be at most {settings.max_body_bytes} bytes long; got more", code="body_too_long"
    )


class Visit:
    """One request that passes through the gate.

    Attributes
    ----------
    status : int
        HTTP status of the response; 0 until there is one.
    refusal : APIError, optional
        What is wrong with the body, if anything. It replaces the application's response, because the application may
        mistake the error raised while reading the body for one of its own.
    """

    def __init__(self, settings: Settings, receive: Receive, send: Send):
        self._settings, self._receive, self._send = settings, receive, send
        self.status = 0
        self.refusal: APIError | None = None
        self._name = f"req-{secrets.token_hex(8)}".encode()
        self._deadline = anyio.current_time() + settings.body_timeout
        self._size, self._is_read = 0, False

    @staticmethod
    def read_headers(scope: Scope) -> dict[bytes, bytes]:
        """Return the headers by name; the last value of a repeated header wins."""
        return dict(scope["headers"])

    async def send(self, message: Message) -> None:
        """Send a message of the application, unless the request has been rejected."""
        if self.refusal is None:
            await self.send_now(message)

    async def send_now(self, message: Message) -> None:
        """Send a message to the client. Raises SlowClient if the client does not read it in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._name)]}
        with anyio.move_on_after(self._settings.write_timeout) as patience:
            await self._send(message)
        if patience.cancelled_caught:
            raise SlowClient

    async def receive(self) -> Message:
        """Receive the body, checking its size and deadline. After the body, wait for the client to disconnect."""
        if self._is_read:
            return await self._receive()
        try:
            with anyio.fail_after(max(self._deadline - anyio.current_time(), 0)):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not arrive within {self._settings.body_timeout:g} s"
            self.refusal = APIError(408, text, code="body_timeout")
            raise self.refusal from None
        self._size += len(message.get("body", b""))
        self._is_read = not message.get("more_body", False)
        if self._size > self._settings.max_body_bytes:
            self.refusal = too_long(self._settings)
            raise self.refusal
        return message


def _names_this_machine(host: bytes) -> bool:
    """Return whether a Host header names this machine's loopback interface."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if not name or name in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Wait until the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, plus a timeout for the arrival of a request's headers."""

    #: seconds; set by `run.make_server`
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
