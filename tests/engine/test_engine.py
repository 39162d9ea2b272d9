# SPDX-License-Identifier: Apache-2.0
"""The engine's verbs: those of transformers' continuous batching, and what there is beyond."""

import asyncio
import dataclasses
import threading
import time

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

import dlmkernels as dk
from decodings import lively
from dlmkernels.engine import reading
from engines import COMMON, Ask, asks, assert_as_alone, engine_for
from small_models import EOS, PAD, build, prompts


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.fixture(scope="module")
def ten():
    return asks(10, seed=1)


# --- as in transformers -----------------------------------------------------------------------------------------------


def test_verbs_and_fields_are_those_of_transformers():
    verbs = ("start", "stop", "join", "destroy", "is_running", "add_request", "add_requests", "cancel_request",
             "get_result", "request_id_iter", "register_result_handler", "__iter__")  # fmt: skip
    engine = dk.Engine(lively(), slots=2)
    assert engine.background_thread_status.fatal_error is None and engine.batch_processor is None
    for verb in verbs:
        assert callable(getattr(ContinuousBatchingManager, verb)) and callable(getattr(dk.Engine, verb))
    theirs = {field.name for field in dataclasses.fields(GenerationOutput)}
    assert theirs <= {field.name for field in dataclasses.fields(dk.RequestOutput)}
    assert {status.name for status in dk.RequestStatus} >= {"PENDING", "PREFILLING", "DECODING", "FINISHED", "FAILED"}


def test_a_thread_of_its_own(model, ten):
    with engine_for(model) as engine:
        assert engine.is_running()
        ids = [ask.to(engine) for ask in ten]
        first = engine.get_result(ids[7], timeout=60)
        rest = {output.request_id: output for output in engine}
        assert engine.get_result(timeout=0.01) is None
        rest[first.request_id] = first
    assert not engine.is_running()
    assert_as_alone(model, ten, [rest[name] for name in ids])
    with pytest.raises(RuntimeError, match="has been stopped and cannot be started again"):
        engine.start()


def test_leaving_the_block_finishes_what_there_is(model, ten):
    with engine_for(model) as engine:
        ids = engine.add_requests([ask.prompt for ask in ten], max_new_tokens=9, seed=3)
    outputs = {output.request_id: output for output in engine}
    for ask, name in zip(ten, ids):
        assert outputs[name].generated_tokens == Ask(ask.prompt, 9, 3).alone(model, **COMMON).generated[0].tolist()


def test_an_exception_in_the_block_ends_the_engine(model, ten):
    with pytest.raises(KeyError), engine_for(model, slots=2) as engine:
        ids = [ask.to(engine) for ask in ten]
        raise KeyError
    assert sorted(output.request_id for output in engine) == sorted(ids) and not engine.is_running()


def test_results_of_one_request(model, ten):
    engine = engine_for(model, slots=2)
    ids = [ask.to(engine, streaming=True) for ask in ten[:4]]
    outputs = list(engine.request_id_iter(ids[2]))
    assert {output.request_id for output in outputs} == {ids[2]} and outputs[-1].is_finished()
    assert len([output for output in engine if output.is_finished()]) == 3


def test_handlers_in_an_event_loop(model, ten):
    async def main(engine):
        loop_thread, seen, ends = threading.get_ident(), {}, []

        def handler(output):
            assert threading.get_ident() == loop_thread
            seen.setdefault(output.request_id, []).append(output)
            if output.is_finished():
                ends.append(output.request_id)

        ids = []
        for ask in ten:
            ids.append(ask.to(engine, streaming=True, request_id=f"r{len(ids)}", result_handler=handler))
        until = time.monotonic() + 60
        while len(ends) < len(ten) and time.monotonic() < until:
            await asyncio.sleep(0.005)
        return [seen[name][-1] for name in ids]

    with engine_for(model) as engine:
        outputs = asyncio.run(main(engine))
        assert engine.get_result(timeout=0.01) is None
    assert_as_alone(model, ten, outputs)


