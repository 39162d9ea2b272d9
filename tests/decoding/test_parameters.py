# SPDX-License-Identifier: Apache-2.0
"""What each request of a batch says for itself: every row is decoded as it is alone with its own values."""

import pytest
import torch

import dlmkernels as dk
from decodings import lively, ragged
from dlmkernels.decoding.parameters import parameters_of
from dlmkernels.decoding.state import State
from small_models import MASK, PAD, prompts

SEEDS = torch.tensor([11, 12, 13])
COMMON = {"max_new_tokens": 24, "block_length": 8, "eos_policy": "none"}
CAUSAL = {"attention": "causal", "logit_alignment": "shift", "cache": "block"}
#: a rule of the values of one parameter, or of several requests'; and its values
RULES = {
    "Threshold": (dk.Threshold, (0.2, 0.5, 0.9)),
    "Threshold, tie": (lambda x: dk.Threshold(x, tie=0.01), (0.2, 0.5, 0.9)),
    "DynamicThreshold": (dk.DynamicThreshold, (0.2, 0.4, 0.8)),
    "Factor": (dk.Factor, (0.5, 2.0, 6.0)),
    "Frechet": (dk.Frechet, (0.0, 0.3, 0.9)),
    "EntropyBound": (dk.EntropyBound, (0.3, 2.0, 8.0)),
    "EntropySum": (dk.EntropySum, (0.3, 3.0, 9.0)),
    "HierarchicalThreshold": (lambda x: dk.HierarchicalThreshold(0.6, x), (0.1, 0.3, 0.5)),
    "LocalThreshold": (lambda x: dk.LocalThreshold(0.6, x), (0.1, 0.3, 0.5)),
    "StableThreshold": (lambda x: dk.StableThreshold(x, 1.0, 1), (0.2, 0.4, 0.8)),
    "CreditThreshold": (dk.CreditThreshold, (0.2, 0.4, 0.8)),
    "TokenEditing": (lambda x: dk.TokenEditing(x, 0.3, 4), (0.2, 0.4, 0.8)),
    "TokenEditing, edits": (lambda x: dk.TokenEditing(0.3, x, 4), (0.2, 0.4, 0.8)),
    "RunEditing": (lambda x: dk.RunEditing(x, 0.4), (0.2, 0.4, 0.8)),
    "WideInNarrowOut": (lambda x: dk.WideInNarrowOut(x, 0.4), (0.2, 0.4, 0.6)),
    "WideInNarrowOut, back": (lambda x: dk.WideInNarrowOut(0.3, x), (0.2, 0.5, 0.8)),
    "PathPlanning": (dk.PathPlanning, (0.0, 1.0, 3.0)),
    "SplitEditing": (lambda x: dk.SplitEditing(x, 0.2, 3, 90, 91), (0.2, 0.4, 0.8)),
    "RenoisedEntropyBound": (lambda x: dk.RenoisedEntropyBound(x, steps=6), (0.3, 2.0, 8.0)),
}
SAMPLERS = {
    "temperature": {"temperature": (0.0, 0.7, 1.5)},
    "filters": {"temperature": 1.0, "top_k": (0, 3, 20), "top_p": (0.5, 1.0, 0.9)},
    "all": {"temperature": (0.4, 0.0, 2.0), "top_k": (5, 0, 0), "top_p": (1.0, 0.3, 0.8), "cache": "dual"},
    "filtered": {"distribution": "filtered", "temperature": (0.4, 0.0, 2.0), "top_k": (5, 7, 0)},
    "Strided": {"rule": dk.Strided(3), "temperature": (0.0, 0.7, 1.5), **CAUSAL},
    "Strided, by ratio": {"rule": dk.Strided(3, 1.0), "temperature": (0.0, 0.7, 1.5), **CAUSAL},
}


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


def check_rows(model, together, of_row):
    rows, ids, valid = ragged([5, 8, 3], seed=4)
    # a filter has no effect where the temperature is 0, which only a preset may say nevertheless
    together, *alone = (dk.DecodingConfig(**COMMON | x).as_preset() for x in (together, *map(of_row, range(3))))
    out = dk.generate(model, ids, valid, together, seed=SEEDS)
    differ = []
    for k, row in enumerate(rows):
        want = dk.generate(model, row, config=alone[k], seed=SEEDS[k : k + 1])
        assert torch.equal(out.sequences[k, -24:], want.generated[0]), k
        assert torch.equal(out.commit_step[k, -24:], want.commit_step[0, -24:])
        assert out.num_forwards[k] == want.num_forwards[0]
        torch.testing.assert_close(out.confidence[k, -24:], want.confidence[0, -24:])
        other = dk.generate(model, row, config=alone[k - 1], seed=SEEDS[k : k + 1])
        same = torch.equal(other.commit_step, want.commit_step) and torch.equal(other.sequences, want.sequences)
        differ.append(not same)
    assert any(differ), "the values make no difference"


