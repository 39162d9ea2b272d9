# SPDX-License-Identifier: Apache-2.0
"""Requests with constraints of their own come and go, share forwards, and each sees what `generate` would show it."""

import warnings

import pytest
import torch

import dlmkernels as dk
from decodings import NoRepeats, lively
from dlmkernels.decoding.bitmask import pack
from dlmkernels.engine.slots import SlotLane
from engines import asks, assert_as_alone, engine_for, serve
from small_models import VOCAB


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


class Residues(dk.Constraint):
    """At each position of the answer tokens that are no multiple of `k` beside it, said beforehand."""

    def __init__(self, k):
        self.k = k

    def allowed(self, tokens, positions):
        return pack((torch.arange(VOCAB) + positions[..., None]) % self.k != 0)


class Sums(NoRepeats):
    """No token beside an equal one, and none that makes a multiple of `k` with its place behind the prompt."""

    def __init__(self, k, start):
        self.k, self.start, self.shapes = k, start, set()

    def accepts(self, tokens, proposed):
        self.shapes.add((tuple(tokens.shape), tuple(proposed.shape)))
        places = torch.arange(proposed.shape[1]) - self.start
        return super().accepts(tokens, proposed) & ((proposed + places) % self.k != 0)


class Both(Sums):
    def allowed(self, tokens, positions):
        return Residues(5).allowed(tokens, positions)


def of_kind(kind, ask, k):
    if kind == "tensors":
        return torch.arange(VOCAB) % (3 + k % 3) > 0
    if kind == "tensors by position":
        return (torch.arange(VOCAB) + torch.arange(ask.new)[:, None]) % (3 + k % 3) > 0
    if kind == "computed":
        return Residues(3 + k % 3)
    return (Sums if kind == "judged" else Both)(2 + k % 3, len(ask.prompt))


KINDS = ("tensors", "tensors by position", "computed", "judged", "both")
OPTIONS = [
    {}, {"rule": dk.Quota()}, {"cache": "dual"}, {"rule": dk.Backtracking(2)}, {"temperature": 0.8},
    {"rule": dk.TokenEditing(0.4, 0.3)},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_is_as_alone(model, kind, options):
    requests = asks(8, seed=3)
    for k, ask in enumerate(requests):
        ask.options = {"constraint": of_kind(kind, ask, k)}
    engine = engine_for(model, slots=3, reserve=False, **options)
    outputs = serve(model, requests, engine)
    (lane,) = engine._rounds.pool.lanes.values()
    assert isinstance(lane, SlotLane)
    for ask in requests:
        if isinstance(ask.options["constraint"], Sums):
            width = len(ask.prompt) + ask.new
            assert ask.options["constraint"].shapes == {((1, width),) * 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of masks that are left
        assert_as_alone(model, requests, outputs, **options)


def test_what_is_answered_obeys_its_own_constraint(model):
    requests = asks(6, seed=5)
    tables = [torch.arange(VOCAB) % 7 == k for k in range(6)]
    for ask, table in zip(requests, tables):
        ask.options = {"constraint": table}
    for out, table in zip(serve(model, requests, slots=2), tables):
        assert out.complete and table[out.generated_tokens].all()


def test_kinds_do_not_share_forwards_and_those_without_have_none(model):
    requests = asks(8, seed=6)
    for k, ask in enumerate(requests[:6]):
        ask.options = {"constraint": of_kind(("tensors", "computed", "judged")[k % 3], ask, k)}
    engine = engine_for(model)
    outputs = serve(model, requests, engine)
    lanes = list(engine._rounds.pool.lanes.values())
    assert len(lanes) == 4 and sum(lane.constraints is None for lane in lanes) == 1
    assert_as_alone(model, requests, outputs)


class Fails(Sums):
    """Raises, or returns what it must not, at its second call."""

    def __init__(self, how, start):
        super().__init__(97, start)
        self.how, self.calls = how, 0

    def accepts(self, tokens, proposed):
        self.calls += 1
        if self.calls < 2:
            return super().accepts(tokens, proposed)
        if self.how == "raises":
            raise RuntimeError("no grammar")
        return torch.ones(3, dtype=torch.bool) if self.how == "shape" else None


class FailsBefore(Residues):
    def __init__(self, how):
        super().__init__(4)
        self.how = how

    def allowed(self, tokens, positions):
        if self.how == "raises":
            raise RuntimeError("no grammar")
        return torch.ones(1000, dtype=torch.int32) if self.how == "shape" else torch.ones(3)


@pytest.mark.parametrize(
    ("how", "message"), [("raises", "no grammar"), ("shape", "constraint: "), ("kind", "constraint: ")]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_one_that_fails_fails_its_request_alone(model, how, message, when):
    requests = asks(8, seed=7, longest=16)
    requests[3].new = 16
    for k, ask in enumerate(requests):
        ask.options = {"constraint": of_kind("computed" if when == "before" else "judged", ask, k)}
    requests[3].options = {
        "constraint": FailsBefore(how) if when == "before" else Fails(how, len(requests[3].prompt))
    }  # fmt: skip
    engine = engine_for(model, slots=3, rule=dk.Quota())
    outputs = serve(model, requests, engine)
    bad = outputs.pop(3)
    assert bad.status == dk.RequestStatus.FAILED and message in bad.error
    assert_as_alone(model, requests[:3] + requests[4:], outputs, rule=dk.Quota())


def test_a_constraint_is_let_go_with_its_request(model):
    engine = engine_for(model, slots=2)
    requests = asks(3, seed=8)
    for ask in requests:
        ask.options = {"constraint": Residues(3)}
    serve(model, requests, engine)
    lane = next(lane for lane in engine._rounds.pool.lanes.values() if lane.constraints is not None)
    assert lane.constraints._own == [None, None] and not lane.constraints.errors


NOISE = [
    {"rule": dk.UniformState(), "temperature": 1.0}, {"rule": dk.RenoisedEntropyBound(steps=4)},
    {"rule": dk.UniformState(), "temperature": 1.0, "cfg_scale": 0.5}, {"rule": dk.RenoisedEntropyBound(steps=4), "cache": "dual"},
]  # fmt: skip


@pytest.mark.parametrize("options", NOISE, ids=str)
def test_so_do_those_whose_noise_is_other_tokens(model, options):
    """Each begins with noise of its own, which depends on its seed alone."""
    requests = asks(8, seed=9)
    engine = engine_for(model, slots=3, **options)
    outputs = serve(model, requests, engine)
    (lane,) = engine._rounds.pool.lanes.values()
    assert isinstance(lane, SlotLane)
    assert_as_alone(model, requests, outputs, **options)


def test_a_failed_admission_loses_no_request(model, monkeypatch):
    """Those that are being decoded in the same lane are decoded again, and each is delivered once."""
    requests, admit, calls = asks(8, seed=10), SlotLane.admit, []

    def fragile(lane, new):
        calls.append(len(new))
        if len(calls) == 3:
            raise RuntimeError("no room after all")
        admit(lane, new)

    monkeypatch.setattr(SlotLane, "admit", fragile)
    engine = engine_for(model, slots=3)
    ids = [ask.to(engine) for ask in requests]
    outputs = list(engine)
    assert sorted(out.request_id for out in outputs) == sorted(ids) and len(calls) > 3
    found = {out.request_id: out for out in outputs}
    assert_as_alone(model, requests, [found[name] for name in ids])
