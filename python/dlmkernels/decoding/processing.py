# SPDX-License-Identifier: Apache-2.0
"""Per-request options between logits and proposals: repetition penalty, logits processors and top log-probabilities.

The repetition penalty and the recording of top tokens are tensor operations and can be captured in a CUDA graph. A
logits processor is a Python function that runs on the host. With one, each step waits for the device and makes a
float32 copy of the request's logits, and steps cannot be captured.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..window import TokenWindow
from .checks import integer, number
from .config import DecodingConfig
from .hidden_rows import Logits, whole
from .output import DecodingOutput
from .programs import Program
from .propose import Proposer
from .resolve import check_block_by_block
from .state import FROZEN
from .step import Step

#: takes ids int64 `[n, t]` and scores float32 `[n, V]`, returns scores
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Wishes:
    """Logit processing and recording options of one request.

    Attributes
    ----------
    repetition_penalty : float
        Penalty for tokens that already occur in the request (in the prompt or among its decided tokens): their logits
        are divided by it if positive and multiplied by it if negative, as in transformers. 1 means no penalty.
    processors : tuple of callables
        Logits processors as in transformers, called one after another with the given and decided tokens of the request,
        in order of position, and the logits of its open positions.
    top_logprobs : int
        Number of most likely tokens recorded at each position; 0 for none.
    """

    repetition_penalty: float = 1.0
    processors: tuple[Processor, ...] = ()
    top_logprobs: int = 0

    @classmethod
    def of(
        cls, repetition_penalty: Any = 1.0, logits_processor: Any = None, top_logprobs: Any = 0
    ) -> Wishes:  # fmt: skip
        """Check the arguments of a caller and build the options from them."""
        penalty = number(0.0, above=True)("repetition_penalty", repetition_penalty)
        if math.isinf(penalty):
            raise ValueError("repetition_penalty must be finite; got inf")
        if logits_processor is None:
            processors: Sequence[Any] = ()
        else:
            is_value = isinstance(logits_processor, (str, bytes, Mapping)) or hasattr(logits_processor, "ndim")
            is_several = isinstance(logits_processor, Iterable) and not callable(logits_processor) and not is_value
            processors = list(logits_processor) if is_several else [logits_processor]
        for one in processors:
            if not callable(one):
                raise TypeError(
                    f"logits_processor must be a function of token ids and scores, or a list of them; got {one!r}"
                )
            _check_signature(one)
        return cls(float(penalty), tuple(processors), integer(0)("top_logprobs", top_logprobs))

    def __bool__(self) -> bool:
        return self.changes_logits or self.top_logprobs > 0

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """The work a step has to do: the number of tokens to record, and whether there are a penalty and processors."""
        return self.top_logprobs, self.repetition_penalty != 1.0, bool(self.processors)

    @property
    def changes_logits(self) -> bool:
        return self.repetition_penalty != 1.0 or bool(self.processors)

    def check(self, config: DecodingConfig, vocab: int | None) -> None:
        """Raise a ValueError if a requested option cannot be combined with the configuration."""
        names = {
            "repetition_penalty": self.repetition_penalty != 1.0, "logits_processor": bool(self.processors),
            "top_logprobs": self.top_logprobs > 0,
        }  # fmt: skip
        for name, wanted in names.items():
            if not wanted:
                continue
            check_block_by_block(name, config.rule)
            if config.cfg_scale > 0 and name != "top_logprobs":
                raise ValueError(
                    f"{name} cannot be used with cfg_scale={config.cfg_scale}, which combines the logits of two "
                    "forward passes"
                )
        if vocab is not None and self.top_logprobs > vocab:
            raise ValueError(f"top_logprobs must be at most the vocabulary size, {vocab}; got {self.top_logprobs}")


def _check_signature(processor: Processor) -> None:
    """Raise a TypeError if a processor cannot be called with two arguments."""
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            "logits_processor must be a function of two arguments, the decided token ids int64 [n, t] and the scores "
            f"float32 [n, V]; got {processor!r} ({error})"
        ) from None


class RequestProposer(Proposer):
    """A proposer that applies the options of each row's request.

    Attributes
    ----------
    errors : dict
        Exceptions raised by logits processors, by row. Only the request in that row fails.
    raises : bool
        Whether an exception of a processor is raised immediately instead of being stored in `errors`.
    top_ids, top_logprobs : Tensor
        int64 and float32 `[S, T + 1, k]`: most likely tokens of each position, and their log-probabilities, as of the
        last step that could decide it. The last column absorbs the writes of slots without an open position.
    entropy : Tensor
        float32 `[S, T + 1]`: entropy of the same distributions, in nats.
    """

    def __init__(self, program: Program, most_logprobs: int, has_penalty: bool):
        """`has_penalty`: whether any request may have a penalty. Captured steps do the same work every time."""
        super().__init__(program.model, program.state, program.config, program.special)
        rows, columns = self.state.tokens.shape
        device = self.state.tokens.device
        self.wishes: list[Wishes] = [Wishes()] * rows
        self.errors: dict[int, Exception] = {}
        self.raises = False
        self.penalty = torch.ones(rows, device=device)
        self.has_penalty = has_penalty
        self.top_ids = torch.zeros(rows, columns + 1, most_logprobs, dtype=torch.int64, device=device)
        self.top_logprobs = torch.zeros(rows, columns + 1, most_logprobs, dtype=torch.float32, device=device)
        self.entropy = torch.zeros(rows, columns + 1, dtype=torch.float32, device=device)

    @classmethod
    def install(cls, program: Program, wishes: Sequence[Wishes]) -> RequestProposer:
        """Make a program that has not begun apply the options of its rows' requests."""
        kinds = [one.kind for one in wishes]
        new = cls(program, max(records for records, *_ in kinds), any(penalty for _, penalty, _ in kinds))
        for row, one in enumerate(wishes):
            new.set(row, one)
        program.propose = new
        return new

    def set(self, row: int, wishes: Wishes) -> None:
        """Set the options of a new request in a row."""
        self.wishes[row] = wishes
        self.errors.pop(row, None)
        self.penalty[row] = wishes.repetition_penalty

    def step(
        self, logits: Logits, window: TokenWindow, standing: Any, row_map: Tensor | None = None, *args: Any,
        **options: Any,
    ) -> Step:  # fmt: skip
        logits = self._processed(whole(logits), window, row_map)
        step = super().step(logits, window, standing, row_map, *args, **options)
        if self.top_ids.shape[2]:
            self._record(step)
        return step

    # --- logits -------------------------------------------------------------------------------------------------------

    def _processed(self, logits: Tensor, window: TokenWindow, row_map: Tensor | None) -> Tensor:
        if self.has_penalty:
            logits = self._penalized(logits, window, row_map)
        asking = [row for row, wishes in enumerate(self.wishes) if wishes.processors and row not in self.errors]
        if not asking:
            return logits
        logits = logits.clone()
        used = window.used.cpu()
        slots = torch.arange(used.numel(), device="cpu") if row_map is None else row_map.long().cpu()
        slots = slots.view(used.shape)
        for row in asking:
            where = slots[row][used[row]]
            where = where[where >= 0].to(logits.device)
            if len(where):
                try:
                    logits[where] = self._ask(row, logits[where]).to(logits.dtype)
                except Exception as error:  # user code: any exception fails only its own request
                    if self.raises:
                        raise
                    self.errors[row] = error
        return logits

    def _ask(self, row: int, logits: Tensor) -> Tensor:
        """Apply the processors of a row to some of its logits `[n, V]`."""
        tokens = self.state.tokens[row][self._holds()[row]]
        scores = logits.float()
        for process in self.wishes[row].processors:
            new = process(tokens.expand(len(scores), -1), scores)
            fits = isinstance(new, Tensor) and new.shape == scores.shape and new.device == scores.device
            if not fits or not new.is_floating_point():
                got = type(new).__name__
                if isinstance(new, Tensor):
                    got = f"{new.dtype} of shape {list(new.shape)} on {new.device}"
                raise ValueError(
                    f"logits_processor: {type(process).__name__} must return floating-point scores of shape "
                    f"{list(scores.shape)} on {scores.device}; got {got}"
                )
            scores = new
        return scores

    def _holds(self) -> Tensor:
        """Return the positions that hold a token of the request, given or decided, bool `[S, T]`."""
        state = self.state
        columns = torch.arange(state.tokens.shape[1], dtype=torch.int32, device=state.tokens.device)
        inside = (columns >= state.origin[:, None]) & (columns < state.end[:, None])
        return inside & ~state.is_open & (((state.state & FROZEN) != 0) | (state.commit_step >= 0))

    def _penalized(self, logits: Tensor, window: TokenWindow, row_map: Tensor | None) -> Tensor:
        rows, slots = window.positions.shape
        vocab, count = logits.shape[1], len(logits)
        owner = torch.arange(rows, device=logits.device)[:, None].expand(rows, slots).flatten()
        if row_map is not None:  # logit rows that belong to no slot may get the penalty of any request
            target = torch.where(row_map >= 0, row_map, count).long()
            owner = torch.zeros(count + 1, dtype=torch.int64, device=logits.device).scatter(0, target, owner)[:count]
        held = torch.where(self._holds(), self.state.tokens, vocab)
        seen = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device).scatter_(1, held, True)
        penalty = self.penalty[owner][:, None]
        changed = torch.where(logits > 0, logits / penalty, logits * penalty).to(logits.dtype)
        return torch.where(seen[owner, :vocab], changed, logits)

    def recorded(self, out: DecodingOutput) -> DecodingOutput:
        """Return the result with the recorded values of its decoded tokens."""
        if not self.top_ids.shape[2]:
            return out
        width, decoded = out.sequences.shape[1], out.decoded[..., None]
        return replace(
            out, top_ids=torch.where(decoded, self.top_ids[:, :width], -1),
            top_log_probability=torch.where(decoded, self.top_logprobs[:, :width], 0.0),
            entropy=torch.where(out.decoded, self.entropy[:, :width], 0.0),
        )  # fmt: skip

    # --- records ------------------------------------------------------------------------------------------------------

    def _record(self, step: Step) -> None:
        """Record the most likely tokens of every position that the step may decide."""
        count = len(step.raw_logits) // (2 if self.config.cfg_scale > 0 else 1)
        if self.top_ids.shape[2] > step.raw_logits.shape[1]:
            raise ValueError(
                f"top_logprobs must be at most the number of logits, {step.raw_logits.shape[1]}; got "
                f"{self.top_ids.shape[2]}"
            )
        z = self.clean(step.raw_logits, torch.arange(count, device=step.raw_logits.device))
        log_p = z.log_softmax(-1)
        best, entropy = log_p.topk(self.top_ids.shape[2], -1), -(log_p.exp() * log_p).nansum(-1)  # 0 · -inf counts as 0
        where = step.logit_rows
        column = torch.where(step.used & step.is_open, step.window.positions, self.top_ids.shape[1] - 1).long()
        self.entropy.scatter_(1, column, entropy[where])
        column = column[..., None].expand(-1, -1, self.top_ids.shape[2])
        self.top_ids.scatter_(1, column, best.indices[where])
        self.top_logprobs.scatter_(1, column, best.values[where])
