# SPDX-License-Identifier: Apache-2.0
"""Stop strings: find the token that completes the first one, and cut the text before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def check_stop_strings(stop_strings: Any, tokenizer) -> tuple[str, ...]:
    """Check stop strings (one string, an iterable of strings, or None), and return them as a tuple."""
    if stop_strings is None:
        return ()
    if isinstance(stop_strings, str):
        stop_strings = (stop_strings,)
    if (
        not isinstance(stop_strings, Iterable)
        or isinstance(stop_strings, bytes | Mapping)
        or getattr(stop_strings, "ndim", 1) == 0
    ):
        raise TypeError(f"stop_strings must be a string or a sequence of strings; got {type(stop_strings).__name__}")
    found = tuple(stop_strings)
    for text in found:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop_strings must hold non-empty strings; got {text!r}")
    if found and not hasattr(tokenizer, "decode"):
        raise ValueError(
            "stop_strings need a tokenizer, since they are searched for in text: pass "
            f"tokenizer=transformers.AutoTokenizer.from_pretrained(…); got {tokenizer!r}"
        )
    return found


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Return the index in `text` at which the earliest stop string begins, or None if there is none."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def stop_at(tokens: Sequence[int], stop_strings: Sequence[str], tokenizer, known: int = 0) -> int | None:
    """Return how many of the tokens, from the left, it takes to complete a stop string; None if there is none.

    The first `known` tokens are known to contain no stop string.
    """
    if not stop_strings or first_stop(text_of(tokens, tokenizer), stop_strings) is None:
        return None
    low, high = min(known, len(tokens)), len(tokens)  # bisection: a stop string stays in the text as tokens are added
    while low + 1 < high:
        middle = (low + high) // 2
        if first_stop(text_of(tokens[:middle], tokenizer), stop_strings) is None:
            low = middle
        else:
            high = middle
    return high


def text_of(tokens: Sequence[int], tokenizer, stop_strings: Sequence[str] = ()) -> str:
    """Convert tokens to text, without special tokens, up to the first stop string."""
    return before_stop(tokenizer.decode(list(tokens), skip_special_tokens=True), stop_strings)


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return a text up to, and without, the first stop string in it."""
    place = first_stop(text, stop_strings)
    return text if place is None else text[:place]
