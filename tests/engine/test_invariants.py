# SPDX-License-Identifier: Apache-2.0
"""What holds of the engine whatever it is asked: one class for each promise."""

import gc
import itertools

import pytest
import torch

import dlmkernels as dk
from decodings import LateCount, lively
from dlmkernels.decoding import poll
from dlmkernels.engine import slots as slots_module
from dlmkernels.engine.slots import SlotLane
from engines import COMMON, Ask, asks, assert_as_alone, engine_for, same, serve
from recorder import Recorder
from small_models import VOCAB, prompts


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.fixture(scope="module")
def ten():
    return asks(10, seed=1)


def slot_lane(engine):
    (lane,) = engine._rounds.pool.lanes.values()
    assert isinstance(lane, SlotLane)
    return lane


class TestIsolation:
    """A request's tokens depend on model, prompt, configuration and seed alone; with fixed shapes bit for bit."""

    @pytest.fixture(scope="class")
    def wanted(self, model, ten):
        return serve(model, ten, deterministic=True)

    def test_on_its_slot_and_order(self, model, ten, wanted):
        got = serve(model, ten[::-1], deterministic=True)[::-1]
        assert all(same(a, b) for a, b in zip(got, wanted))

    def test_on_arrival(self, model, ten, wanted):
        engine = engine_for(model, deterministic=True)
        ids = []
        for number, ask in enumerate(ten):
            ids.append(ask.to(engine))
            for _ in range(3 * number % 5):
                engine.step()
        found = {output.request_id: output for output in engine}
        assert all(same(found[name], want) for name, want in zip(ids, wanted))

    def test_on_co_tenants(self, model, ten, wanted):
        others = asks(30, seed=9)
        mixed = [ask for triple in zip(others[::3], others[1::3], ten) for ask in triple]
        got = serve(model, mixed, deterministic=True)[2::3]
        assert all(same(a, b) for a, b in zip(got, wanted))

    def test_on_cancelled_co_tenants(self, model, ten, wanted):
        engine = engine_for(model, deterministic=True)
        ids, noise = [], []
        for ask, other in zip(ten, asks(10, seed=10)):
            noise.append(other.to(engine))
            ids.append(ask.to(engine))
            engine.step()
            engine.cancel_request(noise[len(noise) // 2])
        found = {output.request_id: output for output in engine}
        assert all(same(found[name], want) for name, want in zip(ids, wanted))

    def test_other_widths_agree_on_tokens(self, model, ten, wanted):
        for slots in (2, 3, 7):
            got = serve(model, ten, slots=slots)
            assert [out.generated_tokens for out in got] == [out.generated_tokens for out in wanted]


RULES = {
    "threshold": {}, "quota": {"rule": dk.Quota(schedule="cosine")}, "steps": {"rule": dk.Quota(), "steps": 5},
    "one block": {"block_length": None}, "progress": {"rule": dk.DynamicThreshold(0.4)},
    "editing": {"rule": dk.TokenEditing(0.4, 0.3)}, "backtracking": {"rule": dk.Backtracking(2)},
    "credit": {"rule": dk.CreditThreshold(0.4)}, "smoothed": {"rule": dk.SmoothedThreshold(0.5)},
    "shadow": {"rule": dk.WideInNarrowOut(0.4, 0.5)}, "ancestral": {"rule": dk.Ancestral(), "temperature": 1.0},
    "remasking": {"rule": dk.AncestralRemask(eta=0.3), "temperature": 1.0},
    "sampled": {"temperature": 0.8, "top_k": 20}, "parts": {"sub_block_length": 3},
    "ends": {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    "ends of blocks": {"rule": dk.TokenEditing(0.4, 0.3), "eos_policy": "block", "eos_token_id": tuple(range(20, 50))},
    "absolute": {"attention": "block", "block_grid": "absolute"}, "random order": {"score": "random", "rule": dk.Quota()},
    "splitting": {"rule": dk.SplitEditing(0.3, 0.2, 3, 90, 91)}, "guided": {"cfg_scale": 0.5},
    "parts alone": {"attention": "block", "cache": "block", "sub_block_length": 3, "sub_block_cache": True},
    "guided, dual": {"cfg_scale": 0.5, "cache": "dual", "temperature": 0.7}, "dual": {"cache": "dual"}, "prefix": {"cache": "prefix"},
    "delayed": {"cache": "delayed"}, "block cache": {"attention": "block", "cache": "block"},
    "uniform": {"rule": dk.UniformState(), "temperature": 1.0}, "answer": {"rule": dk.EarlyAnswer((2.5, 2.0, 1.5))},
    "pipeline": {"rule": dk.EntropyPipeline(1.0)}, "allowed": {"constraint": torch.arange(VOCAB) % 3 > 0},
    "causal": {"attention": "causal", "logit_alignment": "shift", "cache": "block", "seeded": True},
}  # fmt: skip
TOGETHER = ("pipeline",)


class TestEquality:
    """What the engine makes of a request is what `generate` makes of it alone."""

    @pytest.mark.parametrize("name", RULES)
    def test_alone(self, model, name):
        requests = asks(8, seed=3)
        if name == "steps":
            for k, ask in enumerate(requests):
                ask.new = (16, 21)[k % 2]
        options = RULES[name]
        engine = engine_for(model, slots=3, **options)
        assert_as_alone(model, requests, serve(model, requests, engine), **options)
        continuous = all(isinstance(lane, SlotLane) for lane in engine._rounds.pool.lanes.values())
        assert continuous == (name not in TOGETHER)

    def test_with_parameters_of_their_own(self, model):
        """They share the forwards of one lane."""
        requests = asks(12, seed=4, options=lambda draw: {
            "temperature": draw.choice([0.0, 0.5, 1.2]), "rule": dk.Threshold(draw.choice([0.2, 0.4, 0.8]))})  # fmt: skip
        engine = engine_for(model)
        outputs = serve(model, requests, engine)
        slot_lane(engine)
        assert_as_alone(model, requests, outputs)

    def test_with_configurations_of_their_own(self, model):
        """They take turns."""
        requests = asks(12, seed=5, options=lambda draw: draw.choice(
            [{"rule": dk.Quota()}, {"cache": "dual"}, {"eos_policy": "fill", "eos_token_id": 7}, {}]))  # fmt: skip
        assert_as_alone(model, requests, serve(model, requests))


class TestSlotHygiene:
    """Nothing of a request is left for the next one in its slot."""

    def poison(self, lane, row):
        """Whatever a tenant may leave behind, at its worst."""
        state, program = lane.state, lane.program
        state.tokens[row] = torch.randint(VOCAB, state.tokens[row].shape)
        state.state[row] = 255
        for values in (state.commit_step, state.step, state.block, state.entered, state.end, state.origin):
            values[row] = 1_000_003
        state.confidence[row] = torch.nan
        state.seed[row] = -1
        for values in (*state.parameters.values(), *program.memory.values()):
            values[row] = torch.nan if values.is_floating_point() else 77
        for name in ("begun", "first", "ends", "asked"):
            getattr(lane.grid, name)[row] = 1

    @pytest.mark.parametrize(
        "options", [{}, {"rule": dk.CreditThreshold(0.4)}, {"rule": dk.StableThreshold(0.3, 0.5, 1)}]
    )
    def test_poisoned_tenants(self, model, ten, monkeypatch, options):
        admit, seen = SlotLane.admit, []

        def poisoned(lane, requests):
            free = [row for row, owner in enumerate(lane.owner) if owner is None]
            for row in free[: len(requests)]:
                self.poison(lane, row)
                seen.append(row)
            admit(lane, requests)

        wanted = serve(model, ten, deterministic=True, **options)
        monkeypatch.setattr(SlotLane, "admit", poisoned)
        got = serve(model, ten, deterministic=True, **options)
        assert len(seen) == len(ten) > len(set(seen)) and all(same(a, b) for a, b in zip(got, wanted))

    def test_every_admission_is_counted(self, model, ten):
        engine = engine_for(model)
        serve(model, ten, engine)
        lane = slot_lane(engine)
        # once when the lane is made, and once for each request
        assert int(lane.state.epoch.sum()) == len(ten) + engine.slots

    def test_a_late_report_is_of_nobody(self, model, ten, monkeypatch):
        """Numbers of a row's former request are not taken for those of the one that has it now."""
        monkeypatch.setattr(slots_module, "OpenCount", LateCount)
        engine = engine_for(model)
        assert_as_alone(model, ten, serve(model, ten, engine))
        assert slot_lane(engine).counts.behind > 0


class TestContainment:
    """Rows write and read nothing but their own."""

    def test_idle_rows_stay_as_they_are(self, model):
        engine = engine_for(model)
        engine.add_request(prompts(1, 6)[0].tolist(), max_new_tokens=16)
        engine.step()
        lane = slot_lane(engine)
        names = ("tokens", "state", "commit_step", "confidence", "step", "block")
        before = {name: getattr(lane.state, name)[1:].clone() for name in names}
        while engine.step():
            pass
        for name, value in before.items():
            assert torch.equal(getattr(lane.state, name)[1:], value), name

    def test_nothing_is_read_beyond_a_request(self, model, ten, monkeypatch):
        """Tokens behind a request's end and in other rows make no difference."""
        wanted = serve(model, ten, deterministic=True)
        admit = SlotLane.admit

        def noisy(lane, requests):
            admit(lane, requests)
            for row, owner in enumerate(lane.owner):
                end = len(owner.prompt) + len(owner.answer) if owner else 0
                lane.state.tokens[row, end:] = torch.randint(4, VOCAB - 1, lane.state.tokens[row, end:].shape)

        monkeypatch.setattr(SlotLane, "admit", noisy)
        assert all(same(a, b) for a, b in zip(serve(model, ten, deterministic=True), wanted))


class TestFinality:
    """What has been told of an answer never changes."""

    @pytest.mark.parametrize("options", [
        {}, {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))}, {"rule": dk.TokenEditing(0.4, 0.3)},
        {"rule": dk.Backtracking(2)}, {"cache": "dual"}, {"rule": dk.TokenEditing(0.4, 0.3), "cache": "dual"},
    ], ids=str)  # fmt: skip
    def test_streamed_tokens_stay(self, model, ten, options):
        engine = engine_for(model, **options)
        ids = [ask.to(engine, streaming=True) for ask in ten]
        told = {name: [] for name in ids}
        for output in engine:
            told[output.request_id].append(output)
        for outputs in told.values():
            assert [out.is_finished() for out in outputs] == [False] * (len(outputs) - 1) + [True]
            for earlier, later in itertools.pairwise(outputs):
                n = len(earlier.generated_tokens)
                assert later.generated_tokens[:n] == earlier.generated_tokens
                assert later.commit_step[:n] == earlier.commit_step
        assert any(len(outputs) > 1 for outputs in told.values())
        assert_as_alone(model, ten, [told[name][-1] for name in ids], **options)


class TestProgress:
    """Every request ends within the forwards that are planned for it, whatever the model says."""

    @pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
    def test_useless_logits(self, bad):
        broken = dk.adapt(lively())
        broken.logits = lambda hidden: hidden.new_full((len(hidden), VOCAB), bad)
        requests = asks(6, seed=2)
        outputs = serve(broken, requests, deterministic=True)
        for ask, out in zip(requests, outputs):
            assert out.status == dk.RequestStatus.FINISHED and not out.complete
            assert out.num_forwards <= ask.new

    def test_no_more_forwards_than_tokens(self, model, ten):
        engine = engine_for(model, rule=dk.Threshold(1.0, strict=True))
        outputs = serve(model, ten, engine)
        assert [out.num_forwards for out in outputs] == [ask.new for ask in ten]


class TestLag:
    """The host may know late what is done: that costs idle rows, never a token."""

    @pytest.mark.parametrize("lag", [1, 2, 4])
    def test_late_counts(self, model, ten, monkeypatch, lag):
        class Late(poll.OpenCount):
            lag_on = {"cpu": lag}

        wanted = serve(model, ten, deterministic=True)
        monkeypatch.setattr(slots_module, "OpenCount", Late)
        engine = engine_for(model, deterministic=True)
        got = serve(model, ten, engine)
        assert all(same(a, b) for a, b in zip(got, wanted))
        monkeypatch.undo()
        prompt = engine_for(model, deterministic=True)
        serve(model, ten, prompt)
        assert engine.metrics().forwards > prompt.metrics().forwards


class TestSteps:
    """Between admission and delivery the host reads a report and nothing else, and a step allocates no state."""

    @torch.no_grad()
    def test_no_host_reads(self, model):
        engine = engine_for(model, deterministic=True)
        for ask in asks(4, seed=6):
            ask.to(engine)
        engine.step()
        lane, kinds = slot_lane(engine), set()
        while any(lane.owner) and len(kinds) < 2:
            lane.poll()
            form = lane.program.form(lane._report(), lane.counts.behind)
            if form is None:
                break
            recorder = Recorder()  # refuses whatever reads a value or makes a shape of one
            with recorder:
                report = lane.program.step(lane.program.widest(form))
            assert recorder.calls
            lane.counts.submit(report)
            lane._submitted += 1
            kinds.add(form.kind)
        assert kinds == {"enter", "denoise"}

    def test_addresses_stay(self, model, ten):
        engine = engine_for(model)
        serve(model, ten[:5], engine)
        lane = slot_lane(engine)
        tensors = {name: value for name, value in vars(lane.state).items() if isinstance(value, torch.Tensor)}
        tensors |= lane.state.parameters | {
            name: getattr(lane.grid, name) for name in ("begun", "first", "ends", "asked")
        }
        tensors |= {"kv_range": lane.program.forward.kv_range, "owner": lane.program.plan.owner}
        before = {name: value.data_ptr() for name, value in tensors.items()}
        serve(model, asks(7, seed=8), engine)
        assert slot_lane(engine) is lane
        now = {"kv_range": lane.program.forward.kv_range, "owner": lane.program.plan.owner}
        assert before == {name: now.get(name, value).data_ptr() for name, value in tensors.items()}


class TestFairness:
    """What waits longest is admitted first, and neither phase starves the other."""

    def test_first_come_first_served(self, model):
        engine = engine_for(model, slots=3)
        ids = [ask.to(engine) for ask in asks(12, seed=7)]
        outputs = {output.request_id: output for output in engine}
        starts = [outputs[name].lifespan[0] for name in ids]
        assert starts == sorted(starts)

    def test_the_budget_of_prompts(self, model, ten):
        engine = engine_for(model, slots=8, prefill_budget=20)
        for ask in ten:
            ask.to(engine)
        admitted, budget = [], engine._rounds.pool.admit

        def counted():
            before = {request for _, _, request in engine._rounds.pool.rows()}
            failures = budget()
            now = {request for _, _, request in engine._rounds.pool.rows()} - before
            admitted.append([len(request.prompt) for request in now])
            return failures

        engine._rounds.pool.admit = counted
        outputs = list(engine)
        assert len(outputs) == len(ten) and sum(map(len, admitted)) == len(ten)
        assert all(sum(lengths) <= 20 or len(lengths) == 1 for lengths in admitted)
        assert admitted[0] and admitted[1], "steps go on between admissions"

    def test_nobody_is_passed_over_for_ever(self, model):
        """One request's lane is taken; a stream of others could go on for ever without it."""
        engine = engine_for(model, slots=2, max_lanes=1)
        for ask in asks(3, seed=11):
            ask.to(engine)
        odd = engine.add_request([5, 6, 7], max_new_tokens=8, rule=dk.Quota())
        supply, done = iter(asks(600, seed=12, longest=8)), []
        for _ in range(600):
            next(supply).to(engine)
            engine.step()
            while (output := engine._rounds.deliveries.take()) is not None:
                done.append(output.request_id)
            if odd in done:
                break
        assert odd in done and len(done) < 400


class Spoiler:
    """A logits processor that raises at its second call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("spoiled")
        return scores


class TestDelivery:
    """Each request is delivered once, however it ends; and one that fails hurts no other."""

    def test_cancelled(self, model, ten):
        engine = engine_for(model, slots=2)
        ids = [ask.to(engine) for ask in ten]
        for _ in range(3):
            engine.step()
        cancelled = {ids[0], ids[5], ids[9]}
        for name in cancelled:
            engine.cancel_request(name)
            engine.cancel_request(name)
        engine.cancel_request("nobody")
        outputs = list(engine)
        assert sorted(out.request_id for out in outputs) == sorted(ids)
        by_id = {out.request_id: out for out in outputs}
        gone = {name for name, out in by_id.items() if out.status == dk.RequestStatus.CANCELLED}
        assert gone == cancelled and by_id[ids[5]].error == "cancelled"
        rest = [k for k, name in enumerate(ids) if name not in cancelled]
        assert_as_alone(model, [ten[k] for k in rest], [by_id[ids[k]] for k in rest])
        alone = ten[0].alone(model, **COMMON).generated[0].tolist()
        part = by_id[ids[0]].generated_tokens
        assert part == alone[: len(part)]

    def test_a_bad_processor_fails_its_request_alone(self, model, ten):
        engine = engine_for(model, rule=dk.Quota())
        ids = [ask.to(engine, logits_processor=Spoiler() if k == 3 else None) for k, ask in enumerate(ten)]
        found = {output.request_id: output for output in engine}
        bad = found.pop(ids.pop(3))
        assert bad.status == dk.RequestStatus.FAILED and "spoiled" in bad.error
        assert_as_alone(model, ten[:3] + ten[4:], [found[name] for name in ids], rule=dk.Quota())

    def test_a_bad_callback_fails_its_request_alone(self, model, ten):
        engine = engine_for(model)

        def refuse(output):
            raise KeyError("callback")

        ids = [ask.to(engine, on_step=refuse if k == 3 else None) for k, ask in enumerate(ten)]
        found = {output.request_id: output for output in engine}
        assert "callback" in found.pop(ids.pop(3)).error
        assert_as_alone(model, ten[:3] + ten[4:], [found[name] for name in ids])

    @pytest.mark.parametrize("options", [{}, {"cache": "dual"}])
    def test_a_step_that_fails_fails_what_makes_it_fail(self, ten, options):
        """The others are decoded again."""
        fragile, poison = dk.adapt(lively()), 2
        hidden, seen = fragile.hidden, []

        def refuse(tokens, *args, **kwargs):
            if (tokens == poison).any():
                seen.append(len(tokens))
                if len(seen) > 1:
                    raise RuntimeError("no forward of this")
            return hidden(tokens, *args, **kwargs)

        fragile.hidden = refuse
        options = options | {"suppress_token_ids": [poison]}
        requests = [Ask(list(ask.prompt), ask.new, ask.seed) for ask in ten]
        requests[4].prompt[0], requests[4].new = poison, 16
        engine = engine_for(fragile, **options)
        ids = [ask.to(engine) for ask in requests]
        outputs = list(engine)
        assert sorted(out.request_id for out in outputs) == sorted(ids)
        found = {out.request_id: out for out in outputs}
        bad = found.pop(ids.pop(4))
        assert bad.status == dk.RequestStatus.FAILED and "no forward of this" in bad.error
        fragile.hidden = hidden
        assert_as_alone(fragile, requests[:4] + requests[5:], [found[name] for name in ids], **options)

    @pytest.mark.parametrize("hard", [True, False])
    @pytest.mark.parametrize("threaded", [True, False])
    def test_shutdown(self, model, ten, hard, threaded):
        engine = engine_for(model, slots=2)
        if threaded:
            engine.start()
        ids = [ask.to(engine) for ask in ten]
        if not threaded:
            engine.step()
        engine.stop(hard_stop=hard)
        outputs = list(engine)
        assert sorted(out.request_id for out in outputs) == sorted(ids) and not engine.is_running()
        statuses = {out.status for out in outputs}
        if not hard:
            assert statuses == {dk.RequestStatus.FINISHED}
        elif not threaded:
            assert statuses == {dk.RequestStatus.FAILED} and "stopped" in outputs[0].error
        with pytest.raises(RuntimeError, match="has been stopped"):
            engine.add_request([5], max_new_tokens=3)

    def test_a_fault_of_the_engine_itself(self, model, ten):
        engine = engine_for(model, slots=2)
        ids = [ask.to(engine) for ask in ten]
        engine._rounds.pool.admit = lambda: 1 / 0
        engine.start()
        outputs = list(engine)
        engine.join()
        assert sorted(out.request_id for out in outputs) == sorted(ids)
        assert {out.status for out in outputs} == {dk.RequestStatus.FAILED}
        assert isinstance(engine.background_thread_status.fatal_error, ZeroDivisionError)

    def test_first_done_first_out(self, model):
        """A slot is free within two steps of its request's end."""
        engine = engine_for(model, slots=2, rule=dk.Threshold(1.0, strict=True))  # a token a forward
        long = engine.add_request([5, 6, 7], max_new_tokens=32)
        short = [engine.add_request([5, 6, 7], max_new_tokens=2, seed=k) for k in range(6)]
        order = [output.request_id for output in engine]
        assert order == [*short, long]
        assert engine.metrics().forwards <= 32 + 1


class TestNoDeadlock:
    """What is admitted can be decoded to its end; what never fits is refused at once; memory is there at the start."""

    @pytest.mark.parametrize(("prompt", "options", "message"), [
        ([5] * 30, {"max_new_tokens": 20}, r"input_ids \(30 tokens\) and the answer \(20 tokens .*\) need 50 columns, more than this engine's max_length"),
        ([5] * 5, {"max_new_tokens": 20, "suffix": [6] * 20}, r"need 45 columns"),
        ([5] * 5, {"max_new_tokens": 16, "rule": dk.Quota(), "steps": 1}, r"steps must be at least the number of blocks"),
        ([5, 200], {}, r"input_ids must hold ids from 0 to 96; got 200"),
        ([5, 96], {}, r"input_ids holds the mask token \(96\)"),
        ([5], {"max_new_tokens": 0}, r"max_new_tokens must be None or an integer of at least 1"),
        ([5], {"temperature": (0.5, 1.0)}, r"temperature of an engine must be one number"),
        ([5], {"top_k": 4}, r"top_k=4 has no effect"),
        ([5], {"num_return_sequences": 3}, "num_return_sequences=3 needs randomness: temperature is 0"),
        ([5], {"stop_strings": "x"}, r"stop_strings need a tokenizer"),
        ([5], {"given": [1, 2], "max_new_tokens": 3}, r"given must have max_new_tokens=3 ids"),
        ([5], {"given": [1, 2]}, r"given leaves nothing to decode"),
        ([5], {"seed": 2**70}, r"seed must be None or an integer"),
        ([5], {"repetition_penalty": -1.0}, r"repetition_penalty must be a positive number"),
    ])  # fmt: skip
    def test_refused_at_once(self, model, prompt, options, message):
        engine = engine_for(model)
        with pytest.raises((ValueError, TypeError), match=message):
            engine.add_request(prompt, **options)
        assert list(engine) == []

    def test_unknown_options(self, model):
        with pytest.raises(TypeError, match=r"unknown decoding option temprature"):
            engine_for(model).add_request([5], temprature=1.0)

    def test_names_in_use(self, model):
        engine = engine_for(model)
        engine.add_request([5], request_id="a", max_new_tokens=4)
        with pytest.raises(ValueError, match="request_id 'a' is already in use"):
            engine.add_request([5], request_id="a", max_new_tokens=4)
        list(engine)
        engine.add_request([5], request_id="a", max_new_tokens=4)
        assert [out.request_id for out in engine] == ["a"]

    def test_more_configurations_than_lanes(self, model):
        requests = asks(20, seed=13, options=lambda draw: {"rule": draw.choice(
            [dk.Quota(), dk.Threshold(0.4), dk.CreditThreshold(0.4), dk.TokenEditing(0.4, 0.3), dk.Factor()])})  # fmt: skip
        engine = engine_for(model, max_lanes=2)
        assert_as_alone(model, requests, serve(model, requests, engine))
        assert len(engine._rounds.pool.lanes) <= 2

    def test_memory_does_not_grow(self, model):
        engine = engine_for(model)
        serve(model, asks(20, seed=14), engine)

        def tensors():
            gc.collect()
            return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

        before = tensors()
        serve(model, asks(40, seed=15), engine)
        assert tensors() <= before + 5

    def test_no_more_than_slots(self, model):
        engine = engine_for(model, slots=3)
        for ask in asks(20, seed=16, options=lambda draw: draw.choice([{}, {"cache": "dual"}, {"rule": dk.Quota()}])):
            ask.to(engine)
        while engine.step():
            assert engine.metrics().running <= 3


def test_outputs_share_nothing_with_the_engine(model):
    engine = engine_for(model)
    prompt = [5, 6, 7]
    engine.add_request(prompt, max_new_tokens=16, streaming=True)
    first = next(iter(engine))
    first.generated_tokens.clear()
    first.prompt_ids.clear()
    *_, last = engine
    assert prompt == [5, 6, 7] == last.prompt_ids and len(last.generated_tokens) == 16
