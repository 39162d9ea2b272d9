# SPDX-License-Identifier: Apache-2.0
"""The plan of a decoding: which blocks, and how many steps in each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import DecodingConfig


@dataclass(frozen=True)
class Grid:
    """Where the blocks of each row of a batch stand.

    Rows are padded on the left, so that all prompts end in one column. Blocks counted from there stand in the same
    columns in every row; blocks counted from a request's first token do not, and the first of them may hold the end of
    the prompt. Those are decoded whole, as published: the canvas grows to hold the last of them.

    Attributes
    ----------
    first : Tensor
        int32 `[B]`: column of the first block with something to decode.
    ends : Tensor
        int32 `[B]`: column after a row's last block.
    asked : Tensor
        int32 `[B]`: column after the last that was asked for; what stands from there on completes a block.
    length : int
        L, of a block.
    width : int
        Columns of the canvas.
    span : tuple of int
        Smallest and largest `first`.
    count : int
        Blocks of the row that has most.
    last_lengths : tuple of int
        How many columns the last block of a row may have.
    start : int
        Column after the prompts.
    is_absolute, grows : bool
        Whether blocks are counted from a request's first token; and whether the last one is decoded whole, and the
        canvas is as long as that takes.
    """

    first: Tensor
    ends: Tensor
    asked: Tensor
    length: int
    width: int
    span: tuple[int, int]
    count: int
    last_lengths: tuple[int, ...]
    start: int
    is_absolute: bool
    grows: bool

    @classmethod
    def of(cls, config: DecodingConfig, origin: Tensor, start: int, end: int | Tensor, grows: bool) -> Grid:
        """The grid for decoding the columns from `start` to `end` (one, or int32 `[B]`) of requests that start at
        `origin` int32 `[B]`.
        """  # fmt: skip
        end = torch.zeros_like(origin) + end
        length = config.block_length or int(end.max()) - start
        is_absolute = config.block_grid == "absolute"
        first, ends, asked = _blocks(origin, start, end, length, is_absolute, grows)
        low, high, count, width = torch.stack(
            [first.min(), first.max(), _ceil(ends - first, length).max(), torch.maximum(ends, end).max()]
        ).tolist()
        last = tuple(((ends - first - 1) % length + 1).unique().tolist())
        return cls(first, ends, asked, length, width, (low, high), count, last, start, is_absolute, grows)

    @classmethod
    def for_any(
        cls, config: DecodingConfig, rows: int, start: int, end: int, grows: bool, device: torch.device
    ) -> Grid:  # fmt: skip
        """A grid with room for any `rows` requests whose prompts end at column `start` and that end by `end`."""
        origin = torch.arange(max(start, 1), dtype=torch.int32, device=device)
        widest = cls.of(config, origin, start, end, grows)
        tensors = {name: getattr(widest, name).new_zeros(rows) for name in _TENSORS}
        grid = dataclasses.replace(widest, last_lengths=tuple(range(1, widest.length + 1)), **tensors)
        grid.place(torch.arange(rows, device=device), grid.first, grid.first + end)
        return grid

    @property
    def planned(self) -> Tensor:
        """int32 `[B]`: blocks that the columns to decode would fill, wherever blocks begin."""
        return _ceil(self.asked - self.start, self.length)

    def place(self, rows: Tensor, origin: Tensor, end: Tensor) -> None:
        """Let the blocks of `rows` int64 `[n]` be those of requests at `origin` that end at `end` int32 `[n]`."""
        found = _blocks(origin, self.start, end, self.length, self.is_absolute, self.grows)
        for name, values in zip(_TENSORS, found, strict=True):
            getattr(self, name).index_copy_(0, rows, values)


_TENSORS = ("first", "ends", "asked")


def _blocks(
    origin: Tensor, start: int, end: Tensor, length: int, is_absolute: bool, grows: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`first`, `ends` and `asked` of a grid."""
    own = (start - origin).clamp(min=0)  # length of a prompt
    first = origin + own // length * length if is_absolute else torch.full_like(origin, start)
    return first, first + _ceil(end - first, length) * length if grows else end.clone(), end


def _ceil(columns: Tensor, length: int) -> Tensor:
    """How many blocks hold so many columns."""
    return (columns + length - 1) // length


@dataclass(frozen=True)
class Block:
    """Columns that are decoded together: a block of the grid, or a part of one. Columns count from the grid's first.

    Attributes
    ----------
    start, length : int
        Its first column, and how many it has.
    num_steps : int
        What a fixed schedule divides its tokens by.
    outer, outer_length : int
        The same of the block of the grid that it is part of.
    behind : int
        Steps planned for the blocks before it.
    """

    start: int
    length: int
    num_steps: int
    outer: int
    outer_length: int
    behind: int


def plan_blocks(config: DecodingConfig, grid: Grid) -> list[Block]:
    """The blocks of a grid, each divided into parts of `sub_block_length`, and the steps among them.

    Steps are divided evenly among the parts that the columns to decode fill; what is left over goes to the first of
    them, one each.
    """
    part = config.sub_block_length or grid.length
    in_block = -(-grid.length // part)
    steps, planned = config.steps if config.rule.uses_steps else None, 0
    if steps is not None:
        least, planned = (int(x) * in_block for x in grid.planned.aminmax())
        if steps < planned:
            raise ValueError(
                f"steps must be at least the number of blocks, {planned} (of {part} tokens): each takes a forward; got "
                f"{steps}"
            )
        if least != planned:
            raise ValueError(
                "steps are divided among the blocks of all requests alike; leave it out where each has a "
                "max_new_tokens of its own"
            )
    blocks: list[Block] = []
    behind = 0
    for outer in range(0, grid.count * grid.length, grid.length):
        outer_length = min(grid.length, grid.width - grid.span[0] - outer)
        for inner in range(0, outer_length, part):
            length = num_steps = min(part, outer_length - inner)
            if steps is not None:
                least, rest = divmod(steps, planned)
                num_steps = least + (len(blocks) < rest)
            blocks.append(Block(outer + inner, length, num_steps, outer, outer_length, behind))
            behind += num_steps
    return blocks
