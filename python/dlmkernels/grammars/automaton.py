# SPDX-License-Identifier: Apache-2.0
"""Finite automata over tokens: what a regular expression says of texts, said of sequences of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: numbers in an automaton's table at most: 256 MB
LARGEST = 1 << 26


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton that reads tokens.

    Tokens that do the same in every state are one class: a vocabulary of 100,000 tokens has a few hundred.

    Attributes
    ----------
    table : ndarray
        int32 `[C, Q + 1]`: the state after a token of each class in each state. State Q is the dead one: no text that
        comes to it is completed by anything. Class 0 leads there from everywhere.
    class_of : ndarray
        int32 `[V]`: the class of each token.
    start : int
        The first state.
    final : ndarray
        bool `[Q + 1]`: where a text may end.
    """

    table: np.ndarray
    class_of: np.ndarray
    start: int
    final: np.ndarray

    @classmethod
    def of(cls, pattern: str, texts: Sequence[str | None]) -> TokenAutomaton:
        """The automaton of all sequences of tokens whose texts, one behind the other, a pattern matches as a whole.

        Parameters
        ----------
        pattern : str
            A regular expression in Python's syntax, without look-around and references back.
        texts : sequence of str or None
            What each token stands for; None: the token is never part of a text.

        Raises
        ------
        ValueError
            When the pattern cannot be read, or its automaton becomes too large.
        """
        symbols, delta, start, final = _of_characters(pattern)
        table, class_of = _lifted(symbols, delta, texts)
        return cls(table, class_of, start, final)

    @cached_property
    def shortest(self) -> int:
        """How many tokens the shortest text has; -1 if these tokens make none."""
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


def _of_characters(pattern: str) -> tuple[dict, np.ndarray, int, np.ndarray]:
    """Number of each character's symbol, int32 states `[Q + 1, K]`, the first state, and which are final."""
    import interegular
    from interegular.fsm import anything_else

    try:
        machine = interegular.parse_pattern(pattern).to_fsm()
    except (interegular.InvalidSyntax, interegular.Unsupported, NotImplementedError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"pattern: {pattern!r} is no regular expression that can be used here: {text}") from error
    names = {state: k for k, state in enumerate(sorted(machine.states))}
    keys = {key: k for k, key in enumerate(sorted(set(machine.alphabet.values())))}
    dead = len(names)
    delta = np.full((dead + 1, len(keys)), dead, dtype=np.int32)
    for state, ways in machine.map.items():
        for key, after in ways.items():
            if key in keys:
                delta[names[state], keys[key]] = names[after]
    final = np.zeros(dead + 1, dtype=bool)
    final[[names[state] for state in machine.finals]] = True
    _bury(delta, final)
    symbols = {character: keys[key] for character, key in machine.alphabet.items() if character is not anything_else}
    symbols[None] = keys[machine.alphabet[anything_else]]
    return symbols, delta, names[machine.initial], final


def _bury(delta: np.ndarray, final: np.ndarray) -> None:
    """Let the ways that lead to no final state lead to the dead one, which is the last."""
    lives = final.copy()
    while True:
        wider = lives | lives[delta].any(1)
        if (wider == lives).all():
            break
        lives = wider
    delta[~lives[delta]] = len(final) - 1


def _lifted(symbols: dict, delta: np.ndarray, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """What each token does in each state, as a table of classes and the class of each token.

    A text is a function of states, and those of longer texts are found from those of shorter ones: most texts soon are
    the function that leads everywhere to the dead state.
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
                    raise ValueError(f"pattern: its automaton of {states} states is too large for {len(texts)} tokens")
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
