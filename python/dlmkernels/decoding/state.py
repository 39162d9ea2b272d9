# SPDX-License-Identifier: Apache-2.0
"""State of the requests being decoded: a struct of arrays with one row for each request, updated in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..window import TokenWindow
from .calls import remask_
from .ends import end_rows

OPEN, FROZEN = ops.STATE_OPEN, ops.STATE_FROZEN
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Columns:
    """A range of columns in each row, which may extend beyond the canvas.

    Attributes
    ----------
    number : Tensor
        int32 `[S, W]`: column numbers, ascending.
    index : Tensor
        int64 `[S, W]`: column numbers, clamped to the last column of the canvas.
    inside : Tensor
        bool `[S, W]`: whether the column is on the canvas.
    """

    number: Tensor
    index: Tensor
    inside: Tensor


@dataclass(frozen=True)
class NegativePrompt:
    """Prompts that the unconditional half of a batch with classifier-free guidance sees instead of the real ones.

    Attributes
    ----------
    tokens : Tensor
        int64 `[S, P]`: tokens for the columns of the prompts, padded on the left.
    origin : Tensor
        int32 `[S]`: column at which each negative prompt begins.
    """

    tokens: Tensor
    origin: Tensor


@dataclass(frozen=True)
class State:
    """S requests on a canvas (the positions of prompt and answer) of T columns.

    Ops and programs write into these tensors in place. None of the tensors is ever replaced.

    Attributes
    ----------
    tokens : Tensor
        int64 `[S, T]`: the canvas.
    state : Tensor
        uint8 `[S, T]`: bits for open, frozen, edited, and changed since its keys and values were cached.
    origin, end : Tensor
        int32 `[S]`: first column of each request, after its left padding, and column after its last. Columns from `end`
        on are frozen, although they hold no given token.
    commit_step, confidence : Tensor
        int32 and float32 `[S, T]`: step in which a position was committed, and the probability its token had then.
        They are -1 and 0 for given, open and padding positions.
    step : Tensor
        int32 `[S]`: number of forward passes that each request has taken part in.
    seed : Tensor
        int64 `[S]`: seed of each request's random draws.
    block, entered : Tensor
        int32 `[S]`: number of the block that the row is in, -1 before the first, and value of `step` when it entered.
    epoch : Tensor
        int32 `[S]`: number of requests that the row has held so far, which tells stale results from current ones.
    parameters : dict
        Per-request parameters by name, `[S]` or `[S, n]`; see `decoding.parameters`.
    negative : NegativePrompt, optional
        Negative prompts for classifier-free guidance.
    """

    tokens: Tensor
    state: Tensor
    origin: Tensor
    end: Tensor
    commit_step: Tensor
    confidence: Tensor
    step: Tensor
    seed: Tensor
    block: Tensor
    entered: Tensor
    epoch: Tensor
    parameters: dict[str, Tensor]
    negative: NegativePrompt | None = None

    @classmethod
    def of(
        cls, tokens: Tensor, is_open: Tensor, origin: Tensor, end: Tensor | int | None = None,
        negative: NegativePrompt | None = None, seed: Tensor | None = None,
        parameters: Mapping[str, Tensor] = NOTHING,
    ) -> State:  # fmt: skip
        """Create a state with one row for each request.

        `tokens` is int64 and `is_open` bool `[S, T]`; `origin` and `end` are int32 `[S]`, `seed` is int64 `[S]`. If
        `end` is None, requests extend to the last column.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        new = cls.empty(len(tokens), tokens.shape[1], tokens.device, negative, parameters)
        new.admit(rows, tokens, is_open, origin, tokens.shape[1] if end is None else end, seed, parameters)
        return new

    @classmethod
    def empty(
        cls, rows: int, columns: int, device: torch.device, negative: NegativePrompt | None = None,
        parameters: Mapping[str, Tensor] = NOTHING,
    ) -> State:  # fmt: skip
        """Create a state without requests. Only names, dtypes and trailing shapes of the `parameters` are used."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(rows, columns, dtype=torch.int64), state=zeros(rows, columns, dtype=torch.uint8),
            origin=zeros(rows), end=zeros(rows), commit_step=zeros(rows, columns),
            confidence=zeros(rows, columns, dtype=torch.float32), step=zeros(rows),
            seed=zeros(rows, dtype=torch.int64), block=zeros(rows), entered=zeros(rows), epoch=zeros(rows),
            parameters={
                name: zeros(rows, *value.shape[1:], dtype=value.dtype) for name, value in parameters.items()
            },
            negative=negative,
        )  # fmt: skip

    def admit(
        self, rows: Tensor, tokens: Tensor, is_open: Tensor, origin: Tensor, end: Tensor | int,
        seed: Tensor | None = None, parameters: Mapping[str, Tensor] = NOTHING,
    ) -> None:  # fmt: skip
        """Put new requests into `rows` int64 `[n]`: `tokens` and `is_open` are `[n, T]`, other tensors `[n]`.

        Positions that are not open are frozen. Everything in these rows but the `epoch` is overwritten, so each of the
        state's parameters must be given. Raises a ValueError if the names of the parameters differ.
        """
        if parameters.keys() != self.parameters.keys():
            raise ValueError(f"parameters must have the names {sorted(self.parameters)}; got {sorted(parameters)}")
        for name, own in self.parameters.items():
            own.index_copy_(0, rows, parameters[name])
        fresh = {
            "tokens": tokens, "state": torch.where(is_open, OPEN, FROZEN).to(torch.uint8), "origin": origin,
            "end": torch.zeros_like(rows) + end, "commit_step": -1, "confidence": 0, "step": 0,
            "seed": 0 if seed is None else seed, "block": -1, "entered": 0, "epoch": self.epoch[rows] + 1,
        }  # fmt: skip
        for name, value in fresh.items():
            field = getattr(self, name)
            if isinstance(value, Tensor):
                field.index_copy_(0, rows, value.to(field.dtype))
            else:
                field.index_fill_(0, rows, value)

    @property
    def is_open(self) -> Tensor:
        """Positions that are still undecided, bool `[S, T]`."""
        return (self.state & OPEN) != 0

    def length(self, end: int) -> Tensor:
        """Return the column after the last given, open or committed position before column `end`, int32 `[S]`.

        All other positions are padding after an end token.
        """
        is_token = ((self.state & (OPEN | FROZEN)) != 0) | (self.commit_step >= 0)
        number = torch.arange(1, end + 1, dtype=torch.int32, device=self.tokens.device)
        is_token = is_token[:, :end] & (number <= self.end[:, None])
        return torch.where(is_token, number, 0).amax(1)

    def columns(self, start: Tensor, length: int) -> Columns:
        """Return the columns from `start[b]` to `start[b] + length - 1` of each row b; `start` is int32 `[S]`."""
        number = start[:, None] + torch.arange(length, dtype=torch.int32, device=start.device)
        last = self.tokens.shape[1] - 1
        return Columns(number, number.clamp(max=last).long(), number <= last)

    def open_in(self, columns: Columns) -> Tensor:
        """Return which of the columns are open, bool `[S, W]`."""
        return self._has(OPEN, columns) & columns.inside

    def free_in(self, columns: Columns) -> Tensor:
        """Return which of the columns are not given, bool `[S, W]`."""
        return ~self._has(FROZEN, columns) & columns.inside

    def window(self, columns: Columns, capacity: int) -> TokenWindow:
        """Return a window with the open positions among the columns, in ascending order.

        It has `capacity` slots, which must be enough for every row. Decided positions take no slot, so that the
        language-model head does not run for them.
        """
        return TokenWindow(listed(columns, self.open_in(columns), capacity, self.tokens.shape[1]), self.origin)

    def free_window(self, columns: Columns, working: Tensor) -> TokenWindow:
        """Return a window with all positions among the columns that are not given, in the rows `working` bool `[S]`."""
        return TokenWindow(torch.where(self.free_in(columns) & working[:, None], columns.number, -1), self.origin)

    def _has(self, bit: int, columns: Columns) -> Tensor:
        """Return where the state at the columns has a bit set, bool `[S, W]`; undefined outside the canvas."""
        return (self.state.gather(1, columns.index) & bit).bool()

    def write(self, positions: Tensor, tokens: Tensor, ends: Tensor | None = None, **how: Any) -> Tensor:
        """Call `ops.remask_` at `positions` int32 `[S, W]` with proposals int64 `[S, W]`, and return its info.

        The op also updates `commit_step` and `confidence`. `ends` int64 `[S, E]` are each row's own end tokens, which
        replace the op's `eos_token_ids`. `how` holds the other arguments of the op.
        """
        how.setdefault("end", self.end)
        fills = False
        if ends is not None:
            fills = how.get("eos_policy") == "fill"
            how |= {"eos_token_ids": [], "eos_policy": "none"}
        info = remask_(
            self.tokens, self.state, positions, tokens, commit_step=self.commit_step, commit_confidence=self.confidence,
            **how,
        )  # fmt: skip
        if ends is not None:
            end_rows(self, info, ends, how["end"], how["fill_token_id"] if fills else None)
        return info

    def fill_after_eos(self, rows: Tensor, eos: list[int], pad: int, ends: Tensor | None = None) -> None:
        """Complete rows that have an end token with no open position before it and no given one after it.

        All positions after that end token become `pad`. Only the chosen `rows` bool `[S]` are looked at. `ends` is as
        in `write`, and replaces `eos`.
        """
        nothing = torch.full_like(self.tokens[:, :1], -1)
        end = torch.where(rows, self.end, 0)  # with end 0, no end token is found in the other rows
        self.write(
            nothing.int(), nothing, ends, eos_token_ids=eos, eos_policy="fill", fill_token_id=pad, end=end
        )  # fmt: skip

    def close_behind(self, column: Tensor) -> None:
        """Overwrite all positions after `column` int32 `[S]` that were not given with the token at `column`.

        They count as closed but not committed. Rows with -1 are left unchanged.
        """
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        behind = (column >= 0)[:, None] & (columns > column[:, None]) & ((self.state & FROZEN) == 0)
        token = self.tokens.gather(1, column.clamp(min=0).long()[:, None])
        self.tokens.copy_(torch.where(behind, token, self.tokens))
        self.state.copy_(torch.where(behind, self.state & ~OPEN, self.state))
        self.commit_step.masked_fill_(behind, -1)
        self.confidence.masked_fill_(behind, 0.0)

    def renoise(self, vocab_size: int, rows: Tensor | None = None) -> None:
        """Put uniformly drawn tokens at all open positions of `rows` bool `[S]`, or of all rows if None."""
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        is_open = self.is_open if rows is None else self.is_open & rows[:, None]
        position = torch.where(is_open, columns, -1)
        before_the_first = torch.full_like(self.step, -1)  # the draws of step 0 are used by that step itself
        self.write(
            position, torch.full_like(self.tokens, -1), renoise=is_open, step=before_the_first, seed=self.seed,
            origin=self.origin, vocab_size=vocab_size,
        )  # fmt: skip


def put(to: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Copy `values` `[S, …]` into `to`, in the given rows bool `[S]`, or in all rows if None."""
    to.copy_(values if rows is None else torch.where(rows.view(-1, *[1] * (to.dim() - 1)), values, to))


def listed(columns: Columns, chosen: Tensor, capacity: int, behind: int) -> Tensor:
    """List the `chosen` bool `[S, W]` columns of each row in ascending order, int32 `[S, capacity]`.

    Unused places are -1. If `capacity` equals W, chosen columns keep their places. `behind` must be greater than any
    column number.
    """
    if capacity == chosen.shape[1]:
        return torch.where(chosen, columns.number, -1)
    first = torch.where(chosen, columns.number, behind).topk(capacity, 1, largest=False).values
    return first.masked_fill(first == behind, -1)
