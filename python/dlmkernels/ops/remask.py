# SPDX-License-Identifier: Apache-2.0
"""`remask_`: documentation, the call of torch.ops.dlmkernels, and the fake for torch.compile."""

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

    The canvas of a row holds its prompt and the positions to be decoded. The state of a position is a sum of bits:

    - ``STATE_OPEN`` (1): still to be decided.
    - ``STATE_FROZEN`` (2): given, as part of a prompt or of the context to infill. Never written, and neither open nor
      decided whatever its other bits.
    - ``STATE_EDITED`` (4): an edit has replaced its token.
    - ``STATE_DIRTY`` (8): its token has changed since its keys and values were written. Whoever writes them clears the
      bit.

    Other bits are preserved. A position that is neither open nor frozen is decided. Positions from `end` on do not
    belong to the request: they are never written, and count as neither open nor decided nor given.

    If several masks apply to a slot, only the last one in this list takes effect, and the others leave no trace:

    - `commit`, if the position is open: the token becomes the proposal, the position is decided, and step and
      confidence are recorded;
    - `edit`, if the position is decided and its token differs from the proposal: the token becomes the proposal, the
      edited bit is set and the confidence is recorded;
    - `remask`, if the position is decided or about to be committed in this call: the token becomes `mask_token_id`, the
      position is open, and -1 and 0 are recorded as step and confidence;
    - `renoise`: the token becomes a uniform draw from [0, vocab_size), the position is open, and -1 and 0 are recorded.

    A negative proposal is never committed or edited in. The end of a request is the first end-of-sequence token at a
    decided position that has no given position after it: where a given position follows, the text continues there.
    After the masks have been applied, `eos_policy` "fill" completes each row that has no open position before its end:
    every position after the end becomes `fill_token_id` and decided, and -1 and 0 are recorded. A position whose token
    differs from its token before the call gets the dirty bit. `step` increases by one in rows that have a used slot.

    Parameters
    ----------
    tokens : Tensor
        int64 [B, T], contiguous like all other tensors; written.
    state : Tensor
        uint8 [B, T]; written.
    position : Tensor
        int32 [B, W]: canvas position of each slot, distinct within a row; -1 marks an unused slot. W is at most 4096.
        On CUDA, where values are not checked, a position outside the canvas is also unused, and of several slots with
        the same position only the first is used.
    proposal : Tensor
        int64 [B, W]: proposed token of each slot; negative for none.
    commit, edit, remask, renoise : Tensor, optional
        bool [B, W].
    confidence : Tensor, optional
        float32 [B, W]: the value recorded in `commit_confidence` for a commit or an edit.
    commit_step : Tensor, optional
        int32 [B, T]; written: the step in which each position was committed (0 without `step`).
    commit_confidence : Tensor, optional
        float32 [B, T]; written.
    step : Tensor, optional
        int32 [B]; written: the number of steps each row has taken.
    seed : Tensor, optional
        int64, one value, one per row or one per group of rows: random key of `renoise`.
    origin : Tensor, optional
        int32, shaped like `seed`: canvas position at which the row's request starts, default 0. The draws of `renoise`
        depend only on (seed, position - origin, step).
    end : Tensor, optional
        int32, shaped like `seed`: canvas position after the last one of the row, in [0, T]; default T.
    mask_token_id : int
        Required by `remask`.
    vocab_size : int
        Required by `renoise`. If positive, committing or editing in a token id outside the vocabulary is an error (on
        the CPU).
    eos_token_ids : list of int
        The end-of-sequence tokens; may be empty. At most 64 on CUDA.
    eos_policy : str
        "none" or "fill".
    fill_token_id : int
        Required by the policy "fill".

    Returns
    -------
    Tensor
        int32 [B, 9], with the columns ``INFO_FIELDS``, describing each row after the call: number of open positions
        among the row's slots; number of open positions in the row; number of positions committed, number edited, and
        number remasked or renoised (each counted once, under the mask that took effect, even if it was filled
        afterwards); number of positions whose token changed; canvas position of the end of the request (-1 if it has
        none); canvas position of the first open position (T if there is none); 1 if no position is open, else 0.

    Raises
    ------
    ArgumentError
        Before anything is written: for a wrong device, dtype, shape or stride; an unknown policy; a missing
        `confidence`, `seed`, `mask_token_id`, `vocab_size` or `fill_token_id`; and, on the CPU, a position outside
        [-1, T) or given twice in a row, an end outside [0, T] and a token id outside the vocabulary. The message names
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
