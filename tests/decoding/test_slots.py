# SPDX-License-Identifier: Apache-2.0
"""Requests come and go in the rows of one program, each decoded as it is alone."""

from collections import deque

import pytest
import torch

import dlmkernels as dk
from decodings import lively
from dlmkernels.decoding.programs import Task, program_of
from dlmkernels.decoding.resolve import prepare
from dlmkernels.decoding.schedule import Grid
from dlmkernels.decoding.state import State
from recorder import Player
from small_models import MASK, PAD, prompts

ROWS, MOST, BLOCK = 3, 40, 8
BLOCKS = {"cache": "block", "attention": "block"}
CAUSAL = {"attention": "causal", "logit_alignment": "shift", "cache": "block"}
CASES = {
    **{str(rule): {"rule": rule} for rule in (
        dk.Threshold(0.4), dk.Quota(schedule="cosine"), dk.TokenEditing(0.4, 0.3), dk.Backtracking(2),
        dk.CreditThreshold(0.4), dk.SmoothedThreshold(0.5), dk.WideInNarrowOut(0.4, 0.5), dk.EarlyAnswer((2.5, 2.0, 1.5)),
    )},
    "sampled": {"rule": dk.Threshold(0.4), "temperature": 1.0},
    "ends": {"rule": dk.Threshold(0.4), "eos_policy": "block", "eos_token_id": tuple(range(20, 50))},
    "remasked": {"rule": dk.AncestralRemask(eta=0.3), "temperature": 1.0},
    "prefix": {"rule": dk.Threshold(0.4), "cache": "prefix"},
    "prefix, refreshed": {"rule": dk.Threshold(0.4), "cache": "prefix", "warmup": 2, "refresh_interval": 3},
    "dual": {"rule": dk.Threshold(0.4), "cache": "dual"},
    "dual, vicinity": {"rule": dk.Threshold(0.4), "cache": "dual", "vicinity": (2, 3), "logit_alignment": "shift"},
    "dual, editing": {"rule": dk.TokenEditing(0.4, 0.3, 4), "cache": "dual"},
    "dual, ends": {"rule": dk.Threshold(0.4), "cache": "dual", "eos_policy": "fill", "eos_token_id": tuple(range(20, 50))},
    "dual, credit": {"rule": dk.CreditThreshold(0.4), "cache": "dual", "temperature": 1.0},
    "dual, smoothed": {"rule": dk.SmoothedThreshold(0.5), "cache": "dual"},
    "dual, parts": {"rule": dk.Threshold(0.4), "cache": "dual", "sub_block_length": 3},
    "delayed": {"rule": dk.Threshold(0.4), "cache": "delayed"},
    "delayed, shifted": {"rule": dk.Threshold(0.4), "cache": "delayed", "logit_alignment": "shift", "refresh_interval": 4},
    "block": {"rule": dk.Threshold(0.4), **BLOCKS},
    "block, absolute": {"rule": dk.Threshold(0.4), **BLOCKS, "block_grid": "absolute"},
    "block, shifted": {"rule": dk.Threshold(0.4), **BLOCKS, "logit_alignment": "shift"},
    "block, apart": {"rule": dk.Threshold(0.4), **BLOCKS, "fuse_commit": False},
    "block, seeded": {"rule": dk.Threshold(0.4), "seeded": True, **CAUSAL},
    "block, parts": {"rule": dk.Threshold(0.4), **BLOCKS, "sub_block_length": 3},
    "parts alone": {"rule": dk.Threshold(0.4), **BLOCKS, "sub_block_length": 3, "sub_block_cache": True},
    "parts alone, shifted": {"rule": dk.Threshold(0.4), **BLOCKS, "sub_block_length": 3, "sub_block_cache": True,
                             "logit_alignment": "shift"},
    "causal context": {"rule": dk.Threshold(0.4), "attention": "causal-context", "cache": "block", "seeded": True},
    "causal context, no cache": {"rule": dk.Threshold(0.4), "attention": "causal-context"},
    "guided": {"rule": dk.Threshold(0.4), "cache": "dual", "cfg_scale": 0.5},
    "features": {"rule": dk.Threshold(0.4), "cache": dk.DLLMCache(5, 3, 0.25)},
    "evicted": {"rule": dk.Threshold(0.4), "cache": "sparse-dllm"},
    "evicted, shifted": {"rule": dk.Threshold(0.4), "cache": "sparse-dllm", "logit_alignment": "shift"},
    "features, guided": {"rule": dk.Threshold(0.4), "cache": dk.DLLMCache(3, 2, 0.5), "cfg_scale": 0.5},
    "guided, block": {"rule": dk.Threshold(0.4), **BLOCKS, "cfg_scale": 0.5},
}  # fmt: skip


class Requests:
    """Prompts of 3 to 12 tokens, of which 5 to 24 tokens are to be decoded, their seeds, and what they become alone."""

    def __init__(self, model, options, count=7):
        self.model, self.options = model, {"block_length": BLOCK, "eos_policy": "none"} | options
        self.prompts = [prompts(1, 3 + (5 * k) % 10, seed=k)[0] for k in range(count)]
        self.lengths = [5 + (7 * k) % 20 for k in range(count)]
        self.seeds = torch.arange(count) + 70

    def check(self, done):
        assert sorted(done) == list(range(len(self.prompts)))
        alone = 0
        for k, prompt in enumerate(self.prompts):
            length = self.lengths[k]
            want = dk.generate(self.model, prompt, max_new_tokens=length, seed=self.seeds[k : k + 1], **self.options)
            tokens, steps, count = done[k]
            end = len(prompt) + length
            assert torch.equal(tokens[:end], want.sequences[0]), k
            assert torch.equal(steps[:end], want.commit_step[0]) and count == int(want.num_forwards[0]), k
            alone += count
        return alone


