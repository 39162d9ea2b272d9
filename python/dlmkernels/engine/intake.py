# SPDX-License-Identifier: Apache-2.0
"""Turn a caller's arguments into requests that are known to fit and to be decodable, or raise an error."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoding.bitmask import check_kind
from ..decoding.checks import INT64, flag, id_range, integer, listed
from ..decoding.config import DecodingConfig, SpecialTokens, check_names
from ..decoding.constraint import Constraint
from ..decoding.copies import seed_of_copy
from ..decoding.extras import check_copies
from ..decoding.inputs import read_prompts
from ..decoding.processing import Wishes
from ..decoding.propose import bias_tensor
from ..decoding.resolve import resolve
from ..decoding.rules import NextToken, SelfSpeculative, Strided
from ..decoding.schedule import plan_blocks
from ..decoding.stops import check_stop_strings
from ..models.adapt import DiffusionModel
from .alike import check_one_request, common, ends_width, has_fixed_length
from .gang import check_program
from .pool import Size
from .request import Request, id_of_copy
from .slots import goes_by_itself, grid_of

#: number of resolved configurations that are cached
REMEMBERED = 256


class Known(NamedTuple):
    """A resolved and checked configuration.

    Attributes
    ----------
    config, special : DecodingConfig, SpecialTokens
    key : hashable
        Equal for configurations whose requests can share forward passes.
    has_fixed_length : bool
        Whether requests must also have the same answer length to share forward passes.
    """

    config: DecodingConfig
    special: SpecialTokens
    key: Hashable
    has_fixed_length: bool


class Intake:
    """Creates requests. May be used from any thread."""

    def __init__(self, model: DiffusionModel, config: DecodingConfig, tokenizer, size: Size):
        self.model, self.config, self.tokenizer, self.size = model, config, tokenizer, size
        self._known: dict[Hashable, Known] = {}
        self._lock = threading.Lock()
        if isinstance(config.seed, Tensor):
            raise ValueError(
                "seed of an engine must be one number or None; pass seeds for single requests to add_request"
            )

    def known(self, options: Mapping[str, Any]) -> Known:
        """Return the engine's configuration with some fields changed, resolved and checked."""
        key: Hashable
        if "constraint" in options:  # each request has its own, which must not be kept alive
            return self._resolved(options)
        try:
            key = tuple((name, _typed(options[name])) for name in sorted(options))
            hash(key)
        except TypeError:  # an unhashable value, such as a list
            return self._resolved(options)
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = self._resolved(options)
            with self._lock:
                if len(self._known) >= REMEMBERED:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = found
        return found

    def _resolved(self, options: Mapping[str, Any]) -> Known:
        config, special = resolve(self.model, self.config, options, "continuations")
        check_one_request(config)
        by_itself = goes_by_itself(self.model, config)
        key = common(config, by_itself), ends_width(config, special)
        known = Known(config, special, key, has_fixed_length(config))
        if isinstance(config.constraint, Tensor):
            check_kind(config.constraint, self.model.device)
        if not by_itself:  # build a program for a dummy request, so that an unsupported configuration raises now
            if isinstance(config.constraint, Tensor):  # its shape depends on the length of the answer
                known = known._replace(config=dataclasses.replace(config, constraint=None).as_preset())
            prompt, length = [int(special.mask == 0)], max(min(config.longest, self.size.columns - 1), 1)
            check_program(self.model, self._blank(known, prompt, [-1] * length))
        return Known(config, special, key, has_fixed_length(config))

    def blank(self) -> Request:
        """Return a dummy request with the engine's own configuration."""
        return self._blank(self.known({}), [], [-1])

    @staticmethod
    def _blank(known: Known, prompt: list[int], answer: list[int]) -> Request:
        return Request(
            "", prompt, answer, 0, 0, known.config, known.special, known.key, known.has_fixed_length, Wishes()
        )  # fmt: skip

    def requests(
        self, request_id: str, input_ids: Any, *, max_new_tokens: int | None, given: Any, suffix: Any, seed: int | None,
        num_return_sequences: int, stop_strings: Any, wishes: Wishes, flags: Mapping[str, Any], options: dict[str, Any],
    ) -> list[Request]:  # fmt: skip
        """Create one request for each sequence to return."""
        check_names(options)
        options = {name: value for name, value in options.items() if value is not None}
        known = self.known(options)
        prompt = self._prompt(input_ids, known.special)
        answer, suffix_length = self._answer(prompt, known, max_new_tokens, given, suffix)
        if known.has_fixed_length:
            known = self.known(options | {"max_new_tokens": len(answer)})
        self._check_fit(known, prompt, answer, wishes)
        count = check_copies(num_return_sequences, known.config)
        seed = self._seed(seed)
        stops = check_stop_strings(stop_strings, self.tokenizer)
        requests = [
            Request(
                id_of_copy(request_id, k), prompt, answer, suffix_length,
                seed_of_copy(seed, k), known.config, known.special, known.key, known.has_fixed_length, wishes, stops,
                **flags,
            )
            for k in range(count)
        ]  # fmt: skip
        if isinstance(known.config.constraint, Constraint):  # raises now if the constraint cannot be used
            known.config.constraint.bound(requests[0].place(self.model.vocab_size))
        return requests

    def _prompt(self, input_ids: Any, special: SpecialTokens) -> list[int]:
        if isinstance(input_ids, Tensor):
            is_one = input_ids.dim() == 1 or (input_ids.dim() == 2 and len(input_ids) == 1)
            if input_ids.dtype != torch.int64 or not is_one:
                raise ValueError(
                    "input_ids must be the ids of one prompt, int64 [P] or [1, P]; got "
                    f"{input_ids.dtype} of shape {list(input_ids.shape)}"
                )
            prompt = listed("input_ids", input_ids.flatten())
        elif input_ids is None:
            raise TypeError("input_ids must be the ids of one prompt, or text with tokenizer=…; got None")
        elif isinstance(input_ids, Sequence) and len(input_ids) == 0 and not isinstance(input_ids, str):
            prompt = []
        else:
            tokens, mask = read_prompts(
                "input_ids", input_ids, None, self.tokenizer, torch.device("cpu"), max(special.pad, 0)
            )  # fmt: skip
            if len(tokens) != 1:
                raise ValueError(f"input_ids must be one prompt; got {len(tokens)} (add_requests takes several)")
            prompt = tokens[0].tolist() if mask is None else tokens[0][mask[0] != 0].tolist()
        self._check_ids("input_ids", prompt, special, 0)
        return prompt

    def _check_ids(self, name: str, ids: Sequence[int], special: SpecialTokens, lowest: int) -> None:
        vocab = self.model.vocab_size
        for i in ids:
            if not isinstance(i, Integral) or isinstance(i, bool):
                raise TypeError(f"{name} must hold token ids, which are integers; got {i!r}")
            if i < lowest or (vocab is not None and i >= vocab):
                raise ValueError(f"{name} must hold ids {id_range(vocab, lowest)}; got {i}")
            if i == special.mask and i >= 0:
                raise ValueError(f"{name} holds the mask token ({special.mask})")

    def _answer(
        self, prompt: list[int], known: Known, max_new_tokens: int | None, given: Any, suffix: Any
    ) -> tuple[list[int], int]:  # fmt: skip
        """Return the tokens after the prompt, -1 at each position to decode, and the length of the suffix in them."""
        behind = ids_of("suffix", suffix)
        self._check_ids("suffix", behind, known.special, 0)
        length = integer(1, optional=True)("max_new_tokens", max_new_tokens)
        room = self.size.columns - len(prompt) - len(behind)
        given = None if given is None else ids_of("given", given)
        if length is None and given is not None:
            length = len(given)
        if length is None:
            length = known.config.longest
            if "max_new_tokens" not in known.config.asked:
                length = max(min(length, room), 1)
        if length > max(room, self.size.columns):  # before a list of this length is created
            raise ValueError(
                f"input_ids ({len(prompt)} tokens) and the answer (max_new_tokens={length}) are longer than this "
                f"engine's max_length of {self.size.columns}"
            )
        answer = [-1] * length if given is None else given
        self._check_ids("given", answer, known.special, -1)
        if len(answer) != length:
            raise ValueError(
                f"given must have max_new_tokens={length} ids, -1 at positions to decode; got {len(answer)}"
            )
        if all(i >= 0 for i in answer):
            raise ValueError("given leaves nothing to decode: it must hold -1 at each position to decode")
        return answer + behind, len(behind)

    def _check_fit(self, known: Known, prompt: list[int], answer: list[int], wishes: Wishes) -> None:
        """Raise if the request could never fit into a slot or never be decoded."""
        config = known.config
        grid = grid_of(self.model, config, len(prompt), len(answer))
        if grid.width > self.size.columns:
            raise ValueError(
                f"input_ids ({len(prompt)} tokens) and the answer ({len(answer)} tokens with the suffix) need "
                f"{grid.width} columns, more than this engine's max_length of {self.size.columns}"
            )
        if known.has_fixed_length and config.rule.by_block:
            plan_blocks(config, grid)
        self._check_tensors(config, len(answer))
        if not prompt and (isinstance(config.rule, (NextToken, Strided, SelfSpeculative)) or config.cfg_scale > 0):
            why = (
                f"rule {type(config.rule).__name__} predicts the first token of the answer from the last of the prompt"
            )
            if config.cfg_scale > 0:
                why = "guidance (cfg_scale) masks the prompt"
            raise ValueError(f"input_ids must hold at least one token, since {why}")
        if any(i >= 0 for i in answer) and not config.rule.by_block:
            raise ValueError(f"given and suffix cannot be used with rule {type(config.rule).__name__}")
        wishes.check(config, self.model.vocab_size)

    def _check_tensors(self, config: DecodingConfig, length: int) -> None:
        """Raise if the logit bias or a constraint tensor does not fit the vocabulary or an answer of this length."""
        vocab, constraint = self.model.vocab_size, config.constraint
        if vocab is not None and config.logit_bias is not None:
            bias_tensor(config.logit_bias, vocab, torch.device("cpu"))
        if isinstance(constraint, Tensor):
            words = constraint.shape[-1] if constraint.dtype == torch.int32 else -(-constraint.shape[-1] // 32)
            fits = constraint.dim() == 1 or (
                constraint.shape[-2] in (1, length) and (constraint.dim() == 2 or constraint.shape[:-2] == (1,))
            )
            if not fits or (vocab is not None and words > -(-vocab // 32)):
                raise ValueError(
                    f"constraint must have shape [n], [{length}, n] or [1, {length}, n] for this answer, where n "
                    f"counts int32 words of 32 tokens or bools; got {list(constraint.shape)}"
                )

    def _seed(self, seed: int | None) -> int:
        """Return the request's own seed, else the engine's, else a random one."""
        chosen = integer(INT64.min, INT64.max, optional=True)("seed", seed)
        if chosen is None:
            assert not isinstance(self.config.seed, Tensor)
            chosen = self.config.seed
        return int(torch.randint(2**63 - 1, (1,), device="cpu")) if chosen is None else chosen


def _typed(value: Any) -> Hashable:
    """Return a key for a value that differs from those of equal values of other types: 1, 1.0 and True."""
    return type(value), tuple(map(_typed, value)) if isinstance(value, tuple) else value


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Within this context, errors about the `input_ids` of a request name `inputs[number]` instead."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = str(error)
        if not text.startswith("input_ids"):
            raise
        raise type(error)(f"inputs[{number}]{text.removeprefix('input_ids')}") from None


def ids_of(name: str, values: Any) -> list[int]:
    """Return token ids as a list, which is empty for None."""
    if values is None:
        return []
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} must be one sequence of token ids, [n]; got shape {list(values.shape)}")
    values = listed(name, values)
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of token ids; got {type(values).__name__}")
    return list(values)


def check_handler(name: str, value: Any) -> None:
    """Raise if a result handler is not callable."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable that takes a RequestOutput; got {type(value).__name__}")


def check_flags(**values: Any) -> dict[str, Any]:
    """Check the options that ask for outputs before the end of a request, and return them."""
    on_step = values.pop("on_step")
    if on_step is not None:
        check_handler("on_step", on_step)
    return {name: flag(name, value) for name, value in values.items()} | {"on_step": on_step}
