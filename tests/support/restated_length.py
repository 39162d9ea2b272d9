# SPDX-License-Identifier: Apache-2.0
"""Decoders that change the length, restated in plain Python: one request at a time, its positions in a list.

Like `published.py` they follow the papers and programs at temperature 0, with the differences that are listed there.
A model is a callable `model(tokens[1, T])` that returns logits `[1, T, V]`, or a pair that begins with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from published import blocks_of, forward, ranking, shifted


@dataclass
class Position:
    """What is known of one position."""

    token: int
    is_open: bool
    step: int = -1
    confidence: float = 0.0
    original: bool = True


class Text:
    """A request whose positions come and go.

    `slack` is how little was missing for any decision to come out otherwise, as in `published.Request`.
    """

    def __init__(self, canvas: Tensor, mask: int):
        self.mask = mask
        self.row = [Position(int(t), int(t) == mask) for t in canvas]
        self.num_forwards, self.slack = 0, math.inf

    tokens = property(lambda self: torch.tensor([x.token for x in self.row]))
    commit_step = property(lambda self: torch.tensor([x.step for x in self.row], dtype=torch.int32))
    confidence = property(lambda self: torch.tensor([x.confidence for x in self.row]))

    def new(self) -> Position:
        return Position(self.mask, True, original=False)

    def open(self, start: int = 0, end: int | None = None) -> list[int]:
        end = len(self.row) if end is None else end
        return [i for i in range(start, min(end, len(self.row))) if self.row[i].is_open]

    def write(self, i: int, token: int, confidence: float) -> None:
        """Commit or replace."""
        x = self.row[i]
        if not x.is_open and x.token == token:
            return
        if x.is_open:
            x.step = self.num_forwards
        x.token, x.is_open, x.confidence = token, False, confidence

    def note(self, *distances: float) -> None:
        self.slack = min((self.slack, *distances))

    def best(self, score: dict[int, float], count: int) -> list[int]:
        """The `count` positions of the largest score."""
        at = list(score)
        order = [at[k] for k in ranking(list(score.values()))]
        if 0 < count < len(order):
            self.note(score[order[count - 1]] - score[order[count]])
        return order[:count]

    def above(self, values: dict[int, float], bar: float) -> list[int]:
        self.note(*(abs(v - bar) for v in values.values()))
        return [i for i, v in values.items() if v > bar]


class Said:
    """Token and probability of every position, from logits `[T, V]` without what must not be proposed."""

    def __init__(self, text: Text, z: Tensor, never: list[int]):
        self.z = z.float().index_fill(1, torch.tensor(never), -torch.inf)
        self.p_all = torch.softmax(self.z, -1)
        self.token, self.p = self.z.argmax(-1).tolist(), self.p_all.amax(-1).tolist()
        self.entropy = torch.special.entr(self.p_all).sum(-1).tolist()
        two = self.z.topk(2).values
        self.lead = (two[:, 0] - two[:, 1]).tolist()
        self.text = text

    def other(self, i: int, never: set[int]) -> tuple[int, float]:
        """The likeliest token of position i but for these, and its probability among all."""
        z = self.z[i].index_fill(0, torch.tensor(sorted(never)), -torch.inf)
        two = z.topk(2).values
        self.text.note((two[0] - two[1]).item())
        return int(z.argmax()), self.p_all[i, int(z.argmax())].item()


def expanding(
    model: Callable, canvas: Tensor, mask: int, *, expand: int, delete: list[int], most: int, count: int = 1,
    budget: int | None = None, shift: bool = True, score: str = "entropy", block: int | None = None,
) -> Text:  # fmt: skip
    """DreamOn's infilling (arXiv:2602.01326, eval/generator.py of its repository), of several tokens a forward too.

    `block`: of so many columns from the first mask on, the first that has a mask is decoded.
    """
    text = Text(canvas, mask)
    masks = text.open()
    limit, budget = len(canvas) - len(masks) + most, 2 * most if budget is None else budget
    first = masks[0] if masks else 0
    while open_ := text.open():
        z, _ = forward(model, text.tokens)
        room = min(limit - len(text.row), budget)
        said = Said(text, shifted(z) if shift else z, [mask] if room > 0 else [mask, expand])
        if block:
            begin = first + (open_[0] - first) // block * block
            open_ = [i for i in open_ if i < begin + block]
        chosen = text.best({i: -said.entropy[i] if score == "entropy" else said.p[i] for i in open_}, count)
        text.note(*(said.lead[i] for i in chosen))
        row = []
        for i, x in enumerate(text.row):
            if i in chosen and said.token[i] == expand:
                if room > 0:
                    row.append(text.new())
                    room, budget = room - 1, budget - 1
                row.append(x)
                continue
            if i in chosen and said.token[i] in delete:
                continue
            if i in chosen:
                text.write(i, said.token[i], said.p[i])
            row.append(x)
        text.row = row
        text.num_forwards += 1
    return text


def lengthening(
    model: Callable, prompt: Tensor, mask: int, *, eos: list[int], most: int, block: int | None, first: int = 64,
    growth: int = 8, window: int = 32, enough: float = 0.5, certain: float = 0.9, high: float = 0.9, low: float = 0.1,
) -> Text:  # fmt: skip
    """DAEDAL (arXiv:2508.00819, models/LLaDA_DAEDAL.py of its repository).

    Differs from the program: at the largest length only what fits is inserted (the program inserts all and cuts what is
    pushed beyond the end off), and a request does not depend on others.
    """
    start = len(prompt)
    text = Text(torch.cat((prompt, prompt.new_full((min(first, most),), mask))), mask)
    block = block or most

    def look() -> tuple[Said, float]:
        said = Said(text, forward(model, text.tokens)[0], [mask])
        text.num_forwards += 1
        ends = [i for i in range(start, len(text.row)) if said.token[i] in eos]
        for i in range(start, len(text.row)):
            if set(said.z[i].topk(2).indices.tolist()) & set(eos):
                text.note(said.lead[i])
        return said, sum(said.p[i] for i in ends[-window:]) / window

    def grow(count: int) -> None:
        text.row += [text.new() for _ in range(min(count, start + most - len(text.row)))]

    while True:
        _, confidence = look()
        text.note(abs(confidence - enough))
        if confidence >= enough or len(text.row) == start + most:
            break
        grow(growth)
    grow(window // 2)
    while open_ := text.open():
        said, confidence = look()
        text.num_forwards -= 1  # of the forward that commits
        text.note(abs(confidence - certain))
        begin = start + (open_[0] - start) // block * block
        p = {i: said.p[i] for i in text.open(begin, begin + block)}
        chosen = text.above(p, high) or text.best(p, 1)
        text.note(*(said.lead[i] for i in chosen))
        for i in chosen:
            text.write(i, said.token[i], said.p[i])
        rest = {i: q for i, q in p.items() if i not in chosen}
        text.note(*(abs(q - low) for q in rest.values()))
        doubted = {i: -q for i, q in rest.items() if q < low}
        if doubted and confidence < certain and len(text.row) < start + most:
            (at,) = text.best(doubted, 1)
            room = start + most - len(text.row)
            text.row[at:at] = [text.new() for _ in range(min(growth - 1, room))]
        text.num_forwards += 1
    return text


def split_editing(
    model: Callable, canvas: Tensor, start: int, mask: int, *, delete: int, split: int, threshold: float,
    edit_threshold: float, post: int, block_length: int | None = None, blocks: list[tuple[int, int]] | None = None,
    seen_anew: list | None = None,
) -> Text:  # fmt: skip
    """LLaDA2.2's blocks as SGLang serves them (dllm/algorithm/joint_threshold_indel.py).

    Differs from the program: the mask is never proposed, neither at masks that were inserted nor in place of a token.
    `seen_anew` is told the forwards in which a block had come back and a change was varied.
    """
    text = Text(canvas, mask)
    for begin, end in blocks or blocks_of(start, len(canvas), block_length):
        free = [i for i in range(begin, end) if i >= start]
        for i in free:
            text.row[i].original = True
        seen, tried, after = set(), {}, 0
        for index in range(end - begin + post + 1):
            said = Said(text, forward(model, text.tokens)[0], [mask])
            masks = [i for i in free if text.row[i].is_open]
            original = [i for i in masks if text.row[i].original]
            after += not original
            final = after >= post > 0 or (post == 0 and not original) or index == end - begin + post
            confidence = {i: said.p[i] for i in masks}
            commit = masks
            if original and not final:
                need = len(masks) - len(original) + 1
                commit = text.above(confidence, threshold)
                if len(commit) < need:
                    commit = text.best(confidence, need)
            if post == 0 and set(original) <= set(commit):
                final, commit = True, masks
            decided = [i for i in free if not text.row[i].is_open and said.token[i] != text.row[i].token]
            edit = text.above({i: said.p[i] for i in decided}, edit_threshold)
            token = {i: (said.token[i], said.p[i]) for i in commit + edit}
            text.note(*(said.lead[i] for i in free))
            state = tuple(x.token for x in text.row[begin:end])
            if token and final:
                for i, (t, _) in token.items():
                    if t in (delete, split):
                        token[i] = said.other(i, {delete, split})
            elif token and state in seen:
                change = {i: -said.p[i] for i, (t, _) in token.items() if t != text.row[i].token}
                if change:
                    (at,) = text.best(dict(sorted(change.items())), 1)
                    token[at] = said.other(at, tried.get(at, set()) | {mask})
                    if seen_anew is not None:
                        seen_anew.append(text.num_forwards)
            seen.add(state)
            row = text.row[:begin]
            for i in range(begin, end):
                t, p = token.get(i, (None, 0.0))
                if t is not None:
                    tried.setdefault(i, set()).add(t)
                if t == delete:
                    continue
                if t == split:
                    row.append(text.new())
                elif t is not None:
                    text.write(i, t, p)
                row.append(text.row[i])
            row += [text.new() for _ in range(end - len(row))]
            text.row = row[:end] + text.row[end:]
            text.num_forwards += 1
            if final or not token:
                break
    return text
