# SPDX-License-Identifier: Apache-2.0
"""How many steps are made between two looks at their reports: that costs idle rows, never a token."""

import pytest
import torch

import dlmkernels as dk
from decodings import NoRepeats, lively, ragged
from dlmkernels.decoding import poll
from dlmkernels.decoding.capture import RecordedSteps
from dlmkernels.decoding.programs.row_forms import RowForms
from dlmkernels.engine import slots as slots_module
from engines import asks, assert_as_alone, engine_for, same, serve
from recorder import Replays
from small_models import prompts

OPTIONS = [
    {}, {"cache": "dual"}, {"rule": dk.TokenEditing(0.4, 0.3)}, {"temperature": 0.8, "top_k": 20},
    {"attention": "causal", "logit_alignment": "shift", "cache": "block", "seeded": True},
    {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_do_not_depend_on_it(model, monkeypatch, options, lag):
    """Bit for bit, by replayed steps, with a host that reads the newest report or the one before."""

    class Late(poll.OpenCount):
        lag_on = {"cpu": lag}

    def steps_of(program, graphs="auto", is_widest=False):
        made.append(RecordedSteps(program, Replays()))
        return made[-1]

    requests = asks(8, seed=31)
    wanted = serve(model, requests, deterministic=True, **options)
    assert_as_alone(model, requests, wanted, **options)
    monkeypatch.setattr(slots_module, "OpenCount", Late)
    monkeypatch.setattr("dlmkernels.engine.engine.steps_of", steps_of)
    for steps in (2, 5):
        made = []
        engine = engine_for(model, deterministic=True, steps_per_poll=steps, **options)
        got = serve(model, requests, engine)
        assert all(same(a, b) for a, b in zip(got, wanted)), steps
        assert made[0].replayed > 0


def rounds_and_steps(model, steps_per_poll, **options):
    engine = engine_for(
        model, slots=3, rule=dk.Threshold(1.0, strict=True), block_length=None, steps_per_poll=steps_per_poll
    )
    for k in range(3):
        engine.add_request([5, 6, 7], max_new_tokens=30 if k else 13, seed=k, **options)
    rounds = 0
    while engine.step():
        rounds += 1
    return rounds, engine.metrics().forwards, engine.metrics().host_microseconds


def test_the_host_looks_less_often_and_idle_rows_are_few(model):
    """A token a forward, one block: 30 forwards; those beyond are fewer than there are between two looks."""
    rounds, forwards, _ = rounds_and_steps(model, 1)
    fewer, more, _ = rounds_and_steps(model, 5)
    assert rounds >= 30 == forwards and fewer <= rounds / 3 and forwards <= more < forwards + 5


@pytest.mark.parametrize(
    "options", [{"streaming": True}, {"on_step": print}, {"drafts": True}], ids=["streaming", "on_step", "drafts"]
)
def test_whoever_follows_a_request_sees_every_step(model, options):
    rounds, forwards, _ = rounds_and_steps(model, 5, **options)
    assert forwards == 30 <= rounds


def test_who_waits_is_admitted_as_soon_as_with_single_steps(model):
    found = []
    for steps in (1, 6):
        engine = engine_for(model, slots=2, rule=dk.Threshold(1.0, strict=True), steps_per_poll=steps)
        long = engine.add_request([5, 6, 7], max_new_tokens=32)
        short = [engine.add_request([5, 6, 7], max_new_tokens=2, seed=k) for k in range(6)]
        found.append([output.request_id for output in engine])
        assert found[-1] == [*short, long]
        blocks = 4  # of the long one, and at the end of each there may be steps in vain
        assert engine.metrics().forwards <= 32 + 1 + blocks * (steps - 1)


PROGRAMS = [
    {}, {"cache": "dual"}, {"cache": "delayed"}, {"rule": dk.Quota(), "steps": 8}, {"rule": dk.Backtracking(2)},
    {"rule": dk.Threshold(0.3), "constraint": NoRepeats()}, {"rule": dk.EntropyPipeline(1.0)},
    {"rule": dk.Strided(3), "attention": "causal", "logit_alignment": "shift", "cache": "block", "block_length": None},
    {"rule": dk.Pipeline(0.5), "attention": "block", "logit_alignment": "shift", "cache": "block"},
]  # fmt: skip


@pytest.mark.parametrize("options", PROGRAMS, ids=str)
def test_neither_does_what_generate_makes(model, options):
    options = {
        "max_new_tokens": 24,
        "eos_policy": "none",
        "seed": 3,
        "block_length": 8,
        "rule": dk.Threshold(0.4),
    } | options
    _, ids, valid = ragged()
    want = dk.generate(model, ids, valid, **options)
    for steps in (2, 7):
        out = dk.generate(model, ids, valid, steps_per_poll=steps, **options)
        for name in ("sequences", "commit_step", "num_forwards", "complete", "length"):
            assert torch.equal(getattr(out, name), getattr(want, name)), (steps, name)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "2"])
def test_what_it_may_be(model, value):
    with pytest.raises(ValueError, match="steps_per_poll must be an integer of at least 1; got"):
        engine_for(model, steps_per_poll=value)
    with pytest.raises(ValueError, match="steps_per_poll must be an integer of at least 1; got"):
        dk.generate(model, ragged()[1], ragged()[2], steps_per_poll=value)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_longer_request_that_enters_between_two_looks(model, deterministic):
    """It is forwarded whole, although the report that the step goes by knows of shorter ones alone."""
    allowed = torch.rand(97, generator=torch.Generator().manual_seed(1)) < 0.6
    common = {"eos_policy": "none", "rule": dk.Threshold(0.5), "block_length": 4, "constraint": allowed}
    for seed in range(4):
        engine = dk.Engine(model, slots=4, max_length=48, deterministic=deterministic, steps_per_poll=2, **common)
        engine.add_request(prompts(1, 3, seed=seed)[0].tolist(), max_new_tokens=13)
        engine.step()
        late = prompts(1, 9, seed=seed + 50)
        request = engine.add_request(late[0].tolist(), max_new_tokens=19)
        alone = dk.generate(model, late, max_new_tokens=19, **common)
        assert engine.get_result(request).generated_tokens == alone.generated[0].tolist()


def test_a_form_of_all_rows_is_as_wide_as_any():
    """Where a step takes all rows, those too that the report did not show in a block."""

    class Whole:
        commits_apart, usual_phase, takes_rows, rows_change, length = False, 1, True, True, 48
        columns_of = staticmethod(lambda block: ())
        takes_canvas = staticmethod(lambda phase: True)
        part_of = staticmethod(lambda phase: "whole")

    for may_be_few, width in ((False, None), (True, 16)):
        forms = RowForms(dk.DecodingConfig(), 8, Whole(), 4, may_be_few)
        forms.begin([16, 40])
        form = forms.next((3, -1, 1, 1, 0, 0), 0)  # the first row is in a block, the second has nothing left
        assert form.width == width and form.rows == (1 if may_be_few else None)
