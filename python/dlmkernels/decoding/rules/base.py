# SPDX-License-Identifier: Apache-2.0
"""The interface of unmasking rules.

A rule decides which positions of the canvas (prompt plus answer) are committed in each denoising step. It is a small
frozen dataclass. Most rules have a single method, `select`, which asks the step for the best positions in score order:

>>> @dataclass(frozen=True)
... class HalfOfTheRest(Rule):
...     def select(self, step):
...         return step.select("none", fill=(step.open_now + 1) // 2)

A rule that does more than commit (edit, remask or renoise tokens, or end a block by its own criterion) implements `act`
instead. State that must survive until the next step is kept in the step (`Step.keep`, `Step.recall`), never in the rule
itself. Both methods consist of tensor operations only: reading a value on the host would force a device
synchronization. Batch rows are at different points of their plans, so the step number, the number of planned steps and
the numbers of positions are tensors `[B]`. Values that depend only on the step number come from a lookup table
(`Step.planned`).
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
    """The changes that a step makes to the W slots of its window, in each of the B requests.

    The first four attributes are the masks of `ops.remask_`. If several of them apply to a slot, only the last of
    commit, edit, remask and renoise takes effect.

    Attributes
    ----------
    commit, edit, remask, renoise : Tensor, optional
        bool `[B, W]`: slots to which the operation applies. If None, it applies to none.
    token, confidence : Tensor, optional
        int64 and float32 `[B, W]`: tokens to write and confidences to record. If None, the step's own proposals.
    embeds, embedded : Tensor, optional
        `[B, W, hidden]` and bool `[B, W]`: input embeddings that replace those of the tokens in the next forward pass
        of this block, and the slots where they do.
    working : Tensor, optional
        bool `[B]`: requests that need another step for this block. If None, those with an open position left in it.
        Ignored if the rule's `slots` is "open".
    insert, remove : Tensor, optional
        int32 and bool `[B, W]`, both or neither: number of masks to insert before each slot, and slots to remove, after
        everything else has been written. A block keeps its size: positions pushed past its end are dropped, and those
        that become free there are masked. With a `VariableLength` rule, the request grows or shrinks instead. Requires
        a window with all positions of the block, or a variable length.
    append : Tensor, optional
        int32 `[B]`: number of masks to append to each request. Requires a variable length.
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


#: `DecodingConfig` fields on how the LM head is computed; they have no effect on rules whose steps need the logits.
OF_THE_HEAD = frozenset({"lm_head", "logits_budget"})


class Rule:
    """Base class of all unmasking rules.

    A position is *open* until a step commits a token there, and *decided* from then on. Positions of the prompt and of
    an infill context are *given*: neither open nor decided.

    Attributes
    ----------
    needs : frozenset of str
        Statistics that the rule reads in addition to the confidence: "margin", "entropy", "p_current". The default is
        margin and entropy.
    slots : {"open", "block", "canvas"}
        Positions in the step's window: the open positions of the block, all positions of the block that are not given,
        or all positions of the canvas that are not given. The LM head runs for all of them.
    noise : {"mask", "uniform", "continuous", "none"}
        Content of open positions: the mask token, tokens drawn uniformly from the vocabulary, noisy vectors, or nothing
        that the (causal) model would read.
    shadow : bool
        Whether the predictions for decided positions come from a shadow block: one extra mask per position of the
        block, which sees everything except the token at that position. If False, a position sees its own token.
        Requires slots="block".
    draws : bool
        Whether the rule itself makes random choices, even if tokens are not sampled.
    decodes : {"anything", "continuations", "infillings"}
        Supported tasks: both, `generate` only, or `infill` only.
    token_ids : dict
        Names of the fields that hold token ids, mapped to whether the rule requires them. Ids that are None are read
        from the model's configuration.
    by_block : bool
        Whether the rule is decoded block after block by the default program (decoding loop). If False, it has its own
        program.
    reads_logits : bool
        Whether the rule's steps read logits (`Step.logits`, `Step.again`). A rule that reads them without declaring it
        works, but is slower: the LM head runs a second time for what it reads.
    reads_ends : bool
        Whether the rule asks which tokens are end tokens (`Step.is_end`).
    thresholds : tuple of str
        Names of the fields that scores are compared with: a position qualifies if its score is at least this large.
    limits : dict
        Checks of the rule's fields, made on construction: field name to check (see `decoding.checks`). A field whose
        check is a `PerRequest` also takes one value per request. Within a step, these values are a tensor `[B, 1]`.
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
    thresholds: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self):
        normalize(self, self.limits)

    @property
    def ignores(self) -> frozenset[str]:
        """Fields of `DecodingConfig` that have no effect with this rule. Passing one raises a ValueError."""
        return frozenset()

    def select(self, step: Step) -> Tensor:
        """Return the positions to commit: bool `[B, W]`, a subset of `step.eligible`."""
        raise NotImplementedError

    def act(self, step: Step) -> Action:
        """Return the changes that this step makes. The default is to commit the positions from `select`."""
        return Action(commit=self.select(step))

    @property
    def uses_steps(self) -> bool:
        """Whether the configured `steps` determines the number of forward passes. If False, the confidences do."""
        return False

    def max_steps(self, length: int, num_steps: int) -> int:
        """Return the maximum number of forward passes for a block of `length` positions planned for `num_steps`."""
        return max(length, num_steps)

    def temperature(self, index: int, num_steps: int) -> float | None:
        """Return the sampling temperature of step `index`, or None for the configured one."""
        return None

    def time(self, index: int, num_steps: int) -> float | None:
        """Return the diffusion time of step `index`, from 1 (noise) to 0, or None if the rule has no time grid."""
        return None


def row_sum(values: Tensor, where: Tensor) -> Tensor:
    """Return the sum of the selected non-negative values of each row, float64 `[B]`.

    Values are added as integer multiples of 2^-32, so that the result does not depend on the batch or the device.
    """
    fixed = (values.double().nan_to_num(0.0, 2.0**18, 0.0).clamp(0, 2.0**18) * 2.0**32).round().long()
    return fixed.masked_fill(~where, 0).sum(1).double() / 2.0**32


def row_mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the selected non-negative values of each row, float32 `[B]`; 0 if none are selected."""
    return (row_sum(values, where) / where.sum(1).clamp(min=1)).float()
