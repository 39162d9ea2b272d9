# SPDX-License-Identifier: Apache-2.0
"""Plan a decoding: the positions of its blocks, and the number of steps in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import DecodingConfig


@dataclass(frozen=True)
class Grid:
    """Positions of the blocks in each row of a batch.

    Rows are padded on the left, so that all prompts end at the same column. Blocks counted from there have the same
    columns in every row. Blocks counted from a request's first token do not, and the first of them may contain the end
    of the prompt. Such blocks are always decoded whole, as in the published decoders, so the canvas (the columns of
    prompt and answer) grows to hold the last one.

    Attributes
    ----------
    begun : Tensor
        int32 `[B]`: column after each prompt.
    first, ends : Tensor
        int32 `[B]`: first column of the first block with positions to decode, and column after the last block.
    asked : Tensor
        int32 `[B]`: column after the last requested position. Positions from there on only complete a block.
    length : int
        Length of a block.
    width : int
        Number of columns of the canvas.
    span : tuple of int
        Smallest and largest value of `first`.
    count : int
        Largest number of blocks in a row.
    last_lengths : tuple of int
        Lengths that the last block of a row can have. Empty if all rows have the same number of columns.
    is_absolute : bool
        Whether blocks are counted from a request's first token.
    grows : bool
        Whether the last block is always decoded whole, which can lengthen the canvas.
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
        """Build the grid for decoding columns `start` to `end` (each one number, or int32 `[B]`), end excluded, of
        requests that begin at column `origin` int32 `[B]`.
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
        """Build a grid with `rows` rows, on which any request that fits into `columns` columns can be placed."""
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
        """Number of blocks that the columns to decode would fill if blocks began after the prompt, int32 `[B]`."""
        return _ceil(self.asked - self.begun, self.length)

    def place(self, rows: Tensor, origin: Tensor, start: Tensor, end: Tensor) -> None:
        """Set the blocks of `rows` int64 `[n]` to those of requests in columns `origin` to `end` int32 `[n]`.

        Decoding begins at column `start` int32 `[n]`.
        """
        first, ends = _bounds(origin, start, end, self.length, self.is_absolute, self.grows)
        for own, values in ((self.begun, start), (self.first, first), (self.ends, ends), (self.asked, end)):
            own.index_copy_(0, rows, values)


def _bounds(
    origin: Tensor, start: Tensor, end: Tensor, length: int, is_absolute: bool, grows: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `first` and `ends` of a grid."""
    own = (start - origin).clamp(min=0)  # length of a prompt
    first = origin + own // length * length if is_absolute else start.clone()
    return first, first + _ceil(end - first, length) * length if grows else end.clone()


def _ceil(columns: Tensor, length: int) -> Tensor:
    """Return the number of blocks needed for so many columns."""
    return (columns + length - 1) // length


@dataclass(frozen=True)
class Block:
    """Columns that are decoded together: a block of the grid, or a part of one.

    Columns are relative to the first column of the row's first block.

    Attributes
    ----------
    start, length : int
        First column, and number of columns.
    num_steps : int
        Number of steps among which a fixed schedule divides the tokens.
    outer, outer_length : int
        First column and number of columns of the block of the grid that this block is part of.
    behind : int
        Number of steps planned for the preceding blocks.
    """

    start: int
    length: int
    num_steps: int
    outer: int
    outer_length: int
    behind: int


def plan_blocks(config: DecodingConfig, grid: Grid) -> list[Block]:
    """Divide the blocks of a grid into parts of `sub_block_length`, and assign steps to each part.

    The configured steps are divided evenly among the parts that the columns to decode fill. The remainder goes to the
    first parts, one step each.
    """
    part = config.sub_block_length or grid.length
    in_block = -(-grid.length // part)
    steps, planned = config.steps if config.rule.uses_steps else None, 0
    if steps is not None:
        least, planned = (int(x) * in_block for x in grid.planned.aminmax())
        if steps < planned:
            raise ValueError(
                f"steps must be at least the number of blocks, {planned} (of {part} tokens), since each needs a "
                f"forward pass; got {steps}"
            )
        if least != planned:
            raise ValueError(
                "steps are divided among the same blocks for all requests: omit steps if requests have different "
                "max_new_tokens"
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
