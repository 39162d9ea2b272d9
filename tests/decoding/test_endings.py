# SPDX-License-Identifier: Apache-2.0
"""Where a request ends: at an end token with nothing given behind it, never before something that was given."""

import functools

import pytest
import torch

import dlmkernels as dk
from small_models import MASK, PAD, build, prompts

RULES = {
    "quota": {},
    "threshold-dual": {"rule": dk.Threshold(0.4), "cache": "dual", "block_length": 8},
    "threshold-block": {"rule": dk.Threshold(0.4), "attention": "block", "cache": "block", "block_length": 8},
    "seeded": {"rule": dk.Threshold(0.4), "attention": "block", "cache": "block", "block_length": 8, "seeded": True,
               "logit_alignment": "shift"},
    "editing": {"rule": dk.TokenEditing(0.4, 0.3), "block_length": 8},
    "canvas": {"rule": dk.EarlyAnswer((2.0, 1.5, 1.0)), "block_length": 8},
    "remasking": {"rule": dk.AncestralRemask(eta=0.3), "block_length": 8, "steps": 24, "seed": 4},
    "guided": {"rule": dk.Threshold(0.4), "cfg_scale": 0.5},
}  # fmt: skip


@functools.cache
def model():
    return build(sharpness=6.0)


def ended(plain, is_given, ends, pad=PAD):
    """The sequences of a decoding without end tokens, as they are with them; and which of them are decoded."""
    tokens, decoded = plain.sequences.clone(), ~is_given
    for row in range(len(tokens)):
        behind = int(is_given[row].nonzero().max()) + 1
        end = torch.isin(tokens[row, behind:], torch.tensor(ends)).nonzero().flatten()
        if len(end):
            tokens[row, behind + int(end[0]) + 1 :] = pad
            decoded[row, behind + int(end[0]) + 1 :] = False
    return tokens, decoded


def assert_ended(out, plain, is_given, ends, pad=PAD):
    tokens, decoded = ended(plain, is_given, ends, pad)
    assert torch.equal(out.sequences, tokens)
    assert torch.equal(out.decoded, decoded) and out.complete.all()


@pytest.mark.parametrize("eos_policy", ["fill", "block"])
@pytest.mark.parametrize("name", RULES)
def test_infill_fills_every_gap(name, eos_policy):
    """An end token in an earlier gap ends nothing; in the last one, what is behind it becomes padding."""
    tokens = prompts(3, 24, seed=8)
    tokens[:, 3:8] = tokens[:, 11:14] = tokens[:, 17:] = MASK
    tokens[1, 20:22] = prompts(1, 2)[0]
    tokens[2, 23] = 5  # nothing is open behind the last given token
    is_given = tokens != MASK
    plain = dk.infill(model(), tokens, eos_policy="none", **RULES[name])
    assert plain.complete.all()
    for ends in (
        plain.sequences[:, 4].tolist(),
        plain.sequences[:, 18].tolist(),
        plain.sequences[:, [5, 22]].flatten().tolist(),
    ):
        out = dk.infill(model(), tokens, eos_policy=eos_policy, eos_token_id=ends, pad_token_id=PAD, **RULES[name])
        assert_ended(out, plain, is_given, ends)
    assert not torch.equal(ended(plain, is_given, plain.sequences[:, 18].tolist())[0], plain.sequences)


@pytest.mark.parametrize("eos_policy", ["fill", "block"])
@pytest.mark.parametrize("name", RULES)
def test_tokens_that_are_given_in_an_answer(name, eos_policy):
    ids, given = prompts(2, 6, seed=3), torch.full((2, 16), -1)
    given[0, 9:11] = torch.tensor([7, 8])
    given[1, 2] = 9
    is_given = torch.cat((torch.ones(2, 6, dtype=torch.bool), given >= 0), 1)
    options = {"max_new_tokens": 16, "given": given} | RULES[name]
    plain = dk.generate(model(), ids, eos_policy="none", **options)
    ends = [*plain.generated[:, 1].tolist(), plain.generated[0, 13].item()]
    for eos in (ends, ends * 2):  # an id given twice is one id
        out = dk.generate(model(), ids, eos_policy=eos_policy, eos_token_id=eos, **options)
        assert_ended(out, plain, is_given, ends)
    out = dk.generate(model(), ids, eos_policy=eos_policy, eos_token_id=ends, pad_token_id=ends[0], **options)
    assert_ended(out, plain, is_given, ends, ends[0])  # padding that is an end token


def test_end_tokens_that_were_given_end_nothing():
    ids, given = prompts(1, 6, seed=3), torch.full((1, 12), -1)
    ids[0, 2] = given[0, 4] = 11
    plain = dk.generate(model(), ids, max_new_tokens=12, given=given, eos_policy="none")
    assert not (plain.sequences[plain.decoded] == 11).any()
    out = dk.generate(model(), ids, max_new_tokens=12, given=given, eos_token_id=11)
    assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.commit_step, plain.commit_step)


@pytest.mark.parametrize("pad", [PAD, None], ids=["pad", "pad is the end token"])
def test_columns_behind_a_row_are_not_given(pad):
    """Prompts of different lengths on an absolute grid: rows end in different columns, and end tokens end each."""
    ids, valid = prompts(3, 9, seed=6), torch.ones(3, 9, dtype=torch.int64)
    for row, left in enumerate((0, 3, 4)):
        valid[row, :left] = 0
    ids = ids.masked_fill(valid == 0, PAD)
    options = {"attention": "block", "cache": "block", "block_grid": "absolute", "block_length": 8}
    options |= {"rule": dk.Threshold(0.4), "max_new_tokens": 13}
    plain = dk.generate(model(), ids, valid, eos_policy="none", **options)
    ends = plain.generated[:, 4].tolist()
    for eos_policy in ("fill", "block"):
        chosen = {"eos_policy": eos_policy, "eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
        out = dk.generate(model(), ids, valid, **options, **chosen)
        is_given = (torch.arange(22) < 9).expand(3, -1)
        assert_ended(out, plain, is_given, ends, chosen["pad_token_id"])
        for row in range(3):
            alone = dk.generate(model(), ids[row : row + 1], valid[row : row + 1], **options, **chosen)
            assert torch.equal(alone.sequences[0], out.sequences[row])
            assert torch.equal(alone.num_forwards[0], out.num_forwards[row])


def test_spare_columns_of_a_row_that_grows_are_not_given():
    """An end token ends a row that is shorter than its canvas."""
    rule = dk.Lengthening(first_length=8, growth=4, end_window=4, end_enough=0.0)
    options = {"rule": rule, "max_new_tokens": 24, "block_length": 8, "attention": "full", "cache": "none"}
    ids = prompts(2, 6)
    plain = dk.generate(model(), ids, eos_policy="none", eos_token_id=[90], **options)
    assert (plain.length < 30).all()
    ends = plain.generated[:, 3].tolist()
    is_given = torch.arange(plain.sequences.shape[1])[None] < 6
    out = dk.generate(model(), ids, eos_policy="fill", eos_token_id=ends, **options)
    for row in range(2):
        end = 6 + int(torch.isin(out.generated[row], torch.tensor(ends)).int().argmax())
        assert out.decoded[row, 6 : end + 1].all() and not out.decoded[row, end + 1 :].any()
        assert (out.sequences[row, end + 1 :] == PAD).all()
    assert not (out.decoded & is_given).any()


def test_a_mask_is_no_given_token():
    given = torch.full((1, 8), -1)
    given[0, 3] = MASK
    with pytest.raises(ValueError, match="given holds the mask token"):
        dk.generate(model(), prompts(1, 6), max_new_tokens=8, given=given)
