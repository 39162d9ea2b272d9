# SPDX-License-Identifier: Apache-2.0
"""Decoding, from the prompt to the answer.

Decoding runs a *program* on a *state*. The state is a struct of arrays with one row per request; its tensors are
allocated once and written in place. One step of a program is ::

    plan -> forward -> propose -> select -> write -> advance

All of these are tensor operations, whose shapes are determined by a *form*. A step reads nothing on the host and
returns a report of a few integers. From an earlier report the host chooses the form of the next step, or sees that
decoding is complete. A single loop, `programs.base.run`, alternates between the two.

::

    state                  tokens, records, progress of each row           state.py
    standing, step         the view of a step that a rule gets             standing.py, step.py
    rules, scores          selection of the positions to commit            rules/, scores.py
    constraint, config     user options, validated                         constraint.py, config.py, resolve.py
    propose                logits -> proposals and their statistics        propose.py
    forward                columns to compute and their attention          forward.py, block_forward.py
    programs               plan and advance; the loop                      programs/
    generate, infill       public entry points                             generate.py, custom_generate.py

Each layer depends only on the layers above it in this table. The rows of a batch are independent: they may be in
different blocks, at different steps and of different lengths, and each is decoded as it would be alone.
`docs/programs.md` shows how to write a program.
"""
