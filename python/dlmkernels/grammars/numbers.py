# SPDX-License-Identifier: Apache-2.0
"""Regular expressions for the integers between two bounds."""

from __future__ import annotations

#: Maximum number of digits of an integer without a bound.
DIGITS = 18


def integers(low: int | None, high: int | None) -> str:
    """Return a regular expression for the integers from `low` to `high` in decimal. None means any, up to 18 digits."""
    most = 10**DIGITS - 1
    low, high = (-most if low is None else low), (most if high is None else high)
    parts = []
    if low < 0:
        negative = _naturals(max(-high, 1), -low)
        parts.append(f"-(?:{negative})")
    if high >= 0:
        parts.append(_naturals(max(low, 0), high))
    return f"(?:{'|'.join(parts)})"


def _naturals(low: int, high: int) -> str:
    """Return alternatives for the integers from `low` to `high`, both at least 0, one per number of digits."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 0 if digits == 1 else 10 ** (digits - 1))
        last = min(high, 10**digits - 1)
        parts.append(_same_digits(str(first), str(last)))
    return "|".join(parts)


def _same_digits(low: str, high: str) -> str:
    """Return alternatives for the integers between two numbers with the same number of digits."""
    if low == high:
        return low
    if len(low) == 1:
        return f"[{low}-{high}]"
    head, rest = low[0], len(low) - 1
    if head == high[0]:
        return f"{head}(?:{_same_digits(low[1:], high[1:])})"
    zeros, nines = "0" * rest, "9" * rest
    parts = []
    first, last = int(head), int(high[0])
    if low[1:] != zeros:
        parts.append(f"{head}(?:{_same_digits(low[1:], nines)})")
        first += 1
    if high[1:] != nines:
        last -= 1
        tail = [f"{high[0]}(?:{_same_digits(zeros, high[1:])})"]
    else:
        tail = []
    if first <= last:
        parts.append(f"[{first}-{last}][0-9]{{{rest}}}")
    return "|".join(parts + tail)
