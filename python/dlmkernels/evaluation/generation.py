# SPDX-License-Identifier: Apache-2.0
"""Read a task's `generation_kwargs`. Every option is either applied or rejected by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..decoding.checks import equal
from ..decoding.config import DecodingConfig
from .arguments import FIELDS, read_fields

#: Answer length if neither the task nor the arguments give one; the same as for lm-eval's own models.
DEFAULT_LENGTH = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FILTERS = {"top_p": 1.0, "top_k": 0}


@dataclass(frozen=True)
class Generation:
    """How one answer is generated.

    Attributes
    ----------
    max_new_tokens : int
        Length of the answer in tokens.
    until : tuple of str
        Stop strings. The answer is cut off before the first that occurs in it.
    infill : bool
        Whether the prompt is a canvas whose mask tokens are to be filled in. The answer is then everything from the
        first mask token on.
    options : dict
        Fields of `DecodingConfig` that differ from the engine's configuration.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    infill: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def read_generation(
    kwargs: Mapping[str, Any], config: DecodingConfig, stated: frozenset[str], prefer: str | None
) -> Generation:
    """Read a task's `generation_kwargs`, including those of `--gen_kwargs`.

    Parameters
    ----------
    kwargs : mapping
        `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`, `top_k`, `infill` and fields of `DecodingConfig`.
    config : DecodingConfig
        The engine's configuration.
    stated : frozenset of str
        Its fields that were set by arguments, by a preset or by the model's family.
    prefer : {"task", "model"}, optional
        Which values to use if the task contradicts these fields. If None, a contradiction is an error.

    Raises
    ------
    ValueError, TypeError
        If a name is unknown, a value is invalid, or there is a contradiction and `prefer` is None.
    """
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"generation_kwargs must be a dictionary; got {type(kwargs).__name__}")
    rest = dict(kwargs)
    until = _until(rest.pop("until", None))
    infill = rest.pop("infill", False)
    if not isinstance(infill, bool):
        raise ValueError(f"generation_kwargs: infill must be true or false; got {infill!r}")
    wanted = _sampling(rest, config)
    if (length := _length(rest)) is not None:
        wanted["max_new_tokens"] = length
    if unknown := sorted(rest.keys() - set(FIELDS)):
        known = ("until", "infill", "do_sample", *LENGTHS, *FIELDS)
        raise ValueError(f"generation_kwargs: unsupported {', '.join(unknown)}; known: {', '.join(known)}")
    wanted |= read_fields(rest)
    wanted = _undisputed(wanted, config, stated, prefer)
    length = wanted.pop("max_new_tokens", config.max_new_tokens if "max_new_tokens" in stated else DEFAULT_LENGTH)
    if wanted.get("temperature") == 0.0:  # greedy decoding: filters of the distribution would have no effect
        wanted |= FILTERS
    options = {name: value for name, value in wanted.items() if not equal(value, getattr(config, name))}
    return Generation(length, until, infill, options)


def _until(value: Any) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"generation_kwargs: until must be a non-empty string or a list of them; got {value!r}")
    return tuple(dict.fromkeys(texts))


def _length(rest: dict[str, Any]) -> int | None:
    said = {name: rest.pop(name) for name in LENGTHS if name in rest}
    if not said:
        return None
    if len(set(said.values())) > 1:
        raise ValueError(f"generation_kwargs: the answer lengths {said} contradict each other")
    name, value = next(iter(said.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"generation_kwargs: {name} must be an integer of at least 1; got {value!r}")
    return value


def _sampling(rest: dict[str, Any], config: DecodingConfig) -> dict[str, Any]:
    """Read the temperature and the filters. As in transformers, `do_sample` decides whether to sample at all."""
    draws = rest.pop("do_sample", None)
    if draws is not None and not isinstance(draws, bool):
        raise ValueError(f"generation_kwargs: do_sample must be true or false; got {draws!r}")
    said = {name: rest.pop(name) for name in ("temperature", *FILTERS) if rest.get(name) is not None}
    for name in FILTERS.keys() | {"temperature"}:
        rest.pop(name, None)
    temperature = said.get("temperature")
    if temperature is not None and (isinstance(temperature, bool) or not isinstance(temperature, (int, float))):
        raise ValueError(f"generation_kwargs: temperature must be a number; got {temperature!r}")
    if draws is False and temperature:
        raise ValueError(
            f"generation_kwargs: temperature={temperature} has no effect with do_sample=False: set do_sample=True or "
            "temperature=0"
        )
    if draws and temperature == 0:
        raise ValueError("generation_kwargs: do_sample=True needs a temperature above 0; got 0")
    if draws is False:
        said["temperature"] = 0.0
    elif draws and temperature is None:
        said["temperature"] = config.temperature if config.samples else 1.0
    if said.get("temperature") == 0:
        return {"temperature": 0.0}
    return said


def _undisputed(
    wanted: dict[str, Any], config: DecodingConfig, stated: frozenset[str], prefer: str | None
) -> dict[str, Any]:
    """Resolve contradictions between a task's options and the fields in `stated`, according to `prefer`."""
    disputed = {n: v for n, v in wanted.items() if n in stated and not equal(v, getattr(config, n))}
    if not disputed or prefer == "task":
        return wanted
    if prefer == "model":
        return {name: value for name, value in wanted.items() if name not in disputed}
    words = ", ".join(f"{name}={value} (not {getattr(config, name)})" for name, value in disputed.items())
    raise ValueError(
        f"the task's generation_kwargs contradict the model's arguments or preset: they set {words}. Pass --model_args "
        "prefer=model to use the model's values, or prefer=task to use the task's"
    )


def seed_of(seed: int, *content: Any) -> int:
    """Return a 63-bit seed that depends only on the evaluation's seed and on the request's content."""
    text = json.dumps([seed, *content], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
