# SPDX-License-Identifier: Apache-2.0
"""Build the minimal deterministic automaton of a regular expression, within limits on its size.

interegular only parses the expression. Its own automata are exact, but take time quadratic in a repetition count and
exponential time for some short expressions. Here, the expression becomes a nondeterministic automaton (Thompson's
construction), then a deterministic one (subset construction), whose equivalent states are merged (Moore's algorithm).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: Maximum number of states of an automaton, and of an intermediate one.
STATES, INTERMEDIATE = 10_000, 100_000
#: Maximum number of transitions that are followed to make an automaton deterministic (about a second).
WORK = 2_000_000
#: Maximum number of characters in all ranges of a pattern, such as [a-z], which the parser lists one by one.
IN_RANGES = 200_000
#: Maximum number of characters of a pattern.
LONGEST = 100_000


class TooLarge(ValueError):
    """An expression whose automaton exceeds a limit."""


class CharacterAutomaton(NamedTuple):
    """A minimal deterministic automaton over characters, in which every state is reachable and can reach a final one.

    Only the initial state may be unable to reach a final state, if nothing matches.

    Attributes
    ----------
    symbols : dict
        Index of the symbol of each character; None stands for all characters that are not listed.
    delta : ndarray
        int32 `[Q + 1, K]`: the next state for each state and symbol; state Q is the dead state.
    start : int
        The initial state.
    final : ndarray
        bool `[Q + 1]`: the accepting states.
    work : int
        Effort it took to build the automaton, in the units of `WORK`.
    """

    symbols: dict[str | None, int]
    delta: np.ndarray
    start: int
    final: np.ndarray
    work: int

    def can_contain(self, characters: str) -> bool:
        """Return whether a text that matches can contain one of the characters."""
        columns = sorted({self.symbols.get(c, self.symbols[None]) for c in characters})
        return bool((self.delta[:, columns] != len(self.final) - 1).any())


def automaton_of(pattern: str) -> CharacterAutomaton:
    """Build the automaton of the texts that a pattern fully matches.

    Raises
    ------
    TooLarge
        If its automaton exceeds a limit.
    ValueError
        If the pattern is not supported.
    """
    import interegular

    if len(pattern) > LONGEST:
        raise TooLarge(f"it has {len(pattern)} characters, more than {LONGEST}")
    spans = re.findall(r"(?=(.)-(.))", pattern, re.S)
    if sum(max(ord(last) - ord(first), 0) for first, last in spans) > IN_RANGES:
        raise TooLarge(f"its character ranges span more than {IN_RANGES} characters; use negated sets, such as [^a-z]")
    try:
        nondeterministic = _Nondeterministic(interegular.parse_pattern(pattern))
    except TooLarge:
        raise
    except RecursionError as error:
        raise ValueError(f"pattern: {pattern!r:.80} has groups nested too deeply") from error
    except Exception as error:  # errors of the library share no base class
        is_told = isinstance(error, (interegular.Unsupported, interegular.InvalidSyntax, ValueError))
        text = (str(error).splitlines() or [""])[0] if is_told else ""
        text = text or _python_error(pattern) or "its syntax is invalid"
        if text in ("'^'", "'$'"):
            text = f"{text} is not needed, because the pattern always matches the whole answer"
        raise ValueError(f"pattern: {pattern!r:.80} is not a supported regular expression: {text}") from error
    symbols, rows, final, width, work = _deterministic(nondeterministic)
    # measured: a state costs about as much as ten transitions, and parsing a character as twenty
    return _minimal(symbols, rows, final, width, work + 10 * len(nondeterministic.edges) + 20 * len(pattern))


def _python_error(pattern: str) -> str | None:
    """Return the error that Python's own parser reports, with its position; None if the pattern is valid in Python."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


