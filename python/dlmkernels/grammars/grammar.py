# SPDX-License-Identifier: Apache-2.0
"""Constrain a decoding to a finite automaton, at all positions of the canvas at once.

A token is allowed at a position if the remaining masks can be filled so that the whole answer, of exactly its length,
is accepted. This is the case if the token leads from a state that is reachable through the positions before it to a
state from which the positions after it can reach a final state. Tokens can therefore be committed in any order, none
has to be taken back, and an answer is complete before its canvas (prompt and answer positions) ends. The sets of states
are those of Suresh et al., "DINGO: Constrained Inference for Diffusion LLMs" (arXiv:2505.23061), which uses them to
find the most likely text of a block. Here they check the tokens that a rule wants to commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..decoding.bitmask import pack
from ..decoding.constraint import AnswerPlace, Constraint
from .automaton import TokenAutomaton

#: Number of sets of states, and number of bitmasks, that are cached per `Machine`.
REMEMBERED = 4096, 256


class Grammar(Constraint):
    """Constraint to the answers of a regular language. An end token follows, unless the answer fills its canvas.

    Created by `json_schema`, `json_object` and `regex`. One object can be used for any number of requests.

    Attributes
    ----------
    min_tokens : int
        Number of tokens in the shortest answer, not counting the end token.

    Raises
    ------
    ValueError
        If no sequence of the tokenizer's tokens is such an answer.
    """

    def __init__(self, automaton: TokenAutomaton, name: str):
        self.automaton, self.name = automaton, name
        if automaton.shortest < 0:
            raise ValueError(f"{name}: no text of the tokenizer's tokens matches")
        self.min_tokens = automaton.shortest
        self._machine = lru_cache(maxsize=8)(lambda *key: Machine(automaton, *key))

    def __repr__(self) -> str:
        return f"Grammar({self.name}, min_tokens={self.min_tokens})"

    def bound(self, place: AnswerPlace) -> Constraint:
        shortest = self.min_tokens
        length = min(end - place.start for end in place.ends)
        if length < shortest:
            raise ValueError(
                f"constraint: {self.name} needs max_new_tokens of at least {shortest}; got an answer of {length} tokens"
            )
        machine = self._machine(place.eos, place.pad, place.banned, place.vocab)
        return GrammarInPlace(machine, place.start, place.ends, place.mask, self.name)

    def accepts(self, tokens: Tensor, proposed: Tensor) -> Tensor:
        raise TypeError("a grammar must be bound to a decoding before it can check answers: call bound(place) first")


class Machine:
    """The automaton extended by the special tokens of a decoding, with caches of computed sets of states.

    It has one more state, for positions after the end token, where any token is allowed. The dead state stays last.
    """

    def __init__(
        self, automaton: TokenAutomaton, eos: tuple[int, ...], pad: int, banned: tuple[int, ...], vocab: int | None
    ):
        classes, states = automaton.table.shape
        done, dead = states - 1, states
        table = np.where(automaton.table == done, dead, automaton.table)  # the dead state moves up by one index
        table = np.concatenate((table, np.full((classes, 1), dead, dtype=np.int32)), 1)
        table[:, done] = done  # anything may follow the end token
        end = np.full(states + 1, dead, dtype=np.int32)
        end[:states][automaton.final] = end[done] = done
        self.table = np.concatenate((table, end[None], end[None]))
        self.class_of = automaton.class_of.copy() if vocab is None else automaton.class_of[:vocab].copy()
        self.classes = classes
        self._set(eos, classes)
        self._set((pad,) if pad not in eos else (), classes + 1)
        self.start, self.done, self.dead = automaton.start, done, dead
        self.final = np.append(automaton.final, False)
        self.final[done] = True
        usable = np.zeros(len(self.table), dtype=bool)
        is_banned = np.zeros(len(self.class_of), dtype=bool)
        is_banned[[token for token in banned if 0 <= token < len(is_banned)]] = True
        usable[np.unique(self.class_of[~is_banned])] = True
        usable[classes + 1] = False  # padding is never proposed
        self.usable = usable
        leads = np.zeros((states + 1, states + 1), dtype=np.float32)
        for row in self.table[usable]:
            leads[np.arange(states + 1), row] = 1
        leads[:, dead] = 0
        leads[done, done] = 1
        self._leads = leads
        self._after = lru_cache(maxsize=REMEMBERED[0])(self._after_mask)
        self._before = lru_cache(maxsize=REMEMBERED[0])(self._before_mask)
        self.words = lru_cache(maxsize=REMEMBERED[1])(self._words)

    def _set(self, tokens: Sequence[int], to: int) -> None:
        for token in tokens:
            if 0 <= token < len(self.class_of):
                self.class_of[token] = to

    def ways(self, token: int) -> np.ndarray:
        """Return the next state for a token in each state, int32 `[Q]`."""
        kind = self.class_of[token] if 0 <= token < len(self.class_of) else 0
        return self.table[kind]

    # Sets of states are bytes of bools, so that they are hashable for the caches.

    def _after_mask(self, states: bytes) -> bytes:
        here = np.frombuffer(states, dtype=bool).astype(np.float32)
        return (here @ self._leads > 0).tobytes()

    def _before_mask(self, states: bytes) -> bytes:
        there = np.frombuffer(states, dtype=bool).astype(np.float32)
        return (self._leads @ there > 0).tobytes()

    def after(self, states: bytes, token: int | None) -> bytes:
        """Return the states reachable from `states` by a token, or by any token if None."""
        if token is None:
            return self._after(states)
        found = np.zeros(len(self.final), dtype=bool)
        found[self.ways(token)[np.frombuffer(states, dtype=bool)]] = True
        found[self.dead] = False
        return found.tobytes()

    def before(self, states: bytes, token: int | None) -> bytes:
        """Return the states from which a token, or any token if None, leads into `states`."""
        if token is None:
            return self._before(states)
        return np.frombuffer(states, dtype=bool)[self.ways(token)].tobytes()

    def _words(self, before: bytes, behind: bytes) -> Tensor:
        """Return the bitmask int32 `[n]` of the tokens that lead from a state in `before` to a state in `behind`."""
        here, there = np.frombuffer(before, dtype=bool), np.frombuffer(behind, dtype=bool)
        right = there[self.table[:, here]].any(1)
        right[self.classes + 1] = False
        return pack(torch.from_numpy(right[self.class_of]))


class GrammarInPlace(Constraint):
    """A grammar bound to the answers of one decoding, which are columns `[start, ends[row])` of each batch row."""

    def __init__(self, machine: Machine, start: int, ends: Sequence[int], mask: int, name: str):
        self.machine, self.start, self.ends, self.mask, self.name = machine, start, ends, mask, name

    def allowed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        canvas, slots = tokens.tolist(), positions.tolist()
        width = -(-len(self.machine.class_of) // 32)
        found = torch.full((*positions.shape, width), -1, dtype=torch.int32, device="cpu")
        for row, columns in enumerate(slots):
            inside = [k for k, column in enumerate(columns) if self.start <= column < self.ends[row]]
            if not inside:
                continue
            answer = self._answer(canvas[row], row)
            behind = self._behind(answer)
            before = self._before(answer, behind)
            for k in inside:
                place = columns[k] - self.start
                found[row, k] = self.machine.words(before[place], behind[place + 1])
        return found.to(tokens.device)

    def accepts(self, tokens: Tensor, proposed: Tensor) -> Tensor:
        accepted = proposed >= 0
        for row, (canvas, wanted) in enumerate(zip(tokens.tolist(), proposed.tolist())):
            answer = self._answer(canvas, row)
            new = wanted[self.start : self.ends[row]]
            if not any(token >= 0 for token in new):
                continue
            behind = self._behind(answer)
            states = self._first()
            for place, token in enumerate(new):
                if token >= 0:
                    after = self.machine.after(states, token)
                    if _meet(after, behind[place + 1]):
                        states = after
                        continue
                    accepted[row, self.start + place] = False
                states = self.machine.after(states, answer[place])
        return accepted

    def _answer(self, canvas: Sequence[int], row: int) -> list[int | None]:
        """Return the tokens of a row's answer, None where they are masked."""
        part = canvas[self.start : self.ends[row]]
        return [None if token == self.mask else token for token in part]

    def _first(self) -> bytes:
        states = np.zeros(len(self.machine.final), dtype=bool)
        states[self.machine.start] = True
        return states.tobytes()

    def _behind(self, answer: Sequence[int | None]) -> list[bytes]:
        """Return, for each column and for the end of the answer, the states before it that can reach a final state."""
        found = [self.machine.final.tobytes()]
        for token in reversed(answer):
            found.append(self.machine.before(found[-1], token))
        return found[::-1]

    def _before(self, answer: Sequence[int | None], behind: Sequence[bytes]) -> list[bytes]:
        """Return, for each column and for the end of the answer, the states reachable through the columns before it."""
        found = [self._first()]
        if not _meet(found[0], behind[0]):
            raise ValueError(
                f"constraint: no answer of exactly {len(answer)} tokens satisfies {self.name} and keeps the tokens "
                "already in it; without an end token, or with given tokens, an answer must fill its canvas"
            )
        for token in answer:
            found.append(self.machine.after(found[-1], token))
        return found


def _meet(some: bytes, others: bytes) -> bool:
    return bool((np.frombuffer(some, dtype=bool) & np.frombuffer(others, dtype=bool)).any())
