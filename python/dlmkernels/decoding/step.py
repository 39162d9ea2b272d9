# SPDX-License-Identifier: Apache-2.0
"""One denoising step, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..window import TokenWindow
from .bitmask import unpack, without
from .calls import select_tokens
from .hidden_rows import Logits
from .standing import Standing
from .state import State


@dataclass(eq=False)
class Step:
    """One denoising step: proposals and confidences for the W slots of the window, before anything is written.

    Attributes
    ----------
    stats : ops.TokenConfidence
        Per-slot results of `token_confidence`. The properties below return them in shape `[B, W]`.
    eligible : Tensor
        bool `[B, W]`: slots that may be committed, which are the open ones of the block.
    standing : Standing
        Progress of each row through its plan, from which `index`, `num_steps` and similar properties are read.
    raw_logits, row_map : Tensor or HiddenRows, Tensor
        The model's logits `[R, V]`, or `[2 R, V]` with guidance; and int32 `[B * W]`, the row of these logits for each
        slot, -1 for an unused slot (None: each slot has its own row, in order).
    canvas : State
        All positions of prompt and answer, and how each was committed. Must not be written to.
    score_of : Score
        The configured score.
    proposer : Proposer
        Computes proposals from logits.
    sampling_temperature : float or Tensor
        One number for all rows, or float32 `[B]`.
    allowed : Tensor, optional
        Bitmasks of the tokens that may be proposed: int32 `[B, W, ceil(V / 32)]`, or `[ceil(V / 32)]` for all slots.
    memory, kept : dict
        Values that the rule kept in its last step and in this one; see `recall` and `keep`.
    room : Tensor, optional
        int32 `[B]`: number of positions by which a request may still grow. None if the length is fixed.
    """

    stats: ops.TokenConfidence
    window: TokenWindow
    eligible: Tensor
    standing: Standing
    raw_logits: Logits
    canvas: State
    score_of: Any
    proposer: Any = None
    row_map: Tensor | None = None
    order_temperature: float = 0.0
    sampling_temperature: float | Tensor = 0.0
    deferred: Tensor | None = None
    allowed: Tensor | None = None
    redraws: Tensor | None = None  # int32 [B, W], how many of each slot's proposals were refused in this step
    memory: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    room: Tensor | None = None
    _score: Tensor | None = field(default=None, init=False)

    def _shaped(self, name: str) -> Tensor:
        try:
            return getattr(self.stats, name).view(self.eligible.shape)
        except RuntimeError:
            raise ValueError(f"the rule reads step.{name}, which its `needs` does not include") from None

    # --- progress of the rows -----------------------------------------------------------------------------------------

    @property
    def index(self) -> Tensor:
        """Number of this step within the row's block, from 0, int32 `[B]`."""
        return self.standing.index

    @property
    def is_first(self) -> Tensor:
        """Whether this is the row's first step in its block, bool `[B]`."""
        return self.standing.step == self.standing.entered

    @property
    def num_steps(self) -> Tensor:
        """Number of steps planned for the block, int32 `[B]`."""
        return self.standing.num_steps

    @property
    def progress(self) -> Tensor:
        """Share of all steps planned for the row that are done including this one, at most 1, float64 `[B]`."""
        return self.standing.progress

    @property
    def open_at_start(self) -> Tensor:
        """Number of open positions of the block when the row entered it, int32 `[B]`."""
        return self.standing.open_at_start

    @cached_property
    def open_now(self) -> Tensor:
        """Number of open positions of the block before this step, int32 `[B]`."""
        return self.eligible.sum(1, dtype=torch.int32)

    @property
    def block_start(self) -> Tensor:
        """First canvas column of the row's block, int32 `[B]`."""
        return self.standing.block_start

    @property
    def block_length(self) -> Tensor:
        """Number of columns of the block, int32 `[B]`."""
        return self.standing.block_length

    def planned(self, name: str, of: Callable[[int, int], Sequence[float]]) -> Tensor:
        """Return the n numbers `of(index, num_steps)` for the step of each row, float64 `[n, B, 1]`.

        `of` is called on the host, once for all steps; its results are cached by `name`.
        """
        return self.standing.tables.look_up(name, of, self.standing.step, torch.float64).T.contiguous()[..., None]

    def planned_count(self, name: str, of: Callable[[int, int], int]) -> Tensor:
        """Like `planned`, for a function that returns one integer; int32 `[B]`."""
        return self.standing.tables.look_up(name, of, self.standing.step, torch.int32)

    # --- predictions of the model -------------------------------------------------------------------------------------

    @property
    def token(self) -> Tensor:
        """Proposed token ids, int64 `[B, W]`; -1 if a slot has none."""
        return self._shaped("token")

    @property
    def argmax(self) -> Tensor:
        """Most likely token ids, int64 `[B, W]`: the proposals at temperature 0."""
        return self._shaped("argmax")

    @property
    def confidence(self) -> Tensor:
        """Probability of the proposed token, float32 `[B, W]`."""
        return self._shaped("confidence")

    @property
    def argmax_confidence(self) -> Tensor:
        """Probability of `argmax`, float32 `[B, W]`."""
        return self.probability_of(self.argmax)

    def probability_of(self, tokens: Tensor) -> Tensor:
        """Return the probability of a token (not a banned one) at each slot, int64 to float32 `[B, W]`; -inf for -1."""
        z = self.proposer.clean(self.raw_logits, self.logit_rows.flatten(), tokens.flatten().clamp(min=0)).view(
            tokens.shape
        )
        temperature = self.sampling_temperature
        if self.proposer.config.distribution != "raw":
            if isinstance(temperature, Tensor):
                z = z * (1 / torch.where(temperature > 0, temperature, 1))[:, None]
            elif temperature > 0:
                z = z * (1 / temperature)
        return torch.where(tokens >= 0, (z - self.logsumexp).exp(), -torch.inf)

    @property
    def margin(self) -> Tensor:
        """Difference between the two largest probabilities, float32 `[B, W]`."""
        return self._shaped("margin")

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predicted distribution in nats, float32 `[B, W]`."""
        return self._shaped("entropy")

    @property
    def logsumexp(self) -> Tensor:
        """Log-sum-exp of the logits, float32 `[B, W]`."""
        return self._shaped("logsumexp")

    @property
    def p_current(self) -> Tensor:
        """Probability of the slot's current token, float32 `[B, W]`; 0 for the mask token."""
        return self._shaped("p_given")

    @property
    def logit_rows(self) -> Tensor:
        """Row of the logits for each slot, int64 `[B, W]`; arbitrary for unused slots."""
        if self.row_map is None:
            rows = torch.arange(self.eligible.numel(), device=self.eligible.device)
        else:
            rows = self.row_map.clamp(min=0).long()
        return rows.view(self.eligible.shape)

    def logits(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return the logits of slots `[first, last)`, float32 `[B, n, V]`, guided; -inf for tokens never proposed.

        This copies the logits, which the ops do not need. Rules should avoid it where they can.
        """
        rows = self.logit_rows[:, first:last]
        z = self.proposer.clean(self.raw_logits, rows.flatten()).unflatten(0, rows.shape)
        if self.allowed is None:
            return z
        bitmask = self.allowed if self.allowed.dim() == 1 else self.allowed[:, first:last]
        return z.masked_fill(~unpack(bitmask, self.vocab_size), -torch.inf)

    def again(self, bias: Tensor) -> Step:
        """Return this step with proposals from `logits + bias`, without another forward pass.

        `bias` is float32 `[B, W, V]`, or `[1, 1, V]` for all slots.
        """
        stats = self.proposer(self.raw_logits, self.window, self.row_map, bias=bias.flatten(0, 1), allowed=self.allowed)
        return replace(self, stats=stats)

    def without(self, refused: Tensor, token: Tensor) -> Step:
        """Return this step with new proposals, other than `token` `[B, W]`, at the slots `refused` bool `[B, W]`.

        Each new draw uses fresh noise, which depends on the number of refusals at the slot in this step. A token is as
        likely to be drawn as if the refused ones had been excluded from the beginning.
        """
        words = -(-self.vocab_size // 32)
        allowed = token.new_full((1,), -1, dtype=torch.int32) if self.allowed is None else self.allowed
        allowed = without(allowed.expand(*self.eligible.shape, words), token, refused)
        window = TokenWindow(torch.where(refused, self.window.positions, -1), self.window.origin)
        sampled = self.proposer.options["temperature"] is not None
        redraws = refused.int() if self.redraws is None else self.redraws + refused
        new = self.proposer(
            self.raw_logits, window, self.row_map, allowed=allowed, redraw=redraws,
            temperature=self.sampling_temperature if sampled else None,
        )  # fmt: skip
        where = refused.flatten()
        merged = (torch.where(where, n, old) if old.numel() == len(where) else old for n, old in zip(new, self.stats))
        return replace(self, stats=ops.TokenConfidence(*merged), allowed=allowed, redraws=redraws)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the model's input embeddings `[B, W, hidden]` of tokens int64 `[B, W]`."""
        return self.proposer.model.embed(tokens)

    def mean_embedding(self, probabilities: Tensor) -> Tensor:
        """Return the mean of the model's input embeddings, `[B, W, hidden]`, under distributions `[B, W, V]`."""
        vocabulary = torch.arange(probabilities.shape[2], device=probabilities.device)
        table = self.embed(vocabulary[None])[0]
        return probabilities.to(table.dtype) @ table

    # --- state of the slots -------------------------------------------------------------------------------------------

    def at(self, canvas: Tensor) -> Tensor:
        """Return the values at the slots of a tensor over the canvas, `[B, T]` to `[B, W]`; arbitrary if unused."""
        return canvas.gather(1, self.window.positions.clamp(min=0).long())

    @property
    def used(self) -> Tensor:
        """Slots that stand for a position, bool `[B, W]`; the others are unused."""
        return self.window.used

    @property
    def is_open(self) -> Tensor:
        """Slots that are still undecided, inside or outside the block, bool `[B, W]`."""
        return self.used & self.at(self.canvas.is_open)

    @property
    def decided(self) -> Tensor:
        """Slots whose token has been committed, bool `[B, W]`. All False if `Rule.slots` is "open"."""
        return self.used & ~self.at(self.canvas.is_open)

    @property
    def current(self) -> Tensor:
        """Current token ids at the slots, int64 `[B, W]`."""
        return self.at(self.canvas.tokens)

    @property
    def index_in_block(self) -> Tensor:
        """Positions relative to the first column of the block, int32 `[B, W]`."""
        return self.window.positions - self.block_start[:, None]

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""
        return self.raw_logits.shape[1]

    @property
    def mask_token(self) -> int:
        """Id of the mask token."""
        return self.proposer.special.mask

    def is_end(self, tokens: Tensor) -> Tensor:
        """Return which of the tokens int64 `[B, W]` are end tokens, bool `[B, W]`."""
        return self.proposer.is_end(tokens)

    def everyone(self, value: bool) -> Tensor:
        """Return a tensor with the same value for every request, bool `[B]`."""
        return torch.full_like(self.open_now, value, dtype=torch.bool)

    def recall(self, name: str, *shape: int, otherwise: float | Tensor = 0.0, by_row: bool = False) -> Tensor:
        """Return the values last passed to `keep` in this block, or `otherwise` if there are none yet.

        Their shape is `[B, W, *shape]`, with a value for the position of each slot, or `[B, *shape]` with `by_row`.
        """
        if name in self.kept:
            return self._of_slots(self.kept[name], by_row)
        if name not in self.memory:
            rows = self.eligible.shape[:1] if by_row else self.eligible.shape
            if isinstance(otherwise, Tensor):
                return otherwise.expand(*rows, *shape)
            return torch.full((*rows, *shape), otherwise, device=self.eligible.device)
        kept = self._of_slots(self.memory[name], by_row)
        return torch.where(self.is_first.view(-1, *[1] * (kept.dim() - 1)), otherwise, kept).to(kept.dtype)

    def keep(self, name: str, values: Tensor, by_row: bool = False) -> None:
        """Remember `values` until the row's block ends: `[B, W, …]` by position, or `[B, …]` with `by_row`.

        A rule may be called several times for one step. Later steps see what it kept in the call that took effect.
        """
        if by_row:
            self.kept[name] = values
            return
        # one place for each column of the block, and one more for unused slots
        shape = (len(values), self.standing.width + 1, *values.shape[2:])
        before = self.memory.get(name)
        if before is None:
            before = torch.zeros(shape, dtype=values.dtype, device=values.device)
        self.kept[name] = before.scatter(1, self._place(before), values)

    def _of_slots(self, kept: Tensor, by_row: bool) -> Tensor:
        return kept if by_row else kept.gather(1, self._place(kept))

    def _place(self, kept: Tensor) -> Tensor:
        index = torch.where(self.used, self.index_in_block, self.standing.width).long()
        index = index.view(*index.shape, *[1] * (kept.dim() - 2))
        return index.expand(-1, -1, *kept.shape[2:])

    # --- selection ----------------------------------------------------------------------------------------------------

    @property
    def score(self) -> Tensor:
        """The configured score, float32 `[B, W]`; positions with larger scores are committed earlier."""
        if self._score is None:
            self._score = self._scored()
        return self._score

    def _scored(self) -> Tensor:
        score = self.score_of(self)
        if self.deferred is not None:
            last = torch.isin(self.token, self.deferred) & (score > -torch.inf)
            score = score.masked_fill(last, self.score_of.lowest)
        return score

    @property
    def candidates(self) -> Tensor:
        """The score of slots that may be committed, -inf for the others, float32 `[B, W]`."""
        return self.score.masked_fill(~self.eligible | self.score.isnan(), -torch.inf)

    def select(
        self,
        rule: str = "none",
        *,
        score: Tensor | None = None,
        eligible: Tensor | None = None,
        parameter: float | Tensor | None = None,
        strict: bool = False,
        cost: Tensor | None = None,
        gate: Tensor | None = None,
        need: int | Tensor | None = None,
        fill: int | Tensor | None = None,
        cap: int | Tensor | None = None,
    ) -> Tensor:
        """Select slots in score order, bool `[B, W]`: `ops.select_tokens`, with numbers accepted in place of tensors.

        By default, this uses the configured score and the step's `eligible` slots.
        """
        temperature = self.order_temperature
        if score is None and temperature == 0:
            temperature = self.score_of.order_temperature
        device = self.eligible.device
        options: dict[str, Any] = {"strict": strict, "cost": cost, "gate": gate}
        if temperature > 0:
            options["order_temperature"] = constant(temperature, torch.float32, device)
        if temperature > 0 or rule == "bernoulli":
            options["seed"], options["step"] = self.canvas.seed, self.canvas.step
            options["position"] = self.window.request_positions
        if parameter is not None:
            options["parameter"] = _per_request(parameter, torch.float32, device)
        for name, value in (("need", need), ("fill", fill), ("cap", cap)):
            if value is not None:
                options[name] = _per_request(value, torch.int32, device)
        score = (self.score if score is None else score).contiguous()
        return select_tokens(score, self.eligible if eligible is None else eligible, rule, **options)


def _per_request(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.flatten().to(dtype) if isinstance(value, Tensor) else constant(value, dtype, device)


@lru_cache(maxsize=512)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor `[1]`. It is cached, and must not be written to."""
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=dtype, device=device)
