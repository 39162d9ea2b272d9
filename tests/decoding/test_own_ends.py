# SPDX-License-Identifier: Apache-2.0
"""End tokens of each request's own: requests that end at different tokens share forwards, and each is as it is alone."""

import pytest
import torch

import dlmkernels as dk
from decodings import lively, ragged
from dlmkernels import ops
from dlmkernels.decoding.capture import RecordedSteps
from dlmkernels.decoding.ends import end_table
from dlmkernels.decoding.state import State
from dlmkernels.engine.slots import SlotLane
from engines import asks, assert_as_alone, engine_for, serve
from recorder import Replays
from small_models import VOCAB, prompts

COMMON = {"block_length": 8, "eos_policy": "fill", "rule": dk.Threshold(0.4), "max_new_tokens": 24}
ENDS = [(20,), tuple(range(20, 40)), (), (55, 56, 57)]


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


def a_state(seed):
    """A canvas of few different tokens, open, decided and given ones among them, that ends somewhere."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, (4, 12), generator=draw)
    state = State.of(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(4, dtype=torch.int32))
    kinds = torch.tensor([ops.STATE_OPEN, 0, 0, 0, 0, ops.STATE_FROZEN, ops.STATE_FROZEN | ops.STATE_OPEN])
    state.state.copy_(kinds[torch.randint(5 if seed % 2 else 7, tokens.shape, generator=draw)])
    state.commit_step.copy_(torch.randint(9, tokens.shape, generator=draw))
    state.confidence.copy_(torch.rand(tokens.shape, generator=draw))
    state.end.copy_(torch.randint(13, (4,), generator=draw))
    return state, draw


@pytest.mark.parametrize("policy", ["none", "fill"])
def test_a_write_is_what_the_op_makes_of_each_row(policy):
    ids, filled = [(1,), (2, 3), (), (0, 4, 5)], 0
    for seed in range(60):
        (state, draw), (want, _) = a_state(seed), a_state(seed)
        at = torch.rand(4, 12, generator=draw).argsort(1)[:, :5].int()
        proposal = torch.randint(6, at.shape, generator=draw)
        how = {
            "commit": torch.rand(at.shape, generator=draw) < 0.7, "confidence": torch.rand(at.shape, generator=draw),
            "remask": torch.rand(at.shape, generator=draw) < 0.2, "mask_token_id": 9, "eos_policy": policy,
            "fill_token_id": 7,
        }  # fmt: skip
        info = state.write(at, proposal, end_table(ids, torch.device("cpu")), eos_token_ids=[1, 2, 3], **how)
        for row, own in enumerate(ids):
            part = slice(row, row + 1)
            of_row = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in how.items()}
            alone = ops.remask_(
                want.tokens[part], want.state[part], at[part], proposal[part], commit_step=want.commit_step[part],
                commit_confidence=want.confidence[part], end=want.end[part], eos_token_ids=list(own), **of_row,
            )  # fmt: skip
            # a slot whose position becomes padding counts as changed by what it held before, which is not looked up
            exact = [k for k, name in enumerate(ops.INFO_FIELDS) if name != "changed"]
            assert torch.equal(info[part, exact], alone[:, exact]), (seed, row)
            filled += policy == "fill" and int(alone[0, ops.INFO_FIELDS.index("first_eos")]) >= 0
        for name in ("tokens", "commit_step", "confidence"):
            assert torch.equal(getattr(state, name), getattr(want, name)), (seed, name)
        decided = ~ops.STATE_DIRTY & 255
        assert torch.equal(state.state & decided, want.state & decided), seed
    assert filled > 10 or policy == "none"


PROGRAMS = {
    "blocks": {}, "sampled": {"temperature": 0.8}, "dual": {"cache": "dual"}, "delayed": {"cache": "delayed"},
    "ends of blocks": {"rule": dk.TokenEditing(0.4, 0.3), "eos_policy": "block"},
    "block cache": {"attention": "block", "cache": "block"},
    "strided": {"rule": dk.Strided(4), "attention": "causal", "logit_alignment": "shift", "cache": "block", "block_length": None},
    "pipeline": {"rule": dk.EntropyPipeline(1.0)},
    "lengthening": {"rule": dk.Lengthening(0.3, 0.1, 6, 4, 4, 0.1, 0.6), "block_length": None},
    "seeded": {"attention": "causal", "logit_alignment": "shift", "cache": "block", "seeded": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_batch_is_what_each_row_is_alone(model, name):
    options = COMMON | PROGRAMS[name] | {"seed": torch.arange(4)}
    ends = [tuple(range(10, 60)), (94,), tuple(range(50, 90)), (5,)] if name == "lengthening" else ENDS
    _, ids, valid = ragged((5, 11, 8, 7))
    together = dk.generate(model, ids, valid, **options | {"eos_token_id": ends})
    ended = 0
    for row, own in enumerate(ends):
        prompt = ids[row : row + 1, valid[row].bool()]
        alone = dk.generate(model, prompt, **options | {"eos_token_id": own, "seed": row})
        length = int(alone.length[0]) - alone.prompt_length
        assert int(together.length[row]) - together.prompt_length == length, row
        assert torch.equal(together.generated[row, :length], alone.generated[0, :length]), row
        first = together.prompt_length
        steps = together.commit_step[row, first : first + length], alone.commit_step[0, alone.prompt_length :][:length]
        assert torch.equal(*steps), row
        assert int(together.num_forwards[row]) == int(alone.num_forwards[0]), row
        ended += length < 24
    assert ended > 0


def test_every_copy_has_those_of_its_request(model):
    _, ids, valid = ragged((5, 11, 8, 7))
    options = COMMON | {"temperature": 1.0, "seed": 3, "rule": dk.Threshold(0.2)}
    out = dk.generate(model, ids, valid, num_return_sequences=2, eos_token_id=ENDS, **options)
    lengths = out.length - out.prompt_length
    for row, length in enumerate(lengths.tolist()):
        shown, own = out.generated[row, :length].tolist(), set(ENDS[row // 2])
        assert length == 24 or shown[-1] in own
        assert not own & set(shown[:-1])
    assert int(lengths.min()) < 24


def of_all_kinds(draw):
    return {"eos_token_id": draw.choice([(20,), tuple(range(20, 28)), 55, (1, 2, 3), tuple(range(60, 67))])}


@pytest.mark.parametrize("options", [
    {}, {"cache": "dual"}, {"temperature": 0.7}, {"rule": dk.TokenEditing(0.4, 0.3), "eos_policy": "block"},
    {"attention": "block", "cache": "block"}, {"rule": dk.EntropyPipeline(1.0)},
], ids=str)  # fmt: skip
def test_requests_of_an_engine_share_forwards(model, options):
    options = {"eos_policy": "fill"} | options
    requests = asks(12, seed=3, options=of_all_kinds)
    engine = engine_for(model, **options)
    outputs = serve(model, requests, engine)
    assert len(engine._rounds.pool.lanes) == 1
    assert_as_alone(model, requests, outputs, **options)
    assert {out.finish_reason for out in outputs} == {"length", "eos"}
    for ask, out in zip(requests, outputs):
        own = ask.options["eos_token_id"]
        own = {own} if isinstance(own, int) else set(own)
        assert (out.finish_reason == "eos") == bool(own & set(out.generated_tokens))


def test_more_end_tokens_than_there_is_room_for_take_a_lane_of_their_own(model):
    requests = asks(6, seed=5)
    for ask, count in zip(requests, (1, 8, 9, 16, 17, 32)):
        ask.options = {"eos_token_id": tuple(range(20, 20 + count))}
    engine = engine_for(model, slots=6, eos_policy="fill")
    outputs = serve(model, requests, engine)
    widths = sorted(lane._ends_width for lane in engine._rounds.pool.lanes.values())
    assert widths == [8, 16, 32]
    assert_as_alone(model, requests, outputs, eos_policy="fill")


def test_replayed_steps_read_them_from_the_request_on_that_has_its_own(model, monkeypatch):
    """Before, all rows end as the engine says, and steps do not look them up; the steps after are others."""
    made = []

    def steps_of(program, graphs="auto", is_widest=False):
        made.append(RecordedSteps(program, Replays()))
        return made[-1]

    monkeypatch.setattr("dlmkernels.engine.engine.steps_of", steps_of)
    requests = asks(14, seed=8, options=of_all_kinds)
    for ask in requests[:5]:
        ask.options = {}
    engine = engine_for(model, deterministic=True, eos_policy="fill", eos_token_id=20)
    first = serve(model, requests[:5], engine)
    (lane,) = engine._rounds.pool.lanes.values()
    assert isinstance(lane, SlotLane) and not lane.program.reads_own_ends
    outputs = first + serve(model, requests[5:], engine)
    assert lane.program.reads_own_ends and len(engine._rounds.pool.lanes) == 1
    (steps,) = made
    assert {form.own_ends for form in steps._recordings} == {False, True} and steps.replayed > 10
    assert_as_alone(model, requests, outputs, eos_policy="fill", eos_token_id=20)


def test_what_is_refused(model):
    ids = prompts(2, 5)
    with pytest.raises(ValueError, match="eos_token_id must have one value for each of the 2 requests; got 3"):
        dk.generate(model, ids, eos_token_id=[[1], [2], [3]], **COMMON)
    with pytest.raises(ValueError, match=r"eos_token_id\[1\] must be a sequence"):
        dk.generate(model, ids, eos_token_id=[[1], 2], **COMMON)
    with pytest.raises(ValueError, match=f"eos_token_id must be in the model's vocabulary of {VOCAB} tokens; got 9999"):
        dk.generate(model, ids, eos_token_id=[[1], [9999]], **COMMON)
    with pytest.raises(ValueError, match="eos_token_id holds the mask token"):
        dk.generate(model, ids, eos_token_id=[[1], [model.config.mask_token_id]], **COMMON)
    with pytest.raises(ValueError, match="eos_token_id must hold at least one token for each request with rule Leng"):
        dk.generate(model, ids, rule=dk.Lengthening(), eos_policy="fill", max_new_tokens=8, eos_token_id=[[1], []])
    with pytest.raises(ValueError, match="eos_token_id of an engine must be one id or a flat list"):
        engine_for(model, eos_policy="fill", eos_token_id=[[1], [2]])
    with pytest.raises(ValueError, match="eos_token_id of an engine must be one id or a flat list"):
        engine_for(model, eos_policy="fill").add_request([1, 2], eos_token_id=[[1], [2]])
