# SPDX-License-Identifier: Apache-2.0
"""Damaged calls of every op: the result is the reference's, or a refusal that names the op and leaves all as it was.

`HYPOTHESIS_PROFILE=long pytest tests/ops/test_fuzz_ops.py` tries some thousand calls of each.
"""

import math

import pytest
import torch

import numerics
import op_calls
from dlmkernels import ops, reference

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, note  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.on_cpu  # values are looked at there alone

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**62,
    2**63,
    0.0,
    1e-50,
    1e-40,
    0.5,
    1e30,
    3.4e38,
    1e39,
    math.inf,
    math.nan,
    True,
    None,
    "a",
]
# Where float32 and float64 part: the reference in float64 says nothing of the kernels there.
ROUNDED_AWAY = {("block_attention", "scale"): 1e3}


def other_dtype(draw, t):
    return t.to(draw(st.sampled_from(DTYPES)))


def other_values(draw, t):
    t = t.clone()
    if t.dtype == torch.bool:
        return t.logical_not_()
    if t.is_floating_point():
        values = [math.nan, 0.0, -0.0, 1.0, 1e-40]
    else:
        info = torch.iinfo(t.dtype)
        values = [max(info.min, -2), max(info.min, -1), 0, 1, 5, info.max, info.min]
    for _ in range(draw(st.integers(1, 3))):
        if t.numel():
            place = torch.tensor(draw(st.integers(0, t.numel() - 1)))
            t[torch.unravel_index(place, t.shape)] = draw(st.sampled_from(values))
    return t


def other_shape(draw, t):
    dim = draw(st.integers(0, t.dim() - 1))
    shapes = [t.unsqueeze(dim), t.narrow(dim, 0, t.shape[dim] // 2), t.narrow(dim, 0, 0), t.flatten(),
              torch.cat([t, t], dim)]  # fmt: skip
    shapes += [t.select(dim, 0)] if t.shape[dim] else []
    return draw(st.sampled_from(shapes))


def other_strides(draw, t):
    """The same values, or for the last two the first ones repeated."""
    dim, gap = draw(st.integers(0, t.dim() - 1)), draw(st.integers(1, 9))
    room = list(t.shape)
    room[dim] += gap
    wide = torch.zeros(room, dtype=t.dtype).narrow(dim, gap // 2, t.shape[dim]).copy_(t)
    turned = t.transpose(dim, -1).contiguous().transpose(dim, -1)
    first = t.narrow(dim, 0, min(1, t.shape[dim]))
    return draw(st.sampled_from([wide, turned, first.expand(t.shape)]))


def same_memory(draw, t, others):
    """A view of another argument's memory, whatever that holds."""
    at, size = draw(st.sampled_from(others)), t.numel() * t.element_size()
    if t.dtype == torch.bool or at.device.type != "cpu" or at.untyped_storage().nbytes() < size:
        return t
    offset = draw(st.integers(0, (at.untyped_storage().nbytes() - size) // t.element_size()))
    view = torch.empty(0, dtype=t.dtype).set_(at.untyped_storage(), offset, t.shape, t.contiguous().stride())
    return view.copy_(t.clone()) if draw(st.booleans()) else view


@st.composite
def damaged(draw, op):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    call = op_calls.CALLS[op]()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(call)))
        value = call[name]
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (int, float)):
                call[name] = draw(st.sampled_from(NUMBERS))
            continue
        if not value.dim() or value.is_meta:
            continue
        kinds = [other_dtype, other_shape, other_strides, same_memory, None, "meta"]
        damage = draw(st.sampled_from(kinds if name == "weight" else [*kinds, other_values]))  # its values are finite
        if damage is None:
            call[name] = None
        elif damage == "meta":
            call[name] = value.to("meta")
        elif damage is same_memory:
            others = [other for key, other in op_calls.tensors(call).items() if key != name]
            call[name] = same_memory(draw, value, others)
        else:
            call[name] = damage(draw, value)
    return call


def in_float64(call):
    return {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in op_calls.cloned(call).items()}  # fmt: skip


def by_reference(op, call):
    numbers = {name: int(value) for name, value in call.items() if isinstance(value, bool)}  # as the ops take them
    result = getattr(reference, op)(**(call | numbers))
    result = result if isinstance(result, tuple) else (result,)
    return [*result, *(call[name] for name in op_calls.written(op) if isinstance(call.get(name), torch.Tensor))]


def bits(t):
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)  # strides of dimensions of 1 are any


@pytest.mark.parametrize("op", op_calls.CALLS)
@given(data=st.data())
def test_damaged_calls(op, data):
    call = data.draw(damaged(op))
    before = op_calls.cloned(call)
    memory = {name: bits(value).clone() for name, value in op_calls.tensors(call).items() if not value.is_meta}
    note(
        {name: (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v for name, v in call.items()}
    )
    try:
        result = getattr(ops, op)(**call)
    except (ValueError, TypeError, RuntimeError) as error:
        name = str(error).split(" ")[0 if isinstance(error, (TypeError, ValueError)) and ": " not in str(error) else 1]
        assert str(error).startswith(f"{op}: ") or name in call, error
        for key, held in memory.items():
            assert torch.equal(bits(call[key]), held), f"{key} was written"
        return
    got = [*(result if isinstance(result, tuple) else (result,)),
           *(call[name] for name in op_calls.written(op) if isinstance(call.get(name), torch.Tensor))]  # fmt: skip
    for (of, name), most in ROUNDED_AWAY.items():
        if of == op and isinstance(call[name], (int, float)) and abs(call[name]) > most:
            return
    if op == "soft_embedding" and not before["weight"].isfinite().all():
        return  # not promised
    if any(t.is_meta for t in got) or any(
        isinstance(v, torch.Tensor) and v.dtype == torch.float16 for v in before.values()
    ):
        return
    gold, peer = by_reference(op, in_float64(before)), by_reference(op, op_calls.cloned(before))
    if op == "shard_confidence" and before.get("weight") is not None:
        # The words hold the bits of logits, which two ways to multiply round differently: what they say is compared.
        how = {name: call[name] for name in ("temperature", "distribution", "with_entropy")}
        got, gold, peer = (ops.combine_shards(words[0][None], **how) for words in (got, gold, peer))
    for i, (a, b, c) in enumerate(zip(got, gold, peer, strict=True)):
        if a.is_floating_point():
            numerics.assert_close(f"{op} {i}", a, b, c)
        else:
            assert torch.equal(a, b if op == "token_confidence" else c), f"{op} {i}"
