# SPDX-License-Identifier: Apache-2.0
"""Random configurations: what holds of every decoding, or an error that names an option.

`HYPOTHESIS_PROFILE=long pytest tests/decoding/test_fuzz_configurations.py` runs many.
"""

import dataclasses
import functools
import re
import warnings

import pytest
import torch

import dlmkernels as dk
from small_models import MASK, PAD, VOCAB, build, prompts

pytest.importorskip("hypothesis")
from hypothesis import given, note
from hypothesis import strategies as st

FIELDS = {field.name for field in dataclasses.fields(dk.DecodingConfig)}
LENGTHS = (3, 6, 1)
RULES = [
    dk.Quota(), dk.Quota(of_block=True), dk.Quota(spread=True), dk.TimeQuota(), dk.Threshold(0.3), dk.Factor(1.0),
    dk.DynamicThreshold(0.4), dk.EntropyBound(1.0), dk.EntropySum(1.0), dk.HierarchicalThreshold(0.5, 0.2),
    dk.LocalThreshold(0.5, 0.3), dk.DilatedSchedule(2), dk.StableThreshold(0.3, 0.5), dk.CreditThreshold(0.5),
    dk.SmoothedThreshold(0.5), dk.EarlyAnswer((2.0, 1.0, 0.5)), dk.TokenEditing(0.5, 0.3, 3), dk.RunEditing(0.3),
    dk.Backtracking(2), dk.WideInNarrowOut(0.3, 0.5), dk.PathPlanning(), dk.AncestralRemask(eta=0.3), dk.Ancestral(),
    dk.ScoreAncestral(), dk.UniformState(), dk.PredictorCorrector(), dk.RenoisedEntropyBound(1.0, steps=4),
    dk.Pipeline(0.5), dk.EntropyPipeline(1.0), dk.Strided(3), dk.SelfSpeculative(), dk.Reordered(4),
    dk.Lengthening(first_length=4, growth=2, end_window=4),
]  # fmt: skip
WAYS = [  # what a position sees, and the caches for it
    *({"cache": cache} for cache in ("none", "prefix", "dual", "delayed")),
    *({"attention": kind, "cache": cache, "block_length": 4}
      for kind in ("block", "causal", "causal-context", "reordered") for cache in ("none", "block")),
    {"attention": "causal-context", "cache": "block", "block_length": 4, "seeded": True},
    {"attention": "causal", "cache": "block", "logit_alignment": "shift"},
]  # fmt: skip
OPTIONS = {
    "block_length": st.sampled_from([4, 5, 8]), "sub_block_length": st.sampled_from([2, 3]),
    "steps": st.sampled_from([2, 4, 12]), "score": st.sampled_from(["margin", "entropy", "random", "position"]),
    "temperature": st.sampled_from([0.3, 1.0]), "top_k": st.sampled_from([1, 5]), "top_p": st.sampled_from([0.4, 0.9]),
    "top_p_first": st.just(True), "keep_crossing": st.just(False),
    "distribution": st.sampled_from(["tempered", "filtered"]), "order_temperature": st.sampled_from([0.2, 2.0]),
    "sub_block_cache": st.just(True), "warmup": st.just(2), "refresh_interval": st.sampled_from([1, 3]),
    "vicinity": st.sampled_from([(1, 2), (3, 0)]), "fuse_commit": st.just(False), "cfg_scale": st.just(0.5),
    "eos_token_id": st.sampled_from([5, (7, 9, 11)]), "suppress_token_ids": st.just((44, 12)),
    "defer_token_ids": st.just((5, 6)), "eos_policy": st.sampled_from(["none", "block"]),
    "logit_alignment": st.just("shift"), "block_grid": st.sampled_from(["absolute", "prompt", "both-ways"]),
    "constraint": st.just(torch.arange(VOCAB) % 3 != 0), "max_new_tokens": st.sampled_from([1, 9, 12]),
}  # fmt: skip


@st.composite
def configurations(draw):
    """Options of `generate`: a rule that is mostly given what it needs, or a preset; and a few options more."""
    more = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    options = {"max_new_tokens": 10} | draw(st.sampled_from(WAYS)) | {name: draw(OPTIONS[name]) for name in more}
    if draw(st.booleans()):
        options["rule"] = draw(st.sampled_from(RULES))
        return None, options
    return draw(st.sampled_from(sorted(dk.PRESETS))), options


@functools.cache
def model_of(kind):
    return build(kind, seed=3, sharpness=4.0)


def decode(model, rows, config, options):
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_full((width - len(row),), PAD), row)) for row in rows])
    valid = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return dk.generate(model, ids, valid, config, **options), caught


@given(configurations(), st.sampled_from(["llama", "bert"]), st.integers(0, 2**31))
def test_random_configurations(configuration, kind, seed):
    config, options = configuration
    note(f"{config} {options}")
    model, rows = model_of(kind), [prompts(1, n, seed=n)[0] for n in LENGTHS]
    seeds = torch.arange(3) + seed
    try:
        out, caught = decode(model, rows, config, options | {"seed": seeds})
    except ValueError as error:
        assert FIELDS & set(re.findall(r"\w+", str(error))), error
        return
    new = options["max_new_tokens"]
    banned = [*options.get("suppress_token_ids", ())]
    assert not torch.isin(out.sequences, torch.tensor([MASK])).any() or caught
    assert ((out.sequences >= 0) & (out.sequences < VOCAB)).all()
    assert out.complete.all() or any("masks are left" in str(w.message) for w in caught)
    committed = out.commit_step >= 0
    assert not torch.isin(out.sequences[committed], torch.tensor([*banned, MASK])).any()
    if "constraint" in options:
        assert (out.sequences[committed] % 3 != 0).all()
    assert (out.num_forwards >= 1).all() and (out.num_forwards <= 40 * new + 40).all()
    assert (out.commit_step.amax(1) < out.num_forwards).all()
    assert ((out.confidence >= 0) & (out.confidence <= 1 + 1e-6)).all()
    for i, row in enumerate(rows):
        assert torch.equal(out.sequences[i, out.prompt_length - len(row) : out.prompt_length], row)
        alone, _ = decode(model, [row], config, options | {"seed": seeds[i : i + 1]})
        length = min(alone.generated.shape[1], new)
        assert torch.equal(alone.generated[0, :length], out.generated[i, :length]), i
        assert alone.num_forwards[0] == out.num_forwards[i], i
