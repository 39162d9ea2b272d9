# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op's outputs, for torch.compile and fake tensors; same order as csrc/torch/ops.cpp."""

import torch


def _check_devices(op, needed, optional):
    """Refuse tensors on several devices: with one of them on "meta" no kernel, and so none of its checks, would run.

    The first of those that are needed is the one on whose device all others must be.
    """
    for name, value in needed.items():
        if value is None:
            raise RuntimeError(f"{op}: {name} must be a tensor; got None")
    anchor_name, anchor = next(iter(needed.items()))
    for name, value in (needed | optional).items():
        if isinstance(value, torch.Tensor) and value.device != anchor.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {anchor_name}; got {value.device}")


def _check_gradients(op, **arguments):
    """Refuse what a gradient is asked for: a compiled graph runs the kernels, and their checks, without gradients."""
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"{op}: the op is not differentiable, but {name} requires a gradient; call it under torch.no_grad() or "
                f"pass {name}.detach()"
            )


# --- block_attention -------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::block_attention")
def _block_attention(q, k_new, v_new, k_cache, v_cache, slots=None, kv_range=None, **optional):
    given = {"k_new": k_new, "v_new": v_new, "slots": slots, "kv_range": kv_range}
    _check_devices("block_attention", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, given | optional)
    _check_gradients("block_attention", q=q, k_new=k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


# --- token_confidence ------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::token_confidence")
def _token_confidence(logits, *, row_map=None, with_margin=True, with_entropy=True, **optional):
    _check_devices("token_confidence", {"logits": logits}, {"row_map": row_map, **optional})
    _check_gradients("token_confidence", logits=logits, **optional)
    rows = logits.shape[0] if row_map is None else row_map.shape[0]

    def empty(length, dtype=torch.float32):
        return logits.new_empty((length,), dtype=dtype)

    return (
        empty(rows, torch.int64),
        empty(rows, torch.int64),
        empty(rows),
        empty(rows if with_margin else 0),
        empty(rows if with_entropy else 0),
        empty(rows),
        empty(rows),
        empty(rows, torch.int32),
    )


# --- select_tokens ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::select_tokens")
def _select_tokens(score, eligible, rule="none", **optional):
    _check_devices("select_tokens", {"score": score, "eligible": eligible}, optional)
    return score.new_empty(score.shape, dtype=torch.bool), score.new_empty(score.shape[:1], dtype=torch.int32)


# --- remask_ ---------------------------------------------------------------------------------------------------------

INFO_COLUMNS = 9  # kInfoColumns of csrc/common/params.h


@torch.library.register_fake("dlmkernels::remask_")
def _remask_(tokens, state, position, proposal, **optional):
    needed = {"tokens": tokens, "state": state, "position": position, "proposal": proposal}
    _check_devices("remask_", needed, optional)
    _check_gradients("remask_", **optional)
    return tokens.new_empty((tokens.shape[0], INFO_COLUMNS), dtype=torch.int32)


# --- verify_drafts ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::verify_drafts")
def _verify_drafts(drafts, token, **optional):
    _check_devices("verify_drafts", {"drafts": drafts, "token": token}, optional)
    return drafts.new_empty(drafts.shape[:1], dtype=torch.int32), token.new_empty(token.shape)


# --- splice_ ---------------------------------------------------------------------------------------------------------

SPLICE_COLUMNS = 3  # kSpliceColumns of csrc/common/params.h


@torch.library.register_fake("dlmkernels::splice_")
def _splice_(tokens, start, **optional):
    _check_devices("splice_", {"tokens": tokens, "start": start}, optional)
    _check_gradients("splice_", **optional)
    info = tokens.new_empty((tokens.shape[0], SPLICE_COLUMNS), dtype=torch.int32)
    return tokens.new_empty(tokens.shape, dtype=torch.int32), info


# --- soft_embedding --------------------------------------------------------------------------------------------------


@torch.library.register_fake("dlmkernels::soft_embedding")
def _soft_embedding(logits, weight, *, row_map=None, **optional):
    _check_devices("soft_embedding", {"logits": logits, "weight": weight}, {"row_map": row_map, **optional})
    _check_gradients("soft_embedding", logits=logits, weight=weight, **optional)
    return weight.new_empty((logits.shape[0] if row_map is None else row_map.shape[0], weight.shape[1]))
