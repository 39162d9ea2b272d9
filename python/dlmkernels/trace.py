# SPDX-License-Identifier: Apache-2.0
"""What happened in a decoding, forward by forward: as events, as text, as a picture, as a page to watch."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .page import page_of

#: What can happen at a position: an open one is given a token; a decided one another token; a decided one is opened
#: again; an open one is given other noise; an open position is inserted; one is removed; one becomes padding.
KINDS = ("commit", "edit", "remask", "renoise", "insert", "remove", "fill")


@dataclass(frozen=True)
class Event:
    """One thing that happened at one position.

    Attributes
    ----------
    forward : int
        Number of the request's forward, from 0.
    kind : str
        One of `KINDS`.
    position : int
        Canvas column when it happened. Insertions and removals move what stands behind them.
    token : int
        Id that stands there from then on.
    confidence : float
        Probability of a token that is committed, or edited in; 0 otherwise.
    """

    forward: int
    kind: str
    position: int
    token: int
    confidence: float = 0.0


@dataclass(frozen=True)
class Recording:
    """A decoding from its first canvas on, recorded by `generate(…, trace=True)`.

    Attributes
    ----------
    tokens, is_open : Tensor
        int64 and bool `[B, T]`: the canvas before the first forward, and where it was open.
    events : tuple of tuples of Event
        What happened, a tuple for each row, in order.
    blocks : tuple of tuples of int
        For each row the columns at which its blocks begin.
    mask_token_id : int
        -1 for models without a mask token.
    """

    tokens: Tensor
    is_open: Tensor
    events: tuple[tuple[Event, ...], ...]
    blocks: tuple[tuple[int, ...], ...]
    mask_token_id: int

    def without_columns(self, count: int) -> Recording:
        """The same without the first `count` columns."""
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
        int64 `[B, T]`, the finished canvas.
    commit_step : Tensor
        int32 `[B, T]`, -1 for tokens that were given, for masks that are left and for padding.
    confidence : Tensor
        float32 `[B, T]`.
    prompt_length : int
        Columns before the first decoded one.
    origin, length : Tensor, optional
        int32 `[B]`: the first column of each row, and the one behind its last. None: the whole canvas.
    tokenizer : optional
        Anything with transformers' `decode(ids)`, for pages. Without one they show ids.
    recording : Recording, optional
        Everything that happened, if the decoding was recorded (`trace=True`). Otherwise what is known is when each of
        the final tokens was committed.
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
        """What happened in one row, in the order of forwards, and of positions where nothing was inserted or removed.

        Without a recording: the commitments of the final tokens.
        """
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(self.tokens):
            raise ValueError(f"row must be a number from 0 to {len(self.tokens) - 1}; got {row!r}")
        if self.recording is not None:
            return list(self.recording.events[row])
        steps, tokens, confidence = (x[row].tolist() for x in (self.commit_step, self.tokens, self.confidence))
        found = [Event(s, "commit", p, tokens[p], confidence[p]) for p, s in enumerate(steps) if s >= 0]
        return sorted(found, key=lambda event: event.forward)

    def canvas_at(self, step: int, mask_token_id: int) -> Tensor:
        """The canvas after forward number `step` (from 0; -1: before the first), int64 `[B, T]`.

        Of the final tokens: those that were committed later are masks. What no forward has committed, padding after an
        end token too, is there from the start. What a decoding took back or changed is among the `events` of a
        recording.
        """
        return self.tokens.masked_fill(self.commit_step > step, mask_token_id)

    def order(self, row: int = 0) -> list[list[int]]:
        """Canvas positions of one row in the order of their commitment, one list a forward."""
        steps = self.commit_step[row].tolist()
        return [[p for p, s in enumerate(steps) if s == i] for i in range(max(steps, default=-1) + 1)]

    def text(self, decode: Callable[[list[int]], str], mask_token_id: int, row: int = 0) -> str:
        """One line a forward: the generated part as it stood, masks included; `decode` maps ids to a string."""
        lines = []
        for step in range(-1, int(self.commit_step[row].max()) + 1):
            canvas = self.canvas_at(step, mask_token_id)[row, self.prompt_length :]
            lines.append(f"{step + 1:4d}  {decode(canvas.tolist())}")
        return "\n".join(lines)

    def html(
        self, path: str | PathLike | None = None, *, beside: Trace | Sequence[Trace] = (),
        names: Sequence[str] | None = None, title: str = "A decoding",
    ) -> str:  # fmt: skip
        """A page on which the decoding can be watched: play it, step through it, point at a token to read about it.

        One HTML file that holds all it needs and loads nothing, neither scripts nor fonts nor anything else. It shows
        the canvas after each forward, a map of positions and forwards, and how many tokens were decided when.

        Parameters
        ----------
        path : path, optional
            Where to write it, in UTF-8. None: it is only returned.
        beside : Trace or sequence of Trace
            Other decodings to show next to this one, forward by forward.
        names : sequence of str, optional
            What each of them is called.
        title : str
            The page's title.

        Returns
        -------
        str
            The page.

        Raises
        ------
        ValueError
            When there are not as many names as decodings.
        """
        others = [beside] if isinstance(beside, Trace) else beside
        if not isinstance(others, Sequence) or not all(isinstance(one, Trace) for one in others):
            raise TypeError(f"beside must be a Trace or several of them; got {type(beside).__name__}")
        page = page_of(page_data([self, *others], names), title)
        if path is not None:
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.write(page)
        return page

    def _repr_html_(self) -> str:
        """The page within a notebook, in a frame of its own that may run the page's script and nothing else."""
        source = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{source}" sandbox="allow-scripts" title="A decoding" '
            'style="width: 100%; height: 640px; border: 0"></iframe>'
        )

    def plot(self, path: str | PathLike, row: int = 0) -> None:
        """Save a PNG: position against the forward that committed it, coloured by confidence (needs matplotlib)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

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

    # --- what a page shows --------------------------------------------------------------------------------------------

    def start(self, row: int = 0) -> tuple[list[int], list[bool]]:
        """The row before the first forward: ids, and which positions were open."""
        if self.recording is not None:
            return self.recording.tokens[row].tolist(), self.recording.is_open[row].tolist()
        decided = self.commit_step[row] >= 0
        return torch.where(decided, -1, self.tokens[row]).tolist(), decided.tolist()

    def bounds(self, row: int = 0) -> tuple[int, int]:
        """First column of a row that is no padding, and the column behind its last."""
        first = 0 if self.origin is None else int(self.origin[row])
        return first, self.tokens.shape[1] if self.length is None else int(self.length[row])


def page_data(traces: Sequence[Trace], names: Sequence[str] | None) -> dict[str, Any]:
    """What the page is told of one or more decodings, side by side."""
    if names is None:
        names = [""] if len(traces) == 1 else [f"decoding {i + 1}" for i in range(len(traces))]
    if isinstance(names, str) or len(names) != len(traces):
        raise ValueError(f"names must hold one name for each of the {len(traces)} decodings; got {names!r}")
    return {"kinds": KINDS, "decodings": [_decoding(trace, name) for trace, name in zip(traces, names)]}


def _decoding(trace: Trace, name: str) -> dict[str, Any]:
    """What the page is told of one decoding: its rows, and what the tokens in them are called."""
    rows = [_row(trace, row) for row in range(len(trace.tokens))]
    ids = {token for row in rows for token in row["start"] if token >= 0}
    ids |= {event[3] for row in rows for event in row["events"]}
    ids |= {token for row in rows for choices in row["choices"].values() for token, _ in choices}
    mask = -1 if trace.recording is None else trace.recording.mask_token_id
    texts = {token: text_of(trace.tokenizer, token) for token in sorted(ids)}
    return {"name": str(name), "mask": mask, "texts": texts, "rows": rows}


def _row(trace: Trace, row: int) -> dict[str, Any]:
    """One row as the page needs it. Events are [forward, number of the kind, position, token, confidence]."""
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
    """What a token is called: its text, with the space before it if it begins a word; its id without a tokenizer."""
    if tokenizer is None or token < 0:
        return str(token)
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):  # an id that the tokenizer does not know
        return f"[{token}]"
    if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # SentencePiece's mark of a word's beginning, dropped where a text begins
    return text if text and "\ufffd" not in text else f"[{token}]"


def _short(value: float) -> float:
    """Four digits; 0 for what JSON cannot hold."""
    return round(value, 4) if value == value and abs(value) != float("inf") else 0
