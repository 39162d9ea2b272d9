# SPDX-License-Identifier: Apache-2.0
"""The program of D2F and d3LLM, which decodes several blocks of a request at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...window import TokenWindow
from ..config import DecodingConfig
from ..forward import Forward, rows_at
from ..rules import Action, EntropyPipeline, Pipeline
from ..schedule import Grid
from ..standing import Standing
from ..state import State
from .base import Program, Task


class PipelinedProgram(Program):
    """Decodes all opened blocks of a row at once; each row opens its own blocks.

    A report is the largest number of columns that any row has to forward, and the largest number of open positions in
    the opened blocks of any row. A form is the same two numbers, as upper bounds.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        _check(self.config)
        rule, config, state, grid = self.rule, self.config, self.state, self.grid
        assert isinstance(rule, Pipeline)
        self.pipeline = rule
        self.forward = Forward(self.model, state, config, self.special, grid, task.prompt_embeds)
        self.blocks = Blocks(state, grid, rule)
        # With block-causal attention, nothing right of the opened blocks is visible; otherwise all masks are.
        self.reach = grid.ends.clone()
        self.visibility = self.forward.block_causal() if config.attention == "block" else {}
        #: column at which the forward pass of each row starts; everything to its left is in the cache
        self.first = torch.zeros_like(state.origin)
        #: hidden state of the last cached column, [S, 1, hidden], if cached columns no longer change
        self.carried: Tensor | None = None
        self.prefix: DelayedPrefix | None = None
        if config.cache == "prefix":
            self.prefix = DelayedPrefix(state, grid, config)
        self.standing = Standing.in_one_block(grid.first, self.blocks.width, state.step)

    def form(self, report: tuple[int, ...], behind: int) -> tuple[int, int] | None:
        rows, capacity = report
        if capacity == 0 or self.taken == self.most_forwards:
            return None
        self.taken += 1
        # Each step since the report may have opened a block or, with a prefix cache, require refreshing the prefix.
        most, late = self.forward.length, behind * self.grid.length
        rows = min(rows + late, most) if self.prefix is None or not behind else most
        return rows, min(capacity + late, self.blocks.width)

    def widest(self, form: tuple[int, int]) -> tuple[int, int]:
        rows, most = self.forward.length, self.blocks.width
        if self.pipeline.buffer is None:
            return rows, most
        # all open blocks, plus those finished since the last forward pass, which are appended to the cache
        width = self.pipeline.buffer * self.grid.length
        return (min(rows, 2 * width) if form[0] <= 2 * width else rows), min(most, width)

    def begin(self) -> Tensor:
        self.taken = 0
        self.forward.begin()
        self.blocks.begin()
        self.constrained.enter(torch.ones_like(self.state.origin, dtype=torch.bool))
        if self.config.attention == "block":
            self.reach.copy_(self.blocks.end)
        if self.config.cache == "block":
            self.first.copy_(self.state.origin)
        if self.prefix is not None:
            self.first.copy_(self.prefix.begin(self.blocks.context))
        return torch.stack(((self.reach - self.first).amax(), self.blocks.num_open.amax()))

    def step(self, form: tuple[int, int]) -> Tensor:
        rows, capacity = form
        state, blocks, first, reach = self.state, self.blocks, self.first, self.reach
        context = blocks.context
        columns = first[:, None] + torch.arange(rows, dtype=torch.int32, device=first.device)
        works = state.is_open.any(1) & ~self.constrained.is_stuck
        used = (columns < reach[:, None]) & works[:, None]
        seen = reach.clamp(max=rows) if self.config.cache == "none" else reach
        hidden = self.forward.at(columns, seen, used, **self.visibility)
        # The hidden state before the first forwarded column belongs to the cache; without one, use the first column's.
        head = hidden[:, :1]
        if self.config.cache == "block":
            has_context = (first > state.origin)[:, None, None]
            head = head if self.carried is None else torch.where(has_context, self.carried, head)
        hidden = torch.cat((head, hidden), 1)
        window = blocks.window(capacity, works)
        row = window.positions - first[:, None] + (0 if self.forward.shift else 1)
        logits = self.propose.head(rows_at(hidden, row).flatten(0, 1))
        step, action = self.decide(
            logits, window, self.standing, lambda step: Action(self.pipeline.select_by_block(step, blocks.is_active))
        )
        assert action.commit is not None
        info = self.commit(window.positions, step.token, action.commit, step.confidence)
        if self.config.cache == "block":
            self._carry(rows_at(hidden, (context - first)[:, None]))
            first.copy_(context)
        eos = info[:, 6] if self.config.eos_policy != "none" else torch.full_like(info[:, 6], -1)
        if self.pipeline.closes_at_eos:
            state.close_behind(torch.where(info[:, 1] > 0, eos, -1))
        blocks.advance(eos < 0)
        if self.config.attention == "block":
            reach.copy_(blocks.end)
        if self.prefix is not None:
            first.copy_(self.prefix.advance(blocks.context))
        num_open = blocks.num_open.masked_fill(self.constrained.is_stuck, 0)
        return torch.stack((((reach - first) * (num_open > 0)).amax(), num_open.amax()))

    def _carry(self, hidden: Tensor) -> None:
        if self.carried is None:
            self.carried = torch.empty_like(hidden)
        self.carried.copy_(hidden)


