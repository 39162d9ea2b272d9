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
    first : Tensor
        int32 `[B]`: column of the first block with something to decode.
    length : int
        L, of a block.
    ends : Tensor
        int32 `[B]`: column after a row's last block.
    depth : int
        Largest number of columns of any row left of its first block.
    width : int
        Columns of the canvas.
    span : tuple of int
        Smallest and largest `first`.
    count : int
        Blocks of the row that has most.
    planned : int
        Blocks that the columns to decode would fill, which is the same for every request.
    """

    first: Tensor
    length: int
    ends: Tensor
    depth: int
    width: int
    span: tuple[int, int]
    count: int
    planned: int

    @classmethod
    def of(cls, config: DecodingConfig, origin: Tensor, start: int, end: int, grows: bool) -> Grid:
        """The grid for decoding the columns `[start, end)` of requests that start at `origin` int32 `[B]`.

        `grows`: the last block is decoded whole, and the canvas is as long as that takes.
        """
        length = config.block_length or end - start
        if config.block_grid == "absolute":
            first = origin + (start - origin).clamp(min=0) // length * length
        else:
            first = torch.full_like(origin, start)
        blocks = (end - first + length - 1) // length
        ends = first + blocks * length if grows else torch.full_like(first, end)
        low, high, count, depth, width = torch.stack(
            [first.min(), first.max(), blocks.max(), (first - origin).max(), ends.max()]
        ).tolist()
        planned = -(-(end - start) // length)
        return cls(first, length, ends, max(depth, 0), max(width, end), (low, high), count, planned)


@dataclass(frozen=True)
class Block:
    """Columns that are decoded together: a block of the grid, or a part of one. Columns count from the grid's first.

    `num_steps` is what a fixed schedule divides the block's tokens by; `max_steps` ends the block even when rows
    without one usable logit leave masks behind.

    Attributes
    ----------
    start, length : int
        Its first column, and how many it has.
    outer, outer_length : int
        The same of the block of the grid that it is part of.
    behind : int
        Steps planned for the blocks before it.
    """

    start: int
    length: int
    num_steps: int
    max_steps: int
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
    steps = config.steps if config.rule.uses_steps else None
    if steps is not None and steps < grid.planned * in_block:
        raise ValueError(
            f"steps must be at least the number of blocks, {grid.planned * in_block} (of {part} tokens): each takes a "
            f"forward; got {steps}"
        )
    blocks: list[Block] = []
    behind = 0
    for outer in range(0, grid.count * grid.length, grid.length):
        outer_length = min(grid.length, grid.width - grid.span[0] - outer)
        for inner in range(0, outer_length, part):
            length = num_steps = min(part, outer_length - inner)
            if steps is not None:
                least, rest = divmod(steps, grid.planned * in_block)
                num_steps = least + (len(blocks) < rest)
            most = config.rule.max_steps(length, num_steps)
            blocks.append(Block(outer + inner, length, num_steps, most, outer, outer_length, behind))
            behind += num_steps
    return blocks
