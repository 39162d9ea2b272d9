# SPDX-License-Identifier: Apache-2.0
"""The plan of a decoding: which blocks, and how many steps in each."""

from __future__ import annotations

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
    begun : Tensor
        int32 `[B]`: column after each prompt.
    first, ends : Tensor
        int32 `[B]`: column of the first block with something to decode, and after the last.
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
        How many columns the last block of a row may have; none where all rows have as many columns.
    is_absolute, grows : bool
        Whether blocks are counted from a request's first token; and whether the last one is decoded whole, and the
        canvas is as long as that takes.
    """

    begun: Tensor
    first: Tensor
    ends: Tensor
    asked: Tensor
    length: int
    width: int
    span: tuple[int, int]
    count: int
    last_lengths: tuple[int, ...]
    is_absolute: bool
    grows: bool

    @classmethod
    def of(
        cls, config: DecodingConfig, origin: Tensor, start: int | Tensor, end: int | Tensor, grows: bool
    ) -> Grid:  # fmt: skip
        """The grid for decoding the columns from `start` to `end` (one, or int32 `[B]`) of requests that start at
        `origin` int32 `[B]`.
        """  # fmt: skip
        begun, asked = torch.zeros_like(origin) + start, torch.zeros_like(origin) + end
        length = config.block_length or max(int((asked - begun).max()), 1)
        first, ends = _bounds(origin, begun, asked, length, config.block_grid == "absolute", grows)
        low, high, count, width = torch.stack(
            [first.min(), first.max(), _ceil(ends - first, length).max(), torch.maximum(ends, asked).max()]
        ).tolist()
        columns = (ends - first).unique()
        last = tuple(((columns - 1) % length + 1).unique().tolist()) if len(columns) > 1 else ()
        is_absolute = config.block_grid == "absolute"
        return cls(begun, first, ends, asked, length, width, (low, high), count, last, is_absolute, grows)

    @classmethod
    def for_any(
        cls, config: DecodingConfig, rows: int, columns: int, grows: bool, device: torch.device
    ) -> Grid:  # fmt: skip
        """A grid on which any requests that fit into so many columns can be placed, `rows` at a time."""
        length = config.block_length or config.longest
        width = columns + (length - 1) * grows
        begun, first, ends, asked = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(4))
        grid = cls(
            begun, first, ends, asked, length, width, (0, columns), -(-width // length), tuple(range(1, length + 1)),
            config.block_grid == "absolute", grows,
        )  # fmt: skip
        nothing = torch.zeros_like(begun)
        grid.place(torch.arange(rows, device=device), nothing, nothing, nothing + config.longest)
        return grid

    @property
    def planned(self) -> Tensor:
        """int32 `[B]`: blocks that the columns to decode would fill, wherever blocks begin."""
        return _ceil(self.asked - self.begun, self.length)

    def place(self, rows: Tensor, origin: Tensor, start: Tensor, end: Tensor) -> None:
        """Let the blocks of `rows` int64 `[n]` be those of requests in columns `origin` to `end` int32 `[n]`.

        What is decoded begins at column `start` int32 `[n]`.
        """
        first, ends = _bounds(origin, start, end, self.length, self.is_absolute, self.grows)
        for own, values in ((self.begun, start), (self.first, first), (self.ends, ends), (self.asked, end)):
            own.index_copy_(0, rows, values)


def _bounds(
    origin: Tensor, start: Tensor, end: Tensor, length: int, is_absolute: bool, grows: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`first` and `ends` of a grid."""
    own = (start - origin).clamp(min=0)  # length of a prompt
    first = origin + own // length * length if is_absolute else start.clone()
    return first, first + _ceil(end - first, length) * length if grows else end.clone()


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
