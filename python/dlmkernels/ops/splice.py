# SPDX-License-Identifier: Apache-2.0
"""`splice_`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

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
    """What `splice_` returns."""

    source: Tensor  #: int32 [B, T], where each position's content was before the call; -1: it is new
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
    """Insert positions into a window of each row and remove others, in place; what lies behind moves along.

    Slot w of row b is canvas position ``start[b] + w``. Before it go ``insert[b, w]`` new positions, and it is itself
    taken out where ``remove[b, w]``; both together replace it. A new position holds `fill_token_id`, is open, and has
    -1 and 0 for step and confidence. All other content keeps its order, and its state and records with it. A row of
    the batch has one of two kinds of room:

    - with `length`, positions ``[0, length[b])`` are live and their number grows and shrinks. The slot at ``length[b]``
      inserts at the end. Positions that become free at the end hold `pad_token_id` and are frozen. A row that would
      need more than T positions is left as it is, and `info` says how many are missing.
    - without, ``[start[b], end[b])`` keeps its size: what is pushed beyond the end is dropped, what becomes free at the
      end is filled like an insertion. Positions from the end on stay as they are.

    Published decoders in these terms: LLaDA2.2 splits and deletes within a block of fixed size (its SPLIT is an
    insertion before the token); DreamOn's expanded masks and deleted ends, and DAEDAL's replacement of a doubtful
    position by eight masks (``insert=7`` before it, itself remasked) or its longer canvas, change the length.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all others; written.
    start : Tensor
        int32 [B]: canvas position of slot 0, -1: nothing happens in this row. Slots beyond the live positions or the
        end are ignored.
    insert : Tensor, optional
        int32 [B, W], W at most 4096: how many positions to insert before each slot. On CUDA, where values are not
        checked, a negative one counts as 0.
    remove : Tensor, optional
        bool [B, W]: the slots to take out. A frozen position stays.
    length : Tensor, optional
        int32 [B], in [0, T]; written.
    end : Tensor, optional
        int32, one value, one a row or one a group of consecutive rows, in [0, T]; default T. Not with `length`.
    state, commit_step, commit_confidence : Tensor, optional
        uint8, int32 and float32 [B, T], as `remask_` keeps them; written. ``STATE_DIRTY`` stays with the position,
        whose keys and values it is about, and is set where the token is not what it was before the call.
    fill_token_id : int
        Needed by `insert`, and by `remove` without `length`: the mask token.
    pad_token_id : int
        Needed by `remove` with `length`.

    Returns
    -------
    Spliced
        `source`, to move anything else that is kept by position: ``x.gather(1, source.clamp(min=0).long())``, new
        where it is -1. `info` int32 [B, 3]: positions inserted (asked for, of those dropped too), removed, and
        positions that found no room: dropped without `length`, missing with it (then nothing was done).

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