class _Nondeterministic:
    """An automaton with epsilon transitions for a parsed expression. State 0 is its initial state.

    Attributes
    ----------
    sets : dict
        Index of each set of characters, given by the characters and whether it is their complement.
    edges : list of list of tuple of int
        The transitions of each state: index of the set of characters, and next state.
    epsilon : list of list of int
        The states that each state reaches without a character.
    end : int
        The accepting state.
    """

    def __init__(self, tree: Any):
        from interegular import patterns

        self._kinds = patterns
        self.sets: dict[tuple[frozenset[str], bool], int] = {}
        self.edges: list[list[tuple[int, int]]] = []
        self.epsilon: list[list[int]] = []
        self.end = self._build(tree, self._new(), patterns.REFlags(0))

    def _new(self) -> int:
        if len(self.edges) >= INTERMEDIATE:
            raise TooLarge(f"written without repetition counts, it has more than {INTERMEDIATE} states")
        self.edges.append([])
        self.epsilon.append([])
        return len(self.edges) - 1

    def _build(self, tree: Any, start: int, flags: Any) -> int:
        """Add transitions for an expression that begins at state `start`; return the state at which it ends."""
        kinds = self._kinds
        if isinstance(tree, kinds._CharGroup):
            return self._character(tree.chars, tree.negated, start, flags)
        if isinstance(tree, type(kinds._DOT)):
            but = frozenset() if flags & kinds.REFlags.SINGLE_LINE else frozenset("\n")
            return self._character(but, True, start, flags & ~kinds.REFlags.SINGLE_LINE)
        if isinstance(tree, type(kinds._EMPTY)):
            return start
        if isinstance(tree, kinds._Concatenation):
            for part in tree.parts:
                start = self._build(part, start, flags)
            return start
        if isinstance(tree, kinds._Repeated):
            return self._repeated(tree, start, flags)
        if isinstance(tree, kinds.Pattern):
            flags = (flags | tree.added_flags) & ~tree.removed_flags
            if len(tree.options) == 1:
                return self._build(tree.options[0], start, flags)
            ends = [self._build(option, start, flags) for option in tree.options]
            end = self._new()
            for one in ends:
                self.epsilon[one].append(end)
            return end
        raise kinds.Unsupported("lookahead and lookbehind are not implemented")

    def _character(self, characters: frozenset[str], negated: bool, start: int, flags: Any) -> int:
        kinds = self._kinds
        if flags & kinds.REFlags.MULTILINE:
            raise kinds.Unsupported("flag m is not implemented")
        if flags & kinds.REFlags.CASE_INSENSITIVE:
            both = (form for c in characters for form in (c.lower(), c.upper()))
            characters = frozenset(form for form in both if len(form) == 1)
        end = self._new()
        self.edges[start].append((self.sets.setdefault((characters, negated), len(self.sets)), end))
        return end

    def _repeated(self, tree: Any, start: int, flags: Any) -> int:
        if tree.max is not None and tree.max < tree.min:
            raise ValueError(f"the repetition {{{tree.min},{tree.max}}} has a minimum above its maximum")
        for _ in range(tree.min):
            start = self._step(tree.base, start, flags)
        if tree.max is None:
            loop = self._new()
            self.epsilon[start].append(loop)
            self.epsilon[self._build(tree.base, loop, flags)].append(loop)
            return loop
        end = self._new()
        for _ in range(tree.max - tree.min):
            self.epsilon[start].append(end)
            start = self._step(tree.base, start, flags)
        self.epsilon[start].append(end)
        return end

    def _step(self, tree: Any, start: int, flags: Any) -> int:
        """Build one repetition, with a new state at its end, so that repeating nothing also runs into the limit."""
        end = self._new()
        self.epsilon[self._build(tree, start, flags)].append(end)
        return end

    def closure(self, states: Sequence[int]) -> tuple[frozenset[int], int]:
        """Return the states reached without a character that have transitions or accept, and how many were visited."""
        seen, stack = set(states), list(states)
        while stack:
            for after in self.epsilon[stack.pop()]:
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
        return frozenset(state for state in seen if self.edges[state] or state == self.end), len(seen)


def _symbols(sets: Sequence[tuple[frozenset[str], bool]]) -> tuple[dict[str | None, int], list[list[int]]]:
    """Return the symbol of each character, and the symbols in each set. Characters in the same sets share a symbol."""
    within: dict[str, int] = {}
    for k, (characters, _) in enumerate(sets):
        for character in characters:
            within[character] = within.get(character, 0) | 1 << k
    numbers = {0: 0}
    symbols: dict[str | None, int] = {None: 0}
    for character, mask in within.items():
        symbols[character] = numbers.setdefault(mask, len(numbers))
    members = []
    for characters, negated in sets:
        inside = {symbols[character] for character in characters}
        members.append(sorted(set(numbers.values()) - inside if negated else inside))
    return symbols, members


def _deterministic(
    machine: _Nondeterministic,
) -> tuple[dict[str | None, int], list[dict[int, int]], list[bool], int, int]:
    """Return the symbols, each state's transitions, which states accept, the number of symbols, and the work done."""
    symbols, members = _symbols(list(machine.sets))
    first, work = machine.closure([0])
    numbers = {first: 0}
    targets: dict[frozenset[int], int] = {}
    queue, rows, final = [first], [], []
    for states in queue:
        ways: dict[int, set[int]] = {}
        for state in states:
            for which, after in machine.edges[state]:
                work += len(members[which])
                for symbol in members[which]:
                    ways.setdefault(symbol, set()).add(after)
        row = {}
        for symbol, found in ways.items():
            key = frozenset(found)
            if key not in targets:
                reached, visited = machine.closure(list(key))
                work += visited
                targets[key] = numbers.setdefault(reached, len(numbers))
                if targets[key] == len(queue):
                    queue.append(reached)
            row[symbol] = targets[key]
        rows.append(row)
        final.append(machine.end in states)
        if work > WORK or len(queue) > 4 * STATES:
            raise TooLarge(f"its automaton has more than {STATES} states, or takes too long to compute")
    return symbols, rows, final, max(symbols.values()) + 1, work


