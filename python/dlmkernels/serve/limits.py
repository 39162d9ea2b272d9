# SPDX-License-Identifier: Apache-2.0
"""What stands before every endpoint: the key, the size of bodies, and the patience with slow clients."""

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
                raise too_long(settings)


def too_long(settings: Settings) -> APIError:
    """What a body is answered that is longer than allowed."""
    return APIError(413, f"the body is longer than {settings.max_body_bytes} bytes", code="body_too_long")


class Visit:
    """One request on its way through the gate.

    Attributes
    ----------
    status : int
        What it was answered; 0 while it was not.
    refusal : APIError, optional
        What is wrong with its body. The application, which may take an error in reading for one of its own, is not
        heard any more then.
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
        """Headers by their names; of several the last."""
        return dict(scope["headers"])

    async def send(self, message: Message) -> None:
        """What the application says, unless the request has been refused."""
        if self.refusal is None:
            await self.send_now(message)

    async def send_now(self, message: Message) -> None:
        """Send to a client that must read within some time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._name)]}
        with anyio.move_on_after(self._settings.write_timeout) as patience:
            await self._send(message)
        if patience.cancelled_caught:
            raise SlowClient

    async def receive(self) -> Message:
        """The body, which must be short enough and come soon enough; then that the client has gone."""
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
    """Whether a Host header names this machine."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if not name or name in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


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
