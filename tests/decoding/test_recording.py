# SPDX-License-Identifier: Apache-2.0
"""Recordings of decodings: their events, applied in order to the first canvas, make the last one."""

import math
import warnings

import pytest
import torch

import dlmkernels as dk
from decodings import lively, ragged
from small_models import EOS, MASK, build, prompts

EXPAND, DELETE, SPLIT = 90, 91, 92
RULES = {
    "quota": ({"rule": dk.Quota(), "steps": 4}, {"commit"}),
    "threshold": ({"rule": dk.Threshold(0.3), "block_length": 5, "cache": "dual"}, {"commit"}),
    "wino": ({"rule": dk.WideInNarrowOut(0.05, 0.9)}, {"commit", "remask"}),
    "edits": ({"rule": dk.TokenEditing(0.4, 0.2, 3), "block_length": 8}, {"commit", "edit"}),
    "remdm": ({"rule": dk.AncestralRemask(eta=0.4), "steps": 12, "temperature": 1.0}, {"commit", "remask"}),
    "uniform": ({"rule": dk.UniformState(), "steps": 6}, {"renoise", "commit"}),
    "renoised": ({"rule": dk.RenoisedEntropyBound(1.0, steps=5)}, {"renoise", "commit"}),
    "lengthening": ({"rule": dk.Lengthening(first_length=4, growth=2, end_window=4)}, {"commit", "insert"}),
    "pipeline": ({"rule": dk.Pipeline(0.3), "block_length": 5}, {"commit"}),
    "own drafts": (
        {"rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block", "block_length": 4},
        {"commit"},
    ),
    "end token": ({"rule": dk.Quota(), "block_length": 6, "eos_token_id": 81}, {"commit", "fill"}),
}  # fmt: skip


def replay(recording, row):
    """Tokens and open positions after all the events of a row."""
    tokens, is_open = recording.tokens[row].tolist(), recording.is_open[row].tolist()
    for event in recording.events[row]:
        place, opens = event.position, event.kind in ("remask", "renoise", "insert")
        if event.kind == "remove":
            assert tokens[place] == event.token
            del tokens[place], is_open[place]
        elif event.kind == "insert":
            tokens.insert(place, event.token)
            is_open.insert(place, True)
        else:
            assert is_open[place] == (event.kind in ("commit", "renoise", "fill")) or event.kind == "fill"
            tokens[place], is_open[place] = event.token, opens
    return tokens, is_open


def assert_told(out):
    """The events of each row make its result, in forwards it took part in, with the probabilities that it names."""
    for row in range(len(out.sequences)):
        tokens, is_open = replay(out.recording, row)
        end = int(out.length[row])
        assert tokens[:end] == out.sequences[row, :end].tolist()
        steps = [event.forward for event in out.recording.events[row]]
        assert steps == sorted(steps) and max(steps) < int(out.num_forwards[row])
        last = {}
        if not any(event.kind in ("insert", "remove") for event in out.recording.events[row]):
            for event in out.recording.events[row]:
                last[event.position] = event
            for position in out.decoded[row].nonzero().flatten().tolist():
                event = last[position]
                assert (event.token, event.confidence) == (
                    out.sequences[row, position], pytest.approx(float(out.confidence[row, position])),
                )  # fmt: skip
                assert event.forward == out.commit_step[row, position] or event.kind == "edit"


@pytest.mark.parametrize("name", RULES)
def test_generate(name):
    options, kinds = RULES[name]
    model = build(seed=3, sharpness=4.0)
    _, ids, valid = ragged((3, 6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = dk.generate(model, ids, valid, max_new_tokens=11, seed=5, **options)
        out = dk.generate(model, ids, valid, max_new_tokens=11, seed=5, trace=True, **options)
    assert plain.recording is None and torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.commit_step, plain.commit_step) and torch.equal(out.num_forwards, plain.num_forwards)
    assert_told(out)
    assert {event.kind for row in out.recording.events for event in row} >= kinds


def test_expanding_and_deleting():
    model = lively()
    with torch.no_grad():
        model.lm_head.weight[[EXPAND, DELETE]] *= 1.8
    rows = [torch.cat((prompts(1, k, seed=k)[0], torch.full((4,), MASK), prompts(1, 2, seed=k)[0])) for k in (3, 6)]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    valid = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    rule = dk.Expanding(expand_token_id=EXPAND, delete_token_id=DELETE)
    kinds = set()
    for seed in range(4):
        out = dk.infill(
            model, ids, valid, rule=rule, max_new_tokens=9, temperature=1.0, seed=seed, eos_policy="none", trace=True
        )  # fmt: skip
        assert_told(out)
        kinds |= {event.kind for row in out.recording.events for event in row}
    assert kinds >= {"commit", "insert", "remove"}


def test_blocks_guidance_and_stop():
    model = build(seed=3, sharpness=4.0)
    _, ids, valid = ragged((3, 6, 1))
    negative = prompts(1, 9, seed=9)[0]
    out = dk.generate(
        model, ids, valid, max_new_tokens=11, block_length=4, cfg_scale=0.5, negative_prompt=negative.tolist(),
        eos_policy="none", trace=True,
    )  # fmt: skip
    assert_told(out)
    assert out.recording.blocks == ((6, 10, 14),) * 3 and out.recording.mask_token_id == MASK
    begun = out.recording
    assert torch.equal(begun.is_open, torch.arange(17).expand(3, -1) >= 6)


def test_infill_and_top_logprobs():
    model = build(seed=3, sharpness=4.0)
    canvas = torch.tensor([[5, MASK, 7, MASK, MASK, 9, MASK]])
    assert_told(dk.infill(model, canvas, rule=dk.Quota(), trace=True, eos_policy="none"))
    out = dk.generate(model, prompts(2, 5), max_new_tokens=6, top_logprobs=3, trace=True, eos_token_id=EOS)
    assert out.entropy.shape == out.confidence.shape and (out.entropy[~out.decoded] == 0).all()
    sure = out.top_log_probability[..., 0].exp()[out.decoded]  # what the likeliest leaves bounds the entropy from below
    assert (out.entropy[out.decoded] >= -(sure * sure.log()) - 1e-5).all()
    assert (out.entropy[out.decoded] <= math.log(model.config.vocab_size)).all()
    assert_told(out)


def test_refusals():
    model = build(seed=3)
    with pytest.raises(
        TypeError, match=r"trace must be True or False; got 'page\.html': pass trace=True, then call out\.trace\.html"
    ):
        dk.generate(model, prompts(1, 3), max_new_tokens=4, trace="page.html")
    with pytest.raises(ValueError, match="graphs=True cannot be used with trace=True"):
        dk.generate(model, prompts(1, 3), max_new_tokens=4, trace=True, graphs=True)
