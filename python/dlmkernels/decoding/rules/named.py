# SPDX-License-Identifier: Apache-2.0
"""Rules by name, as given on command lines and in requests: `threshold:0.9`."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..names import PRESET_NAMES, close_match
from . import (
    CreditThreshold,
    DynamicThreshold,
    EntropyBound,
    EntropySum,
    Factor,
    HierarchicalThreshold,
    LocalThreshold,
    Quota,
    Rule,
    StableThreshold,
    Threshold,
    TimeQuota,
)

# name -> constructor, called with the number after the colon if there is one
RULES: dict[str, Callable[..., Rule]] = {
    "quota": Quota,
    "time-quota": TimeQuota,
    "threshold": Threshold,
    "factor": Factor,
    "entropy-bound": EntropyBound,
    "entropy-sum": EntropySum,
    "dynamic-threshold": DynamicThreshold,
    "hierarchical-threshold": HierarchicalThreshold,
    "local-threshold": LocalThreshold,
    "stable-threshold": StableThreshold,
    "credit-threshold": CreditThreshold,
}


def _hint(text: str) -> str:
    """Return what to add to the message about an unknown rule: a similar one, or all."""
    if text in PRESET_NAMES:
        return f": that is a preset; pass config={text!r}, or --preset {text} on the command line"
    found = re.fullmatch(r"([\w-]+)(?:[:(=]([\d.e-]+)\)?)?", text)
    near = close_match(found[1], RULES) if found else None
    if found is not None and near is not None:
        return f": did you mean '{near}{f':{found[2]}' if found[2] else ''}'?"
    return f"; known: {', '.join(RULES)}, optionally followed by a colon and a number, as in threshold:0.9"


def parse_rule(text: str) -> Rule:
    """Create a rule from its name: `quota`, `threshold:0.9`, `factor:1.0`, `entropy-bound:0.1`, …"""
    name, colon, number = text.partition(":")
    if name not in RULES:
        raise ValueError(f"unknown rule {text!r}{_hint(text)}")
    if not colon:
        return RULES[name]()
    if name == "quota":
        raise ValueError(f"rule quota takes no number; got '{number}'. Set the number of forward passes with --steps")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"rule {name} takes a number after the colon; got '{number}'") from None
    return RULES[name](value)
