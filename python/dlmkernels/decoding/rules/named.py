# SPDX-License-Identifier: Apache-2.0
"""Rules by name, as command lines and requests give them: `threshold:0.9`."""

from __future__ import annotations

from collections.abc import Callable

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

# name -> constructor, taking the number after the colon where there is one
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


def parse_rule(text: str) -> Rule:
    """A rule from its name: `quota`, `threshold:0.9`, `factor:1.0`, `entropy-bound:0.1`, …"""
    name, colon, number = text.partition(":")
    if name not in RULES:
        raise ValueError(f"unknown rule '{name}'; known: {', '.join(RULES)}, with a number after a colon, as in "
                         "threshold:0.9")  # fmt: skip
    if not colon:
        return RULES[name]()
    if name == "quota":
        raise ValueError("rule quota takes no number: --steps says how many forwards")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"rule {name} takes a number after the colon; got '{number}'") from None
    return RULES[name](value)
