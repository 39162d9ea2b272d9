# SPDX-License-Identifier: Apache-2.0
"""Steps that are recorded and replayed. Of CUDA graphs the CPU has a stand-in: the same calls on the same memory."""

import warnings

import pytest
import torch

import dlmkernels as dk
from decodings import lively, ragged
from dlmkernels.decoding import capture, extras
from dlmkernels.decoding.capture import WARM_UP, RecordedSteps, Steps
from dlmkernels.engine.slots import SlotLane
from engines import asks, assert_as_alone, engine_for, same, serve
from recorder import Replays
from small_models import MASK, PAD, VOCAB, prompts

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[needs_gpu, pytest.mark.gpu])]
COMMON = {"block_length": 8, "eos_policy": "none", "rule": dk.Threshold(0.4), "max_new_tokens": 32}


@pytest.fixture(scope="module")
def models():
    made = {}

    def on(device):
        if device not in made:
            made[device] = dk.adapt(lively().to(device))
        return made[device]

    return on


@pytest.fixture
def record(monkeypatch):
    """Lets programs on the CPU be replayed too; what was recorded."""
    made = []

    def steps_of(program, graphs="auto", is_widest=False):
        if program.state.tokens.device.type == "cuda":
            steps = original(program, graphs, is_widest)
        elif graphs is False:
            return Steps(program, is_widest)
        else:
            steps = RecordedSteps(program, Replays(), graphs is True)
        made.append(steps)
        return steps

    original = capture.steps_of
    monkeypatch.setattr(extras, "steps_of", steps_of)
    monkeypatch.setattr("dlmkernels.engine.engine.steps_of", steps_of)
    return made


OPTIONS = {
    "none": {}, "dual": {"cache": "dual"}, "sampled": {"temperature": 0.8, "top_k": 20, "seed": 3},
    "editing": {"rule": dk.TokenEditing(0.4, 0.3)}, "ends": {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    "penalty": {"repetition_penalty": 2.0, "top_logprobs": 3}, "block": {"attention": "block", "cache": "block"},
    "pipeline": {"rule": dk.EntropyPipeline(1.0)}, "lengths": {"max_new_tokens": (32, 20, 27)},
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_generate_by_replayed_steps(models, record, device, name):
    model, options = models(device), COMMON | {"rule": dk.Threshold(1.0, strict=True)} | OPTIONS[name]
    _, ids, valid = (x.to(device) if isinstance(x, torch.Tensor) else x for x in ragged())
    want = dk.generate(model, ids, valid, graphs=False, **options)
    assert not record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = dk.generate(model, ids, valid, graphs=True, **options)
    (steps,) = record
    assert isinstance(steps, RecordedSteps) and steps.replayed > 0 and steps.refusal is None
    for field in ("sequences", "commit_step", "num_forwards", "complete", "length"):
        assert torch.equal(getattr(out, field), getattr(want, field)), field
    torch.testing.assert_close(out.confidence, want.confidence)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"rule": dk.TokenEditing(0.4, 0.3)}], ids=str)
def test_the_engine_by_replayed_steps(models, record, device, options, deterministic):
    """Requests come, go and are cancelled between replays."""
    model = models(device)
    requests = asks(14, seed=21)
    engine = engine_for(model, graphs=True, deterministic=deterministic, **options)
    ids = []
    for number, ask in enumerate(requests):
        ids.append(ask.to(engine))
        engine.step()
        if number == 6:
            engine.cancel_request(ids[5])
    found = {output.request_id: output for output in engine}
    rest = [k for k in range(14) if found[ids[k]].status == dk.RequestStatus.FINISHED]
    assert len(rest) >= 13
    (steps,) = record
    (lane,) = engine._rounds.pool.lanes.values()
    assert isinstance(lane, SlotLane) and steps.replayed > 20
    assert {form.rows for form in steps._recordings} <= ({None} if deterministic else {None, 1, 2, 4})
    seen_seldom = sum(min(count, WARM_UP + 1) for key, count in steps._seen.items())
    assert steps.made == steps.replayed + seen_seldom
    assert engine.metrics().replayed_share > 0.5
    if device == "cpu":
        assert_as_alone(model, [requests[k] for k in rest], [found[ids[k]] for k in rest], **options)
    again = serve(model, requests, engine_for(model, graphs=False, deterministic=True, **options))
    assert all(found[ids[k]].generated_tokens == again[k].generated_tokens for k in rest)
    if device == "cpu" and deterministic:
        assert all(same(found[ids[k]], again[k]) for k in rest)


class Undecided(torch.nn.Module):
    """A model whose control flow depends on what it is given."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))

    def forward(self, tokens, **kwargs):
        logits = self.table[tokens]
        if float(logits.sum()) > 1e9:
            logits = -logits
        return type("Output", (), {"logits": logits})()


@pytest.fixture(scope="module")
def undecided():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dk.adapt(Undecided().eval(), causal=False)


def test_what_cannot_be_captured_runs_as_it_is(undecided, record):
    options = COMMON | {"mask_token_id": MASK, "pad_token_id": PAD, "rule": dk.Threshold(1.0, strict=True)}
    want = dk.generate(undecided, prompts(1, 5), graphs=False, **options)
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs, since one could not be captured: .* reads a val"):
        out = dk.generate(undecided, prompts(1, 5), graphs="auto", **options)
    assert torch.equal(out.sequences, want.sequences) and record[0].refusal and record[0].replayed == 0
    with pytest.raises(ValueError, match="graphs=True: a step of this decoding cannot be captured"):
        dk.generate(undecided, prompts(1, 5), graphs=True, **options)


def test_without_a_gpu_nothing_is_captured(models):
    _, ids, valid = ragged()
    dk.generate(models("cpu"), ids, valid, **COMMON)  # no warning, no recording
    with pytest.raises(ValueError, match="graphs=True: steps cannot be captured, since the model is on cpu"):
        dk.generate(models("cpu"), ids, valid, graphs=True, **COMMON)
    with pytest.raises(ValueError, match="graphs must be 'auto', True or False; got 'yes'"):
        dk.generate(models("cpu"), ids, valid, graphs="yes", **COMMON)


def test_a_form_is_recorded_once(models, record):
    _, ids, valid = ragged()
    dk.generate(models("cpu"), ids, valid, graphs=True, **COMMON | {"rule": dk.Threshold(1.0, strict=True)})
    (steps,) = record
    assert len(steps._recordings) == len(steps._recorder.recordings) == 2  # enter and denoise
    assert steps.made == steps.replayed + len(steps._recordings) * (WARM_UP + 1)


def test_why_masks_are_left_is_known_of_replayed_steps(record):
    broken = dk.adapt(lively())
    logits, first = broken.logits, torch.tensor([0])
    broken.logits = lambda hidden: logits(hidden).index_fill(0, first, torch.nan)
    found = []
    for graphs in (False, True):
        with pytest.warns(RuntimeWarning, match="masks are left") as caught:
            dk.generate(broken, prompts(1, 5), graphs=graphs, **COMMON | {"rule": dk.Threshold(1.0, strict=True)})
        found.append(str(caught[-1].message))
    assert found[0] == found[1]
