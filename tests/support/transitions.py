# SPDX-License-Identifier: Apache-2.0
"""Markov chains over texts of a few tokens, followed state by state."""

import itertools
import math


def follow(states, steps, choices):
    """Distribution over states after all steps: each position moves by itself, `choices(state, i, step)` says how."""
    for step in range(steps):
        after = {}
        for state, p in states.items():
            options = [choices(state, i, step) for i in range(len(state))]
            for combination in itertools.product(*(o.items() for o in options)):
                state_after = tuple(token for token, _ in combination)
                after[state_after] = after.get(state_after, 0.0) + p * math.prod(q for _, q in combination)
        states = after
    return states
