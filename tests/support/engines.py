# SPDX-License-Identifier: Apache-2.0
"""What tests of the engine share: random requests, what each becomes alone, and engines that serve them."""

import random
from dataclasses import dataclass, field

import torch

import dlmkernels as dk
from small_models import prompts

COMMON = {"block_length": 8, "eos_policy": "none", "rule": dk.Threshold(0.4)}


@dataclass
class Ask:
    """One request, as both the engine and `generate` are asked."""

    prompt: list[int]
    new: int
    seed: int
    options: dict = field(default_factory=dict)

    def alone(self, model, **common):
        return dk.generate(
            model, torch.tensor([self.prompt]), max_new_tokens=self.new, seed=self.seed, **common | self.options
        )  # fmt: skip

    def to(self, engine, **more):
        return engine.add_request(self.prompt, max_new_tokens=self.new, seed=self.seed, **self.options, **more)


def asks(count, seed=0, longest=24, options=lambda draw: {}):
    """Requests with prompts of 3 to 12 tokens and answers of 1 to `longest`."""
    draw = random.Random(seed)
    return [
        Ask(prompts(1, draw.randint(3, 12), seed=1000 * seed + k)[0].tolist(), draw.randint(1, longest),
            draw.randint(0, 2**40), options(draw))
        for k in range(count)
    ]  # fmt: skip


def engine_for(model, slots=4, max_length=40, **options):
    return dk.Engine(model, slots=slots, max_length=max_length, **COMMON | options)


def serve(model, requests, engine=None, **options):
    """What requests become that come all at once."""
    engine = engine_for(model, **options) if engine is None else engine
    ids = [ask.to(engine) for ask in requests]
    found = {output.request_id: output for output in engine}
    return [found[name] for name in ids]


def assert_as_alone(model, requests, outputs, **common):
    common = COMMON | common
    for number, (ask, out) in enumerate(zip(requests, outputs, strict=True)):
        want = ask.alone(model, **common)
        start = want.prompt_length
        length = int(want.length[0]) - start
        assert out.status == dk.RequestStatus.FINISHED, (number, out)
        assert out.generated_tokens == want.generated[0, :length].tolist(), number
        assert out.commit_step == want.commit_step[0, start : start + length].tolist(), number
        assert out.num_forwards == int(want.num_forwards[0]), number
        assert out.prompt_ids == ask.prompt and out.complete == bool(want.complete[0])


def same(a, b):
    """Whether two outputs are the same bit for bit."""
    names = ("generated_tokens", "commit_step", "confidence", "num_forwards", "complete", "finish_reason")
    return all(getattr(a, name) == getattr(b, name) for name in names)
