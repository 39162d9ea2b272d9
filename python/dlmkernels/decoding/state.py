# SPDX-License-Identifier: Apache-2.0
"""Everything that is known of the requests being decoded: one struct of arrays, a row each, written in place."""

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
    """Some columns of each row.

    Attributes
    ----------
    number : Tensor
        int32 `[S, W]`, ascending.
    index : Tensor
        int64 `[S, W]`: the same, or the last that there is.
    inside : Tensor
        bool `[S, W]`: whether there is such a column.
    """

    number: Tensor
    index: Tensor
    inside: Tensor


@dataclass(frozen=True)
class NegativePrompt:
    """What the unconditional half of a guided batch sees in place of the prompts.

    Attributes
    ----------
    tokens : Tensor
        int64 `[S, P]`, in the columns of the prompts, padded on the left.
    origin : Tensor
        int32 `[S]`: column at which each begins.
    """

    tokens: Tensor
    origin: Tensor


@dataclass(frozen=True)
class State:
    """S requests on a canvas of T columns. The ops and the programs write into these tensors; none is ever replaced.

    Attributes
    ----------
    tokens : Tensor
        int64 `[S, T]`: the canvas.
    state : Tensor
        uint8 `[S, T]`: bits open, frozen, edited, changed since its keys and values were written.
    origin, end : Tensor
        int32 `[S]`: where each request starts (its left padding), and the column after its last. What stands from `end`
        on is frozen, but nobody has given it.
    commit_step, confidence : Tensor
        int32 and float32 `[S, T]`: step at which a position was committed (-1: given, open, or padding), and the
        probability its token had then (0 there).
    step : Tensor
        int32 `[S]`: forwards each request has taken part in.
    seed : Tensor
        int64 `[S]`: what its random draws depend on.
    block, entered : Tensor
        int32 `[S]`: number of the block it is in, -1 before the first; and `step` when it came there.
    epoch : Tensor
        int32 `[S]`: how many requests the row has been given, so that a late answer can be told from one of today.
    parameters : dict
        Tensors `[S]` or `[S, n]` of what each request says for itself: see `decoding.parameters`.
    negative : NegativePrompt, optional
        With guidance by a prompt of its own.
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
        """One row for each request: int64 `tokens` and bool `is_open` `[S, T]`, int32 `origin` and `end` `[S]`."""
        rows = torch.arange(len(tokens), device=tokens.device)
        new = cls.empty(len(tokens), tokens.shape[1], tokens.device, negative, parameters)
        new.admit(rows, tokens, is_open, origin, tokens.shape[1] if end is None else end, seed, parameters)
        return new

    @classmethod
    def empty(
        cls, rows: int, columns: int, device: torch.device, negative: NegativePrompt | None = None,
        parameters: Mapping[str, Tensor] = NOTHING,
    ) -> State:  # fmt: skip
        """Rows without a request. Of the `parameters` names and dtypes are read."""

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
        """Give `rows` int64 `[n]` new requests: `tokens` and `is_open` `[n, T]`, the others `[n]`.

        Positions that are not open are frozen. Of what stood there nothing is left but the count of requests, so that
        each of the state's parameters must be given.
        """
        if parameters.keys() != self.parameters.keys():
            raise ValueError(f"parameters must be {sorted(self.parameters)}; got {sorted(parameters)}")
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
        """bool `[S, T]`."""
        return (self.state & OPEN) != 0

    def length(self, end: int) -> Tensor:
        """int32 `[S]`: column behind the last of the first `end` that was given, or is open, or was decided by a step.

        What is none of these is the padding behind an end token.
        """
        is_token = ((self.state & (OPEN | FROZEN)) != 0) | (self.commit_step >= 0)
        number = torch.arange(1, end + 1, dtype=torch.int32, device=self.tokens.device)
        is_token = is_token[:, :end] & (number <= self.end[:, None])
        return torch.where(is_token, number, 0).amax(1)

    def columns(self, start: Tensor, length: int) -> Columns:
        """The columns `start[b]` … `start[b] + length` of each row; start int32 `[S]`."""
        number = start[:, None] + torch.arange(length, dtype=torch.int32, device=start.device)
        last = self.tokens.shape[1] - 1
        return Columns(number, number.clamp(max=last).long(), number <= last)

    def open_in(self, columns: Columns) -> Tensor:
        """Which of the columns are open: bool `[S, W]`."""
        return self._has(OPEN, columns) & columns.inside

    def free_in(self, columns: Columns) -> Tensor:
        """Which of the columns are not given: bool `[S, W]`."""
        return ~self._has(FROZEN, columns) & columns.inside

    def window(self, columns: Columns, capacity: int) -> TokenWindow:
        """The open positions among the columns, ascending, in `capacity` slots, at least as many as any row has.

        Decided positions take no slot, so that no language-model head runs for them.
        """
        return TokenWindow(listed(columns, self.open_in(columns), capacity, self.tokens.shape[1]), self.origin)

    def free_window(self, columns: Columns, working: Tensor) -> TokenWindow:
        """All positions among the columns that are not given, in the `working` rows, bool `[S]`."""
        return TokenWindow(torch.where(self.free_in(columns) & working[:, None], columns.number, -1), self.origin)

    def _has(self, bit: int, columns: Columns) -> Tensor:
        """Where the state at the columns has a bit: bool `[S, W]`; outside the canvas anything."""
        return (self.state.gather(1, columns.index) & bit).bool()

    def write(self, positions: Tensor, tokens: Tensor, ends: Tensor | None = None, **how: Any) -> Tensor:
        """`ops.remask_` at `positions` int32 `[S, W]` with proposals int64 `[S, W]`, and with the records; its info.

        `ends` int64 `[S, E]`: end tokens of each row's own, in place of the op's `eos_token_ids`.
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
        """Complete those of the rows bool `[S]` that have an end token with nothing open before it or given behind it.

        All after it becomes `pad`. `ends` as in `write`, in place of `eos`.
        """
        nothing = torch.full_like(self.tokens[:, :1], -1)
        end = torch.where(rows, self.end, 0)  # a row that ends before it begins has no end token
        self.write(
            nothing.int(), nothing, ends, eos_token_ids=eos, eos_policy="fill", fill_token_id=pad, end=end
        )  # fmt: skip

    def close_behind(self, column: Tensor) -> None:
        """Overwrite what stands behind `column` int32 `[S]` with the token there; nowhere in rows where that is -1.

        Nobody has committed it then.
        """
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        behind = (column >= 0)[:, None] & (columns > column[:, None]) & ((self.state & FROZEN) == 0)
        token = self.tokens.gather(1, column.clamp(min=0).long()[:, None])
        self.tokens.copy_(torch.where(behind, token, self.tokens))
        self.state.copy_(torch.where(behind, self.state & ~OPEN, self.state))
        self.commit_step.masked_fill_(behind, -1)
        self.confidence.masked_fill_(behind, 0.0)

    def renoise(self, vocab_size: int, rows: Tensor | None = None) -> None:
        """Put tokens drawn uniformly from the vocabulary at all open positions, in rows bool `[S]`; None: in all."""
        columns = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        is_open = self.is_open if rows is None else self.is_open & rows[:, None]
        position = torch.where(is_open, columns, -1)
        before_the_first = torch.full_like(self.step, -1)  # the draws of step 0 are that step's own
        self.write(
            position, torch.full_like(self.tokens, -1), renoise=is_open, step=before_the_first, seed=self.seed,
            origin=self.origin, vocab_size=vocab_size,
        )  # fmt: skip


def put(to: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Let `values` `[S, …]` stand in `to`, in the rows bool `[S]`; None: in all."""
    to.copy_(values if rows is None else torch.where(rows.view(-1, *[1] * (to.dim() - 1)), values, to))


def listed(columns: Columns, chosen: Tensor, capacity: int, behind: int) -> Tensor:
    """The chosen ones bool `[S, W]` of some columns, ascending, int32 `[S, capacity]`; -1 where a row has no more.

    `behind`: a number larger than that of any column.
    """
    if capacity == chosen.shape[1]:
        return torch.where(chosen, columns.number, -1)
    first = torch.where(chosen, columns.number, behind).topk(capacity, 1, largest=False).values
    return first.masked_fill(first == behind, -1)
