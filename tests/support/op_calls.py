# SPDX-License-Identifier: Apache-2.0
"""One valid call of every op, with every argument given and, where shapes allow, different in every row."""

import torch

from dlmkernels import ops


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def block_attention():
    B, Q, S, H, G, D = 2, 3, 7, 4, 2, 8
    return dict(
        q=torch.randn(B, Q, H, D), k_new=torch.randn(B, Q + 1, G, D), v_new=torch.randn(B, Q + 1, G, D),
        k_cache=torch.randn(3, S, G, D), v_cache=torch.randn(3, S, G, D), slots=i32([[4, 0, 6], [2, -1, 5]]),
        kv_range=i32([[0, 6], [1, 7]]), causal_block=2, block_origin=i32([1, 3]), q_limit=i32([[5, 3, 6], [4, 1, 7]]),
        k_order=i32([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]), window_left=4, window_right=2, softcap=3.0,
        scale=0.3, cache_rows=i32([2, 0]), k_slots=i32([[4, 0, 6, 1], [2, -1, 5, 3]]),
        visible=i32([[[5], [-1], [14]], [[3], [9], [6]]]),
    )  # fmt: skip


def token_confidence():
    R, N, V = 5, 4, 37
    return dict(
        logits=torch.randn(R, V), row_map=i32([3, 0, 4, 1]), given=torch.tensor([5, -1, 36, 0]),
        uncond_logits=torch.randn(R, V), cfg_scale=torch.tensor([0.5, 1.5]), bias=torch.randn(N, V),
        banned=torch.tensor([[1, -1], [7, 3]]), bitmask=torch.randint(-(2**31), 2**31, (N, 2)).int(),
        temperature=torch.tensor([0.7, 0.0, 1.0, 2.0]), top_k=i32([5, 0, 9, 3]), top_p=torch.tensor([0.9, 0.8]),
        top_p_first=True, keep_crossing=False, distribution="filtered", seed=torch.tensor([3, 8]),
        step=i32([1, 2, 3, 4]), position=i32([9, 4, 0, 2]), redraw=i32([0, 3]), with_margin=True, with_entropy=True,
    )  # fmt: skip


def select_tokens():
    B, W = 2, 6
    return dict(
        score=torch.rand(B, W), eligible=torch.rand(B, W) < 0.8, rule="threshold", parameter=torch.tensor([0.4, 0.6]),
        strict=True, gate=torch.rand(B, W) < 0.9, cost=torch.rand(B, W), need=i32([1, 2]), fill=i32([2, 1]),
        cap=i32([4, 3]), order_temperature=torch.tensor([0.5, 1.5]), seed=torch.tensor([3, 8]), step=i32([5, 1]),
        position=i32([[0, 1, 2, 3, 4, 5], [8, 6, 4, 3, 1, 0]]),
    )  # fmt: skip


def remask_():
    B, T, W = 2, 7, 4
    return dict(
        tokens=torch.randint(0, 90, (B, T)), state=i32([[1, 0, 1, 0, 2, 1, 0], [0, 1, 1, 4, 0, 0, 1]]).to(torch.uint8),
        position=i32([[0, 1, 2, 6], [5, 3, -1, 1]]), proposal=torch.randint(0, 90, (B, W)),
        commit=torch.rand(B, W) < 0.5, edit=torch.rand(B, W) < 0.5, remask=torch.rand(B, W) < 0.3,
        renoise=torch.rand(B, W) < 0.3, confidence=torch.rand(B, W), commit_step=torch.randint(0, 9, (B, T)).int(),
        commit_confidence=torch.rand(B, T), step=i32([3, 6]), seed=torch.tensor([4, 7]), origin=i32([0, 2]),
        mask_token_id=95, vocab_size=96, eos_token_ids=[2, 3], eos_policy="fill", fill_token_id=0,
    )  # fmt: skip


