# SPDX-License-Identifier: Apache-2.0
"""What a server is told when it is made, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

#: names and addresses that only this machine reaches
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits and names of a server.

    Attributes
    ----------
    model_name : str
        What requests call the model.
    host : str
        Address to listen on. The default is reached from this machine alone.
    port : int
        0: any free one.
    api_key : str, optional
        What requests must carry as `Authorization: Bearer KEY`; None: nothing.
    open_to_all : bool
        Allows an address that other machines reach without a key.
    max_waiting : int
        Answers that may wait for a slot; further requests get status 429.
    max_body_bytes : int
        Longest request body; longer ones get status 413.
    body_timeout : float
        Seconds in which a request's head, and then its body, must have arrived.
    write_timeout : float
        Seconds after which a client that does not read its answer is cut off.
    request_timeout : float
        Seconds after which a request is cancelled, status 504.
    drain_timeout : float
        Seconds that requests in flight get to finish when the server is told to stop; then they get status 503.
    max_choices : int
        Most answers to one request: its prompts times `n`.
    decoding_options : bool
        Whether requests may choose `rule`, `steps` and `block_length`. Requests that differ in these do not share
        forwards, and each kind takes memory of its own, so that this is for clients that are trusted.
    live : bool
        Whether `/` is a page on which whoever may use the server sees what it decodes.
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
                raise ValueError(f"{field.name} must be an integer that is not negative; got {value!r}")
            if field.type == "float" and (not isinstance(value, (int, float)) or not value > 0):
                raise ValueError(f"{field.name} must be a positive number of seconds; got {value!r}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535; got {self.port}")
        if not self.model_name:
            raise ValueError("model_name must not be empty")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise ValueError("api_key must consist of ASCII characters without spaces, and not be empty")
        if not self.is_local and self.api_key is None and not self.open_to_all:
            raise ValueError(
                f"host {self.host} can be reached from other machines, and anybody there could use the model: set an "
                "API key (--api-key, or DLMKERNELS_API_KEY in the environment), or pass --open-to-all"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
