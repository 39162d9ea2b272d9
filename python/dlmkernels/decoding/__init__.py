# SPDX-License-Identifier: Apache-2.0
"""Decoding, from the prompt to the text.

A decoding is a *program* that runs on a *state*. The state is one struct of arrays: a row for each request, tensors
that are allocated once and written in place. A step of a program is ::

    plan -> forward -> propose -> select -> write -> advance

all of it tensor operations whose shapes are said by a *form*. The step reads nothing on the host and hands back a
report, a few integers. From an old report the host chooses the form of the next step, or finds that all is decoded.
There is one loop, `programs.base.run`, and it is these two lines.

::

    state                  tokens, records, where each row is              state.py
    standing, step         what a rule sees of a step                      standing.py, step.py
    rules, scores          which positions a step decides                  rules/, scores.py
    constraint, config     what a user chooses, checked                    constraint.py, config.py, resolve.py
    propose                logits -> proposals and their statistics        propose.py
    forward                which columns are forwarded, what they see      forward.py, block_forward.py
    programs               plan and advance; the loop                      programs/
    generate, infill       the front doors                                 generate.py, custom_generate.py

A layer knows those above it in this table and none below. The rows of a batch stand anywhere: in different blocks, at
different steps, of different lengths; each is decoded as it would be alone. `docs/programs.md` shows how to write a
program.
"""
