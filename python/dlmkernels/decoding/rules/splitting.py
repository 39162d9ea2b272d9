# SPDX-License-Identifier: Apache-2.0
"""A rule that edits a block with ordinary tokens and with two special ones that insert and delete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import ops
from ..checks import Check, integer
from ..step import Step
from .base import Action, Rule
from .revision import TokenEditing


@dataclass(frozen=True)
class SplitEditing(Rule):
    """Edit a block of fixed size with ordinary tokens and with two special ones that insert and delete.

    LLaDA2.2 as served by SGLang ("joint threshold" with insertion and deletion; github.com/sgl-project/sglang). As in
    `TokenEditing`, open positions are committed and decided tokens are replaced. In addition, a mask is inserted before
    a position whose proposal is the split token, and a position whose proposal is the delete token is removed. The
    block keeps its size: positions pushed past its end are lost, and masks are added at its end when it shrinks.

    While any of the masks that the block started with are left, a forward pass commits the open positions with a score
    above `threshold`, or the best k if those are fewer than k, one more than the number of inserted masks. After that,
    it commits all masks. Decided tokens are replaced if the proposal is a different token with a confidence above
    `edit_threshold`. If the block holds the same tokens as in an earlier step, the least confident change takes a token
    that has not been tried at this position.

    A block ends with a forward pass that changes nothing, or with one that commits everything and neither splits nor
    deletes: the `max_post_steps`-th without any mask of the first ones, or the last of
    ``length + max_post_steps + 1``.

    Attributes
    ----------
    threshold, edit_threshold : float
        Values to exceed: the score to commit, and the confidence to replace a token.
    max_post_steps : int
        Maximum number of forward passes once the masks that the block started with are gone, at least 0.
    delete_token_id, split_token_id : int, optional
        If None, read from the model's configuration.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_logits: ClassVar[bool] = True
    slots: ClassVar[str] = "block"
    decodes: ClassVar[str] = "continuations"
    token_ids: ClassVar[dict[str, bool]] = {"delete_token_id": True, "split_token_id": True}
    thresholds: ClassVar[tuple[str, ...]] = ("threshold",)
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
        is_open = step.is_open
        original = step.recall("original", is_open.shape[1], otherwise=is_open.long(), by_row=True)
        from_start = is_open & (original != 0)
        num_open, num_from_start = is_open.sum(1), from_start.sum(1)
        post_steps = step.recall("post steps", otherwise=torch.zeros_like(num_open), by_row=True)
        post_steps = post_steps + (num_from_start == 0)

        # which positions are written
        is_last = step.index >= step.block_length + self.max_post_steps
        cleans = (post_steps >= max(self.max_post_steps, 1)) | is_last
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
        splits = written & (token == self.split_token_id)
        deletes = written & (token == self.delete_token_id)
        insert, original = splits.int(), original.clone()
        ops.splice_(original, torch.zeros_like(step.block_start), insert=insert, remove=deletes, fill_token_id=0)
        step.keep("original", original, by_row=True)
        step.keep("post steps", post_steps, by_row=True)
        plain = ~splits & ~deletes
        return Action(
            commit & plain, edit & plain, token=token, confidence=step.probability_of(token), insert=insert,
            remove=deletes, working=written.any(1) & ~cleans,
        )  # fmt: skip

    def _without_controls(self, step: Step) -> Tensor:
        """Propose again, excluding the two tokens that insert and delete, int64 `[B, W]`."""
        assert self.delete_token_id is not None and self.split_token_id is not None
        bias = torch.zeros(1, 1, step.vocab_size, device=step.token.device)
        for token in (self.delete_token_id, self.split_token_id):
            bias[..., token].fill_(-torch.inf)
        return step.again(bias).token

    def _varied(self, step: Step, token: Tensor, written: Tensor, where: Tensor) -> Tensor:
        """Change the least confident new token in the requests `where` bool `[B]` whose block repeats an earlier state.

        It becomes the most likely token that has not been tried at this position. Returns the tokens, int64 `[B, W]`.
        """
        block = torch.where(step.used, step.current, -1)
        seen, tried = (self._history(step, name) for name in ("seen", "tried"))
        repeats = (seen == block[:, None]).all(2).any(1) & where
        changes = written & (token != step.current)
        slot = torch.where(changes, step.confidence, torch.inf).argmin(1, keepdim=True)
        tried_there = tried.gather(2, slot[:, None].expand(-1, tried.shape[1], 1))[:, :, 0].clamp(min=-1)
        logits = step.proposer.clean(step.raw_logits, step.logit_rows.gather(1, slot)[:, 0])
        fresh = ops.token_confidence(logits, banned=tried_there.contiguous()).token
        replaced = torch.where(repeats & changes.any(1) & (fresh >= 0), fresh, token.gather(1, slot)[:, 0])
        token = token.scatter(1, slot, replaced[:, None])
        at = step.index.clamp(max=seen.shape[1] - 1).long()[:, None, None].expand(-1, 1, seen.shape[2])
        step.keep("seen", seen.scatter(1, at, block[:, None]), by_row=True)
        step.keep("tried", tried.scatter(1, at, torch.where(written, token, -1)[:, None]), by_row=True)
        return token

    def _history(self, step: Step, name: str) -> Tensor:
        """Return the values kept under `name` in each step of the block, int64 `[B, steps, W]`; -2 for future steps."""
        width = step.token.shape[1]
        steps = self.max_steps(step.standing.width, 0)
        nothing = step.token.new_full((len(step.token), steps, width), -2)
        return step.recall(name, steps, width, otherwise=nothing, by_row=True)

    def max_steps(self, length: int, num_steps: int) -> int:
        return length + self.max_post_steps + 1
