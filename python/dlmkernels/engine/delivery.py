# SPDX-License-Identifier: Apache-2.0
"""Deliver outputs: to a request's handler if one is registered, otherwise into a common queue."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from ..decoding.checks import number
from .request import RequestOutput


def deadline(timeout: Any) -> float | None:
    """Return the time on the monotonic clock at which a timeout in seconds ends, or None if there is none."""
    seconds = number(optional=True)("timeout", timeout)
    return None if seconds is None else time.monotonic() + seconds


def check_id(value: Any) -> None:
    """Raise a TypeError unless a request id is a string."""
    if not isinstance(value, str):
        raise TypeError(f"request_id must be a string; got {type(value).__name__}")


class Deliveries:
    """Outputs on their way to their owners. May be used from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[RequestOutput] = deque()
        self._handlers: dict[str, Callable[[RequestOutput], Any]] = {}

    def register(self, request_id: str, callback: Callable[[RequestOutput], Any]) -> None:
        """Call a function with each output of a request, including those that are already waiting.

        If an event loop is running in this thread, the function is called in that loop. Otherwise it is called in the
        thread that delivers, which is this one for outputs that are already waiting.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            handler = callback
        else:

            def handler(output: RequestOutput) -> None:
                loop.call_soon_threadsafe(callback, output)

        with self._changed:
            early = [output for output in self._waiting if output.request_id == request_id]
            self._waiting = deque(output for output in self._waiting if output.request_id != request_id)
            if not any(output.is_finished() for output in early):
                self._handlers[request_id] = handler
        for output in early:
            self._call(handler, output)

    def put(self, output: RequestOutput) -> None:
        """Pass an output to its handler, or add it to the queue."""
        with self._changed:
            is_last = output.is_finished()
            handler = self._handlers.pop(output.request_id, None) if is_last else self._handlers.get(output.request_id)
            if handler is None:
                self._waiting.append(output)
                self._changed.notify_all()
        if handler is not None:
            self._call(handler, output)

    @staticmethod
    def _call(handler: Callable[[RequestOutput], Any], output: RequestOutput) -> None:
        try:
            handler(output)
        except Exception as error:  # a user's function must not stop other requests
            warnings.warn(
                f"the result handler of request {output.request_id} raised {error!r}", RuntimeWarning, stacklevel=2
            )

    def take(self, request_id: str | None = None) -> RequestOutput | None:
        """Remove and return the oldest waiting output, of any request or of `request_id`; None if there is none."""
        with self._changed:
            return self._take(request_id)

    def _take(self, request_id: str | None) -> RequestOutput | None:
        if request_id is None:
            return self._waiting.popleft() if self._waiting else None
        for output in self._waiting:
            if output.request_id == request_id:
                self._waiting.remove(output)
                return output
        return None

    def wait(
        self, request_id: str | None, timeout: float | None, may_come: Callable[[], bool]
    ) -> RequestOutput | None:  # fmt: skip
        """Like `take`, but block until an output arrives.

        Returns None after `timeout` seconds, or once `may_come` says that no further output can arrive.
        """
        until = deadline(timeout)
        with self._changed:
            while (found := self._take(request_id)) is None:
                left = None if until is None else until - time.monotonic()
                if not may_come() or (left is not None and left <= 0):
                    return None
                self._changed.wait(0.1 if left is None else min(left, 0.1))
        return found

    def wake(self) -> None:
        """Wake all waiting threads, so that they check whether further outputs can arrive."""
        with self._changed:
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting)