def test_handlers_get_what_waits_already_and_may_raise(model, ten):
    engine, seen = engine_for(model), []
    first, second = ten[0].to(engine), ten[1].to(engine)
    while engine.step():
        pass
    engine.register_result_handler(first, seen.append)
    assert [output.request_id for output in seen] == [first]

    def refuse(output):
        raise OSError("nobody is there")

    third = ten[2].to(engine, result_handler=refuse)
    with pytest.warns(RuntimeWarning, match=f"result handler of request {third} raised"):
        assert [output.request_id for output in engine] == [second]


def test_timestamps_and_times(model):
    engine = engine_for(model, slots=2)
    for ask in asks(4, seed=2):
        ask.to(engine, record_timestamps=True)
    for output in engine:
        assert len(output.timestamps) == len(output.generated_tokens)
        assert output.timestamps == sorted(output.timestamps)
        start, end = output.lifespan
        assert output.created_time <= start <= output.timestamps[0] <= output.timestamps[-1] <= end
        assert 0 < output.time_to_first_block <= end - output.created_time


def test_drafts_and_callbacks(model):
    engine, steps = engine_for(model), []
    engine.add_request([5, 6, 7], max_new_tokens=24, drafts=True, on_step=steps.append)
    *drafts, last = list(engine)
    assert len(drafts) == len(steps) >= last.num_forwards
    masks = [draft.draft.count(96) for draft in drafts]
    assert masks == sorted(masks, reverse=True) and masks[0] > 0 and last.draft is None


def test_log_probabilities(model):
    ask = asks(1, seed=5)[0]
    engine = engine_for(model)
    ask.to(engine)
    (out,) = engine
    want = ask.alone(model, **COMMON)
    assert out.logprobs == pytest.approx(want.log_probability[0, want.prompt_length :].tolist(), rel=1e-5, abs=1e-6)
    assert out.tokens_per_forward == pytest.approx(float(want.tokens_per_forward[0]))


def test_how_an_answer_ends(model):
    ends = tuple(range(20, 60))
    engine = engine_for(model, eos_policy="fill", eos_token_id=ends)
    requests = asks(8, seed=6)
    ids = [ask.to(engine) for ask in requests]
    found = {output.request_id: output for output in engine}
    reasons = [found[name].finish_reason for name in ids]
    for ask, name, reason in zip(requests, ids, reasons):
        tokens = found[name].generated_tokens
        assert reason == ("eos" if tokens[-1] in ends else "length") and not set(tokens[:-1]) & set(ends)
        assert reason == "eos" or len(tokens) == ask.new
    assert set(reasons) == {"eos", "length"} or "eos" in reasons


def test_end_tokens_of_one_request(model):
    engine = engine_for(model, eos_policy="fill")
    ask = Ask([5, 6, 7, 8], 24, 3)
    plain, ended = ask.to(engine), ask.to(engine, eos_token_id=list(range(20, 60)))
    found = {output.request_id: output for output in engine}
    assert found[plain].generated_tokens[: len(found[ended].generated_tokens)] == found[ended].generated_tokens
    assert len(found[ended].generated_tokens) < len(found[plain].generated_tokens)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_generate_batch(model, ten):
    found = dk.generate_batch(
        model, [ask.prompt for ask in ten], max_new_tokens=[ask.new for ask in ten], seed=[ask.seed for ask in ten],
        slots=3, **COMMON,
    )  # fmt: skip
    assert_as_alone(model, ten, list(found.values()))
    assert list(found) == [f"req_{k}" for k in range(10)] and dk.generate_batch(model, []) == {}


def test_generate_batch_of_an_adapted_model(model, ten):
    prompts_ = [ask.prompt for ask in ten]
    found = model.generate_batch(prompts_, max_new_tokens=9, seed=4, **COMMON)
    want = dk.generate_batch(model, prompts_, max_new_tokens=9, seed=4, **COMMON)
    assert [a.generated_tokens for a in found.values()] == [b.generated_tokens for b in want.values()]
    copies = model.generate_batch(
        prompts_[:2], max_new_tokens=9, seed=4, num_return_sequences=2, temperature=1.0, **COMMON
    )
    assert list(copies) == ["req_0", "req_0__child#0", "req_1", "req_1__child#0"]


