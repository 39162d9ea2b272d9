# SPDX-License-Identifier: Apache-2.0
"""`remask_`: contract, call of torch.ops.dlmkernels, and what its results look like to torch.compile."""

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from .._ops import ops as native
from ..arguments import call, one_value
from .fakes import check_devices, check_gradients

#: Bits of a canvas position's state.
STATE_OPEN, STATE_FROZEN, STATE_EDITED, STATE_DIRTY = 1, 2, 4, 8

#: Columns of the info that `remask_` returns.
INFO_FIELDS = ("open_window", "open", "committed", "edited", "remasked", "changed", "first_eos", "prefix", "done")


def remask_(
    tokens: Tensor,
    state: Tensor,
    position: Tensor,
    proposal: Tensor,
    *,
    commit: Tensor | None = None,
    edit: Tensor | None = None,
    remask: Tensor | None = None,
    renoise: Tensor | None = None,
    confidence: Tensor | None = None,
    commit_step: Tensor | None = None,
    commit_confidence: Tensor | None = None,
    step: Tensor | None = None,
    seed: Tensor | int | None = None,
    origin: Tensor | int | None = None,
    end: Tensor | int | None = None,
    mask_token_id: int = -1,
    vocab_size: int = 0,
    eos_token_ids: list[int] | tuple[int, ...] = (),
    eos_policy: str = "none",
    fill_token_id: int = -1,
) -> Tensor:
    """Commit, edit, remask and renoise canvas positions of a batch: one denoising step, in place.

    The state of a position is a sum of bits: ``STATE_OPEN`` (1, still to be decided), ``STATE_FROZEN`` (2, given:
    prompt or infill context; never written, neither open nor decided whatever its other bits), ``STATE_EDITED`` (4, an
    edit has replaced its token), ``STATE_DIRTY`` (8, its token has changed since its keys and values were written;
    whoever writes those clears it). Other bits are kept. Positions from `end` on do not belong to the request: they
    are never written, and are neither open nor decided nor given.

    Of the masks that apply to a slot, only the last of this list acts, and the others leave no trace:

    - `commit`, where the position is open: the token becomes the proposal, the position is decided, and step and
      confidence are recorded;
    - `edit`, where it is decided and holds another token than the proposal: the token becomes the proposal, the edited
      bit is set and the confidence is recorded;
    - `remask`, where it is decided or to be committed in this call: the token becomes `mask_token_id`, the position is
      open, and -1 and 0 are recorded for step and confidence;
    - `renoise`: the token becomes a uniform draw from [0, vocab_size), the position is open, -1 and 0 are recorded.

    A negative proposal is neither committed nor edited in. The end of a request is its first end-of-sequence token at a
    decided position that has nothing given behind it: where something was given, the text goes on there. Afterwards
    `eos_policy` "fill" completes each row in which nothing before its end is open: every position after the end becomes
    `fill_token_id` and decided, and -1 and 0 are recorded. A position whose token is not what it was before the call
    gets the dirty bit. `step` grows by one in rows that have a used slot.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all others; written.
    state : Tensor
        uint8 [B, T]; written.
    position : Tensor
        int32 [B, W]: canvas position of each slot, distinct within a row; -1: the slot is unused. W is at most 4096.
        On CUDA, where values are not checked, a position off the canvas is unused too, and of slots at one position
        only the first is used.
    proposal : Tensor
        int64 [B, W]: token for each slot; negative: none.
    commit, edit, remask, renoise : Tensor, optional
        bool [B, W].
    confidence : Tensor, optional
        float32 [B, W]: what `commit_confidence` records of a commit or an edit.
    commit_step : Tensor, optional
        int32 [B, T]; written: the step in which a position was committed (0 without `step`).
    commit_confidence : Tensor, optional
        float32 [B, T]; written.
    step : Tensor, optional
        int32 [B]; written: the number of steps a row has taken.
    seed : Tensor, optional
        int64, one value, one a row or one a group of rows: random key of `renoise`.
    origin : Tensor, optional
        int32, likewise: canvas position at which the row's request starts, default 0. The draws of `renoise` depend
        on (seed, position - origin, step) alone.
    end : Tensor, optional
        int32, likewise: canvas position after the row's last, from 0 to the default T.
    mask_token_id : int
        Needed by `remask`.
    vocab_size : int
        Needed by `renoise`. If positive, committing or editing in a token id beyond it is an error (on the CPU).
    eos_token_ids : list of int
        The end-of-sequence tokens; may be empty. On CUDA at most 64.
    eos_policy : str
        "none" or "fill".
    fill_token_id : int
        Needed by the policy "fill".

    Returns
    -------
    Tensor
        int32 [B, 9], the columns ``INFO_FIELDS``: open positions among the row's slots; open positions in the row;
        positions committed, edited, and remasked or renoised (each counted once, under what acted on it, even if it was
        filled afterwards); positions whose token changed; canvas position of the end of the request (-1: it has none);
        of the first open position (T: none); 1 if no position is open, else 0. All are as the call leaves them.

    Raises
    ------
    ArgumentError
        Before anything is written: for a wrong device, dtype, shape or stride; an unknown policy; a missing
        `confidence`, `seed`, `mask_token_id`, `vocab_size` or `fill_token_id`; and, on the CPU, a position outside
        [-1, T) or given twice in a row, an end outside [0, T] and a token id beyond the vocabulary. The message names
        the argument.
    """
    return call(
        native.remask_.default,
        tokens,
        state,
        position,
        proposal,
        commit=commit,
        edit=edit,
        remask=remask,
        renoise=renoise,
        confidence=confidence,
        commit_step=commit_step,
        commit_confidence=commit_confidence,
        step=step,
        seed=one_value("seed", seed, tokens),
        origin=one_value("origin", origin, tokens),
        end=one_value("end", end, tokens),
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        eos_policy=eos_policy,
        fill_token_id=fill_token_id,
    )


@torch.library.register_fake(add_op_namespace_prefix("remask_"))
def _fake(tokens, state, position, proposal, **optional):
    needed = {"tokens": tokens, "state": state, "position": position, "proposal": proposal}
    check_devices("remask_", needed, optional)
    check_gradients("remask_", **optional)
    return tokens.new_empty((tokens.shape[0], len(INFO_FIELDS)), dtype=torch.int32)
