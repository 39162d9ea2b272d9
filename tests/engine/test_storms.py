# SPDX-License-Identifier: Apache-2.0
"""What happens all at once: threads that add and cancel, callbacks that raise, and an end in the middle of it."""

import random
import threading
import warnings

import pytest

import dlmkernels as dk
from decodings import NoRepeats, lively
from engines import asks, assert_as_alone, engine_for

FINAL = {dk.RequestStatus.FINISHED, dk.RequestStatus.FAILED, dk.RequestStatus.CANCELLED}


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


def refuse(*args):
    raise KeyError("not today")


def options_of(draw):
    """What one request may ask for at its worst."""
    return draw.choice([
        {}, {}, {"streaming": True}, {"drafts": True}, {"on_step": refuse}, {"logits_processor": refuse},
        {"result_handler": refuse}, {"temperature": 0.7}, {"eos_token_id": 7, "eos_policy": "fill"},
        {"constraint": NoRepeats()}, {"cache": "dual"}, {"top_logprobs": 2},
    ])  # fmt: skip


class Client(threading.Thread):
    """Adds requests and cancels some of them, its own and others', until there are enough."""

    def __init__(self, engine, number, count=12):
        super().__init__(daemon=True)
        self.engine, self.draw, self.count = engine, random.Random(number), count
        self.number, self.ids, self.handled, self.late, self.refused = number, [], [], [], 0

    def run(self):
        for k, ask in enumerate(asks(self.count, seed=50 + self.number, longest=16)):
            options = options_of(self.draw)
            handler = options.get("result_handler")
            name = f"{self.number}-{k}"
            try:
                ask.to(self.engine, request_id=name, **options)
            except RuntimeError:  # the engine has been stopped meanwhile
                self.refused += 1
                continue
            self.ids.append(name)
            if handler is not None:
                self.handled.append(name)
            for _ in range(self.draw.randint(0, 3)):
                self.engine.cancel_request(f"{self.draw.randint(0, 3)}-{self.draw.randint(0, k)}")


@pytest.mark.parametrize("end", ["soft", "hard", "in the middle"])
def test_every_request_ends_once(model, end):
    engine = engine_for(model, slots=3, max_lanes=3)
    clients = [Client(engine, number) for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of handlers that raise
        engine.start()
        for client in clients:
            client.start()
        if end == "in the middle":
            engine.stop(hard_stop=True, timeout=60)
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        engine.stop(hard_stop=end == "hard", timeout=120)
    assert not engine.is_running() and engine.background_thread_status.fatal_error is None
    outputs = [output for output in engine if output.is_finished()]
    wanted = {name for client in clients for name in client.ids} - {
        name for client in clients for name in client.handled
    }
    names = [output.request_id for output in outputs]
    assert len(names) == len(set(names)) and set(names) == wanted
    assert {output.status for output in outputs} <= FINAL
    metrics = engine.metrics()
    assert metrics.finished + metrics.failed + metrics.cancelled == sum(len(client.ids) for client in clients)
    assert metrics.waiting == metrics.running == 0


def test_a_storm_leaves_nothing_behind(model):
    """After it, requests are decoded as if nothing had been."""
    engine, draw = engine_for(model, slots=3), random.Random(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, ask in enumerate(asks(40, seed=60, longest=16)):
            ask.to(engine, request_id=str(k), **options_of(draw))
            engine.cancel_request(str(draw.randint(0, k)))
            if k % 3 == 0:
                engine.step()
        list(engine)
    requests = asks(6, seed=61)
    ids = [ask.to(engine) for ask in requests]
    found = {output.request_id: output for output in engine}
    assert_as_alone(model, requests, [found[name] for name in ids])


def test_a_handler_that_raises_does_not_end_the_engine(model):
    engine = engine_for(model)
    with pytest.warns(RuntimeWarning, match="not today"):
        bad = engine.add_request([5, 6, 7], max_new_tokens=8, result_handler=refuse)
        good = engine.add_request([5, 6, 7], max_new_tokens=8)
        outputs = list(engine)
    assert [output.request_id for output in outputs] == [good] and bad != good


class Raises:
    """A streamer that cannot take its second text."""

    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls > 1:
            raise OSError("closed pipe")

    def end(self):
        pass


def test_a_streamer_that_raises_is_heard_of_and_the_model_is_as_before(model):
    ask = asks(1, seed=62, longest=24)[0]
    with pytest.raises(OSError, match="closed pipe"):
        dk.generate(model, [ask.prompt], max_new_tokens=24, block_length=8, eos_policy="none", streamer=Raises())
    engine = engine_for(model)
    name = ask.to(engine)
    found = {output.request_id: output for output in engine}
    assert_as_alone(model, [ask], [found[name]])


def test_a_callback_may_use_the_engine(model):
    """It may cancel, ask for more, and look at what is counted; and stop everything."""
    engine, seen = engine_for(model, slots=2), []

    def more(output):
        seen.append(engine.metrics().running)
        if len(seen) == 2:
            engine.add_request([8, 9], request_id="more", max_new_tokens=4)
            engine.cancel_request(output.request_id)

    engine.add_request(
        [5, 6, 7], request_id="first", max_new_tokens=30, rule=dk.Threshold(1.0, strict=True), on_step=more
    )
    found = {output.request_id: output.status for output in engine}
    assert found == {"first": dk.RequestStatus.CANCELLED, "more": dk.RequestStatus.FINISHED} and set(seen) == {1}
