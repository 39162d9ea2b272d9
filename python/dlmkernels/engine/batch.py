# SPDX-License-Identifier: Apache-2.0
"""Decode a list of prompts with an engine, also through the interface of transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoding.checks import integer, listed
from ..decoding.custom_generate import refuse_others
from ..decoding.inputs import filler, read_options, read_prompts
from ..decoding.resolve import ConfigLike, configuration, resolve
from ..models.adapt import DiffusionModel, adapt
from .engine import Engine
from .intake import ids_of, naming
from .request import RequestOutput, id_of_copy
from .slots import grid_of

#: default number of requests decoded at once
SLOTS = 16
#: fields of a generation config that belong to single requests or positions, and the values that switch them off
OF_REQUESTS = {
    "min_length": 0, "min_new_tokens": None, "bad_words_ids": None, "begin_suppress_tokens": None,
    "forced_eos_token_id": None, "repetition_penalty": 1.0, "num_return_sequences": 1,
}  # fmt: skip


def generate_batch(
    model, inputs: Any, generation_config=None, continuous_batching_config=None, record_timestamps: bool = False, *,
    config: ConfigLike = None, tokenizer=None, slots: int | None = None,
    max_new_tokens: int | Sequence[int] | None = None, seed: int | Sequence[int] | None = None,
    given: Sequence[Any] | None = None, **options: Any,
) -> dict[str, RequestOutput]:  # fmt: skip
    """Decode answers to any number of prompts of any lengths, with up to `slots` of them in progress at once.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        As in `generate`.
    inputs : list
        Prompts: lists of token ids or, with a tokenizer, texts or chats.
    generation_config, continuous_batching_config : optional
        Objects of transformers; see `init_continuous_batching`.
    record_timestamps : bool
        As in `Engine.add_request`.
    config, tokenizer :
        As in `Engine`.
    slots : int, optional
        Number of requests decoded at once. If None, the number of answers, but at most 16.
    max_new_tokens : int or sequence of int, optional
        Length of the answers, in tokens: one value for all prompts, or one for each.
    seed : int or sequence of int, optional
        Seed of the random draws: one value for all prompts, or one for each.
    given : sequence, optional
        For each prompt, the tokens fixed in its answer from the start (see `Engine.add_request`), or None.
    **options
        Fields of `DecodingConfig`, and further arguments of `Engine` and `Engine.add_request` (`deterministic`,
        `graphs`, `stop_strings`, `num_return_sequences`, `suffix` …).

    Returns
    -------
    dict
        A `RequestOutput` for each request id, in the order of the inputs. If a prompt has several answers, the one
        with the prompt's own id comes first.

    Raises
    ------
    ValueError, TypeError
        If any of the requests cannot be decoded. In this case none of them is.
    """
    is_scalar = isinstance(inputs, Tensor) and inputs.dim() == 0
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence | Tensor) or is_scalar:
        got = "a tensor of shape []" if is_scalar else type(inputs).__name__
        raise TypeError(f"inputs must be a list of prompts; got {got}")
    if len(inputs) == 0:
        return {}
    model = adapt(model)
    slots, options = _from_transformers(model, generation_config, continuous_batching_config, slots, options)
    max_new_tokens = options.pop("max_new_tokens", None) if max_new_tokens is None else max_new_tokens
    of_engine = {name: options.pop(name) for name in ("deterministic", "graphs", "prefill_budget") if name in options}
    of_request = {
        name: options.pop(name)
        for name in ("stop_strings", "num_return_sequences", "suffix", "repetition_penalty", "logits_processor",
                     "top_logprobs", "on_step")
        if name in options
    }  # fmt: skip
    options = read_options(model, config, options, tokenizer)
    wanted, special = resolve(model, config, options, "continuations")
    prompts = _prompts(inputs, tokenizer, filler(special))
    count = len(prompts)
    lengths = [
        integer(1)("max_new_tokens", n) or 1 for n in _one_each("max_new_tokens", max_new_tokens, count, wanted.longest)
    ]
    seeds, stand = _one_each("seed", seed, count, None), _one_each("given", given, count, None)
    behind = ids_of("suffix", of_request.get("suffix"))
    width = max(grid_of(model, wanted, len(prompt), int(n) + len(behind)).width for prompt, n in zip(prompts, lengths))
    copies = integer(1)("num_return_sequences", of_request.get("num_return_sequences", 1)) or 1
    engine = Engine(
        model, slots=min(SLOTS, count * copies) if slots is None else slots, max_length=max(width, 2),
        config=configuration(model, config).replace(**options), tokenizer=tokenizer, reserve=False, **of_engine,
    )  # fmt: skip
    ids = []
    for number, (prompt, n, s, g) in enumerate(zip(prompts, lengths, seeds, stand)):
        with naming(number):
            ids.append(engine.add_request(
                prompt, max_new_tokens=n, seed=s, given=g, record_timestamps=record_timestamps, **of_request
            ))  # fmt: skip
    found = {output.request_id: output for output in engine if output.is_finished()}
    engine.stop()
    names = [id_of_copy(one, k) for one in ids for k in range(copies)]
    return {name: found[name] for name in names}


def _prompts(inputs: Any, tokenizer, pad: int) -> list[list[int]]:
    """Convert the inputs to lists of token ids."""
    if isinstance(inputs, Tensor):
        inputs = list(inputs[None] if inputs.dim() == 1 else inputs)
    found: list[list[int]] = []
    for number, one in enumerate(inputs):
        one = listed(f"inputs[{number}]", one)
        if one is None:
            raise TypeError(f"inputs[{number}] must be a prompt; got None")
        if isinstance(one, Sequence) and len(one) == 0 and not isinstance(one, str):
            found.append([])
            continue
        tokens, mask = read_prompts(f"inputs[{number}]", one, None, tokenizer, torch.device("cpu"), pad)
        if len(tokens) != 1:
            raise ValueError(f"inputs[{number}] must be one prompt; got {len(tokens)}")
        found.append(tokens[0].tolist() if mask is None else tokens[0][mask[0] != 0].tolist())
    return found


def _one_each(name: str, value: Any, count: int, otherwise: Any) -> list[Any]:
    """Return one value for each of `count` requests, given one value for all or a sequence with one for each."""
    if value is None:
        return [otherwise] * count
    value = listed(name, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value, or one for each of the {count} prompts; got {len(value)} values")
    return list(value)


# --- transformers' configuration objects ------------------------------------------------------------------------------


def init_continuous_batching(
    model, generation_config=None, continuous_batching_config=None, workload_hints=None, *, slots: int | None = None,
    **options: Any,
) -> Engine:  # fmt: skip
    """Create an engine for a model, without starting it.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        As in `generate`.
    generation_config : GenerationConfig, optional
        Transformers' generation configuration. `max_new_tokens`, `eos_token_id`, `pad_token_id` and `suppress_tokens`
        are used and, with `do_sample=True`, `temperature`, `top_k` and `top_p`. Any other field that would change the
        tokens is an error that names it. If None, the decoder of the model's family is used.
    continuous_batching_config : ContinuousBatchingConfig, optional
        Transformers' configuration. Only `max_requests_per_batch` is used, as the number of slots. The other fields
        describe a paged cache, which this engine does not have.
    workload_hints : optional
        Ignored.
    slots : int, optional
        Number of requests decoded at once. If None, the value in `continuous_batching_config`, or else 16.
    **options
        Arguments of `Engine`.
    """
    model = adapt(model)
    slots, options = _from_transformers(model, generation_config, continuous_batching_config, slots, options)
    return Engine(model, slots=SLOTS if slots is None else slots, **options)


def _from_transformers(
    model: DiffusionModel, generation_config, continuous_batching_config, slots: int | None, options: dict[str, Any]
) -> tuple[int | None, dict[str, Any]]:  # fmt: skip
    """Return the number of slots and the options, with values missing there taken from transformers' objects."""
    if slots is None:
        slots = getattr(continuous_batching_config, "max_requests_per_batch", None)
    if generation_config is None:
        return slots, dict(options)
    refuse_others(model.model, generation_config)
    for name, off in OF_REQUESTS.items():
        value = getattr(generation_config, name, None)
        if value not in (None, off):
            raise ValueError(
                f"generation_config: {name}={value!r} cannot be used here, since it applies to single requests: pass "
                "such options to add_request or generate_batch"
            )
    found: dict[str, Any] = {}
    if generation_config.suppress_tokens:
        found["suppress_token_ids"] = tuple(generation_config.suppress_tokens)
    for name in ("max_new_tokens", "eos_token_id", "pad_token_id"):
        value = getattr(generation_config, name, None)
        if value is not None and value != -1:
            found[name] = value
    if generation_config.do_sample:
        found["temperature"] = 1.0 if generation_config.temperature is None else generation_config.temperature
        if generation_config.top_k:
            found["top_k"] = generation_config.top_k
        if generation_config.top_p is not None and generation_config.top_p < 1:
            found["top_p"] = generation_config.top_p
    return slots, found | options
