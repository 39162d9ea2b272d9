# SPDX-License-Identifier: Apache-2.0
"""Rules that take tokens back, restated in plain Python: one request at a time, position by position.

Each restatement is an `act(request, view, state)` that changes the request and says whether its block goes on;
`revise` is the loop around it. Chances are drawn from the same counter-based bits as the ops use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmkernels import reference
from published import Request, blocks_of, ranking


@dataclass
class View:
    """What one forward says of the positions of a block that were not given: dicts by canvas position."""

    index: int
    num_steps: int
    start: int  # of the decoding, in the canvas
    token: dict[int, int]
    argmax: dict[int, int]
    p: dict[int, float]
    p_argmax: dict[int, float]
    entropy: dict[int, float]
    logits: dict[int, Tensor]


class Revised(Request):
    """A request whose tokens may change again."""

    def __init__(self, canvas: Tensor, mask: int, seed: int = 0):
        super().__init__(canvas, mask)
        self.is_open, self.seed = (canvas == mask).tolist(), seed

    def write(self, i: int, view: View, likeliest: bool = False) -> None:
        """Commit or edit position i."""
        token = view.argmax[i] if likeliest else view.token[i]
        if not self.is_open[i] and self.tokens[i] == token:
            return
        if self.is_open[i]:
            self.commit_step[i] = self.num_forwards
        self.tokens[i], self.is_open[i] = token, False
        self.confidence[i] = view.p_argmax[i] if likeliest else view.p[i]
        two = view.logits[i].topk(2).values
        if likeliest or token == view.argmax[i]:
            self.note((two[0] - two[1]).item())

    def take_back(self, i: int, token: int | None = None) -> None:
        """Open position i again, with the mask or with noise."""
        self.tokens[i] = self.mask if token is None else token
        self.commit_step[i], self.confidence[i], self.is_open[i] = -1, 0.0, True

    def bits(self, i: int, stream: str, index: Tensor | int = 0, step: int | None = None) -> Tensor:
        at = [torch.tensor(x) for x in (self.seed, i, self.num_forwards if step is None else step)]
        return reference.philox(*at, stream, torch.as_tensor(index))

    def flips(self, i: int, chance: float) -> bool:
        return bool(reference.bernoulli(self.bits(i, "bernoulli"), torch.tensor(chance, dtype=torch.float32)))

    def gap(self, score: list[float], count: int) -> None:
        """Note how far the `count` best are from the rest."""
        order = sorted(score, reverse=True)
        if 0 < count < len(order):
            self.note(order[count - 1] - order[count])


def revise(
    model: Callable, canvas: Tensor, start: int, mask: int, act: Callable, *, block_length: int | None = None,
    steps: int | None = None, max_steps: Callable = lambda length, planned: max(length, planned), seed: int = 0,
    temperature: Callable | None = None, embed: Callable | None = None, noise: bool = False,
    blocks: list[tuple[int, int]] | None = None,
) -> Revised:  # fmt: skip
    """Decode `[start, end)` block by block; a block goes on while `act` says so, for at most `max_steps` forwards.

    `blocks` are ranges of the canvas; by default blocks of `block_length` from `start` on.
    """
    request = Revised(canvas, mask, seed)
    vocab = None
    if noise:
        vocab = model(canvas[None])[0].shape[2]
        for i in range(start, len(canvas)):
            request.tokens[i] = reference.uniform_below(request.bits(i, "renoise", step=-1), vocab)
    blocks = blocks or blocks_of(start, len(canvas), block_length)
    for begin, end in blocks:
        free = [i for i in range(begin, end) if request.is_open[i]]
        planned, state = (steps // len(blocks) if steps else end - begin), {"vocab": vocab, "blocks": blocks}
        for index in range(max_steps(end - begin, planned) if free else 0):
            embeds = embed(request, state) if embed else None
            z = model(request.tokens[None], **({} if embeds is None else {"embeds": embeds[None]}))[0][0][free]
            z = z.index_fill(1, torch.tensor([mask]), -torch.inf)
            tau = temperature(index, planned) if temperature else None
            p = torch.softmax(z if tau is None else z / tau, -1)
            argmax = z.argmax(-1)
            token = argmax
            if tau is not None:
                ids = torch.arange(z.shape[1])
                g = torch.stack([reference.gumbel(request.bits(i, "token", ids)) for i in free])
                perturbed = z * (1 / torch.tensor(tau)) + g
                token = perturbed.argmax(-1)
                two = perturbed.topk(2).values
                request.note((two[:, 0] - two[:, 1]).min().item())
            view = View(
                index, planned, start, *(dict(zip(free, x.tolist())) for x in (
                    token, argmax, p.gather(1, token[:, None])[:, 0], p.gather(1, argmax[:, None])[:, 0],
                    torch.special.entr(p).sum(-1),
                )), dict(zip(free, z)),
            )  # fmt: skip
            goes_on = act(request, view, state)
            request.num_forwards += 1
            if not goes_on:
                break
    return request


def threshold_commits(request: Revised, view: View, tau: float, strict: bool = True) -> list[int]:
    """Open positions above tau, at least the best."""
    is_open = [i for i in view.p if request.is_open[i]]
    score = [view.p[i] for i in is_open]
    request.note(*(abs(s - tau) for s in score))
    above = [i for i in is_open if view.p[i] > tau]
    if not above:
        request.gap(score, 1)
        above = [is_open[k] for k in ranking(score)[:1]]
    return above


def token_editing(tau: float, tau_edit: float, max_post_steps: int) -> Callable:
    """LLaDA2.1: commits above one threshold, edits above the other, some more edits when complete."""

    def act(request: Revised, view: View, state: dict) -> bool:
        was_complete = not any(request.is_open[i] for i in view.p)
        state["post"] = state.get("post", 0) + was_complete
        commits = threshold_commits(request, view, tau)
        decided = [i for i in view.p if not request.is_open[i]]
        request.note(*(abs(view.p[i] - tau_edit) for i in decided if view.token[i] != request.tokens[i]))
        edits = [i for i in decided if view.p[i] > tau_edit and view.token[i] != request.tokens[i]]
        for i in (*commits, *edits):
            request.write(i, view)
        if any(request.is_open[i] for i in view.p):
            return True
        return state["post"] < max_post_steps and (bool(edits) or not was_complete)

    return act


def run_editing(tau: float, sure: float) -> Callable:
    """DMax: the leading run of open positions, and every decided token anew."""

    def act(request: Revised, view: View, state: dict) -> bool:
        commits = []
        for i in [i for i in view.p if request.is_open[i]]:
            if commits:
                request.note(abs(view.p[i] - tau))
            if commits and view.p[i] < tau:
                break
            commits.append(i)
            if view.p[i] < tau:  # the first is taken in any case, and ends the run if it fails
                break
        edits = [i for i in view.p if not request.is_open[i] and view.token[i] != request.tokens[i]]
        for i in view.p:
            if i in commits or not request.is_open[i]:
                request.write(i, view)
        state["soft"] = {i: (view.token[i], view.p[i]) for i in view.p if not request.is_open[i]}
        if any(request.is_open[i] for i in view.p):
            return True
        request.note(*(abs(p - sure) for p in view.p.values()))
        return bool(commits or edits) and not all(p >= sure for p in view.p.values())

    return act


def soft_inputs(table: Tensor, mask: int) -> Callable:
    """DMax' input embeddings: between the token and the mask, as long as both together are."""

    def embed(request: Revised, state: dict) -> Tensor:
        x = table[request.tokens].clone()
        for i, (token, p) in state.get("soft", {}).items():
            mix = p * table[token] + (1 - p) * table[mask]
            x[i] = mix / mix.norm() * (p * table[token].norm() + (1 - p) * table[mask].norm())
        return x

    return embed


