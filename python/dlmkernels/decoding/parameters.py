# SPDX-License-Identifier: Apache-2.0
"""Per-request parameters: configuration fields that hold one value for each request.

During decoding they are tensors of the state, written when a request is assigned to a row and read by every step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .checks import PerRequest
from .config import DecodingConfig
from .ends import ENDS, end_table, own_ends

SAMPLER = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32}
OF_RULE = "rule."


def parameters_of(config: DecodingConfig, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Collect the fields of `config` and of its rule ("rule.threshold") that have one value per request.

    Returns tensors `[B]` by name (`[B, E]` for end tokens), where B is `batch`. Raises a ValueError if a field has a
    different number of values.
    """
    given = _given(config).items()
    found = {name: _values(name, values, batch, dtype, device) for name, (values, dtype) in given}
    ends = own_ends(config.eos_token_id)
    if ends is not None:
        _check_count(ENDS, ends, batch)
        found[ENDS] = end_table(ends, device)
    return found


def lengths_of(config: DecodingConfig, batch: int, device: torch.device) -> Tensor:
    """Return `max_new_tokens` of each of `batch` requests, int32 `[B]`."""
    lengths = config.max_new_tokens
    values = lengths if isinstance(lengths, tuple) else (lengths,) * batch
    return _values("max_new_tokens", values, batch, torch.int32, device)


def with_parameters(config: DecodingConfig, parameters: dict[str, Tensor]) -> DecodingConfig:
    """Return the configuration that a program reads, with these fields replaced by the tensors `parameters`.

    Fields of the rule become `[B, 1]`, so that they broadcast against per-slot values.
    """
    if not parameters:
        return config
    of_rule = {name.removeprefix(OF_RULE): x[:, None] for name, x in parameters.items() if name.startswith(OF_RULE)}
    of_config = {name: x for name, x in parameters.items() if name in SAMPLER}
    return changed(config, of_config | {"rule": changed(config.rule, of_rule)})


def _values(name: str, values: tuple, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    _check_count(name, values, batch)
    return torch.tensor(values, dtype=dtype, device=device)


def _check_count(name: str, values: tuple, batch: int) -> None:
    if len(values) != batch:
        raise ValueError(f"{name} must have one value for each of the {batch} requests; got {len(values)}")


def _given(config: DecodingConfig) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    fields = {name: (getattr(config, name), dtype) for name, dtype in SAMPLER.items()}
    for name, check in config.rule.limits.items():
        if isinstance(check, PerRequest):
            fields[OF_RULE + name] = (getattr(config.rule, name), torch.float32)
    return {name: (values, dtype) for name, (values, dtype) in fields.items() if isinstance(values, tuple)}


def changed(owner: Any, fields: dict[str, Any]) -> Any:
    """Return a copy of a frozen dataclass with these fields replaced, without any checks."""
    changed = copy.copy(owner)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed
