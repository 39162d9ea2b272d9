# SPDX-License-Identifier: Apache-2.0
"""Unmasking rules, one module per family: which positions a step commits, edits, remasks or renoises."""

from .ancestral import Ancestral, PredictorCorrector, ScoreAncestral, UniformState
from .base import Action, Rule
from .confidence import (
    DilatedSchedule,
    DynamicThreshold,
    EntropyBound,
    EntropySum,
    Factor,
    Frechet,
    HierarchicalThreshold,
    LocalThreshold,
    Quota,
    Threshold,
    TimeQuota,
)
from .continuous import ContinuousRule, EmbeddingFlow, LearnedNoise, SimplexDenoising, VectorDenoising
from .drafted import Drafted, NextToken
from .drafting import S2D2, Reordered, SelfSpeculative, Strided
from .history import CreditThreshold, EarlyAnswer, SmoothedThreshold, StableThreshold
from .length import Expanding, Lengthening, VariableLength
from .ordering import ReasonFirst
from .pipeline import EntropyPipeline, Pipeline
from .revision import (
    AncestralRemask,
    Backtracking,
    PathPlanning,
    RenoisedEntropyBound,
    RunEditing,
    TokenEditing,
    WideInNarrowOut,
)
from .splitting import SplitEditing

__all__ = [
    "S2D2", "Action", "Ancestral", "AncestralRemask", "Backtracking", "ContinuousRule", "CreditThreshold",
    "DilatedSchedule", "Drafted", "DynamicThreshold", "EarlyAnswer", "EmbeddingFlow", "EntropyBound",
    "EntropyPipeline", "EntropySum", "Expanding", "Factor", "Frechet", "HierarchicalThreshold", "LearnedNoise",
    "Lengthening", "LocalThreshold", "NextToken", "PathPlanning", "Pipeline", "PredictorCorrector", "Quota",
    "ReasonFirst", "RenoisedEntropyBound", "Reordered", "Rule", "RunEditing", "ScoreAncestral", "SelfSpeculative",
    "SimplexDenoising", "SmoothedThreshold", "SplitEditing", "StableThreshold", "Strided", "Threshold", "TimeQuota",
    "TokenEditing", "UniformState", "VariableLength", "VectorDenoising", "WideInNarrowOut",
]  # fmt: skip
