# SPDX-License-Identifier: Apache-2.0
"""Convert an engine's outputs to the messages of the live page, and deliver them to any number of readers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from typing import Any

from ..engine.request import RequestOutput
from ..trace import KINDS, text_of

COMMIT, EDIT, REMASK, FILL = (KINDS.index(kind) for kind in ("commit", "edit", "remask", "fill"))
#: Maximum number of events stored per request, and of messages stored for readers that fall behind.
MOST_EVENTS, MOST_MESSAGES = 20_000, 2000


class Live:
    """The latest decodings of an engine, step by step. Thread-safe for any number of writers and readers.

    A reader holds a cursor and asks for the messages since then. A reader that falls too far behind gets the current
    state of all decodings instead, so slow readers cost no memory.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer, optional
        Converts tokens to text. If None, tokens are shown as ids.
    mask : int
        Id of the mask token.
    ends : collection of int
        Ids of the end tokens, after which everything is padding.
    kept : int
        Maximum number of decodings shown. Further ones that run at the same time are not shown.
    """

    def __init__(self, tokenizer: Any, mask: int, ends: Collection[int] = (), kept: int = 8):
        self._tokenizer, self._mask, self._ends, self._kept = tokenizer, mask, frozenset(ends), kept
        self._rows: dict[str, _Row] = {}
        self._messages: deque[dict[str, Any]] = deque(maxlen=MOST_MESSAGES)
        self._count = 0
        self._texts: dict[int, str] = {}
        self._lock = threading.Lock()

    def put(self, output: RequestOutput) -> None:
        """Process an output of a request that was added with `drafts=True`."""
        with self._lock:
            row = self._rows.get(output.request_id)
            if row is None:
                if output.draft is None or output.is_finished() or not self._has_room():
                    return
                row = self._rows[output.request_id] = _Row(output, self._mask, self._ends)
                self._say(self._beginning(output.request_id, row))
            if row.reason is not None:
                return
            events = row.advance(output)
            if events or row.reason is not None:
                self._say(self._told(output.request_id, row, events))

    def _has_room(self) -> bool:
        """Return whether another decoding can be shown, after removing the oldest finished one if necessary."""
        if len(self._rows) < self._kept:
            return True
        over = next((name for name, row in self._rows.items() if row.reason is not None), None)
        if over is not None:
            del self._rows[over]
            self._say({"type": "gone", "id": over})
        return over is not None

    def since(self, cursor: int | None = None) -> tuple[int, list[dict[str, Any]]]:
        """Return a new cursor and the messages since an earlier one.

        Parameters
        ----------
        cursor : int, optional
            Cursor from the previous call. If None, the messages describe the current state of all decodings.

        Returns
        -------
        cursor : int
        messages : list of dict
            Each has a "type": "reset", "begin" (with "id", "mask", "row", "texts"), "step" ("id", "events", "texts"),
            "end" (like "step", and "reason") or "gone" ("id"). Events are [forward, index of the kind in `trace.KINDS`,
            column, token, confidence].
        """
        with self._lock:
            missed = None if cursor is None else self._count - cursor
            if missed is not None and 0 <= missed <= len(self._messages):
                return self._count, list(self._messages)[len(self._messages) - missed :]
            found: list[dict[str, Any]] = [{"type": "reset"}]
            for name, row in self._rows.items():
                found += [self._beginning(name, row), self._told(name, row, row.events)]
            return self._count, found

    def _say(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._count += 1

    def _beginning(self, name: str, row: _Row) -> dict[str, Any]:
        shown = {
            "first": 0, "prompt": row.prompt, "last": len(row.start), "start": row.start, "open": row.open,
            "blocks": [],
        }  # fmt: skip
        return {"type": "begin", "id": name, "mask": self._mask, "row": shown, "texts": self._named(row.start)}

    def _told(self, name: str, row: _Row, events: list[list[Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {
            "type": "step", "id": name, "events": list(events), "texts": self._named(event[3] for event in events)
        }  # fmt: skip
        return message if row.reason is None else message | {"type": "end", "reason": row.reason}

    def _named(self, tokens: Any) -> dict[int, str]:
        found = {}
        for token in tokens:
            if token not in self._texts:
                self._texts[token] = text_of(self._tokenizer, token)
            found[token] = self._texts[token]
        return found


class _Row:
    """One decoding: its initial canvas, and the events by which each output differs from the one before."""

    def __init__(self, output: RequestOutput, mask: int, ends: frozenset[int]):
        draft = output.draft or []
        confidence = output.draft_confidence or [0.0] * len(draft)
        self._mask, self._ends = mask, ends
        last = next((k for k, token in enumerate(draft) if token in ends), len(draft))
        # a token with probability 0 was given, unless it follows an end token
        begun = [token if p == 0 and k < last else mask for k, (token, p) in enumerate(zip(draft, confidence))]
        self.prompt = len(output.prompt_ids)
        self.start = [*output.prompt_ids, *begun]
        self.open = "".join("01"[k >= self.prompt and token == mask] for k, token in enumerate(self.start))
        self.events: list[list[Any]] = []
        #: why the decoding has ended; None while it is running
        self.reason: str | None = None
        self._tokens = begun

    def advance(self, output: RequestOutput) -> list[list[Any]]:
        """Return the events since the previous output."""
        now, confidence = list(self._tokens), [0.0] * len(self._tokens)
        if output.is_finished():
            self.reason = output.finish_reason or "error"
            tokens, chances = output.generated_tokens, output.confidence
        else:
            tokens, chances = output.draft or [], output.draft_confidence or []
        count = min(len(now), len(tokens))
        now[:count], confidence[: len(chances[:count])] = tokens[:count], chances[:count]
        forward, events, is_behind = max(output.num_forwards - 1, 0), [], False
        for place, (before, after) in enumerate(zip(self._tokens, now)):
            if after != before:
                kind = (
                    REMASK if after == self._mask else FILL if is_behind else COMMIT if before == self._mask else EDIT
                )
                chance = round(confidence[place], 4) if kind in (COMMIT, EDIT) else 0.0
                events.append([forward, kind, self.prompt + place, after, chance])
            is_behind = is_behind or after in self._ends
        if self.reason in ("eos", "stop"):
            events += [
                [forward, FILL, self.prompt + place, now[place], 0.0]
                for place in range(len(tokens), len(now)) if now[place] == self._mask
            ]  # fmt: skip
        self._tokens = now
        events = events[: MOST_EVENTS - len(self.events)]
        self.events += events
        return events
