# SPDX-License-Identifier: Apache-2.0
"""Rules that take decided tokens back: edit them, mask them again, or put noise in their place.

Their windows hold all positions of the block that were not given, so that the model's opinion of the decided ones is
heard too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ... import ops
from ..checks import Check, amount, flag, integer, number, one_of, temperature
from .ancestral import TimeGrid
from .base import SHARE, Action, Rule, row_mean

if TYPE_CHECKING:
    from ..step import Step


@dataclass(frozen=True)
class TokenEditing(Rule):
    """Commit above one threshold, replace decided tokens above another, and go on editing when all are decided.

    LLaDA2.1 (arXiv:2602.08676), "joint threshold": everything open that is more confident than `threshold`, at least
    the best; every decided position whose proposal is another token and more confident than `edit_threshold`. A
    complete block gets up to `max_post_steps` more forwards, until one of them edits nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {
        "threshold": number(), "edit_threshold": number(), "max_post_steps": integer(0),
    }  # fmt: skip

    threshold: float = 0.95
    edit_threshold: float = 0.9
    max_post_steps: int = 16

    def act(self, step: Step) -> Action:
        commit = step.select("threshold", parameter=self.threshold, strict=True, need=1, fill=1)
        edit = step.decided & (step.confidence > self.edit_threshold) & (step.token != step.current)
        was_complete = step.open_now == 0
        post_steps = step.memory.get("post steps", torch.zeros_like(step.open_now)) + was_complete
        step.memory["post steps"] = post_steps
        may_go_on = (post_steps < self.max_post_steps) & (edit.any(1) | ~was_complete)
        return Action(commit, edit, working=(step.open_now > commit.sum(1)) | may_go_on)

    def max_steps(self, length: int, num_steps: int) -> int:
        return length + self.max_post_steps


