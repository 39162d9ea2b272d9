# SPDX-License-Identifier: Apache-2.0
"""Decoding rules, one module a family: what a step commits, edits, remasks and renoises."""

from .ancestral import Ancestral, PredictorCorrector, ScoreAncestral, UniformState
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
from .revision import (
    AncestralRemask,
    Backtracking,
    PathPlanning,
    RenoisedEntropyBound,
    RunEditing,
    SplitEditing,
    TokenEditing,
    WideInNarrowOut,
)

__all__ = [
    "Action", "Ancestral", "AncestralRemask", "Backtracking", "CreditThreshold", "DilatedSchedule",
    "DynamicThreshold", "EarlyAnswer", "EntropyBound", "EntropySum", "Factor", "HierarchicalThreshold",
    "LocalThreshold", "PathPlanning", "PredictorCorrector", "Quota", "RenoisedEntropyBound", "Rule", "RunEditing",
    "ScoreAncestral", "SmoothedThreshold", "SplitEditing", "StableThreshold", "Threshold", "TimeQuota", "TokenEditing",
    "UniformState",
    "WideInNarrowOut",
]  # fmt: skip
