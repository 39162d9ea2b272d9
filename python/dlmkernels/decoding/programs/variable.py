# SPDX-License-Identifier: Apache-2.0
"""The program of rules that change the length: each request grows and shrinks on a canvas of the maximum length."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ..config import DecodingConfig, SpecialTokens
from ..forward import Forward, rows_at
from ..outcome import output_of
from ..output import DecodingOutput
from ..rules import VariableLength
from ..standing import Standing
from ..state import FROZEN, State
from .base import Program, Task

#: Maximum number of slots that `ops.splice_` takes.
MOST_SLOTS = 4096


class VariableProgram(Program):
    """Decodes requests whose length varies, on a canvas wide enough for the maximum length of every row.

    A report is the largest number of open positions in any row, and the length of the longest row that has any. A form
    is the same two numbers, as upper bounds.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        rule, config, state = self.rule, self.config, self.state
        assert isinstance(rule, VariableLength)
        _check(config, self.special, self.own_ends)
        self.varying = rule
        self.most = most = config.longest
        # A row is padding from `length` on, and may grow up to `limit`. Nothing left of `first` moves.
        self.length = length = state.end
        self.continues = rule.decodes == "continuations"
        self.limit, self.first = torch.zeros_like(length), torch.zeros_like(length)
        self._measure()
        self.forward = Forward(
            self.model, state, config, self.special, self.grid, task.prompt_embeds, self.limit
        )  # fmt: skip
        width = state.tokens.shape[1]
        self.columns = torch.arange(width, dtype=torch.int32, device=length.device)
        last = torch.where(state.is_open, self.columns, 0).amax(1)
        self.masks, widest = torch.stack((state.is_open.sum(1).amax(), (last - self.first).amax())).tolist()
        widest = most if self.continues else widest + most
        self.block_length = min(config.block_length or widest, widest)
        if self.block_length > MOST_SLOTS or (rule.slots == "canvas" and most > MOST_SLOTS):
            raise ValueError(
                f"rule {type(rule).__name__} supports windows of up to {MOST_SLOTS} positions: choose a smaller "
                f"block_length or max_new_tokens; got block_length={config.block_length} and max_new_tokens={most}"
            )
        self.inserted = torch.zeros_like(length)
        self.began = torch.zeros_like(state.step)  # the rule's memory lasts for the whole request

    def _measure(self) -> None:
        """Set the current length and the maximum length of each request."""
        state, most = self.state, self.most
        if self.continues:
            self.length.fill_(self.start + self.varying.first_masks(most))
            self.limit.fill_(self.start + most)
            self.first.fill_(self.start)
            _close(state, self.length, self.special.pad)
        else:
            self.limit.copy_(self.length + most - state.is_open.sum(1, dtype=torch.int32))
            self.first.copy_(state.is_open.int().argmax(1))

    def form(self, report: tuple[int, ...], behind: int) -> tuple[int, int] | None:
        capacity, rows = report
        if capacity == 0 or self.taken == self.varying.max_forwards(self.masks, self.most):
            return None
        self.taken += 1
        # Each step since the report may have inserted up to `most_growth` positions.
        late = behind * self.varying.most_growth
        return min(capacity + late, self.block_length), min(rows + late, self.state.tokens.shape[1])

    def widest(self, form: tuple[int, int]) -> tuple[int, int]:
        return self.block_length, self.state.tokens.shape[1]

    def begin(self) -> Tensor:
        self.taken = 0
        self.inserted.fill_(0)
        self._measure()
        self.forward.begin()
        still_open = self.state.is_open.sum(1, dtype=torch.int32)
        return torch.stack((still_open.amax(), self.length.amax()))

    def step(self, form: tuple[int, int]) -> Tensor:
        capacity, rows = form
        state, first, length, rule = self.state, self.first, self.length, self.varying
        is_open = state.is_open
        working = is_open.any(1)
        used = (self.columns[:rows] < length[:, None]) & working[:, None]
        hidden = self.forward.at(self.columns[:rows].expand(len(first), -1), length.clamp(max=rows), used)
        offset = (is_open.int().argmax(1).int() - first).clamp(min=0)
        block = first + offset // self.block_length * self.block_length
        in_block = state.columns(block, self.block_length)
        if rule.slots == "open":
            base, width = block, self.block_length
            window = state.window(in_block, min(capacity, width))
        else:
            base, width = first, rows - self.start
            window = state.free_window(state.columns(first, width), working)
        speaker = torch.maximum(window.positions - self.forward.shift, state.origin[:, None])
        logits = self.model.logits(rows_at(hidden, speaker).flatten(0, 1))
        room = torch.minimum(self.limit - length, rule.max_insertions(self.most) - self.inserted)
        rule.restrict(logits.unflatten(0, speaker.shape), room)
        standing = Standing.in_one_block(block, self.block_length, state.step, entered=self.began)
        step = self.propose.step(logits, window, standing, memory=self.memory, room=room)
        self.unfinished.see(step)
        action = rule.act(step)
        self.remember(step)
        assert action.commit is not None and action.insert is not None and action.remove is not None
        self.commit(window.positions, step.token, action.commit, step.confidence)
        place = torch.where(window.used, window.positions - base[:, None], width).long()
        insert, remove = _by_place(action.insert, place, width), _by_place(action.remove, place, width)
        self._splice(base, insert, remove)
        if action.append is not None:
            append = action.append.masked_fill(~working, 0)[:, None]
            self._splice(length.clone(), append.contiguous(), None)
        still_open = state.is_open.sum(1, dtype=torch.int32)
        return torch.stack((still_open.amax(), (length * (still_open > 0)).amax()))

    def _splice(self, start: Tensor, insert: Tensor, remove: Tensor | None) -> None:
        """Insert masks before the slots of the columns from `start` on, and remove the slots in `remove`."""
        state, special = self.state, self.special
        moved = ops.splice_(
            state.tokens, start, insert=insert, remove=remove, length=self.length, state=state.state,
            commit_step=state.commit_step, commit_confidence=state.confidence, fill_token_id=special.mask,
            pad_token_id=special.pad,
        )  # fmt: skip
        self.inserted.add_(moved.info[:, 0])
        if self.on_move is not None:
            self.on_move(moved.source)

    def last_column(self) -> int:
        return int(self.length[0])

    def output(self) -> DecodingOutput:
        end = max(int(self.length.amax()), self.start)
        return output_of(self.state, self.start, end, self.unfinished, self.length)


