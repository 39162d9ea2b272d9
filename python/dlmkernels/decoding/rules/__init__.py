# SPDX-License-Identifier: Apache-2.0
"""Decoding rules, one module a family: what a step commits, edits, remasks and renoises."""

from .ancestral import Ancestral
from .base import Action, Rule
from .confidence import (
    DilatedSchedule,
    DynamicThreshold,
    EntropyBound,
    EntropySum,
    Factor,
    HierarchicalThreshold,
    LocalThreshold,
    Quota,
    Threshold,
    TimeQuota,
)
from .history import CreditThreshold, EarlyAnswer, SmoothedThreshold, StableThreshold

__all__ = [
    "Action", "Ancestral", "CreditThreshold", "DilatedSchedule", "DynamicThreshold", "EarlyAnswer", "EntropyBound",
    "EntropySum", "Factor", "HierarchicalThreshold", "LocalThreshold", "Quota", "Rule", "SmoothedThreshold",
    "StableThreshold", "Threshold", "TimeQuota",
]  # fmt: skip
