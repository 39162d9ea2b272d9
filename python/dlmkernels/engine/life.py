# SPDX-License-Identifier: Apache-2.0
"""The life of an engine: its thread, steps without one, and its end."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TypeVar

import torch

from .rounds import Rounds

Own = TypeVar("Own", bound="Life")


class Life:
    """What makes the rounds: a thread, or whoever calls `step`."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._is_closed = self._is_stopping = self._must_stop = False
        self._fatal: BaseException | None = None
        self._stepping = threading.RLock()  # whoever makes a step
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def __enter__(self: Own) -> Own:
        self.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop(hard_stop=error is not None)

    def is_running(self) -> bool:
        """Whether there is a thread that decodes."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Let a thread decode from now on."""
        if self._is_closed:
            raise RuntimeError("the engine has been stopped: make another")
        if not self.is_running():
            self._thread = threading.Thread(target=self._run, name="dlmkernels-engine", daemon=True)
            self._thread.start()

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        """Take no more requests, finish those that there are, and end.

        Parameters
        ----------
        block : bool
            Whether to wait for that.
        timeout : float, optional
            For how many seconds at most.
        hard_stop : bool
            Let requests that are not done fail instead; they are delivered as failed.
        """
        with self._rounds.lock:
            self._is_stopping, self._must_stop = True, self._must_stop or hard_stop
        self._wake.set()
        if not self.is_running():
            self._finish_here()
        elif block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, for `timeout` seconds at most."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def destroy(self) -> None:
        """End at once; whatever is not done fails."""
        self.stop(hard_stop=True)

    def _run(self) -> None:
        """The thread's life."""
        try:
            while not self._must_stop:
                self._wake.clear()
                if not self.step():
                    if self._is_stopping and not self._rounds.inbox:
                        break
                    self._wake.wait(1.0)
        except BaseException as error:  # whoever waits for a result has to hear of it
            self._fatal = error
        finally:
            self._close()

    def _finish_here(self) -> None:
        if not self._is_closed:
            while not self._must_stop and self.step():
                pass
            self._close()

    def _close(self) -> None:
        """Nothing is decoded any more: what is left fails."""
        with self._rounds.lock:
            self._is_closed = True
        self._rounds.end("the engine was stopped" if self._fatal is None else f"the engine failed: {self._fatal!r}")

    @property
    def background_thread_status(self) -> SimpleNamespace:
        """With `fatal_error`, as servers of transformers ask: why the thread has ended, None if it has not failed."""
        return SimpleNamespace(fatal_error=self._fatal)

    @property
    def batch_processor(self) -> None:
        """None: there is none of transformers' pages, whose state its servers show where there is."""
        return None

    def step(self) -> bool:
        """Look after everything once: requests that have come, that are done, that are admitted; and one step of each.

        Returns
        -------
        bool
            Whether anything is left to do.
        """
        with self._stepping, torch.inference_mode(False), torch.no_grad():
            return not self._is_closed and self._rounds.make()
