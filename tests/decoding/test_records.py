# SPDX-License-Identifier: Apache-2.0
"""What a decoding says of itself: `commit_step`, `confidence`, `decoded` and all that is derived from them."""

import functools

import pytest
import torch

import dlmkernels as dk
from small_models import MASK, PAD, build, prompts

LENGTH, NEW = 6, 24
PRESETS = sorted(dk.PRESETS)


@functools.cache
def model():
    return build(sharpness=6.0)


def options(name):
    """The preset, made fit for a model with any kind of attention and for end tokens."""
    config = dk.PRESETS[name]
    rule, more = config.rule, {"max_new_tokens": NEW, "seed": 3}
    if isinstance(rule, dk.Strided):
        more |= {"attention": "causal", "logit_alignment": "shift", "cache": "block"}
    elif isinstance(rule, dk.SelfSpeculative):
        more |= {"attention": "causal-context", "seeded": True, "cache": "block", "block_length": 8}
    elif isinstance(rule, dk.Reordered):
        more |= {"attention": "reordered", "cache": "block"}
    elif config.cache == "block":
        more |= {"attention": "block", "logit_alignment": "same", "block_length": 8}
    elif rule.decodes == "anything" and config.cache not in ("delayed", "d2cache"):
        more |= {"block_length": 12 if config.block_length is None else min(config.block_length, 12)}
    if isinstance(rule, dk.Lengthening):
        more |= {"rule": dk.Lengthening(first_length=8, growth=4, end_window=4), "block_length": 8}
    if isinstance(rule, dk.SplitEditing):
        more |= {"rule": dk.SplitEditing(delete_token_id=93, split_token_id=94)}
    if isinstance(rule, dk.Expanding):
        more |= {"rule": dk.Expanding(expand_token_id=93, delete_token_id=94)}
    if config.rule.uses_steps:
        more |= {"steps": 12}
    return config.replace(**more)


def ragged(batch=4):
    ids = prompts(batch, LENGTH, seed=5)
    valid = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : row % 3] = PAD
        valid[row, : row % 3] = 0
    return ids, valid


def check_records(out, given, ends_at=None):
    """`given` bool `[B, T]`: what stood there before, padding on the left included; `ends_at` the end tokens."""
    decoded = out.commit_step >= 0
    assert torch.equal(out.decoded, decoded)
    assert not (decoded & given).any()
    assert (out.confidence[~decoded] == 0).all() and (out.confidence[decoded] > 0).all()
    assert (out.confidence <= 1 + 1e-5).all()
    assert (out.log_probability[~decoded] == 0).all() and torch.isfinite(out.log_probability).all()
    assert (out.commit_step.amax(1) < out.num_forwards).all()
    assert torch.equal(out.tokens_per_forward, decoded.sum(1) / out.num_forwards.clamp(min=1))
    assert torch.equal(out.trace.canvas_at(int(out.commit_step.max()), MASK), out.sequences)
    for row in range(len(decoded)):
        order = out.trace.order(row)
        assert sorted(sum(order, [])) == decoded[row].nonzero().flatten().tolist()
        assert len(order) <= int(out.num_forwards[row])
    assert (out.sequences[decoded] != MASK).all()
    behind = torch.zeros_like(decoded)
    for row, tokens in enumerate(out.sequences):
        last_given = int(given[row].nonzero().max())
        is_end = torch.isin(tokens, torch.tensor(ends_at or [])) & decoded[row]
        is_end[: last_given + 1] = False
        if is_end.any():
            behind[row, int(is_end.int().argmax()) + 1 :] = True
        behind[row, int(out.length[row]) :] = True
    assert torch.equal(decoded, ~given & ~behind), "decoded exactly where nothing was given, and before the end"
    return int(behind.sum())


@pytest.mark.parametrize("name", [
    n for n in PRESETS if dk.PRESETS[n].rule.decodes != "infillings" and dk.PRESETS[n].rule.noise != "continuous"
])  # fmt: skip
def test_records_of_every_preset(name):
    """Without end tokens; then with some of the tokens that came early as end tokens."""
    config, (ids, valid) = options(name), ragged()
    given = torch.zeros(len(ids), LENGTH + NEW, dtype=torch.bool)
    given[:, :LENGTH] = True
    out = dk.generate(model(), ids, valid, config, eos_policy="none")
    assert out.complete.all() and out.sequences.shape[1] <= LENGTH + NEW
    check_records(out, given[:, : out.sequences.shape[1]])
    ends = out.generated[:3, 5].tolist()
    filled = 0
    for eos_policy in ("fill", "block") if config.rule.by_block else ("fill",):
        out = dk.generate(model(), ids, valid, config, eos_policy=eos_policy, eos_token_id=ends)
        assert out.complete.all()
        filled += check_records(out, given[:, : out.sequences.shape[1]], ends)
        assert (out.generated[~out.decoded[:, LENGTH:]] == PAD).all()
    assert filled > 0


def test_records_where_the_length_varies():
    config = options("dreamon")
    tokens = prompts(3, 20, seed=2)
    tokens[:, 4:9] = tokens[:, 13:16] = MASK
    out = dk.infill(model(), tokens, config=config, eos_policy="none")
    assert out.complete.all() and (out.commit_step.amax(1) < out.num_forwards).all()
    assert (out.confidence[~out.decoded] == 0).all() and (out.confidence[out.decoded] > 0).all()
    assert torch.equal(out.trace.canvas_at(int(out.commit_step.max()), MASK), out.sequences)
