# SPDX-License-Identifier: Apache-2.0
"""Many requests of every kind, at random, and each of them as it is alone."""

import random
import threading

import pytest
import torch

import dlmkernels as dk
from decodings import NoRepeats, lively
from engines import COMMON, asks, engine_for
from small_models import VOCAB

OPTIONS = [
    lambda draw: {}, lambda draw: {"rule": dk.Threshold(draw.choice([0.2, 0.4, 0.9]))},
    lambda draw: {"temperature": draw.choice([0.3, 1.0]), "top_k": draw.choice([5, 20])},
    lambda draw: {"rule": dk.Quota()}, lambda draw: {"rule": dk.TokenEditing(0.4, 0.3)},
    lambda draw: {"cache": "dual"}, lambda draw: {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    lambda draw: {"eos_policy": "fill", "eos_token_id": draw.choice([7, (20, 21), tuple(range(50, 70))])},
    lambda draw: {"constraint": draw.choice([NoRepeats(), torch.arange(VOCAB) % draw.choice([2, 3]) > 0])},
]  # fmt: skip
KINDS = 120


class Broken:
    def __call__(self, ids, scores):
        raise OSError("a broken processor")


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.fixture(scope="module")
def kinds(model):
    """Requests of every kind, and what each becomes alone."""
    requests = asks(KINDS, seed=31, options=lambda draw: draw.choice(OPTIONS)(draw))
    wanted = []
    for ask in requests:
        out = ask.alone(model, **COMMON)
        start = out.prompt_length
        wanted.append(out.sequences[0, start : int(out.length[0])].tolist())
    return requests, wanted


class Soak:
    """Sends requests in, and looks at each output once."""

    def __init__(self, engine, kinds, seed):
        self.engine, (self.requests, self.wanted) = engine, kinds
        self.draw, self.sent, self.done = random.Random(seed), {}, {}

    def send(self, number, prefix=""):
        """One request of some kind; perhaps a broken one, or one that is told of while it is decoded."""
        kind, chance, more = self.draw.randrange(KINDS), self.draw.random(), {}
        ask = self.requests[kind]
        what = "whole"
        if chance < 0.02 and "cache" not in ask.options:
            more, what = {"logits_processor": Broken()}, "broken"
        elif chance < 0.2:
            more = {"streaming": True}
        name = f"{prefix}{number}"
        self.sent[name] = (kind, what)
        assert ask.to(self.engine, request_id=name, **more) == name
        return name

    def see(self, output):
        kind, what = self.sent[output.request_id]
        if not output.is_finished():
            assert output.request_id not in self.done
            assert self.wanted[kind][: len(output.generated_tokens)] == output.generated_tokens
            return
        assert output.request_id not in self.done, "delivered twice"
        self.done[output.request_id] = output
        if what == "broken":
            failed = dk.RequestStatus.FAILED
            assert output.status == dk.RequestStatus.CANCELLED or (output.status, "broken" in output.error) == (
                failed,
                True,
            )
        elif output.status == dk.RequestStatus.CANCELLED:
            assert self.wanted[kind][: len(output.generated_tokens)] == output.generated_tokens
        else:
            assert (output.status, output.generated_tokens) == (dk.RequestStatus.FINISHED, self.wanted[kind])

    def check(self):
        assert self.done.keys() == self.sent.keys()
        ends = [output.status for output in self.done.values()]
        assert min(ends.count(status) for status in dk.RequestStatus if status >= 3) > 0


COUNTS = [200, pytest.param(2000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_step_by_step(model, kinds, count):
    engine = engine_for(model, slots=6, max_lanes=5)
    soak = Soak(engine, kinds, seed=count)
    number = 0
    while number < count or engine.step():
        for _ in range(soak.draw.choice([0, 0, 1, 2, 5])):
            if number < count:
                soak.send(number)
                number += 1
        if soak.draw.random() < 0.1 and soak.sent:
            engine.cancel_request(soak.draw.choice(list(soak.sent)))
        engine.step()
        while (output := engine._rounds.deliveries.take()) is not None:
            soak.see(output)
    for output in engine:
        soak.see(output)
    soak.check()
    metrics = engine.metrics()
    assert metrics.finished + metrics.failed + metrics.cancelled == count and metrics.waiting == metrics.running == 0
    engine.stop()


@pytest.mark.parametrize("count", COUNTS)
def test_from_many_threads(model, kinds, count):
    """Three threads send and cancel, and one takes what comes."""
    with engine_for(model, slots=6, max_lanes=5) as engine:
        soaks = [Soak(engine, kinds, seed=count + k) for k in range(3)]

        def client(k):
            for number in range(count // 3):
                soaks[k].send(number, f"{k}-")
                if soaks[k].draw.random() < 0.1:
                    engine.cancel_request(soaks[k].draw.choice(list(soaks[k].sent)))

        threads = [threading.Thread(target=client, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        left = 3 * (count // 3)
        while left:
            output = engine.get_result(timeout=60)
            if output is None:
                assert any(thread.is_alive() for thread in threads), "an output is missing"
                continue
            soaks[int(output.request_id[0])].see(output)
            left -= output.is_finished()
        for thread in threads:
            thread.join()
    for soak in soaks:
        assert soak.done.keys() == soak.sent.keys()
    assert engine.get_result() is None