def _minimal(
    symbols: dict[str | None, int], rows: list[dict[int, int]], final: list[bool], width: int, work: int
) -> CharacterAutomaton:  # fmt: skip
    """Remove states that reach no accepting state, and merge states from which the same texts are accepted."""
    shortest, bounded = _lengths(rows, final)
    # States with a bounded text are merged exactly, each after all states that follow it.
    same, merged = list(range(len(rows))), dict[tuple, int]()
    for state in bounded:
        onward = frozenset((symbol, same[after]) for symbol, after in rows[state].items() if shortest[after] >= 0)
        same[state] = merged.setdefault((final[state], onward), state)
    kept = [state for state in range(len(rows)) if same[state] == state and (shortest[state] >= 0 or state == 0)]
    place = {state: k for k, state in enumerate(kept)}
    dead = len(kept)
    if dead * width > 1 << 24:
        raise TooLarge(f"its automaton has {dead} states for {width} kinds of characters")
    delta = np.full((dead + 1, width), dead, dtype=np.int32)
    for k, state in enumerate(kept):
        row = {symbol: place[same[after]] for symbol, after in rows[state].items() if shortest[after] >= 0}
        delta[k, list(row)] = list(row.values())
    accepts = np.array([final[state] for state in kept] + [False])
    # The others are split into classes, at first by whether they accept and by the length of their shortest text.
    alone = {state: k for k, state in enumerate(merged.values())}
    known = np.array([(alone.get(q, -1), final[q], shortest[q]) for q in kept] + [(-2, False, -2)])
    labels = _refined(np.unique(known, axis=0, return_inverse=True)[1].reshape(-1), delta)
    count = int(labels.max()) + 1
    if count - 1 > STATES:
        raise TooLarge(f"its automaton has {count - 1} states, more than {STATES}")
    # number the merged states by their first occurrence, the dead state last
    chosen = np.unique(labels, return_index=True)[1]
    order = np.argsort(chosen)
    rank = np.empty(count, dtype=np.int32)
    rank[order] = np.arange(count, dtype=np.int32)
    chosen = chosen[order]
    return CharacterAutomaton(
        symbols, rank[labels[delta[chosen]]], int(rank[labels[place[same[0]]]]), accepts[chosen], work
    )


def _lengths(rows: list[dict[int, int]], final: list[bool]) -> tuple[list[int], list[int]]:
    """Return the length of the shortest accepted text from each state, -1 if there is none, and the bounded states.

    Bounded are states from which all accepted texts have at most some length. Each is listed after all that follow it.
    """
    onward = [set(row.values()) for row in rows]
    before: list[list[int]] = [[] for _ in rows]
    for state, targets in enumerate(onward):
        for after in targets:
            before[after].append(state)
    shortest = [0 if is_final else -1 for is_final in final]
    queue = [state for state, is_final in enumerate(final) if is_final]
    for state in queue:
        for one in before[state]:
            if shortest[one] < 0:
                shortest[one] = shortest[state] + 1
                queue.append(one)
    left = [sum(shortest[after] >= 0 for after in targets) for targets in onward]
    bounded = [state for state in range(len(rows)) if shortest[state] >= 0 and not left[state]]
    for state in bounded:
        for one in before[state]:
            left[one] -= 1
            if not left[one]:
                bounded.append(one)
    return shortest, bounded


def _refined(labels: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Split classes of states until states of one class lead to the same class for each symbol."""
    weights = np.random.default_rng(0).integers(1, 2**63, delta.shape[1] + 1, dtype=np.uint64) | np.uint64(1)
    while True:
        seen = labels.astype(np.uint64)
        # sums of products with fixed random numbers, modulo 2**64, in place of rows, which take longer to compare
        mixed = seen * weights[0] + (seen[delta] * weights[1:]).sum(1, dtype=np.uint64)
        new = np.unique(mixed, return_inverse=True)[1].reshape(-1)
        if new.max() == labels.max():
            break
        labels = new
    chosen = np.unique(labels, return_index=True)[1]
    if not (labels[delta] == labels[delta[chosen[labels]]]).all():  # two sums happened to be equal
        while True:
            new = np.unique(np.c_[labels, labels[delta]], axis=0, return_inverse=True)[1].reshape(-1)
            if new.max() == labels.max():
                break
            labels = new
    return labels
