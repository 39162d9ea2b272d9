# SPDX-License-Identifier: Apache-2.0
"""The plan of a decoding: which blocks, and how many steps in each."""

from __future__ import annotations

from dataclasses import dataclass

from .config import DecodingConfig


@dataclass(frozen=True)
class Block:
    """Canvas positions `[start, end)`, decoded together.

    `num_steps` is what a fixed schedule divides the block's tokens by; `max_steps` ends the block even when rows
    without one usable logit leave masks behind.
    """

    start: int
    end: int
    num_steps: int
    max_steps: int


def plan_blocks(config: DecodingConfig, start: int, end: int) -> list[Block]:
    """Divide the canvas positions `[start, end)` into blocks and the steps among them."""
    length = config.block_length or end - start
    starts = range(start, end, length)
    blocks = []
    if config.steps is not None and config.rule.uses_steps and config.steps % len(starts):
        raise ValueError(
            f"steps must be a multiple of the number of blocks ({len(starts)} blocks of {length}); got {config.steps}"
        )
    for s in starts:
        e = min(s + length, end)
        steps = config.steps // len(starts) if config.steps is not None and config.rule.uses_steps else e - s
        blocks.append(Block(s, e, steps, config.rule.max_steps(e - s, steps)))
    return blocks