class Server:
    """Decodes requests in the rows of one program, first come, first served."""

    def __init__(self, requests, rows=ROWS, **task):
        self.requests, self.rows = requests, rows
        model, config, special = prepare(
            requests.model, None, requests.options | {"max_new_tokens": 24}, "continuations"
        )
        grows = config.block_grid == "absolute" or model.family.whole_blocks
        self.grid = Grid.for_any(config, rows, MOST, grows, torch.device("cpu"))
        self.state = State.empty(rows, self.grid.width, torch.device("cpu"))
        self.owner = [None] * rows
        self.queue = list(range(len(requests.prompts)))
        for row in range(rows):
            self.admit(row)
        self.program = program_of(config.rule)(
            Task(model, self.state, config, special, self.grid, 0, self.grid.width, rows_change=True, **task)
        )
        self.done, self.forwards = {}, 0

    def again(self, requests):
        """Decode other requests with the same program."""
        self.requests, self.queue, self.done = requests, list(range(len(requests.prompts))), {}
        for row in range(self.rows):
            self.admit(row)

    def admit(self, row):
        k = self.owner[row] = self.queue.pop(0) if self.queue else None
        if k is None:
            return False
        prompt, rows = self.requests.prompts[k], torch.tensor([row])
        start, end = (
            torch.tensor([n], dtype=torch.int32) for n in (len(prompt), len(prompt) + self.requests.lengths[k])
        )
        self.grid.place(rows, torch.zeros_like(start), start, end)
        tokens = torch.full((1, self.grid.width), PAD)
        columns = torch.arange(self.grid.width)
        is_open = (columns >= start) & (columns < self.grid.ends[row])
        tokens[0, : len(prompt)] = prompt
        tokens.masked_fill_(is_open, MASK)
        self.state.admit(
            rows, tokens, is_open[None], torch.zeros_like(start), self.grid.ends[rows], self.requests.seeds[k : k + 1]
        )
        return True

    def deliver(self, number, report):
        """The report of a step after rows that have nothing left have got other requests."""
        report = list(report)
        for row, k in enumerate(self.owner):
            if number < self.renewed[row]:  # of the request that was there before
                report[row] = 0
            elif report[row] == -1 and k is not None:
                state = self.state
                self.done[k] = state.tokens[row].clone(), state.commit_step[row].clone(), int(state.step[row])
                if self.admit(row):
                    self.program.renew(torch.tensor([row]))
                    self.renewed[row] = self.steps + 1
                    report[row] = 0
        return tuple(report)

    def run(self, step=None, lag=0):
        """Decode all requests; the host knows what has become of a step when `lag` others have been sent."""
        self.steps, self.renewed = 0, [0] * self.rows
        under_way = deque([self.program.begin().tolist()])
        report, known = None, -1
        while True:
            while len(under_way) > lag or report is None:
                known += 1
                report = under_way.popleft()
            report = self.deliver(known, report)
            form = self.program.form(report, self.steps - known)
            if form is None:
                return self.done
            under_way.append((step or self.program.step)(form).tolist())
            self.steps += 1
            self.forwards += form.kind in ("append", "denoise")


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_requests_come_and_go(model, name):
    requests = Requests(model, CASES[name])
    server = Server(requests)
    alone = requests.check(server.run())
    assert server.forwards < 0.75 * alone, (server.forwards, alone)


SOME = [
    "dual", "features", "evicted", "block", "block, seeded", "parts alone", "delayed", "guided", "sampled", "causal context, no cache"
]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_as_wide_as_ever(model, name):
    """Every forward takes as many rows as there are."""
    requests = Requests(model, CASES[name])
    requests.check(Server(requests, may_be_few=False).run())
    requests.check(Server(requests, rows=1).run())


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("name", [*SOME, "dual, editing", "prefix, refreshed", "block, apart", "ends"])
@torch.no_grad()
def test_the_host_is_late(model, name, lag):
    requests = Requests(model, CASES[name])
    requests.check(Server(requests).run(lag=lag))


@pytest.mark.parametrize("name", [*SOME, "dual, editing", "block, apart", "block, shifted", "block, parts"])
@torch.no_grad()
def test_recorded_calls_decode(model, name):
    """Steps of a form are the same calls every time, whatever requests are where, and these alone decode."""
    first, second = Requests(model, CASES[name], 8), Requests(model, CASES[name], 6)
    server = Server(first)
    player = Player(server.program)
    first.check(server.run(lambda form: player.program.step(player.program.widest(form))))
    server.again(second)
    second.check(server.run(lambda form: player.recorded(player.program.widest(form))))
    server.again(first)
    first.check(server.run(lambda form: player.replayed(player.program.widest(form))))
    assert player.replays > 10


def test_rows_that_stay():
    """Where nobody has said that rows change they cannot."""
    ids = prompts(2, 5)
    model, config, special = prepare(lively(), None, {"cache": "dual", "max_new_tokens": 8}, "continuations")
    grid = Grid.of(config, torch.zeros(2, dtype=torch.int32), 5, 13, grows=False)
    whole = torch.cat((ids, torch.full((2, 8), MASK)), 1)
    state = State.of(whole, whole == MASK, torch.zeros(2, dtype=torch.int32))
    program = program_of(config.rule)(Task(model, state, config, special, grid, 5, 13))
    with pytest.raises(ValueError, match="only if the task has rows_change=True"):
        program.renew(torch.tensor([0]))
