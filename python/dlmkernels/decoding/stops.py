# SPDX-License-Identifier: Apache-2.0
"""Texts that end an answer: where the first of them ends among tokens, and what is left of the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def check_stop_strings(stop_strings: Any, tokenizer) -> tuple[str, ...]:
    """Stop strings as a tuple; one string stands for itself."""
    if stop_strings is None:
        return ()
    if isinstance(stop_strings, str):
        stop_strings = (stop_strings,)
    if not isinstance(stop_strings, Iterable):
        raise TypeError(f"stop_strings must be a text or several; got {type(stop_strings).__name__}")
    found = tuple(stop_strings)
    for text in found:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop_strings must hold texts that are not empty; got {text!r}")
    if found and not hasattr(tokenizer, "decode"):
        raise ValueError(
            "stop_strings need a tokenizer, since they are looked for in text: pass "
            f"tokenizer=transformers.AutoTokenizer.from_pretrained(…); got {tokenizer!r}"
        )
    return found


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in a text; None if there is none."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def stop_at(tokens: Sequence[int], stop_strings: Sequence[str], tokenizer, known: int = 0) -> int | None:
    """How many of the tokens, decoded from the left, it takes to complete a stop string; None if there is none.

    `known`: so many of them are known to hold none.
    """
    if not stop_strings or first_stop(text_of(tokens, tokenizer), stop_strings) is None:
        return None
    low, high = min(known, len(tokens)), len(tokens)  # a text of more tokens holds what one of fewer does
    while low + 1 < high:
        middle = (low + high) // 2
        if first_stop(text_of(tokens[:middle], tokenizer), stop_strings) is None:
            low = middle
        else:
            high = middle
    return high


def text_of(tokens: Sequence[int], tokenizer, stop_strings: Sequence[str] = ()) -> str:
    """The tokens as text, without special ones, as far as the first stop string."""
    return before_stop(tokenizer.decode(list(tokens), skip_special_tokens=True), stop_strings)


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """A text as far as the first stop string in it."""
    place = first_stop(text, stop_strings)
    return text if place is None else text[:place]
