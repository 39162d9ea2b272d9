# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts: several drafts per position, of which the target follows the one that equals its own token."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...cache import KVCache
from ...window import AttentionWindow, TokenWindow
from ..forward import rows_at
from .base import Task
from .drafted import DraftedProgram
from .self_verified import bits

#: number of most likely tokens per depth that may be in a tree
BRANCHES = 8


class TreeProgram(DraftedProgram):
    """Verifies drafts in a tree with a fixed number of nodes, chosen by best-first search (DDTree, arXiv:2604.12989).

    All nodes are verified in one forward pass, in which each sees the text, its ancestors and itself. Their keys and
    values are written to cache slots behind the canvas. Those on the path that the target follows are then moved to
    their places in the canvas.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        assert self.rule.tree is not None  # type: ignore[attr-defined]
        self.nodes: int = self.rule.tree  # type: ignore[attr-defined]
        if self.drafter.is_sequential:
            raise ValueError(
                f"tree needs a drafter whose drafts are independent of each other (DFlash); got {self.drafter!r}"
            )
        config = self.model.config
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if slides or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
            raise ValueError(
                "tree needs a target model without sliding-window attention, which would measure the distance of a "
                "draft by its cache slot"
            )
        self.forward.cache = KVCache(self.forward.length + self.nodes + 1, len(self.state.tokens))

    def read(
        self, anchor: Tensor, columns: Tensor, end: Tensor, used: Tensor, window: TokenWindow
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        forward, last = self.forward, self.last
        block = self.block(anchor, used)
        logits = self.drafter.of_all(self.drafter.logits(block.flatten(0, 1))).unflatten(0, block.shape[:2])
        best = ops.top_candidates(logits.flatten(0, 1), min(BRANCHES, logits.shape[2]))
        shape = *logits.shape[:2], -1
        likely = (best.values - best.logsumexp[:, None]).nan_to_num(-torch.inf, neginf=-torch.inf).view(shape)
        tree = best_first(likely, self.nodes)
        token = torch.nn.functional.pad(best.ids.view(shape), (0, 1, 0, 1), value=-1).flatten(1).gather(1, tree.place)

        # row 0 is the last token, row n + 1 is node n
        depth = torch.nn.functional.pad(tree.depth, (1, 0)).int()
        there = torch.nn.functional.pad(tree.is_there, (1, 0), value=True) & used[:, :1]
        place = last[:, None] + depth
        there = there & (place < end[:, None])
        number = torch.arange(self.nodes + 1, dtype=torch.int32, device=last.device)
        # write all nodes, so that none sees keys and values left behind the canvas by an earlier step
        slots = torch.where(used[:, :1], torch.where(number == 0, place, forward.length + number), -1)
        behind = (forward.length + 1 + number[:: self.nodes]).expand(len(last), -1)
        ranges = torch.stack((torch.stack((forward.origin, last + 1), 1), behind), 1)
        inside = place.clamp(0, forward.length - 1).long()
        seen = AttentionWindow(
            slots.contiguous(), ranges, forward.cache, visible=bits(tree.sees),
            rotations=forward.rotations,
        )  # fmt: skip
        tokens = torch.cat((anchor[:, None], token.clamp(min=0)), 1)
        hidden = forward.run(inside, forward.positions.gather(1, inside), seen, tokens)

        following = torch.where(there & (place + 1 < forward.ends.clamp(max=self.end)[:, None]), place + 1, -1)
        said = self.propose(
            self.propose.head(hidden.flatten(0, 1)), TokenWindow(following.contiguous(), window.origin)
        ).token.view(place.shape)
        path = followed(tree.parent, torch.where(there[:, 1:], token, -1), said, self.drafts)
        drafts = torch.nn.functional.pad(token, (1, 0), value=-1).gather(1, path.clamp(min=0))
        drafts = torch.where(path >= 0, drafts, -1)[:, 1:].contiguous()

        target = torch.where(path >= 0, columns, -1)
        self._move(torch.where(path > 0, forward.length + path, 0), torch.where(path > 0, target, -1).int())
        slots, positions = self._places(columns, target >= 0)
        taps = rows_at(self.tapped.take(), path)
        self.drafter.inject(taps, slots, positions, self.cache)
        return rows_at(hidden, path), drafts

    def _move(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values in all layers from `source` slots int64 to `target` slots int32 `[S, n]` (-1: skip)."""
        assert self.forward.cache is not None
        for k_cache, v_cache in self.forward.cache.layers():
            rows = source[:, :, None, None].expand(-1, -1, *k_cache.shape[2:])
            k, v = k_cache.gather(1, rows), v_cache.gather(1, rows)
            ops.block_attention(k[:, :0], k, v, k_cache, v_cache, target[:, :0], k_slots=target.contiguous())


