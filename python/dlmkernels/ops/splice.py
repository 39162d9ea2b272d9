# SPDX-License-Identifier: Apache-2.0
"""`splice_`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients

#: Columns of the info that `splice_` returns.
SPLICE_FIELDS = ("inserted", "removed", "overflow")


class Spliced(NamedTuple):
    """Result of `splice_`."""

    source: Tensor  #: int32 [B, T], position of the content before the call, -1 if it is new
    info: Tensor  #: int32 [B, 3], the columns SPLICE_FIELDS


def splice_(
    tokens: Tensor,
    start: Tensor,
    *,
    insert: Tensor | None = None,
    remove: Tensor | None = None,
    length: Tensor | None = None,
    end: Tensor | int | None = None,
    state: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    fill_token_id: int = -1,
    pad_token_id: int = -1,
) -> Spliced:
    """Insert positions into a window of each row and remove others, in place; everything behind them moves along.

    Slot w of row b is canvas position ``start[b] + w``. ``insert[b, w]`` new positions are inserted before it, and the
    position itself is removed where ``remove[b, w]`` is set; both together replace it. A new position holds
    `fill_token_id`, is open, and has -1 and 0 as step and confidence. All other content keeps its order, its state and
    its records. There are two modes:

    - With `length`, positions ``[0, length[b])`` are live, and their number grows and shrinks. The slot at
      ``length[b]`` inserts at the end. Positions freed at the end hold `pad_token_id` and are frozen. A row that would
      need more than T positions is left unchanged, and `info` reports how many positions are missing.
    - Without `length`, ``[start[b], end[b])`` keeps its size: what is pushed beyond the end is dropped, and positions
      freed at the end are filled like inserted ones. Positions from `end` on are unchanged.

    Published decoders in these terms: LLaDA2.2 splits and deletes within a block of fixed size (its SPLIT is an
    insertion before the token). DreamOn, which expands masks and deletes the end of a canvas, and DAEDAL, which
    replaces a doubtful position by eight masks (``insert=7`` before it, with the position itself remasked) or extends
    the canvas, change the length.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all other tensors; written.
    start : Tensor
        int32 [B]: canvas position of slot 0; -1 leaves the row unchanged. Slots beyond the live positions or beyond
        `end` are ignored.
    insert : Tensor, optional
        int32 [B, W], W at most 4096: number of positions to insert before each slot. On CUDA, where values are not
        checked, a negative number counts as 0.
    remove : Tensor, optional
        bool [B, W]: the slots to remove. Frozen positions are not removed.
    length : Tensor, optional
        int32 [B], in [0, T]; written.
    end : Tensor, optional
        int32, one value, one per row or one per group of consecutive rows, in [0, T]; default T. Not allowed with
        `length`.
    state, commit_step, commit_confidence : Tensor, optional
        uint8, int32 and float32 [B, T], as maintained by `remask_`; written. Unlike the other bits, ``STATE_DIRTY``
        does not move with the content: it describes the keys and values of a position. It is set where the token
        differs from the one before the call.
    fill_token_id : int
        Required by `insert`, and by `remove` without `length`: the mask token.
    pad_token_id : int
        Required by `remove` with `length`.

    Returns
    -------
    Spliced
        `source` [B, T] moves anything else that is stored by position: ``x.gather(1, source.clamp(min=0).long())``,
        where positions with a source of -1 are new. `info` int32 [B, 3]: number of positions inserted (as requested,
        including any that were dropped), number removed, and number for which there was no room: dropped without
        `length`, or missing with `length` (the row is then unchanged).

    Raises
    ------
    ArgumentError
        Before anything is written: for a wrong device, dtype, shape or stride, W above 4096, both `length` and `end`,
        a missing token id; and, on the CPU, for a start, length, end or count out of range. The message names the
        argument.
    """
    return Spliced(
        *call(
            native.splice_.default,
            tokens,
            start,
            insert=insert,
            remove=remove,
            length=length,
            end=one_value("end", end, tokens),
            state=state,
            commit_step=commit_step,
            commit_confidence=commit_confidence,
            fill_token_id=fill_token_id,
            pad_token_id=pad_token_id,
        )
    )


@torch.library.register_fake(add_op_namespace_prefix("splice_"))
def _fake(tokens, start, **optional):
    check_devices("splice_", {"tokens": tokens, "start": start}, optional)
    check_gradients("splice_", **optional)
    info = tokens.new_empty((tokens.shape[0], len(SPLICE_FIELDS)), dtype=torch.int32)
    return tokens.new_empty(tokens.shape, dtype=torch.int32), info
