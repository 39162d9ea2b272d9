# SPDX-License-Identifier: Apache-2.0
"""Which requests are decoded alike, so that they can share forwards, and what each of them says for itself."""

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

#: fields of a configuration in which requests that share forwards may differ, beside those of the rule
OWN = ("temperature", "top_k", "top_p")


def own_fields(rule: Rule) -> list[str]:
    """Fields of a rule in which requests may differ."""
    return [name for name, check in rule.limits.items() if isinstance(check, PerRequest)]


def has_fixed_length(config: DecodingConfig) -> bool:
    """Whether requests that share forwards must have equally long answers."""
    is_planned = config.steps is not None and config.rule.uses_steps
    # continuous models take as many steps as their answers have tokens
    return is_planned or config.rule.noise == "continuous" or isinstance(config.rule, VariableLength)


def common(config: DecodingConfig, has_own_constraint: bool = False) -> DecodingConfig:
    """A configuration without what its request says for itself: equal for all that may share forwards.

    `has_own_constraint`: rows may have different constraints, of one kind.
    """
    rule = _changed(config.rule, dict.fromkeys(own_fields(config.rule)))
    own = dict.fromkeys((*OWN, "seed", "max_new_tokens", "eos_token_id"))
    if has_own_constraint:
        own |= {"constraint": constraint_kind(config.constraint)}
    return _changed(config, own | {"rule": rule})


def constraint_kind(constraint: Constraint | Tensor | None) -> Hashable:
    """The same for constraints that rows of one program can have."""
    if constraint is None or isinstance(constraint, Tensor):
        return constraint is None
    judges = type(constraint).accepts is not Constraint.accepts
    return judges, constraint.attempts


def ends_width(config: DecodingConfig, special: SpecialTokens) -> int:
    """How many end tokens there is room for in a row of a program that decodes such a request; 0: it reads none.

    Eight, or the next power of two: requests with up to eight can share forwards, and what there is room for does not
    change while requests come and go.
    """
    if config.eos_policy == "none" and not config.rule.reads_ends:
        return 0
    return max(8, 1 << (len(special.eos) - 1).bit_length()) if special.eos else 8


def together(configs: Sequence[DecodingConfig], lengths: Sequence[int] | None = None) -> DecodingConfig:
    """One configuration for several requests, with a value for each of them, but for their end tokens.

    `lengths`: of their answers; None: the first configuration's.
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
    """Refuse a configuration that has values for several requests."""
    fields = {name: getattr(config, name) for name in (*OWN, "max_new_tokens")}
    fields |= {f"rule.{name}": getattr(config.rule, name) for name in own_fields(config.rule)}
    for name, value in fields.items():
        if isinstance(value, tuple):
            raise ValueError(f"{name} of an engine must be one number: each request has its own; got {value!r}")
    if own_ends(config.eos_token_id) is not None:
        raise ValueError(
            "eos_token_id of an engine must be one id or several: each request has its own; got "
            f"{config.eos_token_id!r}"
        )


def _changed(owner: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of a frozen dataclass with other fields, unchecked."""
    changed = copy.copy(owner)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed
