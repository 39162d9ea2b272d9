# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: numbers of any kind become Python numbers; invalid values raise an error that names them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: takes a parameter's name and value; returns the value to store, or raises
Check: TypeAlias = Callable[[str, Any], Any]

FLOAT32 = torch.finfo(torch.float32)
INT64 = torch.iinfo(torch.int64)
#: upper limit of all lengths and counts, so that the sum of two of them fits into int32
LONGEST = 2**30
#: types that can be iterated over, but are no sequence of numbers
UNORDERED = (str, bytes, bytearray, Mapping, Set)


def plain(value: Any) -> Any:
    """Convert a NumPy scalar or a 0-dimensional array or tensor to a Python number; return anything else as it is."""
    is_array = isinstance(value, Tensor) or type(value).__module__ == "numpy"
    if is_array and getattr(value, "ndim", None) == 0 and hasattr(value, "item") and _is_readable(value):
        return value.item()
    return value


def listed(name: str, values: Any) -> Any:
    """Convert a tensor or an array to a (nested) list; return anything else as it is.

    A tensor without values (on the device "meta") or with another layout than strided raises a ValueError.
    """
    check_readable(name, values)
    return values.tolist() if hasattr(values, "tolist") else values


def check_readable(name: str, value: Any) -> None:
    """Raise a ValueError for a tensor whose values cannot be read: one on the device "meta", or a sparse one."""
    if not _is_readable(value):
        kind = "one on the device meta" if value.is_meta else f"one of layout {value.layout}"
        raise ValueError(f"{name} must be a dense tensor that holds values; got {kind}")


def _is_readable(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_meta)


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, optional: bool = False) -> Check:
    """Return a check for a number in `[low, high]` (`above`: in `(low, high]`).

    It must be representable in float32, or an infinity within the limits. `optional`: None is accepted too.
    """

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        x = plain(value)
        is_number = isinstance(x, int | float) and not isinstance(x, bool)
        fits = is_number and (x in (math.inf, -math.inf) or abs(x) <= FLOAT32.max)
        if not fits or not (low < x if above else low <= x) or not x <= high:
            beyond = " within the range of float32" if is_number and abs(x) > FLOAT32.max else ""
            what = _or_none(optional) + _number_in(low, high, above) + beyond
            raise ValueError(f"{name} must be {what}; got {value!r}")
        return x if isinstance(x, int) else float(x)

    return check


def _number_in(low: float, high: float, above: bool) -> str:
    if math.isinf(low):
        return "a number"
    if above:
        start = "a positive number" if low == 0 else f"a number above {low:g}"
        return start if high >= FLOAT32.max else f"{start}, up to {high:g}"
    return f"a number of at least {low:g}" if high >= FLOAT32.max else f"a number from {low:g} to {high:g}"


def integer(low: int, high: int = LONGEST, *, optional: bool = False) -> Check:
    """Return a check for an integer in `[low, high]`. `optional`: None is accepted too."""

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        x = plain(value)
        if not isinstance(x, int) or isinstance(x, bool) or not low <= x <= high:
            is_too_large = isinstance(x, int) and x > high
            limits = [f"of at least {low}"] if low > INT64.min or (isinstance(x, int) and x < low) else []
            limits += [f"of at most {high}" if not limits else f"and at most {high}"] if is_too_large else []
            raise ValueError(f"{name} must be {' '.join([_or_none(optional) + 'an integer', *limits])}; got {value!r}")
        return x

    return check


def temperature(name: str, value: Any) -> float:
    """Check a temperature: 0, or a number whose reciprocal is finite in float32."""
    x = number(0.0)(name, value)
    assert x is not None
    if x != 0 and not FLOAT32.tiny <= x <= FLOAT32.max:
        raise ValueError(f"{name} must be 0 or a finite number of at least {FLOAT32.tiny:.2g}; got {value!r}")
    return x


def _or_none(optional: bool) -> str:
    return "None or " if optional else ""


#: check for a finite number of at least 0
amount = number(0, FLOAT32.max)


def flag(name: str, value: Any) -> bool:
    """Check that a value is True or False."""
    x = plain(value)
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return x


def optional_flag(name: str, value: Any) -> bool | None:
    """Check that a value is True, False or None."""
    return None if value is None else flag(name, value)


def one_of(*choices: str | None, note: str = "") -> Check:
    """Return a check for one of the `choices`. `note`: explains them at the end of the error message."""

    def check(name: str, value: Any) -> str | None:
        if not isinstance(value, str | None) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}{note}")
        return value

    return check


def several(check_one: Check, count: int | None = None, *, optional: bool = False) -> Check:
    """Return a check for a sequence (list, tuple, or 1-D tensor or array) whose values pass `check_one`.

    The sequence is stored as a tuple. `count`: the required number of values. `optional`: None is accepted too.
    """

    def check(name: str, value: Any) -> tuple | None:
        if value is None and optional:
            return None
        values = listed(name, value)
        if not isinstance(values, Iterable) or isinstance(values, UNORDERED):
            raise ValueError(f"{name} must be a sequence of numbers; got {value!r}")
        values = tuple(values)
        if count is not None and len(values) != count:
            raise ValueError(f"{name} must have {count} values; got {value!r}")
        return tuple(check_one(f"{name}[{i}]", one) for i, one in enumerate(values))

    return check


def token_id(name: str, value: Any) -> Any:
    """Check a token id. The model's vocabulary size is not known here."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
        hint = f": pass tokenizer.convert_tokens_to_ids({value!r})" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a token id, an integer; got {value!r}{hint}")
    return value


def optional_token_id(name: str, value: Any) -> Any:
    """Check a token id, or None."""
    return None if value is None else token_id(name, value)


def token_ids(name: str, value: Any) -> tuple:
    """Check a sequence of token ids, and return it as a tuple."""
    if isinstance(value, str):
        raise ValueError(
            f"{name} must be a sequence of token ids; got {value!r}: pass tokenizer.convert_tokens_to_ids([{value!r}])"
        )
    return several(token_id)(name, value) or ()


def end_token_ids(name: str, value: Any) -> int | tuple | None:
    """Check one token id, several, or several per request."""
    value = plain(value)
    if value is None or isinstance(value, int | float | str):
        return optional_token_id(name, value)
    value = listed(name, value)
    if isinstance(value, Sequence) and any(isinstance(one, Sequence) and not isinstance(one, str) for one in value):
        return several(token_ids)(name, value)
    return token_ids(name, value)


def id_range(vocab: int | None, low: int = 0) -> str:
    """Describe the valid token ids of a vocabulary of `vocab` tokens, for error messages: "from 0 to 31"."""
    return f"from {low} to {vocab - 1}" if vocab is not None else f"of at least {low}"


def check_logit_bias(bias: Mapping[int, float] | Tensor | None) -> None:
    """Raise unless `bias` is None, a float tensor `[V]`, or a mapping from ids to numbers, without NaN and +inf."""
    if isinstance(bias, Tensor):
        check_readable("logit_bias", bias)
        fits = bias.dim() == 1 and bias.is_floating_point()
        if not fits or bool((bias.isnan() | (bias == torch.inf)).any()):
            kind = f"{bias.dtype} of shape {list(bias.shape)}" + (" with NaN or +inf in it" if fits else "")
            raise ValueError(f"logit_bias must be a float tensor [V] without NaN or +inf; got {kind}")
    elif isinstance(bias, Mapping):
        for key, value in bias.items():
            if not isinstance(key, numbers.Integral) or isinstance(key, bool) or key < 0:
                raise ValueError(f"logit_bias must have token ids (integers of at least 0) as keys; got {key!r}")
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not (value == -math.inf or abs(value) <= FLOAT32.max):
                raise ValueError(f"logit_bias must have -inf or numbers that fit into float32 as values; got {value!r}")
    elif bias is not None:
        raise ValueError(f"logit_bias must be {{token id: number}} or a float tensor [V]; got {bias!r}")


class PerRequest:
    """Check for one value for all requests, or a sequence `[B]` with one per request, which is stored as a tuple."""

    def __init__(self, check_one: Check):
        self._one, self._all = check_one, several(check_one)

    def __call__(self, name: str, value: Any) -> Any:
        value = plain(value)
        if isinstance(value, UNORDERED) or not hasattr(value, "__len__"):
            return self._one(name, value)
        values = self._all(name, value)
        if not values:
            raise ValueError(f"{name} must be one number, or one for each request; got {value!r}")
        return values


def each(value: Any) -> tuple:
    """Return the values of a `PerRequest` field as a tuple: a single value, or one per request."""
    return value if isinstance(value, tuple) else (value,)


def normalize(owner: Any, limits: Mapping[str, Check]) -> None:
    """Check fields of a frozen dataclass, and store the value that each check returns."""
    for name, check in limits.items():
        object.__setattr__(owner, name, check(name, getattr(owner, name)))


def ordered(owner: Any, low: str, high: str, *, strict: bool = False) -> None:
    """Raise a ValueError unless the first of two fields is at most (`strict`: less than) the second."""
    a, b = getattr(owner, low), getattr(owner, high)
    if a > b or (strict and a == b):
        raise ValueError(f"{low} must be {'less than' if strict else 'at most'} {high}={b}; got {a}")


class ComparedByValue:
    """Mixin that compares and hashes a dataclass by its fields, and compares tensors by their elements.

    For dataclasses with ``eq=False``: the generated comparison would evaluate a tensor as a bool and fail.
    """

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(equal(a, b) for a, b in zip(self._values(), other._values()))

    def __hash__(self) -> int:
        return hash((type(self), *(_hashed(value) for value in self._values())))


def equal(a: Any, b: Any) -> bool:
    """Return whether two values are equal; tensors are compared by their elements."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and bool(torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _hashed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return frozenset(value.items()) if isinstance(value, Mapping) else value