@dataclass(frozen=True)
class SplitEditing(Rule):
    """Edit a block of fixed size by its tokens, and by two that insert and delete.

    LLaDA2.2 as SGLang serves it ("joint threshold" with insertion and deletion; github.com/sgl-project/sglang). As in
    `TokenEditing`, what is open is committed and decided tokens are replaced; but where the proposal is the split token
    a mask is put before what stands there, and where it is the delete token the position is taken out. The block keeps
    its size: what is pushed beyond its end is lost, and masks come in at its end when it shrinks.

    While masks are left that the block began with, a forward commits everything open that is more confident than
    `threshold`, at least one more than there are inserted masks (the best); then all masks. Decided tokens are replaced
    if the proposal is another and more confident than `edit_threshold`. Where a block has been as it is before, the
    least confident change takes a token that has not been tried there. A block ends with a forward that changes
    nothing, or with one that commits everything and neither splits nor deletes: the `max_post_steps`-th without a mask
    of the first ones, or the last of ``length + max_post_steps + 1``.

    Attributes
    ----------
    threshold, edit_threshold : float
        What the confidence must exceed to commit, and to replace.
    max_post_steps : int
        At least 0.
    delete_token_id, split_token_id : int, optional
        Taken from the model's configuration where None.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    decodes: ClassVar[str] = "continuations"
    token_ids: ClassVar[dict[str, bool]] = {"delete_token_id": True, "split_token_id": True}
    limits: ClassVar[Mapping[str, Check]] = {
        **TokenEditing.limits,
        **{name: integer(0, optional=True) for name in ("delete_token_id", "split_token_id")},
    }  # fmt: skip

    threshold: float = 0.5
    edit_threshold: float = 0.0
    max_post_steps: int = 16
    delete_token_id: int | None = None
    split_token_id: int | None = None

    def act(self, step: Step) -> Action:
        memory, is_open = step.memory, step.is_open
        original = memory.get("original", is_open.long())
        from_start = is_open & (original != 0)
        num_open, num_from_start = is_open.sum(1), from_start.sum(1)
        post_steps = memory.get("post steps", torch.zeros_like(num_open)) + (num_from_start == 0)

        # which positions are written
        is_last = step.index >= step.block_length + self.max_post_steps
        cleans = (post_steps >= max(self.max_post_steps, 1)) | step.everyone(is_last)
        least = num_open - num_from_start + 1
        commit = step.select("threshold", parameter=self.threshold, strict=True, need=least, fill=least)
        commit = torch.where((cleans | (num_from_start == 0))[:, None], is_open, commit)
        if self.max_post_steps == 0:
            cleans = cleans | ~(from_start & ~commit).any(1)
            commit = torch.where(cleans[:, None], is_open, commit)
        edit = step.decided & (step.confidence > self.edit_threshold) & (step.token != step.current)
        written = commit | edit

        # what is written there
        token = torch.where(cleans[:, None], self._without_controls(step), step.token)
        token = self._varied(step, token, written, ~cleans)
        tried = torch.where(written, token, -1)[:, None]
        memory["tried"] = torch.cat((memory["tried"], tried), 1) if "tried" in memory else tried
        splits = written & (token == self.split_token_id)
        deletes = written & (token == self.delete_token_id)
        insert = splits.int()
        ops.splice_(original, torch.zeros_like(step.block_start), insert=insert, remove=deletes, fill_token_id=0)
        memory["original"], memory["post steps"] = original, post_steps
        plain = ~splits & ~deletes
        return Action(
            commit & plain, edit & plain, token=token, confidence=step.probability_of(token), insert=insert,
            remove=deletes, working=written.any(1) & ~cleans,
        )  # fmt: skip

    def _without_controls(self, step: Step) -> Tensor:
        """Proposals other than the two tokens that insert and delete, int64 `[B, W]`."""
        assert self.delete_token_id is not None and self.split_token_id is not None
        bias = torch.zeros(1, 1, step.vocab_size, device=step.token.device)
        bias[..., self.delete_token_id] = bias[..., self.split_token_id] = -torch.inf
        return step.again(bias).token

    def _varied(self, step: Step, token: Tensor, written: Tensor, where: Tensor) -> Tensor:
        """The tokens with another at the least confident change, in requests of bool `[B]` whose block was so before.

        It is the likeliest of those that have not been tried at this place.
        """
        block = torch.where(step.used, step.current, -1)[:, None]
        seen = step.memory.get("seen", block[:, :0])
        step.memory["seen"] = torch.cat((seen, block), 1)
        if "tried" not in step.memory:
            return token
        repeats = (seen == block).all(2).any(1) & where
        changes = written & (token != step.current)
        slot = torch.where(changes, step.confidence, torch.inf).argmin(1, keepdim=True)
        tried = step.memory["tried"].gather(2, slot[:, None].expand(-1, seen.shape[1], 1))[:, :, 0]
        rows = torch.arange(token.numel(), device=token.device).view(token.shape).gather(1, slot)[:, 0]
        fresh = ops.token_confidence(step.proposer.clean(step.raw_logits, rows), banned=tried.contiguous()).token
        replaced = torch.where(repeats & changes.any(1) & (fresh >= 0), fresh, token.gather(1, slot)[:, 0])
        return token.scatter(1, slot, replaced[:, None])

    def max_steps(self, length: int, num_steps: int) -> int:
        return length + self.max_post_steps + 1


@dataclass(frozen=True)
class RunEditing(Rule):
    """Commit the leading run of open positions that are sure enough, and overwrite every decided token each step.

    DMax (Chen et al., arXiv:2604.08302): from the left, open positions as long as their confidence is at least
    `threshold`, at least one; every decided position takes its proposal. At the next forward a decided position is
    embedded by how sure it is, ``p E[token] + (1 - p) E[mask]``, stretched to the length
    ``p |E[token]| + (1 - p) |E[mask]|``. A block ends when nothing is open and either nothing has changed or all of
    it is at least `sure`; at the latest after twice as many forwards as it has positions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {"threshold": number(), "sure": number(), "soft": flag}

    threshold: float = 0.5
    sure: float = 0.9
    soft: bool = True

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"order_temperature"})

    def act(self, step: Step) -> Action:
        score = step.candidates
        possible = score > -torch.inf
        run = (~possible | (score >= self.threshold)).cumprod(1).bool()
        commit = possible & (run | (possible.cumsum(1) == 1))
        edit = step.decided & (step.token != step.current)
        is_sure = (~step.used | (step.confidence >= self.sure)).all(1)
        changed = (commit | edit).any(1)
        working = (step.open_now > commit.sum(1)) | (changed & ~is_sure)
        if not self.soft:
            return Action(commit, edit, working=working)
        where = (step.decided | commit) & (step.token >= 0)
        return Action(commit, edit, embeds=self._soft_embedding(step), embedded=where, working=working)

    def _soft_embedding(self, step: Step) -> Tensor:
        token, mask = step.embed(step.token.clamp(min=0)), step.embed(torch.full_like(step.token, step.mask_token))
        p = step.confidence.clamp(0, 1)[..., None]
        mix = p * token + (1 - p) * mask
        length = p * token.norm(dim=-1, keepdim=True) + (1 - p) * mask.norm(dim=-1, keepdim=True)
        return mix * (length / mix.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def max_steps(self, length: int, num_steps: int) -> int:
        return 2 * length


@dataclass(frozen=True)
class Backtracking(Rule):
    """Commit what is surer than the tokens so far were on average, and take back what has gained least.

    Saber (Dong et al., arXiv:2510.18165): everything open that is more confident than the mean confidence with which
    the decided tokens were committed, or the best `count` if those are fewer; then, unless the block is complete,
    ``min(max(count // 2, ceil(committed / 8)), committed - 1)`` decided positions are masked again, those whose
    confidence has grown least since the step before.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {"count": integer(1)}

    count: int = 2

    def act(self, step: Step) -> Action:
        decided_before = step.canvas.commit_step >= 0
        mean = row_mean(step.canvas.confidence, decided_before)
        bar = torch.where(decided_before.any(1), mean, torch.ones_like(mean))
        commit = step.select("threshold", parameter=bar, strict=True, need=self.count, fill=self.count)
        committed = commit.sum(1)
        back = torch.minimum(((committed + 7) // 8).clamp(min=self.count // 2), committed - 1)
        back = back.masked_fill(step.open_now == committed, 0)
        gain = step.confidence - step.recall("confidence")
        step.keep("confidence", step.confidence)
        remask = step.select("none", score=-gain, eligible=step.decided | commit, fill=back)
        return Action(commit, remask=remask)


@dataclass(frozen=True)
class WideInNarrowOut(Rule):
    """Commit freely, and take back what the model, not seeing it, would not say again.

    WINO (Hong et al., arXiv:2507.18578): with n open positions, everything more confident than `threshold`, at most
    ``min(max(0.7 n, 5), 20)``, at least the best. Where that is more than one, decided positions whose token has a
    probability below `back_threshold`, given everything but itself, are masked again: the least likely, and fewer than
    the step before has committed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"p_current"})
    slots: ClassVar[str] = "block"
    shadow: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {"threshold": number(), "back_threshold": number()}

    threshold: float = 0.6
    back_threshold: float = 0.9

    def act(self, step: Step) -> Action:
        most = (step.open_now * 7 // 10).clamp(5, 20)
        commit = step.select("threshold", parameter=self.threshold, strict=True, need=1, fill=1, cap=most)
        committed = commit.sum(1)
        back = step.memory.get("committed", torch.full_like(committed, 30)) - 1
        step.memory["committed"] = committed
        remask = step.select(
            "threshold", score=-step.p_current, eligible=step.decided, parameter=-self.back_threshold, strict=True,
            need=0, fill=0, cap=back.masked_fill(committed < 2, 0),
        )  # fmt: skip
        return Action(commit, remask=remask)


@dataclass(frozen=True)
class PathPlanning(Rule):
    """Keep a growing share of all positions, the surest; mask the rest again.

    P2 (Peng et al., arXiv:2502.03540), self-planning: at step i of S the ``n (S - 1 - i) // S`` of all n positions
    with the lowest ``ln p(proposal)`` are masked or stay so, where the logarithm counts `stickiness` times at decided
    positions: above 1 they are taken back more readily, at 0 never. The other open positions take their proposals.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {"stickiness": amount}

    stickiness: float = 1.0

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids"})

    def act(self, step: Step) -> Action:
        left = max(step.num_steps - 1 - step.index, 0)
        score = step.confidence.log()
        score = torch.where(step.decided, self.stickiness * score, score)
        masked = step.used.sum(1) * left // step.num_steps
        low = step.select("none", score=-score, eligible=step.used, fill=masked)
        return Action(step.is_open & ~low, remask=step.decided & low, working=step.everyone(left > 0))

    @property
    def uses_steps(self) -> bool:
        return True

    def max_steps(self, length: int, num_steps: int) -> int:
        return num_steps


@dataclass(frozen=True)
class AncestralRemask(TimeGrid):
    """The reverse process with remasking: decided positions are masked again with probability sigma.

    ReMDM (Wang et al., arXiv:2503.00307). With ``alpha(t) = 1 - t``, an open position is decided with probability
    ``(alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t))``, which keeps the marginals of the forward process. With
    ``most = (1 - alpha(s)) / alpha(t)``, the largest sigma that is possible, `strategy` is

    - "cap": ``sigma = min(eta, most)``;
    - "rescale": ``sigma = eta min(1, most)``;
    - "conf": ``sigma = min(1, most)`` shared among the decided positions in proportion to ``exp(-p)``, p the
      confidence with which a token was committed;
    - "loop": as "cap" while ``t_off < t <= t_on``, where alpha rests at `alpha_on`; before, alpha rises to it in
      proportion; afterwards from it to 1; and sigma is 0 there.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    slots: ClassVar[str] = "block"
    limits: ClassVar[Mapping[str, Check]] = {
        **TimeGrid.limits, "strategy": one_of("cap", "rescale", "conf", "loop"),
        **{name: SHARE for name in ("eta", "t_on", "t_off", "alpha_on")},
    }  # fmt: skip

    strategy: str = "cap"
    eta: float = 0.008
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def act(self, step: Step) -> Action:
        if self.is_last(step):
            return self.last_action(step)
        t, s = self.times(step)
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        most = (1 - alpha_s) / alpha_t if alpha_t > 0 else math.inf
        if self.strategy == "conf":
            doubt = torch.where(step.decided, -step.at(step.canvas.confidence), -torch.inf)
            remask: float | Tensor = min(1.0, most) * torch.softmax(doubt, 1).nan_to_num(0.0)
            sigma = 0.0  # of the open positions
        else:
            remask = sigma = self._sigma(t, most)
        decide = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        chance = torch.where(step.is_open, decide, torch.as_tensor(remask, device=step.used.device)).float()
        flips = step.select("bernoulli", score=step.confidence, eligible=step.used, cost=chance)
        return Action(flips & step.is_open, remask=flips & step.decided, working=step.everyone(True))

    def alpha(self, t: float) -> float:
        """Share of tokens that the forward process leaves at time t."""
        if self.strategy != "loop":
            return 1 - t
        if t > self.t_on:
            return (1 - t) / (1 - self.t_on) * self.alpha_on
        return self.alpha_on if t > self.t_off else 1 - t / self.t_off * (1 - self.alpha_on)

    def _sigma(self, t: float, most: float) -> float:
        if self.strategy == "rescale":
            return self.eta * min(1.0, most)
        if self.strategy == "loop" and not self.t_off < t <= self.t_on:
            return 0.0
        return min(self.eta, most)


