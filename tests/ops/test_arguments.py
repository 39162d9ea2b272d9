# SPDX-License-Identifier: Apache-2.0
"""Python values given to the ops: numbers where one value will do, and errors that name the argument."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import op_calls
from dlmkernels import ops
from dlmkernels.ops import ArgumentError

inf, nan = math.inf, math.nan

# A number for each argument that takes one, and the dtype of the tensor that it stands for.
NUMBERS = {
    "temperature": (0.75, torch.float32), "order_temperature": (1.5, torch.float32), "top_p": (0.5, torch.float32),
    "cfg_scale": (1.25, torch.float32), "parameter": (0.5, torch.float32), "top_k": (3, torch.int32),
    "need": (2, torch.int32), "fill": (1, torch.int32), "cap": (2, torch.int32), "step": (4, torch.int32), "redraw": (1, torch.int32),
    "origin": (1, torch.int32), "end": (6, torch.int32), "block_origin": (2, torch.int32),
    "seed": (2**62 + 1, torch.int64),
}  # fmt: skip
ONE_VALUE = [
    (op, a.name)
    for op in op_calls.CALLS
    for a in op_calls.registered(op)._schema.arguments
    if a.name in NUMBERS and not (op == "remask_" and a.name == "step")  # which is written
]


def same(op, call, expected):
    results, written = op_calls.run(op, op_calls.cloned(call))
    gold, gold_written = op_calls.run(op, op_calls.cloned(expected))
    tensors = [*results, *(value for value in written.values() if value is not None)]
    return all(map(torch.equal, tensors, [*gold, *(value for value in gold_written.values() if value is not None)]))


def call_with(op, name, value):
    """A call in which `name` may be given."""
    call = op_calls.CALLS[op]() | {name: value}
    return call | {"length": None} if (op, name) == ("splice_", "end") else call


def forms(number, dtype):
    if dtype.is_floating_point:
        return [number, np.float32(number), np.float64(number), Fraction(number), torch.tensor(number),
                torch.tensor(number, dtype=torch.float64), torch.tensor(number, dtype=torch.bfloat16)]  # fmt: skip
    small = [np.int16(number), torch.tensor(number, dtype=torch.int16)] if number < 2**15 else []
    return [number, np.int64(number), torch.tensor(number), *small]


@pytest.mark.parametrize(("op", "name"), ONE_VALUE)
def test_a_number_is_a_tensor_of_one_value(op, name):
    number, dtype = NUMBERS[name]
    expected = call_with(op, name, torch.tensor([number], dtype=dtype))
    for form in forms(number, dtype):
        assert same(op, expected | {name: form}, expected), repr(form)


@pytest.mark.parametrize(("op", "name"), ONE_VALUE)
def test_what_is_no_number_is_a_type_error(op, name):
    _, dtype = NUMBERS[name]
    wrong = ["3", True, [1], (1,), {}, 1j, object(), np.bool_(True), np.array([1]), torch.tensor(True), None.__class__]
    wrong += [] if dtype.is_floating_point else [1.0, np.float32(1), torch.tensor(1.0)]
    for value in wrong:
        with pytest.raises(TypeError, match=f"{name} must be a"):
            getattr(ops, op)(**call_with(op, name, value))


OUT_OF_RANGE = {
    "temperature": [-1, -1e-9, inf, nan, 1e-40, 1e39, 10**400, np.float32(inf), torch.tensor(1e-40)],
    "order_temperature": [-1, inf, nan, 1e-40, 1e39],
    "top_p": [-0.1, 1.1, nan, inf, -inf, 10**400],
    "cfg_scale": [1e39, -1e39, 10**400, nan],
    "parameter": [1e39, -1e39, torch.tensor(1e300, dtype=torch.float64)],
    "top_k": [-1, 2**31, np.int64(2**31), torch.tensor(2**31), -(2**40)],
    "need": [-1, 2**31], "fill": [-1, 2**31], "cap": [-1, 2**31],
    "redraw": [-1, 2**31], "step": [2**31, -(2**31) - 1], "origin": [2**31], "end": [2**31, -(2**31) - 1], "block_origin": [2**31],
    "seed": [2**63, -(2**63) - 1, 10**30, np.uint64(2**63)],
}  # fmt: skip


@pytest.mark.parametrize(("op", "name"), ONE_VALUE)
def test_numbers_out_of_range_are_value_errors(op, name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=f"{name} must be .*; got"):
            getattr(ops, op)(**call_with(op, name, value))


def test_the_largest_and_smallest_numbers():
    for seed in (2**63 - 1, -(2**63)):
        call = op_calls.token_confidence() | {"seed": seed}
        assert same("token_confidence", call, call | {"seed": torch.tensor([seed])})
    for temperature in (1.1754943508222875e-38, 3.4028234663852886e38):
        call = op_calls.token_confidence() | {"temperature": temperature}
        assert same("token_confidence", call, call | {"temperature": torch.tensor([temperature])})
    for parameter in (inf, -inf, nan):
        call = op_calls.select_tokens() | {"parameter": parameter}
        assert same("select_tokens", call, call | {"parameter": torch.tensor([parameter])})


def wrong_values():
    """(op, argument, value, error) for every argument that is not a tensor of one value."""
    wrong = {
        "Tensor": [(3, TypeError), ("a", TypeError), ([1.0], TypeError), (None, TypeError), (np.zeros(2), TypeError)],
        "Optional[Tensor]": [("a", TypeError), ([1], TypeError), (object(), TypeError)],
        "int": [("a", TypeError), (1.5, TypeError), (None, TypeError), ([1], TypeError), (2**63, ValueError),
                (-(2**63) - 1, ValueError)],
        "float": [("a", TypeError), (None, TypeError), ([1.0], TypeError), (1j, TypeError)],
        "Optional[float]": [("a", TypeError), ([1.0], TypeError)],
        "bool": [("a", TypeError), ([1.0], TypeError)],
        "str": [(1, TypeError), (None, TypeError), (["none"], TypeError), ("wrong", ValueError)],
        "List[int]": [("ab", TypeError), (5, TypeError), (["a"], TypeError), ([2**63], TypeError)],
    }  # fmt: skip
    for op in op_calls.CALLS:
        for a in op_calls.registered(op)._schema.arguments:
            if (op, a.name) not in ONE_VALUE:
                yield from ((op, a.name, value, error) for value, error in wrong[str(a.type)])


@pytest.mark.parametrize(("op", "name", "value", "error"), wrong_values())
def test_wrong_values_are_named(op, name, value, error):
    call = op_calls.CALLS[op]()
    before = op_calls.cloned(call)
    with pytest.raises(error, match=rf"^{op}: {name} must be .*; got"):
        getattr(ops, op)(**(call | {name: value}))
    for other, tensor in op_calls.tensors(call).items():
        assert torch.equal(tensor, before[other])


# Numbers for arguments of type float, which the kernels take as float32.
FLOATS = {
    ("block_attention", "softcap"): [-1.0, inf, nan, -inf, 1e39, 1e-50, 10**38 * 4],
    ("block_attention", "scale"): [inf, -inf, nan, 1e39, -1e39, 3.5e38],
    ("verify_drafts", "leniency"): [-1.0, inf, nan, 1e39, 1e-50],
}


@pytest.mark.parametrize(("op", "name"), FLOATS)
@pytest.mark.parametrize("through", ["ops", "torch.ops"])
def test_floats_that_float32_cannot_hold(op, name, through):
    function = getattr(ops, op) if through == "ops" else op_calls.registered(op)
    for value in FLOATS[op, name]:
        with pytest.raises(ValueError if through == "ops" else RuntimeError, match=f"^{op}: {name} must be .*; got"):
            function(**(op_calls.CALLS[op]() | {name: value}))


@pytest.mark.on_cpu  # a GPU would have to wait for the values
@pytest.mark.parametrize("op", ["token_confidence", "verify_drafts", "soft_embedding", "lm_head_confidence"])
def test_temperatures_of_tensors(op):
    for value in (inf, nan, 1e-40, 1e-45, -1.0, -inf):
        call = op_calls.CALLS[op]() | {"temperature": torch.tensor([0.5, value])}
        with pytest.raises(ArgumentError, match=rf"^{op}: temperature must be .*; got .* at 1$"):
            getattr(ops, op)(**call)


def test_refusals_are_value_errors_and_runtime_errors():
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"^token_confidence: logits must have dtype .*; got Double"):
            ops.token_confidence(torch.zeros(1, 3, dtype=torch.float64))


KINDS = [
    (op, a.name, str(a.type))
    for op in op_calls.CALLS
    for a in op_calls.registered(op)._schema.arguments
    if str(a.type) in ("int", "bool")
]


@pytest.mark.parametrize(("op", "name", "kind"), KINDS)
def test_what_torch_would_convert(op, name, kind):
    """A number with a fraction is no integer, and neither is a flag or a dtype; a number is no flag."""
    wrong = [np.float32(2.7), torch.float16, True, torch.tensor(1.0), torch.tensor(True)]
    if kind == "bool":
        wrong = [1, 1.5, nan, 1j, range(2), torch.tensor(1), torch.ones(2, dtype=torch.bool), np.int64(1)]
    for value in wrong:
        with pytest.raises(TypeError, match=f"^{op}: {name} must be (a 64-bit integer|True or False); got"):
            getattr(ops, op)(**(op_calls.CALLS[op]() | {name: value}))
    call = op_calls.CALLS[op]()
    for form in [np.bool_, torch.tensor] if kind == "bool" else [np.int64, torch.tensor]:
        assert same(op, call | {name: form(call[name])}, call)


@pytest.mark.parametrize("op", op_calls.CALLS)
def test_sparse_tensors(op):
    for name in op_calls.tensors(op_calls.CALLS[op]()):
        with pytest.raises(ValueError, match=f"^{op}: {name} must be a dense tensor; got layout torch.sparse_coo"):
            getattr(ops, op)(**(op_calls.CALLS[op]() | {name: torch.ones(2, 2).to_sparse()}))


@pytest.mark.parametrize("op", op_calls.CALLS)
def test_tensors_without_a_dimension(op):
    """Also where nothing is computed."""
    anchor = next(iter(op_calls.CALLS[op]()))
    for device in ("cpu", "meta"):
        with pytest.raises((ValueError, RuntimeError), match=f"^{op}: {anchor} must"):
            call = op_calls.CALLS[op]() | {anchor: torch.tensor(1.0)}
            getattr(ops, op)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()})
    if op == "shard_confidence":
        with pytest.raises(
            ValueError, match=r"^shard_confidence: weight must have at least one dimension; got a tensor"
        ):
            ops.shard_confidence(torch.ones(3, 40), 0, weight=torch.tensor(1.0))


@pytest.mark.parametrize("op", op_calls.CALLS)
def test_none_for_a_tensor(op):
    """torch.ops hands None on as an empty tensor: the op itself says which argument it was."""
    required = [a.name for a in op_calls.registered(op)._schema.arguments if str(a.type) == "Tensor"]
    for name in required:
        with pytest.raises(TypeError, match=f"^{op}: {name} must be a tensor; got None$"):
            getattr(ops, op)(**(op_calls.CALLS[op]() | {name: None}))
        others = {other: v for other, v in op_calls.CALLS[op]().items() if other != name and v is not None}
        for device in ("cpu", "meta"):
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
            with pytest.raises(RuntimeError, match=f"^{op}: {name} must be a tensor; got None$"):
                op_calls.registered(op)(**(there | {name: None}))
    nothing = {a.name: None for a in op_calls.registered(op)._schema.arguments if not a.has_default_value()}
    with pytest.raises(TypeError, match=f"^{op}: {required[0]} must be a tensor; got None$"):
        getattr(ops, op)(**nothing)


MASKS = [(op, name) for op in op_calls.CALLS for name, value in op_calls.tensors(op_calls.CALLS[op]()).items()
         if value.dtype == torch.bool]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), MASKS)
def test_every_byte_of_a_mask_but_0_is_true(op, name):
    """As it is to torch: a uint8 tensor seen as bool has others than 0 and 1. (Copies of it have not.)"""

    def run(make):
        torch.manual_seed(0)
        call = op_calls.CALLS[op]()
        results, written = op_calls.run(op, call | {name: make(call[name])})
        return [*results, *(value for value in written.values() if value is not None)]

    for byte in (2, 4, 128, 255):
        got = run(lambda mask, byte=byte: (mask.to(torch.uint8) * byte).view(torch.bool))
        assert all(map(torch.equal, got, run(lambda mask: mask))), byte


@pytest.mark.on_cpu
class TestMemory:
    """Results larger than any address space: torch's message is kept, with the size that was asked for."""

    ROWS = 2**50

    def refused(self, function, *args):
        with pytest.raises(RuntimeError, match="could not be allocated: ") as error:
            function(*args)
        assert not isinstance(error.value, ValueError)
        message = str(error.value)
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        assert version < (2, 13) or re.search(r"you tried to allocate \d+ bytes", message), message
        return message

    def test_block_attention(self):
        q = torch.zeros(1, 1, 1, 8).expand(2**20, 1, 2**30, 8)
        k = torch.zeros(1, 1, 1, 8).expand(2**20, 1, 1, 8)
        message = self.refused(ops.block_attention, q, None, None, k, k)
        assert message.startswith("block_attention failed: out of shape [1048576, 1, 1073741824, 8] and dtype Float")

    def test_token_confidence(self):
        message = self.refused(ops.token_confidence, torch.zeros(1, 4).expand(self.ROWS, 4))
        assert message.startswith(f"token_confidence failed: token of shape [{self.ROWS}] and dtype Long")

    def test_soft_embedding(self):
        message = self.refused(ops.soft_embedding, torch.zeros(1, 4).expand(self.ROWS, 4), torch.zeros(4, 2))
        assert message.startswith(f"soft_embedding failed: out of shape [{self.ROWS}, 2] and dtype Float")


def test_numbers_in_a_compiled_graph():
    def propose(logits, position):
        out = ops.token_confidence(logits, temperature=0.7, top_k=5, top_p=0.9, seed=3, step=1, position=position)
        return out.token, out.confidence

    logits, position = torch.randn(3, 17), torch.arange(3, dtype=torch.int32)
    compiled = torch.compile(propose, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(logits, position), propose(logits, position)))
