# SPDX-License-Identifier: Apache-2.0
"""What a rule sees of one denoising step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..window import TokenWindow
from .constraint import unpack, without
from .scores import Score

if TYPE_CHECKING:
    from .canvas import Canvas
    from .propose import Proposer


@dataclass(frozen=True)
class RandomState:
    """Counter-based randomness of a batch: int64 `seed` `[B]` and the int32 `step` counter `[B]` of each request."""

    seed: Tensor
    step: Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step: proposals and confidences of the W slots of the window, before anything is written.

    Attributes
    ----------
    stats : ops.TokenConfidence
        Per-slot results of `token_confidence`, each reshaped to `[B, W]` on access below.
    eligible : Tensor
        bool `[B, W]`: slots that may be committed, the open ones of the block.
    index : int
        Number of this step within its block, from 0.
    num_steps : int
        Steps planned for the block.
    progress : float
        Share of the steps planned for the whole generation that are done with this one, up to 1.
    block_start, block_length : Tensor, int
        The block's first column in each row, int32 `[B]`; how many columns it has.
    open_at_start, open_now : Tensor
        int32 `[B]`: open positions of the block when it was entered, and before this step.
    canvas : Canvas
        All positions, with the step and the confidence with which each was committed; not to be written.
    allowed : Tensor, optional
        Bitmasks of the tokens that may be proposed: int32 `[B, W, ceil(V / 32)]`, or `[ceil(V / 32)]` for all slots.
    memory : dict
        What the rule keeps from step to step; empty when a block is entered. See `keep` and `recall`. Its tensors are
        replaced, never written: with a constraint a rule may be asked about one step several times.
    room : Tensor, optional
        int32 `[B]`: by how many positions a request may still grow. None where the length does not vary.
    """

    stats: ops.TokenConfidence
    window: TokenWindow
    eligible: Tensor
    index: int
    num_steps: int
    open_at_start: Tensor
    open_now: Tensor
    raw_logits: Tensor
    proposer: Proposer
    random: RandomState
    score_of: Score
    canvas: Canvas
    block_start: Tensor
    block_length: int
    order_temperature: float = 0.0
    sampling_temperature: float = 0.0
    deferred: Tensor | None = None
    progress: float = 0.0
    allowed: Tensor | None = None
    redraws: Tensor | None = None  # int32 [B, W], how often what a slot drew in this step was refused
    memory: dict[str, Tensor] = field(default_factory=dict)
    room: Tensor | None = None

    def _shaped(self, name: str) -> Tensor:
        x = getattr(self.stats, name)
        if x.numel() != self.eligible.numel():
            raise ValueError(f"the rule reads step.{name} but does not name it in `needs`")
        return x.view(self.eligible.shape)

    # --- what the model says -----------------------------------------------------------------------------------------

    @property
    def token(self) -> Tensor:
        """Proposed token ids, int64 `[B, W]`; -1 where there is none."""
        return self._shaped("token")

    @property
    def argmax(self) -> Tensor:
        """The likeliest token ids, int64 `[B, W]`: the proposals at temperature 0."""
        return self._shaped("argmax")

    @property
    def confidence(self) -> Tensor:
        """Probability of the proposal, float32 `[B, W]`."""
        return self._shaped("confidence")

    @property
    def argmax_confidence(self) -> Tensor:
        """Probability of `argmax`, float32 `[B, W]`."""
        return self.probability_of(self.argmax)

    def probability_of(self, tokens: Tensor) -> Tensor:
        """Probability of one token at each slot, none of them a banned one; int64 to float32 `[B, W]`; -inf for -1."""
        rows = torch.arange(tokens.numel(), device=tokens.device)
        z = self.proposer.clean(self.raw_logits, rows, tokens.flatten().clamp(min=0)).view(tokens.shape)
        temperature = self.sampling_temperature if self.proposer.config.distribution != "raw" else 0.0
        if temperature > 0:
            z = z * (1 / temperature)
        return torch.where(tokens >= 0, (z - self.logsumexp).exp(), -torch.inf)

    @property
    def margin(self) -> Tensor:
        """Gap between the two largest probabilities, float32 `[B, W]`."""
        return self._shaped("margin")

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, float32 `[B, W]`."""
        return self._shaped("entropy")

    @property
    def logsumexp(self) -> Tensor:
        """Of the logits, float32 `[B, W]`."""
        return self._shaped("logsumexp")

    @property
    def p_current(self) -> Tensor:
        """Probability of the token that now stands at a slot, float32 `[B, W]`; 0 for the mask."""
        return self._shaped("p_given")

    def logits(self, first: int = 0, last: int | None = None) -> Tensor:
        """Logits of the slots `[first, last)`, float32 `[B, n, V]`, guided, -inf for what is never proposed.

        This is a copy of all of them: the ops need none, and a rule that can do without should.
        """
        rows = torch.arange(self.eligible.numel(), device=self.eligible.device).view(self.eligible.shape)
        rows = rows[:, first:last]
        z = self.proposer.clean(self.raw_logits, rows.flatten()).unflatten(0, rows.shape)
        if self.allowed is None:
            return z
        bitmask = self.allowed if self.allowed.dim() == 1 else self.allowed[:, first:last]
        return z.masked_fill(~unpack(bitmask, self.vocab_size), -torch.inf)

    def again(self, bias: Tensor) -> Step:
        """The same step with proposals from `logits + bias`; no forward is needed.

        `bias` is float32 `[B, W, V]`, or `[1, 1, V]` for all slots.
        """
        stats = self.proposer(self.raw_logits, self.window, bias=bias.flatten(0, 1), allowed=self.allowed)
        return replace(self, stats=stats)

    def without(self, refused: Tensor, token: Tensor) -> Step:
        """The same step with new proposals at the slots `refused` bool `[B, W]`, other than `token` `[B, W]` there.

        Each slot's draw has a noise of its own, by how often it was refused in this step, and is as likely as if the
        refused tokens had never been possible.
        """
        words = -(-self.vocab_size // 32)
        allowed = token.new_full((1,), -1, dtype=torch.int32) if self.allowed is None else self.allowed
        allowed = without(allowed.expand(*self.eligible.shape, words), token, refused)
        window = TokenWindow(torch.where(refused, self.window.positions, -1), self.window.origin)
        sampled = self.proposer.options["temperature"] is not None
        redraws = refused.int() if self.redraws is None else self.redraws + refused
        new = self.proposer(
            self.raw_logits, window, allowed=allowed, temperature=self.sampling_temperature if sampled else None,
            redraw=redraws,
        )  # fmt: skip
        where = refused.flatten()
        merged = (torch.where(where, n, old) if old.numel() == len(where) else old for n, old in zip(new, self.stats))
        return replace(self, stats=ops.TokenConfidence(*merged), allowed=allowed, redraws=redraws)

    def embed(self, tokens: Tensor) -> Tensor:
        """The model's input embeddings of tokens `[B, W]`, `[B, W, hidden]`."""
        return self.proposer.model.embed(tokens)

    def mean_embedding(self, probabilities: Tensor) -> Tensor:
        """Mean of the model's input embeddings, `[B, W, hidden]`, under distributions `[B, W, V]`."""
        vocabulary = torch.arange(probabilities.shape[2], device=probabilities.device)
        table = self.embed(vocabulary[None])[0]
        return probabilities.to(table.dtype) @ table

    # --- what is known of the slots ----------------------------------------------------------------------------------

    def at(self, canvas: Tensor) -> Tensor:
        """The slots' values of a tensor over the canvas, `[B, T]` to `[B, W]`; unused slots hold anything."""
        return canvas.gather(1, self.window.positions.clamp(min=0).long())

    @property
    def used(self) -> Tensor:
        """Slots that stand for a position, bool `[B, W]`."""
        return self.window.used

    @property
    def is_open(self) -> Tensor:
        """Slots without a token, in the block or not, bool `[B, W]`."""
        return self.used & self.at(self.canvas.is_open)

    @property
    def decided(self) -> Tensor:
        """Slots whose token a step has committed, bool `[B, W]`; only with `Rule.slots` other than "open"."""
        return self.used & ~self.at(self.canvas.is_open)

    @property
    def current(self) -> Tensor:
        """Token ids that stand at the slots, int64 `[B, W]`."""
        return self.at(self.canvas.tokens)

    @property
    def index_in_block(self) -> Tensor:
        """Positions counted from the block's first, int32 `[B, W]`."""
        return self.window.positions - self.block_start[:, None]

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position."""
        return self.raw_logits.shape[1]

    @property
    def mask_token(self) -> int:
        """Id of the mask token."""
        return self.proposer.special.mask

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which of the tokens are end tokens, bool of the same shape."""
        return torch.isin(tokens, self.proposer.ends)

    def everyone(self, value: bool) -> Tensor:
        """The same for every request, bool `[B]`."""
        return torch.full_like(self.open_now, value, dtype=torch.bool)

    def recall(self, name: str, *shape: int) -> Tensor:
        """What `keep` was last given for the slots' positions, float32 `[B, W, *shape]`; 0 at first."""
        if name not in self.memory:
            return torch.zeros((*self.eligible.shape, *shape), device=self.eligible.device)
        kept = self.memory[name]
        return kept.gather(1, self._index_in_memory(kept))

    def keep(self, name: str, values: Tensor) -> None:
        """Remember `values` `[B, W, …]` for the slots' positions until the block ends."""
        if name not in self.memory:
            # one place for each column of the block, and one for unused slots
            shape = (len(values), self.block_length + 1, *values.shape[2:])
            self.memory[name] = torch.zeros(shape, dtype=values.dtype, device=values.device)
        kept = self.memory[name]
        self.memory[name] = kept.scatter(1, self._index_in_memory(kept), values)

    def _index_in_memory(self, kept: Tensor) -> Tensor:
        index = torch.where(self.used, self.index_in_block, self.block_length).long()
        index = index.view(*index.shape, *[1] * (kept.dim() - 2))
        return index.expand(-1, -1, *kept.shape[2:])

    # --- choosing ----------------------------------------------------------------------------------------------------

    @cached_property
    def score(self) -> Tensor:
        """The configured score, float32 `[B, W]`: larger is committed earlier."""
        score = self.score_of(self)
        if self.deferred is not None:
            last = torch.isin(self.token, self.deferred) & (score > -torch.inf)
            score = score.masked_fill(last, self.score_of.lowest)
        return score

    @property
    def candidates(self) -> Tensor:
        """The score where a slot may be committed, -inf elsewhere, float32 `[B, W]`."""
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
        """A prefix of the eligible slots in score order: `ops.select_tokens` with numbers allowed for tensors."""
        temperature = self.order_temperature
        if score is None and temperature == 0:
            temperature = self.score_of.order_temperature
        noise = {}
        if temperature > 0:
            noise["order_temperature"] = self._per_request(temperature, torch.float32)
        if temperature > 0 or rule == "bernoulli":
            noise |= {
                "seed": self.random.seed,
                "step": self.random.step,
                "position": self.window.request_positions,
            }
        return ops.select_tokens(
            (self.score if score is None else score).contiguous(),
            self.eligible if eligible is None else eligible,
            rule,
            parameter=self._per_request(parameter, torch.float32),
            strict=strict,
            cost=cost,
            gate=gate,
            need=self._per_request(need, torch.int32),
            fill=self._per_request(fill, torch.int32),
            cap=self._per_request(cap, torch.int32),
            **noise,
        ).selected

    def _per_request(self, value, dtype: torch.dtype) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return value.to(dtype)
        return torch.full((1,), value, dtype=dtype, device=self.eligible.device)
