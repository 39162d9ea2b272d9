# SPDX-License-Identifier: Apache-2.0
"""Decide which requests can share forward passes, and in which options they may differ."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..decoding.checks import PerRequest
from ..decoding.config import DecodingConfig, SpecialTokens
from ..decoding.constraint import Constraint
from ..decoding.ends import own_ends
from ..decoding.rules import Rule, VariableLength

#: fields of a configuration in which requests that share forward passes may differ, besides fields of the rule
OWN = ("temperature", "top_k", "top_p")


def own_fields(rule: Rule) -> list[str]:
    """Return the fields of a rule in which requests that share forward passes may differ."""
    return [name for name, check in rule.limits.items() if isinstance(check, PerRequest)]


def has_fixed_length(config: DecodingConfig) -> bool:
    """Return whether requests that share forward passes must have the same answer length."""
    is_planned = config.steps is not None and config.rule.uses_steps
    # continuous models take as many steps as their answers have tokens
    return is_planned or config.rule.noise == "continuous" or isinstance(config.rule, VariableLength)


def common(config: DecodingConfig, has_own_constraint: bool = False) -> DecodingConfig:
    """Return the configuration without the per-request fields: equal for requests that may share forward passes.

    With `has_own_constraint`, rows may have different constraints, as long as `constraint_kind` is the same.
    """
    rule = _changed(config.rule, dict.fromkeys(own_fields(config.rule)))
    own = dict.fromkeys((*OWN, "seed", "max_new_tokens", "eos_token_id"))
    if has_own_constraint:
        own |= {"constraint": constraint_kind(config.constraint)}
    return _changed(config, own | {"rule": rule})


def constraint_kind(constraint: Constraint | Tensor | None) -> Hashable:
    """Return a value that is equal for constraints that can be used together in one program."""
    if constraint is None or isinstance(constraint, Tensor):
        return constraint is None
    judges = type(constraint).accepts is not Constraint.accepts
    return judges, constraint.attempts


def ends_width(config: DecodingConfig, special: SpecialTokens) -> int:
    """Return how many end tokens a row needs room for; 0 if the program reads none.

    This is eight, or the next power of two if there are more. Requests with up to eight end tokens can therefore share
    forward passes, and the size does not change while requests come and go.
    """
    if config.eos_policy == "none" and not config.rule.reads_ends:
        return 0
    return max(8, 1 << (len(special.eos) - 1).bit_length()) if special.eos else 8


def together(configs: Sequence[DecodingConfig], lengths: Sequence[int] | None = None) -> DecodingConfig:
    """Merge the configurations of several requests into one with a value for each request, except for end tokens.

    `lengths` are the answer lengths. If None, the first configuration's length is kept.
    """
    first = configs[0]
    fields: dict[str, Any] = {name: tuple(getattr(config, name) for config in configs) for name in OWN}
    names = own_fields(first.rule)
    of_rule = {name: tuple(getattr(config.rule, name) for config in configs) for name in names}
    rule = dataclasses.replace(first.rule, **of_rule) if names else first.rule  # type: ignore[type-var]
    if lengths is not None:
        fields["max_new_tokens"] = lengths[0] if has_fixed_length(first) else tuple(lengths)
    return dataclasses.replace(first, seed=None, rule=rule, eos_token_id=None, **fields).as_preset()


def check_one_request(config: DecodingConfig) -> None:
    """Raise if a configuration has separate values for several requests."""
    fields = {name: getattr(config, name) for name in (*OWN, "max_new_tokens")}
    fields |= {f"rule.{name}": getattr(config.rule, name) for name in own_fields(config.rule)}
    for name, value in fields.items():
        if isinstance(value, tuple):
            raise ValueError(
                f"{name} of an engine must be one number; pass values for single requests to add_request; got {value!r}"
            )
    if own_ends(config.eos_token_id) is not None:
        raise ValueError(
            "eos_token_id of an engine must be one id or a flat list of ids; pass end tokens of single requests to "
            f"add_request; got {config.eos_token_id!r}"
        )


def _changed(owner: Any, fields: Mapping[str, Any]) -> Any:
    """Return a copy of a frozen dataclass with some fields replaced, without checking them."""
    changed = copy.copy(owner)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed
