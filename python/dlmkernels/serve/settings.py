# SPDX-License-Identifier: Apache-2.0
"""Validated settings of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

#: Host names and addresses of the loopback interface.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits and names of a server.

    Attributes
    ----------
    model_name : str
        Name of the model in requests and responses.
    host : str
        Address to listen on. The default can only be reached from this machine.
    port : int
        Port to listen on; 0 picks a free one.
    api_key : str, optional
        Key that requests must send as `Authorization: Bearer KEY`. If None, no key is needed.
    open_to_all : bool
        Whether `host` may be reachable from other machines without a key.
    max_waiting : int
        Maximum number of answers waiting for a slot; further requests get status 429.
    max_body_bytes : int
        Maximum size of a request body in bytes; longer ones get status 413.
    body_timeout : float
        Seconds within which a request's headers, and then its body, must arrive.
    write_timeout : float
        Seconds after which a client that does not read its response is disconnected.
    request_timeout : float
        Seconds after which a request is cancelled with status 504.
    drain_timeout : float
        Seconds that unfinished requests get after the server is told to stop; then they get status 503.
    max_choices : int
        Maximum number of answers to one request: its number of prompts times `n`.
    decoding_options : bool
        Whether requests may set `rule`, `steps` and `block_length`. Requests that differ in these do not share forward
        passes, and each combination takes its own memory, so only enable this for clients that you trust.
    live : bool
        Whether to serve a page at `/` that shows, to everyone who may use the server, what is being decoded.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    open_to_all: bool = False
    max_waiting: int = 256
    max_body_bytes: int = 4 << 20
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    max_choices: int = 128
    decoding_options: bool = False
    live: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{field.name} must be a non-negative integer; got {value!r}")
            if field.type == "float" and (not isinstance(value, (int, float)) or not value > 0):
                raise ValueError(f"{field.name} must be a positive number of seconds; got {value!r}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535; got {self.port}")
        if not self.model_name:
            raise ValueError("model_name must not be empty; got ''")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise ValueError("api_key must be a non-empty string of ASCII characters without spaces")
        if not self.is_local and self.api_key is None and not self.open_to_all:
            raise ValueError(
                f"host {self.host} may be reachable from other machines, from which anybody could use the model: set "
                "an API key (--api-key, or DLMKERNELS_API_KEY in the environment), or pass --open-to-all"
            )

    @property
    def is_local(self) -> bool:
        """Whether the server can only be reached from this machine."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
