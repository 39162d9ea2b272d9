# SPDX-License-Identifier: Apache-2.0
"""Record what a decoding did in each forward pass: as events, as text, as a picture, or as an interactive page."""

from __future__ import annotations

import html
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .page import page_of

#: Kinds of events, in this order: an open position is given a token; a decided one is given another token; a decided
#: one is opened again; an open one is given new noise; an open position is inserted; a position is removed; a position
#: becomes padding.
KINDS = ("commit", "edit", "remask", "renoise", "insert", "remove", "fill")


@dataclass(frozen=True)
class Event:
    """One change at one position.

    Attributes
    ----------
    forward : int
        Number of the request's forward pass, counted from 0.
    kind : str
        One of `KINDS`.
    position : int
        Canvas column at the time of the event. Insertions and removals shift the columns behind them.
    token : int
        Token id at this position from then on.
    confidence : float
        Probability of a token that is committed or edited in; 0 otherwise.
    """

    forward: int
    kind: str
    position: int
    token: int
    confidence: float = 0.0


@dataclass(frozen=True)
class Recording:
    """All events of a decoding, from its initial canvas on, as recorded by `generate(…, trace=True)`.

    Attributes
    ----------
    tokens, is_open : Tensor
        int64 and bool `[B, T]`: the canvas (prompt and answer) before the first forward pass, and its open positions.
    events : tuple of tuples of Event
        The events of each row, in order.
    blocks : tuple of tuples of int
        The columns at which the blocks of each row begin.
    mask_token_id : int
        -1 for models without a mask token.
    """

    tokens: Tensor
    is_open: Tensor
    events: tuple[tuple[Event, ...], ...]
    blocks: tuple[tuple[int, ...], ...]
    mask_token_id: int

    def without_columns(self, count: int) -> Recording:
        """Return this recording without the first `count` columns."""
        return replace(
            self, tokens=self.tokens[:, count:], is_open=self.is_open[:, count:],
            events=tuple(tuple(replace(e, position=e.position - count) for e in row) for row in self.events),
            blocks=tuple(tuple(max(column - count, 0) for column in row) for row in self.blocks),
        )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Trace:
    """History of a decoding.

    Attributes
    ----------
    tokens : Tensor
        int64 `[B, T]`, the finished canvas: prompt and answer.
    commit_step : Tensor
        int32 `[B, T]`: the forward pass that committed each token, -1 for tokens that were given, for remaining masks
        and for padding.
    confidence : Tensor
        float32 `[B, T]`: the confidence recorded when each token was committed.
    prompt_length : int
        Number of columns before the first decoded one.
    origin, length : Tensor, optional
        int32 `[B]`: the first column of each row, and the column after its last. If None, the whole canvas.
    tokenizer : optional
        Any object with the `decode(ids)` method of transformers, for pages. Without one, pages show ids.
    recording : Recording, optional
        All events, if the decoding was recorded (`trace=True`). Otherwise only the time at which each of the final
        tokens was committed is known.
    top_ids, top_log_probability, entropy : Tensor, optional
        With `top_logprobs=k`, `[B, T, k]`, `[B, T, k]` and `[B, T]`: see `DecodingOutput`.
    """

    tokens: Tensor
    commit_step: Tensor
    confidence: Tensor
    prompt_length: int = 0
    origin: Tensor | None = None
    length: Tensor | None = None
    tokenizer: Any = None
    recording: Recording | None = None
    top_ids: Tensor | None = None
    top_log_probability: Tensor | None = None
    entropy: Tensor | None = None

    def __repr__(self) -> str:
        batch, columns = self.tokens.shape
        kind = "recorded" if self.recording is not None else "of the final tokens"
        return f"Trace(batch={batch}, columns={columns}, forwards={int(self.commit_step.max()) + 1}, {kind})"

    def events(self, row: int = 0) -> list[Event]:
        """Return the events of one row, in the order of the forward passes.

        Within a forward pass, events are in the order of their positions unless something was inserted or removed.
        Without a recording, these are the commits of the final tokens.
        """
        row = self._row(row)
        if self.recording is not None:
            return list(self.recording.events[row])
        steps, tokens, confidence = (x[row].tolist() for x in (self.commit_step, self.tokens, self.confidence))
        found = [Event(s, "commit", p, tokens[p], confidence[p]) for p, s in enumerate(steps) if s >= 0]
        return sorted(found, key=lambda event: event.forward)

    def _row(self, row: Any) -> int:
        """Return a row's number as an int; raise ValueError if there is no such row."""
        number = _index(row)
        if number is None or not 0 <= number < len(self.tokens):
            raise ValueError(f"row must be an integer from 0 to {len(self.tokens) - 1}; got {row!r}")
        return number

    def canvas_at(self, step: int, mask_token_id: int) -> Tensor:
        """Return the canvas after forward number `step` (from 0; -1 for before the first), int64 `[B, T]`.

        It is made from the final tokens: those that were committed later are masked. Whatever no forward has committed,
        including padding after an end token, is there from the start. Tokens that were later remasked or edited are
        found only in the `events` of a recording.
        """
        number, mask = _index(step), _index(mask_token_id)
        if number is None or not -1 <= number < 2**31:
            raise ValueError(f"step must be the number of a forward pass, from 0, or -1; got {step!r}")
        if mask is None or not -1 <= mask < 2**31:
            raise ValueError(f"mask_token_id must be a token id; got {mask_token_id!r}")
        return self.tokens.masked_fill(self.commit_step > number, mask)

    def order(self, row: int = 0) -> list[list[int]]:
        """Return the canvas positions of one row in the order of their commits, one list per forward pass."""
        steps = self.commit_step[self._row(row)].tolist()
        return [[p for p, s in enumerate(steps) if s == i] for i in range(max(steps, default=-1) + 1)]

    def text(self, decode: Callable[[list[int]], str], mask_token_id: int, row: int = 0) -> str:
        """Return one line per forward pass: the answer at that time, masks included; `decode` maps ids to a string."""
        row, lines = self._row(row), []
        for step in range(-1, int(self.commit_step[row].max()) + 1):
            canvas = self.canvas_at(step, mask_token_id)[row, self.prompt_length :]
            lines.append(f"{step + 1:4d}  {decode(canvas.tolist())}")
        return "\n".join(lines)

    def html(
        self, path: str | PathLike | None = None, *, beside: Trace | Sequence[Trace] = (),
        names: Sequence[str] | None = None, title: str = "A decoding",
    ) -> str | None:  # fmt: skip
        """Build an interactive page that shows the decoding: play it, step through it, or point at a token for details.

        The page is a single self-contained HTML file that loads no scripts, fonts or other resources. It shows the
        canvas after each forward pass, a map of positions and forward passes, and how many tokens were decided when.

        Parameters
        ----------
        path : path, optional
            File to write the page to, in UTF-8. If None, the page is returned.
        beside : Trace or sequence of Trace
            Other decodings to show next to this one, forward by forward.
        names : sequence of str, optional
            Names of this decoding and of those in `beside`.
        title : str
            The page's title.

        Returns
        -------
        str or None
            The page, or None if it was written to `path`.

        Raises
        ------
        TypeError
            If `beside` is not a Trace or a sequence of them, or `title` is not a string.
        ValueError
            If `names` is not a sequence, or the number of names differs from the number of decodings.
        """
        others = [beside] if isinstance(beside, Trace) else beside
        is_several = isinstance(others, Sequence) and not isinstance(others, (str, bytes))
        if not is_several or not all(isinstance(one, Trace) for one in others):
            other = [type(one).__name__ for one in others if not isinstance(one, Trace)] if is_several else []
            got = f"{type(beside).__name__} with {other[0]}" if other else type(beside).__name__
            raise TypeError(f"beside must be a Trace or several of them; got {got}")
        page = page_of(page_data([self, *others], names), title)
        if path is None:
            return page
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        return None

    def _repr_html_(self) -> str:
        """Return the page for a notebook, in an iframe that may run only the page's own script."""
        source = html.escape(self.html() or "", quote=True)
        return (
            f'<iframe srcdoc="{source}" sandbox="allow-scripts" title="A decoding" '
            'style="width: 100%; height: 640px; border: 0"></iframe>'
        )

    def plot(self, path: str | PathLike, row: int = 0) -> None:
        """Save a PNG: position against the forward that committed it, colored by confidence. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        row = self._row(row)
        steps = self.commit_step[row].cpu()
        decided = (steps >= 0).nonzero().flatten()
        figure = Figure(figsize=(max(6.0, len(decided) / 12), 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        dots = axes.scatter(decided - self.prompt_length, steps[decided], c=self.confidence[row].cpu()[decided],
                            cmap="viridis", vmin=0, vmax=1, s=28)  # fmt: skip
        axes.set(xlabel="position", ylabel="forward", title="When each token was committed")
        axes.invert_yaxis()
        figure.colorbar(dots, label="confidence")
        figure.savefig(path, dpi=120)

    # --- data for the page --------------------------------------------------------------------------------------------

    def start(self, row: int = 0) -> tuple[list[int], list[bool]]:
        """Return the token ids of a row before the first forward pass, and which of its positions were open."""
        row = self._row(row)
        if self.recording is not None:
            return self.recording.tokens[row].tolist(), self.recording.is_open[row].tolist()
        decided = self.commit_step[row] >= 0
        return torch.where(decided, -1, self.tokens[row]).tolist(), decided.tolist()

    def bounds(self, row: int = 0) -> tuple[int, int]:
        """Return the first column of a row that is not padding, and the column after its last."""
        row = self._row(row)
        first = 0 if self.origin is None else int(self.origin[row])
        return first, self.tokens.shape[1] if self.length is None else int(self.length[row])


def page_data(traces: Sequence[Trace], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the data of a page that shows one or more decodings side by side."""
    if names is None:
        names = [""] if len(traces) == 1 else [f"decoding {i + 1}" for i in range(len(traces))]
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or len(names) != len(traces):
        raise ValueError(f"names must hold one name for each of the {len(traces)} decodings; got {names!r}")
    return {"kinds": KINDS, "decodings": [_decoding(trace, name) for trace, name in zip(traces, names)]}


