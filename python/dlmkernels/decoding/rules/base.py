# SPDX-License-Identifier: Apache-2.0
"""What a decoding rule is.

A rule is a small frozen dataclass. Most have one method, `select`, which asks the step for a prefix of the confidence
order:

>>> @dataclass(frozen=True)
... class HalfOfTheRest(Rule):
...     def select(self, step):
...         return step.select("none", fill=(step.open_now + 1) // 2)

One that does more than commit (edit, remask, renoise, end a block by itself) implements `act` instead. What a rule has
to remember from one step to the next it keeps in the step (`Step.keep`, `Step.recall`), never in itself. Between
`act` and its return nothing may be read on the host: everything is a tensor operation. The rows of a batch stand at
different places of their plans, so the number of the step, of planned steps, of positions are tensors `[B]`; what
follows from the number of a step alone is looked up in a table (`Step.planned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import Check, normalize, number
from ..step import Step

SHARE: Check = number(0, 1)


@dataclass(eq=False)
class Action:
    """What a step does to the slots of its window: the masks of `ops.remask_`, of which the last to apply acts.

    Attributes
    ----------
    commit, edit, remask, renoise : Tensor, optional
        bool `[B, W]`. None: nowhere.
    token, confidence : Tensor, optional
        int64 and float32 `[B, W]`: what is written and recorded, where that is not the step's own proposal.
    embeds, embedded : Tensor, optional
        `[B, W, hidden]` and bool `[B, W]`: input embeddings that stand in for those of the tokens at the next forward
        of this block, and at which slots.
    working : Tensor, optional
        bool `[B]`: requests that want another step of this block. None: those with an open position in it.
    insert, remove : Tensor, optional
        int32 and bool `[B, W]`, both or neither: how many masks are put before a slot, and which slots are taken out,
        after the rest is written. A block keeps its size: what is pushed beyond its end is dropped, what becomes free
        there is masked. Where the length varies the request grows and shrinks. Only where the window holds all
        positions of the block, or the length varies.
    append : Tensor, optional
        int32 `[B]`: how many masks are put at the end of a request. Only where the length varies.
    """

    commit: Tensor | None = None
    edit: Tensor | None = None
    remask: Tensor | None = None
    renoise: Tensor | None = None
    token: Tensor | None = None
    confidence: Tensor | None = None
    embeds: Tensor | None = None
    embedded: Tensor | None = None
    working: Tensor | None = None
    insert: Tensor | None = None
    remove: Tensor | None = None
    append: Tensor | None = None


#: Fields of a configuration about where the head's results come from, for rules whose steps need the logits.
OF_THE_HEAD = frozenset({"lm_head", "logits_budget"})


class Rule:
    """Base of all rules.

    Attributes
    ----------
    needs : frozenset of str
        Statistics beyond the confidence that the rule reads: "margin", "entropy", "p_current". A rule that leaves it
        alone gets the first two.
    slots : {"open", "block", "canvas"}
        Which positions the step's window holds: the open ones of the block; all of the block that are not given; or
        all of the canvas that are not given. The head runs for all of them.
    noise : {"mask", "uniform", "continuous", "none"}
        What stands at open positions: the mask token, tokens drawn uniformly from the vocabulary, noisy vectors, or
        nothing that a causal model would read.
    shadow : bool
        Whether the opinions of decided positions are those of a shadow block: masks at the same places that see all
        but the tokens there. (Otherwise a position sees its own token.) With slots="block" only.
    draws : bool
        Whether the rule itself leaves something to chance, even where tokens are not sampled.
    decodes : {"anything", "continuations", "infillings"}
        What it is for: `generate`, `infill`, or both.
    token_ids : dict
        Names of its fields that hold token ids, which are taken from the model's configuration where they are None, and
        whether it needs them.
    by_block : bool
        Whether the program that most rules share decodes it, block after block; False: it has a program of its own.
    reads_logits : bool
        Whether it reads logits in its steps (`Step.logits`, `Step.again`). A rule that does and does not say so works,
        and its steps take longer: the head then runs once more for what is read.
    reads_ends : bool
        Whether it asks which tokens are end tokens (`Step.is_end`).
    limits : dict
        What its numbers may be: name of a field to a check of `decoding.checks`, which is done when it is made. A field
        whose check is a `PerRequest` may have a value for each request; in a step it is then a tensor `[B, 1]`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margin", "entropy"})
    slots: ClassVar[str] = "open"
    noise: ClassVar[str] = "mask"
    shadow: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    decodes: ClassVar[str] = "anything"
    token_ids: ClassVar[dict[str, bool]] = {}
    by_block: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    reads_ends: ClassVar[bool] = False
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)

    @property
    def ignores(self) -> frozenset[str]:
        """Fields of `DecodingConfig` that make no difference to this rule; a user who sets one is told so."""
        return frozenset()

    def select(self, step: Step) -> Tensor:
        """Positions to commit: bool `[B, W]`, a subset of `step.eligible`."""
        raise NotImplementedError

    def act(self, step: Step) -> Action:
        """What the step does; by default it commits what `select` says."""
        return Action(commit=self.select(step))

    @property
    def uses_steps(self) -> bool:
        """Whether the number of forwards is the configured `steps`, and not decided by the confidences."""
        return False

    def max_steps(self, length: int, num_steps: int) -> int:
        """Forwards after which a block of `length` positions, planned for `num_steps`, ends in any case."""
        return max(length, num_steps)

    def temperature(self, index: int, num_steps: int) -> float | None:
        """Sampling temperature of step `index`; None: the configured one."""
        return None

    def time(self, index: int, num_steps: int) -> float | None:
        """Diffusion time of step `index`, from 1 (noise) to 0, of rules that walk a time grid; None of the others."""
        return None


def row_sum(values: Tensor, where: Tensor) -> Tensor:
    """Sum of the chosen non-negative values of each row, float64 `[B]`.

    Summed as integers of 2^-32, so that it does not depend on the batch or the device.
    """
    fixed = (values.double().nan_to_num(0.0, 2.0**18, 0.0).clamp(0, 2.0**18) * 2.0**32).round().long()
    return fixed.masked_fill(~where, 0).sum(1).double() / 2.0**32


def row_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the chosen non-negative values of each row, float32 `[B]`; 0 where there are none."""
    return (row_sum(values, where) / where.sum(1).clamp(min=1)).float()
