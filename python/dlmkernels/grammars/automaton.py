# SPDX-License-Identifier: Apache-2.0
"""Finite automata over tokens: translate a regular expression over characters to one over a tokenizer's tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .expression import TooLarge, automaton_of

#: Maximum number of int32 entries in an automaton's tables (256 MB).
LARGEST = 1 << 26


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic finite automaton over tokens.

    Tokens with the same transition in every state form a class. A vocabulary of 100,000 tokens has a few hundred.

    Attributes
    ----------
    table : ndarray
        int32 `[C, Q + 1]`: the next state for each class of tokens and each state. State Q is the dead state, from
        which no accepted text can be reached. Class 0 leads to the dead state from every state.
    class_of : ndarray
        int32 `[V]`: the class of each token.
    start : int
        The initial state.
    final : ndarray
        bool `[Q + 1]`: the states in which a text may end.
    """

    table: np.ndarray
    class_of: np.ndarray
    start: int
    final: np.ndarray

    @classmethod
    def of(cls, pattern: str, texts: Sequence[str | None]) -> TokenAutomaton:
        """Build the automaton of all token sequences whose concatenated text fully matches a pattern.

        Parameters
        ----------
        pattern : str
            A regular expression in Python's syntax, without lookaround and backreferences.
        texts : sequence of str or None
            The text of each token. A token whose text is None is never accepted.

        Raises
        ------
        ValueError
            If the pattern is not supported, or its automaton becomes too large.
        """
        characters = automaton_of(pattern)
        table, class_of = _lifted(characters.symbols, characters.delta, texts)
        return cls(table, class_of, characters.start, characters.final)

    @cached_property
    def shortest(self) -> int:
        """Number of tokens in the shortest accepted sequence; -1 if there is none."""
        onward = [np.unique(self.table[1:, state]) for state in range(len(self.final))]
        seen, queue = {self.start}, deque([(self.start, 0)])
        while queue:
            state, length = queue.popleft()
            if self.final[state]:
                return length
            for after in onward[state].tolist():
                if after not in seen and after != len(self.final) - 1:
                    seen.add(after)
                    queue.append((after, length + 1))
        return -1


def why_empty(pattern: str, texts: Sequence[str | None]) -> str:
    """Explain why no sequence of tokens matches a pattern: name the characters that no token contains."""
    found = automaton_of(pattern)
    if not found.final.any():
        return f"no text matches the pattern {pattern!r:.80}"
    known = set().union(*(text for text in texts if text))
    is_used = (found.delta != len(found.final) - 1).any(0)
    absent = "".join(sorted(c for c, k in found.symbols.items() if c is not None and is_used[k] and c not in known))
    what = f", since no token contains any of the characters {absent[:40]!r}" if absent else ""
    return "the tokenizer's tokens cannot form any text that matches" + what


def _lifted(symbols: dict, delta: np.ndarray, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Lift an automaton over characters to tokens. Returns the table of token classes, and the class of each token.

    A text is a function from states to states, which is built up character by character and shared between texts with
    a common prefix. Most texts quickly reach the function that maps every state to the dead one.
    """
    states, other = len(delta), symbols[None]
    functions = [np.full(states, states - 1, dtype=np.int32), np.arange(states, dtype=np.int32)]
    known = {function.tobytes(): k for k, function in enumerate(functions)}
    after: dict[tuple[int, int], int] = {}

    def extended(function: int, symbol: int) -> int:
        found = after.get((function, symbol))
        if found is None:
            new = delta[functions[function], symbol]
            found = after[function, symbol] = known.setdefault(new.tobytes(), len(functions))
            if found == len(functions):
                functions.append(new)
                if len(functions) * states > LARGEST:
                    raise TooLarge(f"its automaton of {states} states is too large for {len(texts)} tokens")
        return found

    class_of = np.zeros(len(texts), dtype=np.int32)
    for token, text in enumerate(texts):
        function = 1 if text else 0
        for character in text or "":
            function = extended(function, symbols.get(character, other))
            if function == 0:
                break
        class_of[token] = function
    used, number = np.unique(np.append(class_of, 0), return_inverse=True)
    return np.stack([functions[k] for k in used]), number[:-1].astype(np.int32)