@pytest.mark.parametrize("name", RULES)
def test_parameters_of_rules(model, name):
    rule, values = RULES[name]
    check_rows(model, {"rule": rule(values)}, lambda k: {"rule": rule(values[k])})


@pytest.mark.parametrize("name", SAMPLERS)
def test_parameters_of_the_sampler(model, name):
    options = {"rule": dk.Threshold(0.4)} | SAMPLERS[name]

    def own(k):
        return {field: value[k] if isinstance(value, tuple) else value for field, value in options.items()}

    check_rows(model, options, own)


@pytest.mark.parametrize(
    "kind", [list, tuple, torch.tensor, lambda x: torch.tensor(x).numpy()], ids=["list", "tuple", "tensor", "array"]
)
def test_any_sequence_will_do(kind):
    config = dk.DecodingConfig(temperature=kind([0.0, 0.5]), rule=dk.Threshold(kind([0.5, 1.0])))
    assert config.temperature == (0.0, 0.5) and config.rule.threshold == (0.5, 1.0)
    assert config == dk.DecodingConfig(temperature=(0.0, 0.5), rule=dk.Threshold((0.5, 1.0)))


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": (0.5, 1.0)}, r"temperature must have one value for each of the 3 requests; got 2"),
    ({"rule": dk.Threshold((0.5,))}, r"rule\.threshold must have one value for each of the 3 requests; got 1"),
    ({"temperature": (0.5, -1.0, 0.0)}, r"temperature\[1\] must be a number of at least 0; got -1.0"),
    ({"temperature": 1.0, "top_k": (1, 2.5, 3)}, r"top_k\[1\] must be an integer"),
    ({"temperature": ()}, r"temperature must be one number, or one for each request; got \(\)"),
    ({"top_p": (0.5, 0.6, 0.7)}, r"top_p=\(0.5, 0.6, 0.7\) has no effect"),
])  # fmt: skip
def test_bad_values(model, options, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(model, prompts(3, 4), max_new_tokens=8, **options)


def test_bad_values_of_rules():
    with pytest.raises(ValueError, match=r"threshold\[2\] must be a number; got nan"):
        dk.Threshold((0.5, 0.6, float("nan")))


def test_a_row_is_given_all_its_parameters():
    """Nothing of the request before is left."""
    config = dk.DecodingConfig(temperature=(0.5, 1.0), rule=dk.Threshold((0.5, 0.6)))
    parameters = parameters_of(config, 2, torch.device("cpu"))
    assert {name: x.tolist() for name, x in parameters.items()} == {
        "temperature": [0.5, 1.0], "rule.threshold": pytest.approx([0.5, 0.6]),
    }  # fmt: skip
    state = State.empty(2, 4, torch.device("cpu"), parameters=parameters)
    row, tokens, is_open = torch.tensor([1]), torch.zeros(1, 4).long(), torch.ones(1, 4).bool()
    with pytest.raises(ValueError, match=r"parameters must have the names \['rule.threshold', 'temperature'\]"):
        state.admit(row, tokens, is_open, torch.zeros(1), 4)
    state.admit(row, tokens, is_open, torch.zeros(1), 4, None, {name: x[1:] for name, x in parameters.items()})
    assert state.parameters["temperature"].tolist() == [0.0, 1.0]


LENGTHS = {
    "prompt": {"block_length": 8},
    "one block": {"block_length": None},
    "quota": {"block_length": 8, "rule": dk.Quota(of_block=True)},
    "cosine": {"block_length": 8, "rule": dk.Quota(schedule="cosine")},
    "progress": {"block_length": 8, "rule": dk.EarlyAnswer((2.5, 2.0, 1.5))},
    "editing": {"block_length": 8, "rule": dk.TokenEditing(0.4, 0.3, 4)},
    "parts": {"block_length": 8, "sub_block_length": 3, "attention": "block", "cache": "block"},
    "absolute": {"block_length": 8, "attention": "block", "block_grid": "absolute"},
    "dual": {"block_length": 8, "cache": "dual"},
    "ends": {"block_length": 8, "eos_policy": "fill", "eos_token_id": tuple(range(20, 30))},
    "sampled": {"block_length": 8, "temperature": 1.0, "rule": dk.AncestralRemask(eta=0.3)},
    "Strided": {"rule": dk.Strided(3), **CAUSAL},
    "SelfSpeculative": {
        "rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block", "block_length": 8,
    },
    "Reordered": {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
    "Pipeline": {"rule": dk.Pipeline(0.3, 0.3, 0.5), "attention": "block", "cache": "block", "block_length": 8},
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(20, 9, 24), (3, 16, 8)], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(model, name, lengths):
    options = {"rule": dk.Threshold(0.4), "eos_policy": "none"} | LENGTHS[name]
    rows, ids, valid = ragged([5, 8, 3], seed=4)
    out = dk.generate(model, ids, valid, seed=SEEDS, max_new_tokens=lengths, **options)
    for k, (row, length) in enumerate(zip(rows, lengths)):
        want = dk.generate(model, row, seed=SEEDS[k : k + 1], max_new_tokens=length, **options)
        end = 8 + length
        assert torch.equal(out.sequences[k, 8:end], want.generated[0]), k
        assert torch.equal(out.commit_step[k, 8:end], want.commit_step[0, -length:])
        assert out.num_forwards[k] == want.num_forwards[0] and out.complete[k]
        assert out.length[k] == want.length[0] + 8 - row.shape[-1]
        assert (out.sequences[k, end:] == PAD).all() and not out.decoded[k, end:].any()


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": (8, 9)}, r"max_new_tokens must have one value for each of the 3 requests; got 2"),
    ({"max_new_tokens": (8, 0, 9)}, r"max_new_tokens\[1\] must be an integer of at least 1; got 0"),
    ({"max_new_tokens": (8, 9, 24), "steps": 8, "block_length": 8}, r"steps are divided among the same blocks for all requests"),
    ({"max_new_tokens": (8, 9, 24), "rule": dk.Lengthening(), "eos_token_id": 5}, r"must be one number with rule Leng"),
])  # fmt: skip
def test_bad_lengths(model, options, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(model, prompts(3, 4), **options)


@pytest.mark.parametrize("rule", [
    dk.AncestralRemask(eta=0.3), dk.PathPlanning(), dk.TimeQuota(), dk.DilatedSchedule(2), dk.Quota(spread=True),
    dk.WideInNarrowOut(0.3, 0.4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(2, 10), (6, 10), (3, 11), (11, 5), (8, 4)], ids=str)
def test_lengths_with_equal_ends(model, lengths, rule):
    """Answers that end at the same place of a block, in another one."""
    options = {"rule": rule, "block_length": 4, "eos_policy": "none"}
    options |= {"temperature": 1.0} if isinstance(rule, dk.AncestralRemask) else {}
    ids = prompts(2, 6)
    out = dk.generate(model, ids, seed=SEEDS[:2], max_new_tokens=lengths, **options)
    for k, length in enumerate(lengths):
        want = dk.generate(model, ids[k], seed=SEEDS[k : k + 1], max_new_tokens=length, **options)
        assert torch.equal(out.generated[k, :length], want.generated[0]), k
        assert out.num_forwards[k] == want.num_forwards[0]


@pytest.mark.parametrize("block_length", [4, 16, None])
@pytest.mark.parametrize("rule", [
    dk.Threshold(0.3), dk.Quota(), dk.TimeQuota(), dk.PathPlanning(), dk.TokenEditing(0.4, 0.3, 4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_canvases_of_other_lengths(model, cache, rule, block_length):
    """Each is cut into blocks from its own first token on."""
    options = {"rule": rule, "block_length": block_length, "eos_policy": "none", "cache": cache}
    rows = [prompts(1, n, seed=n)[0] for n in (12, 9, 5, 11)]
    for k, row in enumerate(rows):
        row[torch.randperm(len(row), generator=torch.Generator().manual_seed(k))[: len(row) // 2 + 1]] = MASK
    out = dk.infill(model, [row.tolist() for row in rows], seed=torch.arange(4), **options)
    for k, row in enumerate(rows):
        want = dk.infill(model, row, seed=torch.tensor([k]), **options)
        assert torch.equal(out.sequences[k, -len(row) :], want.sequences[0]), k
        assert torch.equal(out.commit_step[k, -len(row) :], want.commit_step[0])
        assert out.num_forwards[k] == want.num_forwards[0]
