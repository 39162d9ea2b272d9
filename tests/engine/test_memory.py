# SPDX-License-Identifier: Apache-2.0
"""What an engine allocates: for its own configuration at the start, and nothing that stays while requests come and go."""

import pytest
import torch

import dlmkernels as dk
from decodings import lively
from dlmkernels.engine.memory import tensors_in
from engines import asks, assert_as_alone, engine_for, serve

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
OPTIONS = [
    {}, {"cache": "dual"}, {"cache": "delayed"}, {"attention": "block", "cache": "block"},
    {"cfg_scale": 0.5, "cache": "prefix"}, {"rule": dk.CreditThreshold(0.4)},
]  # fmt: skip
SLOTS, COLUMNS = 3, 40


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


def lane_of(engine):
    (lane,) = engine._rounds.pool.lanes.values()
    return lane


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_there_at_the_start(model, options):
    """Caches are as large as slots, columns, layers and heads make them, before there is a request."""
    engine = engine_for(model, slots=SLOTS, max_length=COLUMNS, **options)
    memory, config = engine.memory(), model.config
    rows, columns = lane_of(engine).state.tokens.shape
    assert rows == SLOTS and columns >= COLUMNS
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    wanted = 2 * config.num_hidden_layers * SLOTS * columns * heads * 4 * (2 if "cfg_scale" in options else 1)
    assert memory.caches == (wanted if "cache" in options else 0)
    assert memory.lanes == 1 and memory.total == memory.state + memory.caches
    canvas = SLOTS * columns * (8 + 1 + 4 + 4)  # tokens, state, steps and confidences
    assert canvas < memory.state < 6 * canvas + 4000


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_allocated_that_stays(model, options):
    """After the first requests there are the same tensors at the same addresses, whoever comes."""
    engine = engine_for(model, slots=SLOTS, max_length=COLUMNS, **options)
    before, first = engine.memory(), set(map(address, tensors_in(lane_of(engine).state)))
    requests = asks(6, seed=40)
    assert_as_alone(model, requests, serve(model, requests, engine), **options)
    now, lane = engine.memory(), lane_of(engine)
    assert now.caches == before.caches
    cache = lane.program.forward.cache
    kept = {address(x) for pair in cache._layers.values() for x in pair} if cache else set()
    for seed in (41, 42):
        serve(model, asks(9, seed=seed), engine)
        assert engine.memory() == now and lane_of(engine) is lane
        assert set(map(address, tensors_in(lane.state))) == first
        assert not cache or {address(x) for pair in cache._layers.values() for x in pair} == kept


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_other_configurations_take_as_much_again(model):
    engine = engine_for(model, slots=SLOTS, max_length=COLUMNS, cache="dual", max_lanes=2)
    one = engine.memory()
    requests = asks(8, seed=43, options=lambda draw: draw.choice([{}, {"rule": dk.Quota()}, {"rule": dk.Factor()}]))
    assert_as_alone(model, requests, serve(model, requests, engine), cache="dual")
    two = engine.memory()
    assert two.lanes == 2 and two.caches == 2 * one.caches


def test_it_may_be_left_until_a_request_comes(model):
    engine = engine_for(model, cache="dual", reserve=False)
    assert engine.memory() == dk.EngineMemory(0, 0, 0)
    engine.add_request([5, 6, 7], max_new_tokens=8)
    list(engine)
    assert engine.memory().caches == engine_for(model, cache="dual").memory().caches > 0
    with pytest.raises(TypeError, match="reserve must be True or False"):
        engine_for(model, reserve=2)


def test_what_does_not_fit_is_known_at_the_start(model):
    """Out of memory is an error of the constructor, and not of the first request."""
    hidden = dk.adapt(lively())
    hidden.hidden = lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        engine_for(hidden, cache="dual")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gpu_gives_nothing_more_while_requests_come_and_go(options):
    model = dk.adapt(lively().cuda())
    engine = engine_for(model, slots=SLOTS, max_length=COLUMNS, deterministic=True, **options)
    for _ in range(2):  # the second time what the first has captured is replayed
        serve(model, asks(24, seed=46), engine)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    serve(model, asks(24, seed=46), engine)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