def test_several_answers_that_differ_in_their_order_alone():
    """The temperature is 0; only the positions are committed in random order."""
    model, ids = dk.load("demo"), [4, 5, 6, 7]
    how = dict(
        max_new_tokens=12, block_length=12, score="random", rule=dk.Quota(), steps=6, seed=3, num_return_sequences=3
    )
    want = dk.generate(model, ids, **how)
    found = list(dk.generate_batch(model, [ids], **how).values())
    assert [output.generated_tokens for output in found] == want.generated.tolist()
    assert len(set(map(tuple, want.commit_step.tolist()))) == 3


def test_generate_batch_with_given_tokens(model):
    given = [[-1, 30, -1, -1], None, [31, -1, -1, -1]]
    rows = [prompts(1, 4 + k, seed=k)[0].tolist() for k in range(3)]
    found = list(dk.generate_batch(model, rows, max_new_tokens=4, given=given, **COMMON).values())
    for row, stands, output in zip(rows, given, found):
        want = dk.generate(
            model, torch.tensor(row), max_new_tokens=4, given=None if stands is None else torch.tensor(stands), **COMMON
        )  # fmt: skip
        assert output.generated_tokens == want.generated[0].tolist()
    assert found[0].generated_tokens[1] == 30 and found[0].commit_step[1] == -1


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": [3]}, r"max_new_tokens must be one value, or one for each of the 2 prompts; got 1 values"),
    ({"inputs": [[5], [200]]}, r"inputs\[1\] must hold ids from 0 to 96; got 200"),
    ({"temprature": 1.0}, "unknown decoding option temprature"),
])  # fmt: skip
def test_bad_batches(model, options, message):
    inputs = options.pop("inputs", [[5], [6]])
    with pytest.raises((ValueError, TypeError), match=message):
        dk.generate_batch(model, inputs, **options)