def _decoding(trace: Trace, name: str) -> dict[str, Any]:
    """Return the page's data for one decoding: its rows, and the texts of their tokens."""
    rows = [_row(trace, row) for row in range(len(trace.tokens))]
    ids = {token for row in rows for token in row["start"] if token >= 0}
    ids |= {event[3] for row in rows for event in row["events"]}
    ids |= {token for row in rows for choices in row["choices"].values() for token, _ in choices}
    mask = -1 if trace.recording is None else trace.recording.mask_token_id
    texts = {token: text_of(trace.tokenizer, token) for token in sorted(ids)}
    return {"name": str(name), "mask": mask, "texts": texts, "rows": rows}


def _row(trace: Trace, row: int) -> dict[str, Any]:
    """Return the page's data for one row. Events are [forward, index of the kind, position, token, confidence]."""
    tokens, is_open = trace.start(row)
    first, last = trace.bounds(row)
    events = [
        [e.forward, KINDS.index(e.kind), e.position, e.token, _short(e.confidence)] for e in trace.events(row)
    ]  # fmt: skip
    entropy: dict[int, float] = {}
    choices: dict[int, list[list[float]]] = {}
    if trace.top_ids is not None and trace.top_log_probability is not None:
        for position in (trace.commit_step[row] >= 0).nonzero().flatten().tolist():
            probability = trace.top_log_probability[row, position].exp().tolist()
            pairs = zip(trace.top_ids[row, position].tolist(), probability)
            choices[position] = [[token, _short(p)] for token, p in pairs]
            if trace.entropy is not None:
                entropy[position] = _short(float(trace.entropy[row, position]))
    return {
        "first": first, "prompt": max(trace.prompt_length, first), "last": last, "start": tokens,
        "open": "".join("01"[is_it] for is_it in is_open), "events": events, "entropy": entropy, "choices": choices,
        "blocks": [] if trace.recording is None else list(trace.recording.blocks[row]),
    }  # fmt: skip


def text_of(tokenizer: Any, token: int) -> str:
    """Return a token's text, including a leading space if it begins a word; without a tokenizer, its id."""
    if tokenizer is None or token < 0:
        return str(token)
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # an id that the tokenizer does not know
        return f"[{token}]"
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece marks the beginning of a word, but decode drops it at the start
    return text if text and "\ufffd" not in text else f"[{token}]"


def _index(value: Any) -> int | None:
    """Return an integer of any kind as an int, and None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _short(value: float) -> float:
    """Round to four digits; return 0 for values that JSON cannot represent."""
    return round(value, 4) if value == value and abs(value) != float("inf") else 0
