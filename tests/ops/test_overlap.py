# SPDX-License-Identifier: Apache-2.0
"""What an op writes shares no memory with its other arguments: refused exactly where it would, before anything is written."""

import pytest
import torch

import op_calls
from dlmkernels import ops

PAIRS = [
    (op, target, other)
    for op, call in op_calls.CALLS.items()
    for target in op_calls.written(op)
    for other in op_calls.tensors(call())
    if target in call() and target != other
]


def side_by_side(call, target, other, apart):
    """The two arguments in one storage: the second starts at the end of the first, or its last bytes before that."""
    first, second = (other, target) if target == "length" else (target, other)  # what is second keeps its values
    a, b = call[first], call[second]
    size = a.numel() * a.element_size()
    start = -(-size // 8) * 8 if apart else (size - a.element_size()) // b.element_size() * b.element_size()
    storage = torch.zeros(start + b.numel() * b.element_size() + size, dtype=torch.uint8).untyped_storage()
    views = {}
    for name, t, offset in ((first, a, 0), (second, b, start)):
        view = torch.empty(0, dtype=t.dtype).set_(storage, offset // t.element_size(), t.shape, t.contiguous().stride())
        views[name] = view.copy_(t)
    return call | views


@pytest.mark.parametrize(("op", "target", "other"), PAIRS)
def test_overlapping_arguments_are_refused(op, target, other):
    call = op_calls.CALLS[op]()
    shared = side_by_side(call, target, other, apart=False)
    before = op_calls.cloned(shared)
    named = rf"({target} is written to and must not share .* {other}|{other} is written to and .* with {target}); "
    with pytest.raises(RuntimeError, match=f"^{op}: {named}"):
        getattr(ops, op)(**shared)
    with pytest.raises(RuntimeError, match=f"^{op}: {named}"):
        op_calls.registered(op)(**shared)
    assert all(torch.equal(value, before[name]) for name, value in op_calls.tensors(shared).items())


@pytest.mark.parametrize(("op", "target", "other"), PAIRS)
def test_neighbours_in_one_storage_are_not(op, target, other):
    call = op_calls.CALLS[op]()
    expected, written = op_calls.run(op, op_calls.cloned(call))
    results, got = op_calls.run(op, side_by_side(call, target, other, apart=True))
    for a, b in zip((*results, *got.values()), (*expected, *written.values())):
        assert torch.equal(a, b)


def test_the_same_tensor_twice():
    tokens, state = torch.full((1, 8), 3), torch.ones(1, 8, dtype=torch.uint8)
    x = torch.arange(8, dtype=torch.int32)[None]
    with pytest.raises(RuntimeError, match="commit_step is written to and must not share memory with position"):
        ops.remask_(tokens, state, x, tokens.clone(), commit=state.bool(), commit_step=x)
    with pytest.raises(RuntimeError, match="tokens is written to and must not share memory with position"):
        ops.remask_(tokens, state, tokens.view(torch.int32)[:, :1], tokens[:, :1].clone())
    new, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match="k_cache is written to and must not share memory with slots"):
        ops.block_attention(new, new, new, k, v, k.view(torch.int32)[0, :1, 0, :1])


def test_what_is_read_may_be_shared():
    """Several arguments that are only read, and caches that nothing is written to."""
    k = torch.randn(2, 5, 1, 8)
    out = ops.block_attention(k, None, None, k, k).out
    assert torch.equal(out, ops.block_attention(k.clone(), None, None, k.clone(), k.clone()).out)
    call = op_calls.block_attention()
    call["v_new"] = call["k_new"]
    expected, _ = op_calls.run("block_attention", op_calls.cloned(call))
    assert torch.equal(op_calls.run("block_attention", call)[0][0], expected[0])


# How keys and values can lie in one buffer without sharing an element.
LAYOUTS = {
    "one behind the other": lambda B, S, G, D: torch.zeros(2, B, S, G, D).unbind(0),
    "in every batch row": lambda B, S, G, D: torch.zeros(B, 2, S, G, D).unbind(1),
    "in every slot": lambda B, S, G, D: torch.zeros(B, S, 2, G, D).unbind(2),
    "in every head": lambda B, S, G, D: torch.zeros(B, S, G, 2, D).unbind(3),
    "halves of every head": lambda B, S, G, D: torch.zeros(B, S, G, 2 * D).split(D, 3),
    "with room between": lambda B, S, G, D: torch.zeros(B, S, 3, G, D + 3)[..., 3:].unbind(2)[::2],
    "heads first": lambda B, S, G, D: [x.transpose(1, 2) for x in torch.zeros(B, G, S, 2, D).unbind(3)],
    "slots by turns": lambda B, S, G, D: (lambda x: (x[:, ::2], x[:, 1::2]))(torch.zeros(B, 2 * S, G, D)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_in_one_buffer(layout):
    call = op_calls.block_attention()
    expected, written = op_calls.run("block_attention", op_calls.cloned(call))
    k, v = LAYOUTS[layout](*call["k_cache"].shape)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    call |= {"k_cache": k.copy_(call["k_cache"]), "v_cache": v.copy_(call["v_cache"])}
    results, got = op_calls.run("block_attention", call)
    for a, b in zip((*results, *got.values()), (*expected, *written.values())):
        assert torch.equal(a, b)


def elements(sizes, strides, offset):
    """Storage offsets of all elements of a strided tensor."""
    at = torch.tensor([offset])
    for size, stride in zip(sizes, strides):
        at = (at[:, None] + torch.arange(size) * stride).flatten()
    return at.tolist()


def test_any_strides():
    """Against the offsets of all elements, written out: two caches of random strides in one small storage."""
    torch.manual_seed(0)
    B, S, G, D = 2, 3, 2, 8
    new, q = torch.randn(B, 1, G, D), torch.randn(B, 1, G, D)
    outcomes = set()
    for _ in range(3000):
        storage = torch.zeros(500)
        unit = (1, 8, 8, 16)[int(torch.randint(4, ()))]
        strides = [[int(n) * unit for n in torch.randint(0, 64 // unit + 1, (3,))] + [1] for _ in range(2)]
        offsets = [int(n) * min(unit, 8) for n in torch.randint(0, 200 // min(unit, 8), (2,))]
        places = [elements((B, S, G, D), s, o) for s, o in zip(strides, offsets)]
        itself = any(len(set(place)) < len(place) for place in places)
        each_other = bool(set(places[0]) & set(places[1]))
        caches = [storage.as_strided((B, S, G, D), s, o) for s, o in zip(strides, offsets)]
        try:
            ops.block_attention(q, new, new, *caches)
            refused = None
        except RuntimeError as error:
            refused = "itself" if "must not overlap itself" in str(error) else "each other"
            assert "must not share memory" in str(error) or refused == "itself"
        assert (refused is not None) == (itself or each_other), (strides, offsets, refused)
        assert refused is None or (itself if refused == "itself" else each_other)
        outcomes.add((refused, itself, each_other))
    assert {(None, False, False), ("itself", True, False), ("each other", False, True)} <= outcomes