def wino(
    plain: Callable, canvas: Tensor, start: int, mask: int, *, block_length: int, tau: float, tau_back: float,
    blind: bool = True,
) -> Revised:  # fmt: skip
    """WINO: tokens are verified by masks at their places which do not see them.

    `plain(tokens, visible, positions)` returns the logits of all rows. `blind=False`: the masks see the tokens.
    """
    request, length = Revised(canvas, mask), len(canvas)
    for begin, end in blocks_of(start, length, block_length):
        n, last = end - begin, 30
        visible = torch.zeros(length + n, length + n, dtype=torch.bool)
        visible[:, :length] = True
        visible[length:, length:] = True
        for i in range(n):
            visible[length + i, begin + i] = not blind
        positions = torch.tensor([*range(length), *range(begin, end)])
        tokens_of = torch.full((n,), mask)
        while opened := [i for i in range(begin, end) if request.is_open[i]]:
            z = plain(torch.cat((request.tokens, tokens_of))[None], visible, positions)[0]
            p = torch.softmax(z.index_fill(1, torch.tensor([mask]), -torch.inf), -1)
            best = p.max(-1)
            order = sorted(opened, key=lambda i: (-best.values[i], i))
            above = [i for i in order if best.values[i] > tau]
            request.note(*(abs(best.values[i].item() - tau) for i in opened))
            most = min(max(int(len(opened) * 7 / 10), 5), 20)
            commits = above[:most] or order[:1]
            request.gap([best.values[i].item() for i in opened], len(commits))
            decided = [i for i in range(begin, end) if not request.is_open[i]]
            doubt = {i: p[length + i - begin, request.tokens[i]].item() for i in decided}
            back = []
            if len(commits) > 1:
                request.note(*(abs(v - tau_back) for v in doubt.values()))
                back = sorted((i for i in decided if doubt[i] < tau_back), key=lambda i: (doubt[i], i))
                if len(back) >= last:
                    request.gap([-doubt[i] for i in back], last - 1)
                    back = back[: last - 1]
            for i in commits:
                request.tokens[i], request.is_open[i] = best.indices[i], False
                request.commit_step[i], request.confidence[i] = request.num_forwards, best.values[i]
                two = z[i].topk(2).values
                request.note((two[0] - two[1]).item())
            for i in back:
                request.take_back(i)
            last = len(commits)
            request.num_forwards += 1
    return request