class Blocks:
    """Progress of the blocks of a grid: which blocks each row has opened, and how much of each is decided.

    Attributes
    ----------
    opened : Tensor
        int32 `[B]`: number of blocks opened so far.
    width : int
        Number of columns that hold N blocks, where N is the largest number of blocks in any row.
    columns : Columns
        These columns.
    """

    def __init__(self, canvas: State, grid: Grid, rule: Pipeline):
        self.canvas, self.grid, self.rule = canvas, grid, rule
        self.width = grid.count * grid.length
        number = torch.arange(grid.count, dtype=torch.int32, device=grid.first.device)
        self._number, self._lengths = number, (grid.ends - grid.first)[:, None] - number * grid.length
        self._lengths = self._lengths.clamp(0, grid.length)
        self.columns = canvas.columns(grid.first, self.width)
        self.opened = torch.ones_like(grid.first)
        shape = (len(grid.first), grid.count)
        self._masks = torch.zeros(shape, dtype=torch.int32, device=number.device)
        self._share = torch.zeros(shape, dtype=torch.float64, device=number.device)

    def begin(self) -> None:
        """Open the first block of each row."""
        self.opened.fill_(1)
        self._look()

    @property
    def end(self) -> Tensor:
        """Column after the opened blocks, int32 `[B]`."""
        return torch.minimum(self.grid.first + self.opened * self.grid.length, self.grid.ends)

    @property
    def context(self) -> Tensor:
        """Column up to which all blocks are finished, int32 `[B]`."""
        return torch.minimum(self.grid.first + self._finished() * self.grid.length, self.grid.ends)

    def _finished(self) -> Tensor:
        """Return the number of consecutive finished blocks from the left, int32 `[B]`."""
        return (self._masks == 0).int().cumprod(1).sum(1, dtype=torch.int32)

    @property
    def num_open(self) -> Tensor:
        """Number of open positions in the opened blocks, int32 `[B]`."""
        return self._masks.masked_fill(self._number >= self.opened[:, None], 0).sum(1, dtype=torch.int32)

    @property
    def is_active(self) -> Tensor:
        """Active blocks, bool `[B, N]`: those whose left neighbor is decided to the share `activate_at` of the rule.

        The first block is always active.
        """
        return torch.nn.functional.pad(self._share[:, :-1] >= self.rule.activate_at, (1, 0), value=True)

    def window(self, capacity: int, works: Tensor) -> TokenWindow:
        """Return a window of up to `capacity` open positions in the opened blocks, in rows bool `[B]` that work."""
        window = self.canvas.window(self.columns, capacity)
        positions = window.positions.masked_fill((window.positions >= self.end[:, None]) | ~works[:, None], -1)
        return TokenWindow(positions, window.origin)

    def advance(self, may_open: Tensor) -> None:
        """Update the progress, and open the next block in rows bool `[B]` whose newest block is decided far enough."""
        self._look()
        share = self._share.gather(1, (self.opened - 1).long()[:, None])[:, 0]
        may_open = may_open & (self.grid.first + self.opened * self.grid.length < self.grid.ends)
        if self.rule.buffer is not None:
            may_open = may_open & (self.opened - self._finished() < self.rule.buffer)
        self.opened.add_(may_open & (share >= self.rule.open_at))

    def _look(self) -> None:
        is_open = self.canvas.open_in(self.columns).unflatten(1, (self.grid.count, self.grid.length))
        self._masks.copy_(is_open.sum(2, dtype=torch.int32))
        self._share.copy_((self._lengths - self._masks).double() / self._lengths.clamp(min=1))


