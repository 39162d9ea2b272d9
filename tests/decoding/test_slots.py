# SPDX-License-Identifier: Apache-2.0
"""Requests come and go in the rows of one program, each decoded as it is alone."""

import pytest
import torch

import dlmkernels as dk
from decodings import lively
from dlmkernels.decoding.programs import Task, program_of
from dlmkernels.decoding.resolve import prepare
from dlmkernels.decoding.schedule import Grid
from dlmkernels.decoding.state import State
from small_models import MASK, PAD, prompts

ROWS, START, NEW, BLOCK = 3, 12, 16, 8
RULES = [
    {"rule": dk.Threshold(0.4)}, {"rule": dk.Quota(schedule="cosine"), "steps": 7}, {"rule": dk.TokenEditing(0.4, 0.3)},
    {"rule": dk.Threshold(0.4), "temperature": 1.0}, {"rule": dk.Backtracking(2)}, {"rule": dk.CreditThreshold(0.4)},
    {"rule": dk.SmoothedThreshold(0.5)}, {"rule": dk.WideInNarrowOut(0.4, 0.5)},
    {"rule": dk.Threshold(0.4), "eos_policy": "block", "eos_token_id": tuple(range(20, 50))},
    {"rule": dk.AncestralRemask(eta=0.3), "steps": 10, "temperature": 1.0},
]  # fmt: skip


def requests(count):
    """Prompts of 3 to 12 tokens, padded on the left to 12, and their seeds."""
    rows = [prompts(1, 3 + (5 * k) % 10, seed=k)[0] for k in range(count)]
    ids = torch.stack([torch.cat((row.new_full((START - len(row),), PAD), row)) for row in rows])
    return rows, ids, torch.tensor([START - len(row) for row in rows], dtype=torch.int32), torch.arange(count) + 70


def serve(model, ids, origin, seeds, options):
    """What each request becomes, with how many forwards; and how many there were in all."""
    model, config, special = prepare(model, None, options, "continuations")
    state = State.empty(ROWS, START + NEW, ids.device)
    grid = Grid.of(config, origin[:ROWS], START, START + NEW, grows=False)

    def admit(row, k):
        tokens = torch.cat((ids[k], ids.new_full((NEW,), MASK)))[None]
        is_open = (torch.arange(START + NEW) >= START)[None]
        state.admit(torch.tensor([row]), tokens, is_open, origin[k : k + 1], START + NEW, seeds[k : k + 1])

    for row in range(ROWS):
        admit(row, row)
    program = program_of(config.rule)(Task(model, state, config, special, grid, START, START + NEW))
    owner, queue, done, forwards = list(range(ROWS)), list(range(ROWS, len(ids))), {}, 0
    report, entered = program.begin().tolist(), True
    while True:
        for row in range(ROWS) if entered else ():
            if report[row] == -1 and owner[row] is not None:
                done[owner[row]] = state.tokens[row].clone(), state.commit_step[row].clone(), int(state.step[row])
                owner[row] = queue.pop(0) if queue else None
                if owner[row] is not None:
                    admit(row, owner[row])
                    program.renew(torch.tensor([row]))
                    report[row] = 0
        form = program.form(tuple(report), 0)
        if form is None:
            return done, forwards
        report, entered = program.step(form).tolist(), not program.denoises(form)
        forwards += program.denoises(form)


@pytest.mark.parametrize("options", RULES, ids=str)
@torch.no_grad()
def test_requests_come_and_go(options):
    options = {"max_new_tokens": NEW, "block_length": BLOCK, "eos_policy": "none"} | options
    model = dk.adapt(lively())
    rows, ids, origin, seeds = requests(10)
    done, forwards = serve(model, ids, origin, seeds, options)
    alone = 0
    for k, row in enumerate(rows):
        want = dk.generate(model, row, seed=seeds[k : k + 1], **options)
        tokens, steps, count = done[k]
        assert torch.equal(tokens[origin[k] :], want.sequences[0]), k
        assert torch.equal(steps[origin[k] :], want.commit_step[0]) and count == int(want.num_forwards[0])
        alone += count
    assert alone / ROWS <= forwards < alone / ROWS + 24


@torch.no_grad()
def test_with_a_cache_rows_stay():
    """They enter their blocks together."""
    options = {"max_new_tokens": NEW, "block_length": BLOCK, "eos_policy": "none", "cache": "dual"}
    model, config, special = prepare(lively(), None, options, "continuations")
    _, ids, origin, _ = requests(ROWS)
    whole = torch.cat((ids, ids.new_full((ROWS, NEW), MASK)), 1)
    state = State.of(whole, torch.arange(START + NEW).expand(ROWS, -1) >= START, origin)
    grid = Grid.of(config, origin, START, START + NEW, grows=False)
    program = program_of(config.rule)(Task(model, state, config, special, grid, START, START + NEW))
    program.begin()
    with pytest.raises(ValueError, match="cache='none' alone"):
        program.renew(torch.tensor([0]))