def backtracking(n: int, quirk: bool = False) -> Callable:
    """Saber: a threshold at the mean of the commit confidences; the positions that gained least are opened again.

    `quirk`: the mean is over the last commitment of every position, of those that are open again too.
    """

    def act(request: Revised, view: View, state: dict) -> bool:
        decided = [i for i in range(len(request.tokens)) if request.commit_step[i] >= 0]
        committed = {i: request.confidence[i].item() for i in decided}
        if quirk:
            state["all"] = committed = state.get("all", {}) | committed
        tau = sum(committed.values()) / len(committed) if committed else 1.0
        is_open = [i for i in view.p if request.is_open[i]]
        score = [view.p[i] for i in is_open]
        request.note(*(abs(s - tau) for s in score))
        commits = [i for i in is_open if view.p[i] > tau]
        if len(commits) < n:
            request.gap(score, n)
            commits = [is_open[k] for k in ranking(score)[:n]]
        for i in commits:
            request.write(i, view)
            state.setdefault("all", {})[i] = view.p[i]
        before = state.setdefault("before", {})
        gain = {i: view.p[i] - before.get(i, 0.0) for i in view.p}
        state["before"] = dict(view.p)
        if not any(request.is_open[i] for i in view.p):
            return False
        back = min(max(n // 2, -(-len(commits) // 8)), len(commits) - 1)
        candidates = [i for i in view.p if not request.is_open[i]]
        request.gap([-gain[i] for i in candidates], back)
        for k in ranking([-gain[i] for i in candidates])[:back]:
            request.take_back(candidates[k])
        return True

    return act


def path_planning(stickiness: float) -> Callable:
    """P2: at each step the least likely of all positions are masked, ever fewer."""

    def act(request: Revised, view: View, state: dict) -> bool:
        left = view.num_steps - 1 - view.index
        count = len(view.p) * left // view.num_steps
        score = {i: math.log(p) * (1 if request.is_open[i] else stickiness) for i, p in view.p.items()}
        positions = list(view.p)
        request.gap([-score[i] for i in positions], count)
        low = {positions[k] for k in ranking([-score[i] for i in positions])[:count]}
        for i in positions:
            if i in low and not request.is_open[i]:
                request.take_back(i)
            elif i not in low and request.is_open[i]:
                request.write(i, view)
        return left > 0

    return act


def remdm(strategy: str, eta: float, t_on: float, t_off: float, alpha_on: float, eps: float) -> Callable:
    """ReMDM: two Bernoulli choices, one for open and one for decided positions."""

    def alpha(t: float) -> float:
        if strategy == "loop" and t > t_on:
            return alpha_on * (1 - t) / (1 - t_on)
        if strategy == "loop" and t > t_off:
            return alpha_on
        return 1 - t * (1 - alpha_on) / t_off if strategy == "loop" else 1 - t

    def act(request: Revised, view: View, state: dict) -> bool:
        if view.index == view.num_steps - 1:
            for i in view.p:
                if request.is_open[i]:
                    request.write(i, view, likeliest=True)
            return False
        width = (1 - eps) / (view.num_steps - 1)
        t = 1 - width * view.index
        s = max(t - width, eps)
        a_t, a_s = alpha(t), alpha(s)
        most = (1 - a_s) / a_t if a_t > 0 else math.inf
        decided = [i for i in view.p if not request.is_open[i]]
        weight = {i: math.exp(-request.confidence[i].item()) for i in decided}
        sigma = {
            "cap": min(eta, most), "rescale": eta * min(1, most), "conf": 0.0,
            "loop": min(eta, most) if t_off < t <= t_on else 0.0,
        }[strategy]  # fmt: skip
        for i in view.p:
            if request.is_open[i]:
                if request.flips(i - view.start + state["offset"], (a_s - (1 - sigma) * a_t) / (1 - a_t)):
                    request.write(i, view)
            else:
                chance = min(1, most) * weight[i] / sum(weight.values()) if strategy == "conf" else sigma
                if request.flips(i - view.start + state["offset"], chance):
                    request.take_back(i)
        return True

    return act


def renoising(bound: float, stability: int, limit: float) -> Callable:
    """DiffusionGemma: samples where entropies are least, noise elsewhere, until the likeliest tokens are stable."""

    def act(request: Revised, view: View, state: dict) -> bool:
        positions = list(view.p)
        order = [positions[k] for k in ranking([-view.entropy[i] for i in positions])]
        total, accepted = 0.0, set()
        for i in order:
            request.note(abs(total - bound))
            if accepted and total > bound:
                break
            accepted.add(i)
            total += view.entropy[i]
        now = [view.argmax[i] for i in positions]
        state["same"] = state["same"] + 1 if state.get("now") == now else 0
        state["now"] = now
        mean = sum(view.entropy.values()) / len(positions)
        request.note(abs(mean - limit))
        ends = (state["same"] >= stability and mean < limit) or view.index == view.num_steps - 1
        for i in positions:
            if ends:
                request.write(i, view, likeliest=True)
            elif i in accepted:
                request.write(i, view)
            else:
                request.take_back(i, int(reference.uniform_below(request.bits(i, "renoise"), state["vocab"])))
        return not ends

    return act
