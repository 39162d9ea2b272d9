# SPDX-License-Identifier: Apache-2.0
"""Decoding programs: loops that choose which columns each step forwards and decides, and how each row advances."""

from ..rules import (
    S2D2,
    ContinuousRule,
    Drafted,
    NextToken,
    Pipeline,
    Reordered,
    Rule,
    SelfSpeculative,
    SimplexDenoising,
    Strided,
    VariableLength,
)
from .base import Program as Program
from .base import Task as Task
from .base import run as run
from .blocks import BlockAfterBlock
from .continuous import ContinuousProgram
from .drafted import CausalProgram, DraftedProgram
from .pipelined import PipelinedProgram
from .reordered import ReorderedProgram
from .self_verified import SelfVerifiedProgram
from .simplex import SimplexProgram
from .speculative import SpeculativeProgram
from .strided import StridedProgram
from .tree import TreeProgram
from .variable import VariableProgram

#: programs of the rules that are not decoded block after block
PROGRAMS: dict[type[Rule], type[Program]] = {
    Strided: StridedProgram, SelfSpeculative: SpeculativeProgram, Reordered: ReorderedProgram,
    SimplexDenoising: SimplexProgram, ContinuousRule: ContinuousProgram,
    Pipeline: PipelinedProgram, VariableLength: VariableProgram, S2D2: SelfVerifiedProgram,
    Drafted: DraftedProgram, NextToken: CausalProgram,
}  # fmt: skip


def program_of(rule: Rule) -> type[Program]:
    """Return the program class that decodes with `rule`."""
    if isinstance(rule, Drafted) and rule.tree is not None:
        return TreeProgram
    return next((program for kind, program in PROGRAMS.items() if isinstance(rule, kind)), BlockAfterBlock)