def _by_place(values: Tensor, place: Tensor, width: int) -> Tensor:
    """Scatter slot values `[B, W]` to their places int64 `[B, W]`, giving `[B, width]`, 0 elsewhere.

    Slots with the place `width` are dropped.
    """
    return values.new_zeros(len(values), width + 1).scatter(1, place, values)[:, :-1].contiguous()


def _close(canvas: State, length: Tensor, pad: int) -> None:
    """Turn everything from column `length` int32 `[B]` on into padding."""
    behind = torch.arange(canvas.tokens.shape[1], device=length.device) >= length[:, None]
    canvas.tokens.masked_fill_(behind, pad)
    canvas.state.masked_fill_(behind, FROZEN)


def _check(config: DecodingConfig, special: SpecialTokens, own_ends: Tensor | None) -> None:
    name = type(config.rule).__name__
    if config.attention != "full" or config.cache != "none":
        raise ValueError(
            f"rule {name} needs attention='full' and cache='none'; got attention={config.attention!r} and "
            f"cache={config.cache!r}"
        )
    if isinstance(config.max_new_tokens, tuple):
        raise ValueError(f"max_new_tokens must be one number with rule {name}; got {config.max_new_tokens}")
    for option in ("cfg_scale", "sub_block_length"):
        if getattr(config, option):
            raise ValueError(f"{option} cannot be used with rule {name}; got {getattr(config, option)!r}")
    if config.rule.decodes == "infillings" and config.eos_policy != "none":
        raise ValueError(
            f"rule {name} needs eos_policy='none', because text may follow the positions that are filled in; got "
            f"{config.eos_policy!r}"
        )
    if config.rule.decodes == "continuations":
        if not special.eos:
            raise ValueError(f"eos_token_id is needed by rule {name}, and the model's configuration has none")
        if own_ends is not None and bool((own_ends < 0).all(1).any()):
            raise ValueError(f"eos_token_id must hold at least one token for each request with rule {name}")