@dataclass(frozen=True)
class RenoisedEntropyBound(Rule):
    """Every step takes new samples at the positions of least entropy, and new noise everywhere else.

    The sampler of DiffusionGemma, a model without a mask token. At step i of a block's N = `steps` the temperature is
    ``t_min + (t_max - t_min) (N - i) / N``; all positions, whatever they held, are ordered by the entropy of the
    tempered distribution, and those of `EntropyBound` take their sample, the others a token drawn uniformly. A request
    ends, with the likeliest tokens, after N steps or when these have been the same for `stability` steps and the mean
    entropy is below `entropy` nats.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    slots: ClassVar[str] = "block"
    noise: ClassVar[str] = "uniform"
    draws: ClassVar[bool] = True
    limits: ClassVar[Mapping[str, Check]] = {
        **{name: number(0) for name in ("bound", "entropy")}, "t_min": temperature, "t_max": temperature,
        "stability": integer(0), "steps": integer(1),
    }  # fmt: skip

    bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability: int = 1
    entropy: float = 0.005
    steps: int = 48

    @property
    def ignores(self) -> frozenset[str]:
        return frozenset({"score", "defer_token_ids", "temperature"})

    def temperature(self, index: int, num_steps: int) -> float:
        return self.t_min + (self.t_max - self.t_min) * (self.steps - index) / self.steps

    def act(self, step: Step) -> Action:
        accept = step.select(
            "entropy-bound", score=-step.entropy, eligible=step.used, cost=step.entropy, parameter=self.bound,
            need=1, fill=1,
        )  # fmt: skip
        same = torch.zeros_like(step.open_now)
        if "likeliest" in step.memory:
            unchanged = (~step.used | (step.argmax == step.memory["likeliest"])).all(1)
            same = (step.memory["unchanged steps"] + 1) * unchanged
        step.memory["likeliest"], step.memory["unchanged steps"] = step.argmax, same
        ends = (same >= self.stability) & (row_mean(step.entropy, step.used) < self.entropy)
        if step.index >= self.steps - 1:
            ends = torch.ones_like(ends)
        take = accept | ends[:, None]
        return Action(
            take & step.is_open, take & step.decided, renoise=step.used & ~take, working=~ends,
            token=torch.where(ends[:, None], step.argmax, step.token),
            confidence=torch.where(ends[:, None], step.argmax_confidence, step.confidence),
        )  # fmt: skip

    def max_steps(self, length: int, num_steps: int) -> int:
        return self.steps