def test_init_continuous_batching(model):
    config = transformers.GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.7, top_k=5, eos_token_id=EOS)
    pages = transformers.ContinuousBatchingConfig(max_requests_per_batch=5)
    engine = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=pages, max_length=40, rule=dk.Threshold(0.4)
    )  # fmt: skip
    assert isinstance(engine, dk.Engine) and engine.slots == 5 and engine.max_length == 40
    engine.add_request([5, 6, 7], seed=3)
    (out,) = engine
    want = dk.generate(model, torch.tensor([5, 6, 7]), max_new_tokens=7, temperature=0.7, top_k=5, eos_token_id=EOS,
                       rule=dk.Threshold(0.4), seed=3)  # fmt: skip
    assert out.generated_tokens == want.generated[0, : int(want.length[0]) - 3].tolist()
    for options, message in [
        ({"num_beams": 4}, "num_beams=4 cannot be used with dlmkernels"),
        ({"repetition_penalty": 2.0}, "repetition_penalty=2.0 cannot be used here.*options to add_request"),
        ({"min_new_tokens": 3}, "min_new_tokens=3 cannot be used here"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.init_continuous_batching(generation_config=transformers.GenerationConfig(**options))


def test_a_model_without_kv_reuse():
    plain = torch.nn.Module()
    inner = build()

    def forward(tokens, attention_mask=None, **kwargs):
        return inner(input_ids=tokens, attention_mask=attention_mask, use_cache=False)

    plain.forward, plain.weight = forward, torch.nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="does not know model type"):
        adapted = dk.adapt(plain.eval(), causal=False)
    options = {"mask_token_id": 96, "pad_token_id": PAD, "eos_policy": "none", "rule": dk.Threshold(0.4)}
    requests = asks(6, seed=8)
    engine = dk.Engine(adapted, slots=3, max_length=40, **options)
    ids = [ask.to(engine) for ask in requests]
    found = {output.request_id: output for output in engine}
    for ask, name in zip(requests, ids):
        want = dk.generate(adapted, torch.tensor([ask.prompt]), max_new_tokens=ask.new, **options)
        assert found[name].generated_tokens == want.generated[0].tolist()


# --- what it counts ---------------------------------------------------------------------------------------------------


def test_metrics(model):
    engine = engine_for(model, slots=3, rule=dk.Threshold(1.0, strict=True))  # a token a forward
    for new in (6, 6, 3):
        engine.add_request([5, 6, 7], max_new_tokens=new)
    cancelled = engine.add_request([5], max_new_tokens=3)
    engine.cancel_request(cancelled)
    assert engine.metrics().waiting == 4
    list(engine)
    m = engine.metrics()
    assert (m.finished, m.failed, m.cancelled, m.waiting, m.running) == (3, 0, 1, 0, 0)
    assert m.tokens == 15 and m.forwards == 6 and m.tokens_per_forward == 1.0
    assert m.rows == 15 and m.idle_row_share == 0 and 15 / 18 <= m.occupancy < 1
    assert m.tokens_per_second == pytest.approx(15 / m.seconds)
    assert 0 < m.queue_seconds <= m.time_to_first_block and m.host_microseconds > 0 and m.replayed_share == 0


def test_forwards_take_the_rows_that_work(model):
    """And in an engine whose forwards all have the same shapes, every row."""
    shapes = []
    watched = dk.adapt(lively())
    hidden = watched.hidden
    watched.hidden = lambda tokens, *args: shapes.append(tuple(tokens.shape)) or hidden(tokens, *args)
    for deterministic in (False, True):
        shapes.clear()
        engine = engine_for(
            watched, slots=4, max_length=60, rule=dk.Threshold(1.0, strict=True), deterministic=deterministic
        )
        for new in (3, 6, 9):
            engine.add_request([5, 6, 7], max_new_tokens=new)
        list(engine)
        wanted = [(3, 16)] * 3 + [(2, 16)] * 3 + [(1, 16)] * 3
        assert shapes == ([(4, 60)] * 9 if deterministic else wanted)
        assert engine.metrics().idle_row_share == pytest.approx(0.5 if deterministic else 0)


def test_what_an_engine_is_made_with(model):
    for options, message in [
        ({"slots": 0}, "slots must be an integer of at least 1"), ({"max_length": 1}, "max_length must be None or an int"),
        ({"max_length": 300}, "max_length must be at most the model's max_position_embeddings, 256; got 300"),
        ({"prefill_budget": 0}, "prefill_budget must be"), ({"graphs": "maybe"}, "graphs must be 'auto', True or False"),
        ({"deterministic": 1}, "deterministic must be True or False"), ({"top_k": 3}, "top_k=3 has no effect"),
        ({"seed": torch.tensor([1, 2])}, "seed of an engine must be one number or None"),
        ({"temperature": (0.5, 1.0)}, "temperature of an engine must be one number"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            dk.Engine(model, **{"slots": 2} | options)
    assert dk.Engine(model).max_length == 256


def test_one_slot(model, ten):
    """A program of one row does not give it away: requests are decoded one after the other."""
    engine = engine_for(model, slots=1)
    ids = [ask.to(engine) for ask in ten[:4]]
    order = [output.request_id for output in engine]
    assert order == ids


def test_times_are_noted_once(model):
    """What was told is not told again with another time."""
    request = type("R", (), {"record_timestamps": True, "timestamps": []})()
    reading._note_times(request, 3)
    first = list(request.timestamps)
    reading._note_times(request, 5)
    assert request.timestamps[:3] == first and len(request.timestamps) == 5
    reading._note_times(request, 2)
    assert request.timestamps == first[:2]


def test_a_backbone_that_is_told_where_its_decoding_stands():
    """Each request is told of its own, whatever is decoded beside it."""
    inner = build()

    def call(net, x):
        told = x.moment.masked + x.moment.step / 7
        logits = net(input_ids=x.tokens, attention_mask=x.attention_mask, use_cache=False).logits
        return logits * (1 + told.to(logits.dtype)[:, None, None] / 2)

    options = {"mask_token_id": 96, "pad_token_id": PAD, "eos_policy": "none", "rule": dk.Threshold(0.4)}
    backbone = dk.Backbone(inner, call, vocab_size=97)
    requests = asks(7, seed=9)
    engine = dk.Engine(backbone, slots=3, max_length=40, block_length=8, **options)
    ids = [ask.to(engine) for ask in requests]
    found = {output.request_id: output for output in engine}
    for ask, name in zip(requests, ids):
        want = dk.generate(
            backbone, torch.tensor([ask.prompt]), max_new_tokens=ask.new, block_length=8, **options
        )  # fmt: skip
        assert found[name].generated_tokens == want.generated[0].tolist(), found[name]
        assert found[name].num_forwards == int(want.num_forwards[0])
