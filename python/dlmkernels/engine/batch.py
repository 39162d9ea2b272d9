# SPDX-License-Identifier: Apache-2.0
"""A list of prompts through an engine, and the doors by which users of transformers come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoding.checks import integer
from ..decoding.custom_generate import refuse_others
from ..decoding.inputs import filler, read_options, read_prompts
from ..decoding.resolve import ConfigLike, configuration, resolve
from ..models.adapt import DiffusionModel, adapt
from .engine import Engine
from .intake import ids_of
from .request import RequestOutput, id_of_copy
from .slots import grid_of

#: how many requests are decoded at once where nobody says
SLOTS = 16
#: what of a generation config belongs to requests, or to positions of an answer, and the value that switches it off
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
    """Decode answers to any number of prompts, of any lengths, as many at a time as there are slots.

    Parameters
    ----------
    model : PreTrainedModel or DiffusionModel
        As in `generate`.
    inputs : list
        Prompts: lists of ids, or with a tokenizer texts or chats.
    generation_config, continuous_batching_config : optional
        Of transformers, see `init_continuous_batching`.
    record_timestamps : bool
        As in `Engine.add_request`.
    config, tokenizer :
        As in `Engine`.
    slots : int, optional
        How many are decoded at once; None: 16, or as many as there are prompts.
    max_new_tokens : int or sequence of int, optional
        Length of the answers, one for all or one each.
    seed : int or sequence of int, optional
        One for all or one each.
    given : sequence, optional
        For each prompt what stands in its answer from the start (see `Engine.add_request`), or None.
    **options
        Fields of `DecodingConfig`, and what `Engine` and `Engine.add_request` take beyond (`deterministic`, `graphs`,
        `stop_strings`, `num_return_sequences`, `suffix` …).

    Returns
    -------
    dict
        `RequestOutput` by the request's id, in the order of the inputs; with several answers to a prompt, the one of
        its own id first.

    Raises
    ------
    ValueError, TypeError
        When any of the requests could not be decoded; then none has been.
    """
    if isinstance(inputs, str) or not isinstance(inputs, Sequence | Tensor):
        raise TypeError(f"inputs must be a list of prompts; got {type(inputs).__name__}")
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
    ids = [
        engine.add_request(
            prompt, max_new_tokens=n, seed=s, given=g, record_timestamps=record_timestamps, **of_request
        )
        for prompt, n, s, g in zip(prompts, lengths, seeds, stand)
    ]  # fmt: skip
    found = {output.request_id: output for output in engine if output.is_finished()}
    engine.stop()
    names = [id_of_copy(one, k) for one in ids for k in range(copies)]
    return {name: found[name] for name in names}


def _prompts(inputs: Any, tokenizer, pad: int) -> list[list[int]]:
    """The inputs as lists of ids; those that are ids already as they are."""
    if isinstance(inputs, Tensor):
        inputs = list(inputs[None] if inputs.dim() == 1 else inputs)
    found: list[list[int]] = []
    for number, one in enumerate(inputs):
        if isinstance(one, Tensor) or hasattr(one, "tolist"):
            one = one.tolist()
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
    """A value for each request, of one for all or of one each."""
    if value is None:
        return [otherwise] * count
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one for all, or one for each of {count} prompts; got {len(value)}")
    return list(value)


# --- what transformers' users pass ------------------------------------------------------------------------------------


def init_continuous_batching(
    model, generation_config=None, continuous_batching_config=None, workload_hints=None, *, slots: int | None = None,
    **options: Any,
) -> Engine:  # fmt: skip
    """An engine for a model, not started yet.

    Parameters
    ----------
    generation_config : GenerationConfig, optional
        Of transformers. Honoured are `max_new_tokens`, `eos_token_id`, `pad_token_id`, `suppress_tokens`, and with
        `do_sample=True` temperature, top_k and top_p; what else would change the tokens is refused by name. None: the
        decoder of the model's family.
    continuous_batching_config : ContinuousBatchingConfig, optional
        Of transformers. Honoured is `max_requests_per_batch`, the number of slots; the rest is about a cache of pages,
        which is not used.
    workload_hints : optional
        Makes no difference.
    slots : int, optional
        How many requests are decoded at once; None: what `continuous_batching_config` says, or 16.
    **options
        What `Engine` takes.
    """
    model = adapt(model)
    slots, options = _from_transformers(model, generation_config, continuous_batching_config, slots, options)
    return Engine(model, slots=SLOTS if slots is None else slots, **options)


def _from_transformers(
    model: DiffusionModel, generation_config, continuous_batching_config, slots: int | None, options: dict[str, Any]
) -> tuple[int | None, dict[str, Any]]:  # fmt: skip
    """The number of slots and the options, with what transformers' objects say where nothing else does."""
    if slots is None:
        slots = getattr(continuous_batching_config, "max_requests_per_batch", None)
    if generation_config is None:
        return slots, dict(options)
    refuse_others(model.model, generation_config)
    for name, off in OF_REQUESTS.items():
        value = getattr(generation_config, name, None)
        if value not in (None, off):
            raise ValueError(
                f"generation_config: {name}={value!r} cannot be used here: what requests ask for beyond a "
                "configuration is said to add_request or generate_batch"
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
