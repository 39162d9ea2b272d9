# SPDX-License-Identifier: Apache-2.0
"""Convert Python values to arguments of the ops: numbers to one-value tensors, and torch's errors to helpful ones."""

import math
import numbers
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ArgumentError(ValueError, RuntimeError):
    """Raised when an op cannot accept an argument; nothing has been written.

    It is a ValueError, and also a RuntimeError like the errors of torch's own ops.
    """


class _Range(NamedTuple):
    dtype: torch.dtype
    holds: Callable[[Any], bool]
    expected: str


_ANY = _Range(torch.float32, lambda x: True, "a number")
_TEMPERATURE = _Range(
    torch.float32, lambda x: x == 0 or 1.1754943508222875e-38 <= x < math.inf, "0, or finite and at least 1.2e-38"
)
_COUNT = _Range(torch.int32, lambda x: x >= 0, "0 or positive")
_INTEGER = _Range(torch.int32, lambda x: True, "an integer")
#: The arguments that accept a number.
_ONE_VALUE = {
    "temperature": _TEMPERATURE,
    "order_temperature": _TEMPERATURE,
    "top_p": _Range(torch.float32, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "cfg_scale": _Range(torch.float32, lambda x: x == x, "a number other than NaN"),
    "parameter": _ANY,
    "top_k": _COUNT,
    "need": _COUNT,
    "fill": _COUNT,
    "cap": _COUNT,
    "step": _INTEGER,
    "redraw": _COUNT,
    "origin": _INTEGER,
    "end": _INTEGER,
    "block_origin": _INTEGER,
    "seed": _Range(torch.int64, lambda x: True, "an integer"),
}


def one_value(name: str, value: Any, like: Tensor) -> Any:
    """Convert a number to the one-value tensor that the op argument `name` takes.

    Numbers are Python's and numpy's, and zero-dimensional tensors in CPU memory. None and all other tensors are
    returned unchanged.
    """
    if value is None or not isinstance(like, Tensor):
        return value
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and (value.dtype is not _ONE_VALUE[name].dtype or value.device != like.device)
        if not is_number or value.device.type != "cpu":
            return value
        value = value.item()
    return torch.full((1,), _number(name, value), dtype=_ONE_VALUE[name].dtype, device=like.device)


def _number(name: str, value: Any) -> float | int:
    dtype, holds, expected = _ONE_VALUE[name]
    kind: Any = numbers.Real if dtype.is_floating_point else numbers.Integral
    wanted = "a number" if dtype.is_floating_point else "an integer"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted} or a tensor; got {_shown(value)}")
    if not holds(value):
        raise ArgumentError(f"{name} must be {expected}; got {value}")
    if dtype.is_floating_point:
        if torch.finfo(dtype).max < abs(value) != math.inf:
            raise ArgumentError(f"{name} must be within the range of float32; got {value}")
        return float(value)
    bounds = torch.iinfo(dtype)
    if not bounds.min <= value <= bounds.max:
        raise ArgumentError(f"{name} must be a {bounds.bits}-bit integer; got {value}")
    return int(value)


_TYPES = {
    "Tensor": "a tensor",
    "Optional[Tensor]": "a tensor or None",
    "int": "a 64-bit integer",
    "float": "a number",
    "Optional[float]": "a number or None",
    "bool": "True or False",
    "str": "a string",
    "List[int]": "a list of 64-bit integers",
}
_MISMATCH = re.compile(r"Expected a value of type '([^']+)' for argument '(\w+)' but instead found type '(\w+)'")


def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``op(*args, **kwargs)``, an op of torch.ops.

    Errors about an argument are raised as a TypeError or an ArgumentError.
    """
    if not torch.compiler.is_compiling():
        _check_kinds(op, args, kwargs)
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        refusal = _explained(op, args, kwargs, str(error))
        if refusal is None:
            raise
        raise refusal from None


def _check_kinds(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a TypeError for a flag or an integer that torch would convert from a value of another kind, such as 2.7."""
    expected = _FLAGS_AND_INTEGERS.get(id(op))
    if expected is None:
        kinds = {"bool": bool, "int": int}
        named = [(i, a.name, kinds.get(str(a.type))) for i, a in enumerate(op._schema.arguments)]
        expected = [(i, name, kind) for i, name, kind in named if kind is not None]
        _FLAGS_AND_INTEGERS[id(op)] = expected
    for index, name, kind in expected:
        value = args[index] if index < len(args) else kwargs.get(name)
        if type(value) is kind or value is None:
            continue
        if not (_is_flag if kind is bool else _is_integer)(value):
            raise TypeError(f"{_name(op)}: {name} must be {_TYPES[kind.__name__]}; got {_shown(value)}")


def _name(op: Any) -> str:
    return op._schema.name.split("::")[1]


def _is_flag(value: Any) -> bool:
    return isinstance(value, torch.SymBool) or (
        getattr(value, "ndim", None) == 0 and value.dtype in (torch.bool, "bool")
    )


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return False
    if isinstance(value, torch.SymInt):
        return True
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


#: by id of an op, which lives as long as the process: index, name and type of its flags and integers
_FLAGS_AND_INTEGERS: dict[int, list[tuple[int, str, type]]] = {}


def _explained(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> Exception | None:
    """Return a clearer exception for an error of `op` that is about an argument, else None."""
    arguments = op._schema.arguments
    name = _name(op)
    given = dict(zip((a.name for a in arguments), args)) | kwargs
    for argument in arguments:
        if str(argument.type) == "Tensor" and given.get(argument.name) is None:
            return TypeError(f"{name}: {argument.name} must be a tensor; got None")
    for argument_name, value in given.items():
        if isinstance(value, Tensor) and value.layout != torch.strided:
            return ArgumentError(f"{name}: {argument_name} must be a dense tensor; got layout {value.layout}")
        if isinstance(value, Tensor) and value.dim() == 0 and "aoti_torch_get_size" in message:
            return ArgumentError(f"{name}: {argument_name} must have at least one dimension; got a tensor of shape []")
    if mismatch := _MISMATCH.search(message):
        expected, argument_name, _ = mismatch.groups()
        value = given.get(argument_name)
        too_large = expected == "int" and isinstance(value, int)
        error = ArgumentError if too_large else TypeError
        return error(f"{name}: {argument_name} must be {_TYPES.get(expected, expected)}; got {_shown(value)}")
    return ArgumentError(message) if message.startswith(f"{name}: ") else None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
