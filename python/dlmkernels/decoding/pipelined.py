# SPDX-License-Identifier: Apache-2.0
"""The loop of D2F and d3LLM: several blocks of a request are decoded at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.adapt import DiffusionModel
from ..window import TokenWindow
from .canvas import Canvas
from .config import DecodingConfig, SpecialTokens
from .loop import CanvasForward, commit_tokens
from .outcome import Unfinished, output_of
from .output import DecodingOutput
from .poll import OpenCount
from .propose import Proposer, StepOptions
from .schedule import Grid
from .streaming import Stream
from .streams import EntropyPipeline, Pipeline


@torch.no_grad()
def decode_pipelined(
    model: DiffusionModel,
    canvas: Canvas,
    config: DecodingConfig,
    special: SpecialTokens,
    grid: Grid,
    start: int,
    end: int,
    streamer=None,
    prompt_embeds: Tensor | None = None,
) -> DecodingOutput:
    """Decode columns `[start, end)` and those that complete the last block. Each row opens its own blocks."""
    rule = config.rule
    assert isinstance(rule, Pipeline)
    _check(config)
    forward = CanvasForward(model, canvas, config, special, grid, prompt_embeds)
    options = StepOptions(Proposer(model, canvas, config, special), canvas, config)
    blocks = Blocks(canvas, grid, rule)
    # Under block-causal attention nothing right of the open blocks is seen; otherwise all masks are.
    reach = blocks.end if config.attention == "block" else grid.ends
    visibility = forward.block_causal() if config.attention == "block" else {}
    # column of each row that a forward starts at: what stands left is in the cache
    first = canvas.origin if config.cache == "block" else torch.zeros_like(canvas.origin)
    carried: Tensor | None = None  # hidden state of the last of those, where they do not change any more
    prefix: DelayedPrefix | None = None
    if config.cache == "prefix":
        prefix = DelayedPrefix(canvas, grid, config)
        first = prefix.advance(blocks.context)
    width = blocks.width
    most_rows = canvas.tokens.shape[1]
    stream, unfinished = Stream(streamer, canvas, start), Unfinished(canvas, rule)
    counts = OpenCount(most_rows, width)
    counts.submit(torch.stack(((reach - first).amax(), blocks.num_open.amax())))
    for _ in range(width):
        rows, capacity = counts.latest()
        if capacity == 0:
            break
        # A count that is late may lack a block for each step it is behind; and not know of a prefix to be renewed.
        rows = min(rows + counts.behind * grid.length, most_rows) if prefix is None or not counts.behind else most_rows
        capacity = min(capacity + counts.behind * grid.length, width)
        context = blocks.context
        columns = first[:, None] + torch.arange(rows, dtype=torch.int32, device=first.device)
        used = (columns < reach[:, None]) & canvas.is_open.any(1, keepdim=True)
        seen = reach.clamp(max=rows) if config.cache == "none" else reach
        hidden = forward.at(columns, seen, used, **visibility)
        # The row before the first forwarded one comes from the cached part; without one the first stands for it.
        hidden = torch.cat((hidden[:, :1] if carried is None else carried, hidden), 1)
        window = blocks.window(capacity)
        row = window.positions - first[:, None] + (0 if forward.shift else 1)
        logits = model.logits(_rows(hidden, row).flatten(0, 1))
        open_now = blocks.num_open
        step = options.step(logits, window, grid.first, width, 0, 1, open_now, open_now, 0.0, {})
        unfinished.see(step)
        chosen = rule.select_by_block(step, blocks.is_active)
        info = commit_tokens(canvas, config, special, window.positions, step.token, chosen, step.confidence)
        if config.cache == "block":
            carried = _rows(hidden, (context - first)[:, None])
            first = context
        eos = info[:, 6] if config.eos_policy != "none" else torch.full_like(info[:, 6], -1)
        if rule.closes_at_eos:
            canvas.close_behind(torch.where(info[:, 1] > 0, eos, -1))
        blocks.advance(eos < 0)
        if config.attention == "block":
            reach = blocks.end
        if prefix is not None:
            first = prefix.advance(blocks.context)
        has_open = blocks.num_open > 0
        counts.submit(torch.stack((((reach - first) * has_open).amax(), blocks.num_open.amax())))
        stream.step(end)
    stream.finish(end)
    return output_of(canvas, start, end, unfinished)


class Blocks:
    """How far the blocks of a grid are: which are open in each row, and how much of each is decided.

    Attributes
    ----------
    opened : Tensor
        int32 `[B]`: how many blocks have been opened.
    width : int
        How many columns hold all N blocks of the row that has most.
    columns : Columns
        Those.
    """

    def __init__(self, canvas: Canvas, grid: Grid, rule: Pipeline):
        self.canvas, self.grid, self.rule = canvas, grid, rule
        self.width = grid.count * grid.length
        number = torch.arange(grid.count, dtype=torch.int32, device=grid.first.device)
        self._number, self._lengths = number, (grid.ends - grid.first)[:, None] - number * grid.length
        self._lengths = self._lengths.clamp(0, grid.length)
        self.columns = canvas.columns(grid.first, self.width)
        self.opened = torch.ones_like(grid.first)
        self._look()

    @property
    def end(self) -> Tensor:
        """Column after the open blocks, int32 `[B]`."""
        return torch.minimum(self.grid.first + self.opened * self.grid.length, self.grid.ends)

    @property
    def context(self) -> Tensor:
        """Column up to which all blocks are finished, int32 `[B]`."""
        finished = (self._masks == 0).int().cumprod(1).sum(1, dtype=torch.int32)
        return torch.minimum(self.grid.first + finished * self.grid.length, self.grid.ends)

    @property
    def num_open(self) -> Tensor:
        """Open positions of the opened blocks, int32 `[B]`."""
        return self._masks.masked_fill(self._number >= self.opened[:, None], 0).sum(1, dtype=torch.int32)

    @property
    def is_active(self) -> Tensor:
        """Blocks after one that is decided to the share that it takes, bool `[B, N]`; the prompt is decided."""
        return torch.nn.functional.pad(self._share[:, :-1] >= self.rule.activate_at, (1, 0), value=True)

    def window(self, capacity: int) -> TokenWindow:
        """The open positions of the opened blocks, of which no row has more than `capacity`."""
        window = self.canvas.window(self.columns, capacity)
        positions = torch.where(window.positions < self.end[:, None], window.positions, -1)
        return TokenWindow(positions, window.origin)

    def advance(self, may_open: Tensor) -> None:
        """Take notice of what has been decided, and open a block where the newest asks for it, in rows bool `[B]`."""
        self._look()
        share = self._share.gather(1, (self.opened - 1).long()[:, None])[:, 0]
        is_left = self.grid.first + self.opened * self.grid.length < self.grid.ends
        self.opened = self.opened + (may_open & is_left & (share >= self.rule.open_at))

    def _look(self) -> None:
        is_open = self.canvas.open_in(self.columns).unflatten(1, (self.grid.count, self.grid.length))
        self._masks = is_open.sum(2, dtype=torch.int32)
        self._share = (self._lengths - self._masks).double() / self._lengths.clamp(min=1)


class DelayedPrefix:
    """What d3LLM keeps of each row: finished blocks from the left, and each but a while after it was finished."""

    def __init__(self, canvas: Canvas, grid: Grid, config: DecodingConfig):
        assert isinstance(config.rule, EntropyPipeline)
        self.origin, self.grid, self.delay, self.interval = (
            canvas.origin,
            grid,
            config.rule.delay,
            config.refresh_interval,
        )
        self.forwards = 0
        self.kept = canvas.origin  # column up to which keys and values are in the cache
        # forward at which the block from there on was found finished, -1: it is not; the prompt is a block too
        self.since = torch.where(grid.first > canvas.origin, 0, -1)

    def advance(self, context: Tensor) -> Tensor:
        """Column that the next forward starts at, int32 `[B]`, all blocks up to `context` `[B]` being finished."""
        self.forwards += 1
        kept = self.kept
        ripe = (self.since >= 0) & (self.forwards - self.since >= self.delay)
        next_end = torch.minimum(kept + self.grid.length, self.grid.ends)
        self.kept = torch.where(ripe, torch.where(kept < self.grid.first, self.grid.first, next_end), kept)
        now = torch.where(context > self.kept, self.forwards, -1)
        self.since = torch.where(ripe | (self.since < 0), now, self.since)
        is_due = self.interval is not None and self.forwards % self.interval == 0
        return torch.where(ripe, kept, torch.where((self.since >= 0) | is_due, self.origin, self.kept))


def _rows(hidden: Tensor, row: Tensor) -> Tensor:
    """Rows `row` int32 `[B, W]` of `hidden` `[B, Q, hidden]`; those of unused slots hold anything."""
    inside = row.clamp(0, hidden.shape[1] - 1).long()
    return hidden.gather(1, inside[:, :, None].expand(-1, -1, hidden.shape[2]))


def _check(config: DecodingConfig) -> None:
    name = type(config.rule).__name__
    caches = {"block": ("none", "block"), "full": ("none",)}
    if isinstance(config.rule, EntropyPipeline) and config.logit_alignment == "same":
        caches["full"] = ("none", "prefix")
    if config.cache not in caches.get(config.attention or "", ()):
        raise ValueError(
            f"rule {name} needs attention='block' with cache='block' or 'none', or attention='full' with cache='none' "
            "(EntropyPipeline, with logit_alignment='same': or 'prefix'); got "
            f"{config.attention!r}, {config.cache!r} and {config.logit_alignment!r}"
        )
    for option in ("cfg_scale", "seeded", "sub_block_length"):
        if getattr(config, option):
            raise ValueError(f"{option} cannot be used with rule {name}; got {getattr(config, option)!r}")