class Tree:
    """S trees of N nodes each, in the order in which the nodes were found.

    Attributes
    ----------
    parent : Tensor
        int64 `[S, N]`: row of a node's parent; 0 for the root, n + 1 for node n.
    depth : Tensor
        int64 `[S, N]`: depth of each node, from 1.
    place : Tensor
        int64 `[S, N]`: flat index of the node's token in a table `[D + 1, k + 1]` of D depths and k tokens.
    is_there : Tensor
        bool `[S, N]`: whether the node exists; a tree may have fewer than N nodes.
    sees : Tensor
        bool `[S, N + 1, N + 1]`: whether each row sees each other row, that is, its ancestors and itself.
    """

    def __init__(self, parent: Tensor, depth: Tensor, place: Tensor, is_there: Tensor, sees: Tensor):
        self.parent, self.depth, self.place, self.is_there, self.sees = parent, depth, place, is_there, sees


def best_first(likely: Tensor, nodes: int) -> Tree:
    """Find the `nodes` most likely paths, given log-probabilities `[S, D, k]` in descending order at each depth.

    The probability of a path is the product of the probabilities of its tokens, which are taken to be independent. Once
    a path has been taken, two new candidates arise: the path with its last token replaced by the next most likely one,
    and the path extended by the most likely token of the next depth.
    """
    trees, _, width = likely.shape
    device, none = likely.device, -torch.inf
    table = torch.nn.functional.pad(likely, (0, 1, 0, 1), value=none).flatten(1)
    across, last = width + 1, table.shape[1] - 1
    score = torch.full((trees, 2 * nodes + 1), none, device=device)
    # for each candidate path: index in the table, and parent
    place = torch.zeros((trees, 2 * nodes + 1), dtype=torch.int64, device=device)
    parent = torch.zeros_like(place)
    score[:, 0] = table[:, 0]
    sees = torch.zeros((trees, nodes + 1, nodes + 1), dtype=torch.bool, device=device)
    sees[:, 0, 0].fill_(True)
    found = []
    for n in range(nodes):
        best = score.argmax(1, keepdim=True)
        now, at, above = (x.gather(1, best) for x in (score, place, parent))
        is_there = now > none
        found.append((above, at, is_there))
        score.scatter_(1, best, none)
        sees[:, n + 1] = sees.gather(1, above[:, :, None].expand(-1, -1, nodes + 1))[:, 0]
        sees[:, n + 1, n + 1].fill_(True)
        # the next token at the same depth, and the most likely one at the next depth; arbitrary for missing nodes
        right, down = (x.clamp(max=last) for x in (at + 1, (at // across + 1) * across))
        beside = now - table.gather(1, at) + table.gather(1, right)
        for i, (value, where, above_it) in enumerate(
            ((beside, right, above), (now + table.gather(1, down), down, torch.full_like(at, n + 1)))
        ):
            column = 2 * n + 1 + i
            score[:, column] = torch.where(is_there, value, none).nan_to_num(none, neginf=none)[:, 0]
            place[:, column], parent[:, column] = where[:, 0], above_it[:, 0]
    above, at, is_there = (torch.cat(x, 1) for x in zip(*found))
    return Tree(above, torch.where(is_there, at // across + 1, 0), at, is_there, sees)


def followed(parent: Tensor, token: Tensor, said: Tensor, depth: int) -> Tensor:
    """Return the rows of the path that the target follows, int64 `[S, depth + 1]`: the root first, -1 after its end.

    `parent` and `token` int64 `[S, N]` describe the nodes; `said` int64 `[S, N + 1]` is the target's next token after
    each row.
    """
    row = torch.zeros_like(parent[:, :1])
    path = [row]
    for _ in range(depth):
        wanted = said.gather(1, row.clamp(min=0))
        child = (parent == row) & (token == wanted) & (token >= 0)
        row = torch.where(child.any(1, keepdim=True), child.int().argmax(1, keepdim=True) + 1, -1)
        path.append(row)
    return torch.cat(path, 1)
