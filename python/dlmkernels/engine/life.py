# SPDX-License-Identifier: Apache-2.0
"""Life cycle of an engine: its thread, steps without a thread, and shutdown."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TypeVar

import torch

from .delivery import deadline
from .rounds import Rounds

Own = TypeVar("Own", bound="Life")
#: `RequestOutput.error` of requests that were unfinished when the engine was stopped
STOPPED = "the engine was stopped"


class Life:
    """Runs the engine's rounds, in a background thread or in the callers of `step`."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._is_closed = self._is_stopping = self._must_stop = False
        self._fatal: BaseException | None = None
        self._stepping = threading.RLock()  # held during a round
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def __enter__(self: Own) -> Own:
        self.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop(hard_stop=error is not None)

    def is_running(self) -> bool:
        """Return whether the engine has a running thread."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start a background thread that decodes the requests."""
        if self._is_closed:
            raise RuntimeError("the engine has been stopped and cannot be started again: create a new one")
        if not self.is_running():
            self._thread = threading.Thread(target=self._run, name="dlmkernels-engine", daemon=True)
            self._thread.start()

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        """Accept no more requests, finish the pending ones, and shut down.

        Parameters
        ----------
        block : bool
            Whether to wait for the thread to end. Without a thread, the pending requests are always finished here.
        timeout : float, optional
            Maximum time to wait, in seconds.
        hard_stop : bool
            Whether to fail unfinished requests instead of finishing them. They are delivered as failed.
        """
        deadline(timeout)  # raises now if it is no number
        with self._rounds.lock:
            self._is_stopping, self._must_stop = True, self._must_stop or hard_stop
        self._wake.set()
        if not self.is_running():
            self._finish_here()
        elif block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, but at most `timeout` seconds."""
        until = deadline(timeout)
        if self._thread is not None and self._thread is not threading.current_thread():
            left = None if until is None else until - time.monotonic()
            self._thread.join(None if left is None or left > threading.TIMEOUT_MAX else max(left, 0.0))

    def destroy(self) -> None:
        """Shut down at once; unfinished requests fail."""
        self.stop(hard_stop=True)

    def _run(self) -> None:
        """Run rounds until the engine is stopped; the target of the thread."""
        try:
            while not self._must_stop:
                self._wake.clear()
                if not self.step():
                    if self._is_stopping and not self._rounds.inbox:
                        break
                    self._wake.wait(1.0)
        except BaseException as error:  # callers that wait for results must be told
            self._fatal = error
        finally:
            self._close()

    def _finish_here(self) -> None:
        if not self._is_closed:
            while not self._must_stop and self.step():
                pass
            self._close()

    def _close(self) -> None:
        """Stop decoding, and fail the remaining requests."""
        with self._rounds.lock:
            self._is_closed = True
        self._rounds.end(STOPPED if self._fatal is None else f"the engine failed: {self._fatal!r}")

    @property
    def background_thread_status(self) -> SimpleNamespace:
        """Namespace with `fatal_error`: the exception that ended the thread, or None. Read by transformers' server."""
        return SimpleNamespace(fatal_error=self._fatal)

    @property
    def batch_processor(self) -> None:
        """None. Transformers' server reads the state of a paged cache here, which this engine does not have."""
        return None

    def step(self) -> bool:
        """Run one round: take in new requests, deliver finished ones, admit waiting ones, and run a step of each lane.

        Returns
        -------
        bool
            Whether anything is left to do.
        """
        with self._stepping, torch.inference_mode(False), torch.no_grad():
            return not self._is_closed and self._rounds.make()