def verify_drafts():
    B, W, R, Q, V = 2, 3, 9, 7, 21
    logits, drafts = torch.randn(R, V + 2)[:, :V], torch.randn(Q, V + 5)[:, :V]
    row_map, draft_row_map = i32([[3, 0, 8, 1], [5, 2, 4, 7]]), i32([[2, 6, 0], [1, 5, 3]])
    T = torch.tensor([0.7, 1.3])
    lse = [torch.logsumexp(rows[at.long()] / T.view(2, 1, 1), -1) for rows, at in ((logits, row_map), (drafts, draft_row_map))]  # fmt: skip
    return dict(
        drafts=torch.randint(0, V, (B, W)), token=torch.randint(0, V, (B, W + 1)), logits=logits, logsumexp=lse[0],
        row_map=row_map, draft_logits=drafts, draft_logsumexp=lse[1], draft_row_map=draft_row_map,
        banned=torch.tensor([4, -1]), temperature=T, leniency=0.9, seed=torch.tensor([6, 1]), step=i32([2, 5]),
        position=i32([3, 11]),
    )  # fmt: skip


def splice_():
    B, T = 2, 9
    return dict(
        tokens=torch.randint(0, 90, (B, T)), start=i32([1, 4]), insert=i32([[0, 2, 0], [1, 0, 0]]),
        remove=torch.tensor([[True, False, False], [False, False, True]]), length=i32([6, 8]),
        state=torch.randint(0, 2, (B, T)).to(torch.uint8), commit_step=torch.randint(0, 9, (B, T)).int(),
        commit_confidence=torch.rand(B, T), fill_token_id=95, pad_token_id=1,
    )  # fmt: skip


def soft_embedding():
    R, V, D = 5, 37, 11
    return dict(
        logits=torch.randn(R, V), weight=torch.randn(V, D), row_map=i32([3, -1, 0, 4]),
        temperature=torch.tensor([0.7, 1.5]), top_k=i32([5, 9]), mask_token_id=3,
    )  # fmt: skip


def top_candidates():
    R, N, V = 5, 4, 37
    return dict(
        logits=torch.randn(R, V), k=6, row_map=i32([3, -1, 4, 1]), banned=torch.tensor([[1, -1], [7, 3]]),
        bitmask=torch.randint(-(2**31), 2**31, (N, 2)).int(),
    )  # fmt: skip


def lm_head_confidence():
    call = token_confidence()
    (R, V), D = call["logits"].shape, 6
    own = dict(hidden=torch.randn(R, D), weight=torch.randn(V, D), uncond_hidden=torch.randn(R, D))
    return own | {name: value for name, value in call.items() if name not in ("logits", "uncond_logits")}


def lm_head_candidates():
    call, D = top_candidates(), 6
    R, V = call.pop("logits").shape
    return dict(hidden=torch.randn(R, D), weight=torch.randn(V, D)) | call


def shard_confidence():
    call = lm_head_confidence()
    left_out = ("hidden", "uncond_hidden", "top_k", "top_p", "top_p_first", "keep_crossing", "with_margin")
    own = dict(logits=call["hidden"], first=256, uncond=call["uncond_hidden"])
    own |= {name: value for name, value in call.items() if name not in left_out}
    return own | dict(given=torch.tensor([261, -1, 292, 0]), banned=torch.tensor([[257, -1], [263, 259]]))


CALLS = {f.__name__: f for f in (block_attention, token_confidence, select_tokens, remask_, verify_drafts, splice_, soft_embedding, top_candidates, lm_head_confidence, lm_head_candidates, shard_confidence)}  # fmt: skip


def registered(op):
    return getattr(torch.ops.dlmkernels, op).default


def written(op):
    """The arguments that the op's schema marks as written."""
    return [a.name for a in registered(op)._schema.arguments if a.alias_info and a.alias_info.is_write]


def tensors(call):
    return {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}


def cloned(call):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def run(op, call):
    """What the op returns, as a tuple, and what it wrote."""
    result = getattr(ops, op)(**call)
    return (result if isinstance(result, tuple) else (result,)), {name: call[name] for name in written(op)}
