# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op's outputs, for torch.compile and fake tensors; same order as csrc/torch/ops.cpp."""

import torch


# --- select_tokens ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::select_tokens")
def _select_tokens(score, eligible, rule="none", **_):
    return score.new_empty(score.shape, dtype=torch.bool), score.new_empty(score.shape[:1], dtype=torch.int32)


# --- remask_ ---------------------------------------------------------------------------------------------------------

INFO_COLUMNS = 9  # kInfoColumns of csrc/common/params.h


@torch.library.register_fake("dlmkernels::remask_")
def _remask_(tokens, state, position, proposal, **_):
    return tokens.new_empty((tokens.shape[0], INFO_COLUMNS), dtype=torch.int32)