class DelayedPrefix:
    """Cached prefix of each row in d3LLM: blocks from the left, each added `delay` forwards after it was finished."""

    def __init__(self, state: State, grid: Grid, config: DecodingConfig):
        assert isinstance(config.rule, EntropyPipeline)
        self.origin, self.grid = state.origin, grid
        self.delay, self.interval = config.rule.delay, config.refresh_interval
        self.forwards = torch.zeros_like(state.origin)
        self.kept = state.origin.clone()  # column up to which keys and values are in the cache
        # forward in which the next block was found finished; -1 if it is not finished
        self.since = torch.zeros_like(state.origin)

    def begin(self, context: Tensor) -> Tensor:
        """Return the column at which the first forward pass starts, int32 `[S]`."""
        self.forwards.fill_(0)
        self.kept.copy_(self.origin)
        self.since.copy_(torch.where(self.grid.first > self.origin, 0, -1))  # the prompt is a block too
        return self.advance(context)

    def advance(self, context: Tensor) -> Tensor:
        """Return the column at which the next forward pass starts, int32 `[S]`.

        All blocks up to column `context` int32 `[S]` are finished.
        """
        forwards, kept = self.forwards.add_(1), self.kept.clone()
        ripe = (self.since >= 0) & (forwards - self.since >= self.delay)
        next_end = torch.minimum(kept + self.grid.length, self.grid.ends)
        self.kept.copy_(torch.where(ripe, torch.where(kept < self.grid.first, self.grid.first, next_end), kept))
        now = torch.where(context > self.kept, forwards, -1)
        self.since.copy_(torch.where(ripe | (self.since < 0), now, self.since))
        whole = self.since >= 0
        if self.interval is not None:
            whole = whole | (forwards % self.interval == 0)
        return torch.where(ripe, kept, torch.where(whole, self.origin, self.kept))


def _check(config: DecodingConfig) -> None:
    name = type(config.rule).__name__
    caches = {"block": ("none", "block"), "full": ("none",)}
    if isinstance(config.rule, EntropyPipeline) and config.logit_alignment == "same":
        caches["full"] = ("none", "prefix")
    if config.cache not in caches.get(config.attention or "", ()):
        raise ValueError(
            f"rule {name} needs attention='block' with cache='block' or 'none', or attention='full' with cache='none' "
            "(or cache='prefix' for EntropyPipeline with logit_alignment='same'); got "
            f"attention={config.attention!r}, cache={config.cache!r} and logit_alignment={config.logit_alignment!r}"
        )
    for option in ("cfg_scale", "seeded", "sub_block_length"):
        if getattr(config, option):
            raise ValueError(f"{option} cannot be used with rule {name}; got {getattr(config, option)!r}")
