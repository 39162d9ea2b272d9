# SPDX-License-Identifier: Apache-2.0
"""remask_ against its reference and against four plain passes; conflicts, frozen positions, end of sequence, errors."""

import re
from pathlib import Path

import pytest
import torch

import numerics
from dlmkernels import ops, reference

OPEN, FROZEN, EDITED, DIRTY = ops.STATE_OPEN, ops.STATE_FROZEN, ops.STATE_EDITED, ops.STATE_DIRTY
MASKS = ("commit", "edit", "remask", "renoise")
MUTATED = ("tokens", "state", "commit_step", "commit_confidence", "step")
VOCAB, MASK_ID, EOS = 12, 12, (3, 7)
op = torch.ops.dlmkernels.remask_.default


def generator(seed):
    return torch.Generator().manual_seed(seed)


def choose(g, *values):
    return values[torch.randint(len(values), (), generator=g)]


def rows(t, index):
    return t[index].contiguous() if isinstance(t, torch.Tensor) and t.dim() else t


def random_mask(g, B, W):
    density = torch.tensor([0.0, 0.2, 0.6, 1.0])[torch.randint(4, (B, 1), generator=g)]
    return torch.rand(B, W, generator=g) < density


def random_positions(g, B, T, W):
    """Distinct in a row, in any order, with unused slots among them; some rows idle."""
    position = torch.full((B, W), -1, dtype=torch.int32)
    for b in range(B):
        used = min(W, T, choose(g, 0, W // 2, W, W))
        slots = torch.randperm(W, generator=g)[:used]
        position[b, slots] = torch.randperm(T, generator=g)[:used].int()
    return position


def random_case(g, B, T, W, eos_policy="none", few_open=False):
    """All arguments by name. `few_open`: rows that are nearly complete, so that eos_policy has something to do."""
    state = torch.randint(256, (B, T), generator=g, dtype=torch.uint8) & ~FROZEN & ~OPEN
    given = torch.rand(B, T, generator=g) < torch.tensor([0.0, 0.15, 1.0])[torch.randint(3, (B, 1), generator=g)]
    given &= torch.arange(T) < torch.randint(T + 1, (B, 1), generator=g)
    state |= given.to(torch.uint8) * FROZEN
    opened = torch.rand(B, T, generator=g) < (0.1 if few_open else 0.5)
    if few_open:
        opened &= torch.arange(T) >= torch.randint(T + 1, (B, 1), generator=g)
    state |= opened.to(torch.uint8) * OPEN
    case = {
        "tokens": torch.randint(-1, VOCAB + 1, (B, T), generator=g),
        "state": state,
        "position": random_positions(g, B, T, W),
        "proposal": torch.randint(-2, VOCAB, (B, W), generator=g),
        "mask_token_id": MASK_ID,
        "vocab_size": VOCAB,
        "eos_token_ids": choose(g, [], [EOS[0]], list(EOS)),
        "eos_policy": eos_policy,
        "fill_token_id": choose(g, EOS[0], VOCAB + 3),
    }
    for name in MASKS:
        if choose(g, True, True, False):
            case[name] = random_mask(g, B, W)
    optional = {
        "confidence": torch.rand(B, W, generator=g),
        "commit_step": torch.randint(-1, 9, (B, T), generator=g, dtype=torch.int32),
        "commit_confidence": torch.rand(B, T, generator=g),
        "step": torch.randint(0, 9, (B,), generator=g, dtype=torch.int32),
        "seed": torch.randint(-(2**63), 2**63 - 1, (choose(g, min(B, 1), B),), generator=g),
        "origin": torch.randint(0, T + 1, (B,), generator=g, dtype=torch.int32),
        "end": torch.randint(0, T + 1, (choose(g, min(B, 1), B),), generator=g, dtype=torch.int32),
    }
    for name, value in optional.items():
        required = name == "confidence" or (name == "seed" and "renoise" in case)
        if required or choose(g, True, True, False):
            case[name] = value
    return case


def clone(case):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def assert_same(got, want):
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            where = (got[name] != value).nonzero().tolist()
            assert torch.equal(got[name], value), f"{name} differs at {where[:8]}"


def check(case):
    """Run the op and the reference on copies; everything either may have written must agree. Returns the op's."""
    got, want = clone(case), clone(case)
    info = ops.remask_(**got)
    want_info = reference.remask_(**want)
    assert_same(got, want)
    assert info.dtype == torch.int32 and info.shape == want_info.shape
    for column, name in enumerate(ops.INFO_FIELDS):
        assert torch.equal(info[:, column], want_info[:, column]), f"info.{name}"
    return got, info


def row(tokens, state, position, proposal, **kwargs):
    """Run one row given as lists; returns its tokens, states and info by name, after checking the reference agrees."""
    case = {
        "tokens": torch.tensor([tokens]),
        "state": torch.tensor([state], dtype=torch.uint8),
        "position": torch.tensor([position], dtype=torch.int32).reshape(1, -1),
        "proposal": torch.tensor([proposal], dtype=torch.int64).reshape(1, -1),
    }
    dtypes = {"confidence": torch.float32, "commit_confidence": torch.float32, "commit_step": torch.int32}
    for name, value in kwargs.items():
        if name in MASKS:
            case[name] = torch.tensor([value], dtype=torch.bool).reshape(1, -1)
        elif name in dtypes:
            case[name] = torch.tensor([value], dtype=dtypes[name])
        elif name in ("step", "seed", "origin", "end"):
            case[name] = torch.tensor([value], dtype=torch.int64 if name == "seed" else torch.int32)
        else:
            case[name] = value
    got, info = check(case)
    fields = dict(zip(ops.INFO_FIELDS, info[0].tolist()))
    return {name: got[name][0].tolist() for name in MUTATED if name in got} | {"info": fields}


class TestReference:
    @pytest.mark.parametrize("few_open", [False, True], ids=["half_open", "few_open"])
    @pytest.mark.parametrize("eos_policy", ["none", "fill"])
    def test_random(self, eos_policy, few_open):
        g = generator(len(eos_policy) + few_open)
        filled = 0
        for _ in range(120):
            case = random_case(g, 16, choose(g, 1, 2, 9, 40), choose(g, 1, 3, 8, 20, 45), eos_policy, few_open)
            _, info = check(case)
            filled += int((info[:, ops.INFO_FIELDS.index("done")] == 1).sum())
        assert filled > 50 or not few_open

    @pytest.mark.parametrize(("B", "T", "W"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0), (64, 7, 4), (3, 5000, 4096)])
    def test_sizes(self, B, T, W):
        for eos_policy in ("none", "fill"):
            check(random_case(generator(B), B, T, W, eos_policy))

    def test_parameters_given_once_or_grouped(self):
        g = generator(0)
        case = random_case(g, 6, 20, 8)
        case |= {"renoise": torch.ones(6, 8, dtype=torch.bool), "seed": torch.tensor([4, 5, 6])}
        case |= {"origin": torch.tensor(2, dtype=torch.int32), "end": torch.tensor([13, 20], dtype=torch.int32)}
        got, _ = check(case)
        expanded = case | {"seed": case["seed"].repeat_interleave(2), "origin": torch.full((6,), 2, dtype=torch.int32)}
        expanded["end"] = case["end"].repeat_interleave(3)
        assert torch.equal(check(expanded)[0]["tokens"], got["tokens"])


class TestPlainPasses:
    """The four masks as four passes over lists, each seeing what the one before left."""

    @staticmethod
    def passes(case, b):
        tokens, state = case["tokens"][b].tolist(), case["state"][b].tolist()
        end = int(reference.per_row(case.get("end"), 8, len(tokens))[b])
        slots = [
            (at, w) for w, at in enumerate(case["position"][b].tolist()) if 0 <= at < end and not state[at] & FROZEN
        ]
        before = list(tokens)

        def asked(name):
            return [(at, int(case["proposal"][b, w])) for at, w in slots if name in case and case[name][b, w]]

        for at, proposal in asked("commit"):
            if state[at] & OPEN and proposal >= 0:
                tokens[at], state[at] = proposal, state[at] & ~OPEN
        for at, proposal in asked("edit"):
            if not state[at] & OPEN and proposal >= 0:
                tokens[at] = proposal
        for at, _ in asked("remask"):
            if not state[at] & OPEN:
                tokens[at], state[at] = MASK_ID, state[at] | OPEN
        for at, _ in asked("renoise"):
            tokens[at], state[at] = None, state[at] | OPEN  # any token of the vocabulary
        opens = [bool(s & OPEN) and not s & FROZEN and at < end for at, s in enumerate(state)]
        dirty = [bool(s & DIRTY) or (old != new and new is not None) for s, old, new in zip(state, before, tokens)]
        return tokens, opens, dirty

    def test_agree(self):
        g = generator(3)
        for _ in range(60):
            case = random_case(g, 8, 24, 16)
            got = clone(case)
            info = ops.remask_(**got)
            for b in range(8):
                tokens, opens, dirty = self.passes(case, b)
                state = got["state"][b].tolist()
                inside = range(int(reference.per_row(case.get("end"), 8, 24)[b]))
                assert opens == [s & (OPEN | FROZEN) == OPEN and at in inside for at, s in enumerate(state)]
                assert sum(opens) == info[b, ops.INFO_FIELDS.index("open")]
                for at, token in enumerate(tokens):
                    actual = int(got["tokens"][b, at])
                    if token is None:
                        assert 0 <= actual < VOCAB
                    else:
                        assert actual == token and bool(state[at] & DIRTY) == dirty[at]


class TestMeaning:
    def test_commit(self):
        out = row(
            [5, 9, 9, 9], [0, OPEN, OPEN, OPEN], [1, 3, 2], [4, 6, 8], commit=[1, 0, 1], step=3,
            confidence=[0.5, 0.25, 0.75], commit_step=[-1] * 4, commit_confidence=[0.0] * 4,
        )  # fmt: skip
        assert out["tokens"] == [5, 4, 8, 9]
        assert out["state"] == [0, DIRTY, DIRTY, OPEN]
        assert out["commit_step"] == [-1, 3, 3, -1] and out["commit_confidence"] == [0, 0.5, 0.75, 0]
        assert out["step"] == 4
        want = {"open_window": 1, "open": 1, "committed": 2, "edited": 0, "remasked": 0}
        want |= {"changed": 2, "first_eos": -1, "prefix": 3, "done": 0}
        assert out["info"] == want

    def test_commit_leaves_decided_positions(self):
        out = row([5, 9], [0, 0], [0, 1], [4, 4], commit=[1, 1])
        assert out["tokens"] == [5, 9] and out["state"] == [0, 0] and out["info"]["committed"] == 0

    def test_commit_of_the_token_that_is_there_is_no_change(self):
        out = row([5], [OPEN], [0], [5], commit=[1])
        assert out["state"] == [0] and out["info"]["committed"] == 1 and out["info"]["changed"] == 0

    def test_edit(self):
        out = row(
            [5, 6, 9], [0, 0, OPEN], [0, 1, 2], [7, 6, 7], edit=[1, 1, 1], step=2, confidence=[0.5] * 3,
            commit_step=[0, 1, -1], commit_confidence=[0.0] * 3,
        )  # fmt: skip
        assert out["tokens"] == [7, 6, 9] and out["state"] == [EDITED | DIRTY, 0, OPEN]
        assert out["commit_step"] == [0, 1, -1] and out["commit_confidence"] == [0.5, 0, 0]
        assert out["info"]["edited"] == 1 and out["info"]["changed"] == 1

    def test_remask(self):
        out = row(
            [5, 6, 9], [EDITED, 0, OPEN], [0, 1, 2], [-1, -1, -1], remask=[1, 0, 1], mask_token_id=MASK_ID,
            commit_step=[4, 4, -1], commit_confidence=[0.5] * 3,
        )  # fmt: skip
        assert out["tokens"] == [MASK_ID, 6, 9] and out["state"] == [OPEN | EDITED | DIRTY, 0, OPEN]
        assert out["commit_step"] == [-1, 4, -1] and out["commit_confidence"] == [0, 0.5, 0.5]
        assert out["info"]["remasked"] == 1 and out["info"]["prefix"] == 0

    def test_renoise(self):
        out = row(
            [50, 60, 90], [0, 0, OPEN], [0, 1, 2], [-1, -1, -1], renoise=[1, 0, 1], vocab_size=VOCAB, seed=1,
            commit_step=[4, 4, 4], commit_confidence=[0.5] * 3,
        )  # fmt: skip
        assert out["tokens"][1] == 60 and max(out["tokens"][0], out["tokens"][2]) < VOCAB
        assert out["state"] == [OPEN | DIRTY, 0, OPEN | DIRTY]
        assert out["commit_step"] == [-1, 4, -1] and out["commit_confidence"] == [0, 0.5, 0]
        assert out["info"]["remasked"] == 2

    @pytest.mark.parametrize("state", [OPEN, 0], ids=["open", "decided"])
    def test_the_last_mask_acts_and_the_others_leave_no_trace(self, state):
        both = {"mask_token_id": MASK_ID, "vocab_size": VOCAB, "seed": 9, "step": 5, "confidence": [0.5]}
        both |= {"commit_step": [2], "commit_confidence": [0.25]}
        for first, second in (("commit", "remask"), ("edit", "remask"), ("commit", "renoise"), ("remask", "renoise")):
            together = row([5], [state], [0], [4], **both, **{first: [1], second: [1]})
            if second == "remask" and first == "edit":
                alone = row([5], [state], [0], [4], **both, remask=[1])
            elif second == "remask":  # a commit makes an open position fit to be remasked
                alone = row([5], [state], [0], [4], **both, remask=[1])
                if state:
                    assert alone["info"]["remasked"] == 0
                    assert together["tokens"] == [MASK_ID] and together["state"] == [OPEN | DIRTY]
                    assert together["commit_step"] == [-1] and together["commit_confidence"] == [0]
                    assert together["info"]["committed"] == 0 and together["info"]["remasked"] == 1
                    continue
            else:
                alone = row([5], [state], [0], [4], **both, renoise=[1])
            assert together == alone

    def test_commit_and_edit_share_a_mask(self):
        out = row([9, 5, 6], [OPEN, 0, 0], [0, 1, 2], [4, 4, 6], commit=[1, 1, 1], edit=[1, 1, 1])
        assert out["tokens"] == [4, 4, 6] and out["state"] == [DIRTY, DIRTY | EDITED, 0]
        assert (out["info"]["committed"], out["info"]["edited"], out["info"]["changed"]) == (1, 1, 2)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("bits", [FROZEN, FROZEN | OPEN])
    def test_frozen_positions_are_never_written(self, mask, bits):
        kwargs = {"mask_token_id": MASK_ID, "vocab_size": VOCAB, "seed": 1, mask: [1], "confidence": [0.5]}
        out = row([5], [bits], [0], [4], commit_step=[6], commit_confidence=[0.25], **kwargs)
        assert out["tokens"] == [5] and out["state"] == [bits]
        assert out["commit_step"] == [6] and out["commit_confidence"] == [0.25]
        assert out["info"]["done"] == 1 and out["info"]["open"] == 0 and out["info"]["prefix"] == 1

    def test_negative_proposals_are_not_written(self):
        out = row([9, 5], [OPEN, 0], [0, 1], [-1, -7], commit=[1, 1], edit=[1, 1])
        assert out["tokens"] == [9, 5] and out["state"] == [OPEN, 0]
        assert out["info"]["committed"] == out["info"]["edited"] == 0

    def test_step_counts_in_rows_with_a_used_slot(self):
        step = torch.tensor([4, 4, 4], dtype=torch.int32)
        position = torch.tensor([[-1, -1], [-1, 0], [1, 0]], dtype=torch.int32)
        tokens, state = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.uint8)
        ops.remask_(tokens, state, position, torch.zeros(3, 2, dtype=torch.long), step=step)
        assert step.tolist() == [4, 5, 5]

    def test_renoise_draws_follow_the_request(self):
        """The same request behind padding, in another slot, in another row: the same tokens; another step: others."""
        T, W, vocab = 40, 16, 1000

        def run(pad, b, reverse, step=0, seed=77):
            tokens, state = torch.zeros(3, T, dtype=torch.long), torch.full((3, T), OPEN, dtype=torch.uint8)
            at = torch.arange(pad, pad + W, dtype=torch.int32)
            position = torch.full((3, W), -1, dtype=torch.int32)
            position[b] = at.flip(0) if reverse else at
            everything = torch.ones(3, W, dtype=torch.bool)
            ops.remask_(
                tokens, state, position, torch.zeros(3, W, dtype=torch.long), renoise=everything, vocab_size=vocab,
                seed=torch.tensor(seed), origin=torch.full((3,), pad, dtype=torch.int32),
                step=torch.full((3,), step, dtype=torch.int32),
            )  # fmt: skip
            return tokens[b, pad : pad + W].tolist()

        first = run(0, 0, False)
        assert run(5, 2, True) == first and run(24, 1, False) == first
        assert run(0, 0, False, step=1) != first and run(0, 0, False, seed=78) != first

    def test_renoise_is_uniform(self):
        B, T = 16, 2048
        tokens, state = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.uint8)
        position = torch.arange(T, dtype=torch.int32).repeat(B, 1)
        everything = torch.ones(B, T, dtype=torch.bool)
        proposal = torch.zeros(B, T, dtype=torch.long)
        ops.remask_(tokens, state, position, proposal, renoise=everything, vocab_size=11, seed=torch.arange(B))
        numerics.assert_distribution("tokens", tokens.flatten().bincount(minlength=11), [1 / 11] * 11)


class TestEndOfSequence:
    def fill(self, tokens, state, position=(), proposal=(), **kwargs):
        arguments = {"eos_token_ids": list(EOS), "eos_policy": "fill", "fill_token_id": 11} | kwargs
        return row(tokens, state, list(position), list(proposal), **arguments)

    def test_fills_the_tail_of_a_complete_prefix(self):
        out = self.fill([1, 2, EOS[0], 9, 9], [FROZEN, 0, 0, OPEN, 0])
        assert out["tokens"] == [1, 2, EOS[0], 11, 11]
        assert out["state"] == [FROZEN, 0, 0, DIRTY, DIRTY]
        want = {"open_window": 0, "open": 0, "committed": 0, "edited": 0, "remasked": 0}
        want |= {"changed": 2, "first_eos": 2, "prefix": 5, "done": 1}
        assert out["info"] == want

    def test_waits_for_an_undecided_prefix(self):
        out = self.fill([9, EOS[0], 9], [OPEN, 0, OPEN])
        assert out["tokens"] == [9, EOS[0], 9] and out["state"] == [OPEN, 0, OPEN]
        assert (out["info"]["first_eos"], out["info"]["prefix"], out["info"]["done"]) == (1, 0, 0)

    def test_policy_none_only_reports(self):
        out = self.fill([1, EOS[1], 9], [0, 0, OPEN], eos_policy="none")
        assert out["tokens"] == [1, EOS[1], 9] and out["info"]["first_eos"] == 1 and out["info"]["done"] == 0

    def test_open_and_frozen_positions_do_not_end_a_sequence(self):
        out = self.fill([EOS[0], EOS[1], 9], [FROZEN, OPEN, OPEN])
        assert out["info"]["first_eos"] == -1 and out["tokens"] == [EOS[0], EOS[1], 9]

    @pytest.mark.parametrize("bits", [FROZEN, OPEN | FROZEN])
    def test_nothing_ends_before_something_that_was_given(self, bits):
        out = self.fill([EOS[1], 9, 8, 9], [0, OPEN, bits, OPEN], position=[1], proposal=[5], commit=[1])
        assert out["tokens"] == [EOS[1], 5, 8, 9] and out["state"] == [0, DIRTY, bits, OPEN]
        assert (out["info"]["first_eos"], out["info"]["prefix"], out["info"]["done"]) == (-1, 3, 0)

    def test_the_end_is_the_first_behind_all_that_was_given(self):
        out = self.fill([EOS[0], 9, 8, 6, EOS[1], EOS[0], 9], [0, 0, FROZEN, 0, 0, 0, OPEN])
        assert out["tokens"] == [EOS[0], 9, 8, 6, EOS[1], 11, 11] and out["info"]["first_eos"] == 4
        assert out["info"]["done"] == 1

    def test_an_open_position_before_the_end_keeps_the_request_open(self):
        out = self.fill([EOS[0], 9, 8, EOS[1], 9], [0, OPEN, FROZEN, 0, OPEN])
        assert out["tokens"] == [EOS[0], 9, 8, EOS[1], 9]
        assert (out["info"]["first_eos"], out["info"]["prefix"], out["info"]["done"]) == (3, 1, 0)

    @pytest.mark.parametrize("bits", [0, OPEN, FROZEN, OPEN | FROZEN])
    def test_what_stands_behind_the_row_is_nobodys(self, bits):
        """Neither given, so that it would hold off the end, nor open nor an end itself; nor is it written."""
        out = self.fill(
            [EOS[0], 9, EOS[1]], [0, OPEN, bits], position=[2, 1], proposal=[5, 6], end=2, commit=[1, 1], edit=[1, 1],
            confidence=[0.5, 0.5], commit_step=[3, 4, 5], commit_confidence=[0.5, 0.25, 0.75],
        )  # fmt: skip
        assert out["tokens"] == [EOS[0], 11, EOS[1]] and out["state"] == [0, DIRTY, bits]
        assert out["commit_step"] == [3, -1, 5] and out["commit_confidence"] == [0.5, 0, 0.75]
        want = {"open_window": 0, "open": 0, "committed": 1, "edited": 0, "first_eos": 0, "prefix": 3, "done": 1}
        assert want.items() <= out["info"].items()
        out = self.fill([9, 9, EOS[1]], [0, OPEN, bits], end=2)
        assert (out["info"]["first_eos"], out["info"]["open"], out["info"]["prefix"]) == (-1, 1, 1)
        out = self.fill([EOS[0], 9, EOS[1]], [0, OPEN, bits], end=0)
        assert (out["info"]["first_eos"], out["info"]["done"], out["tokens"][1]) == (-1, 1, 9)

    def test_any_of_several_ids(self):
        out = self.fill([1, EOS[1], EOS[0], 9], [0, 0, 0, OPEN])
        assert out["info"]["first_eos"] == 1 and out["tokens"] == [1, EOS[1], 11, 11]

    def test_nobody_has_committed_the_tail(self):
        records = {"commit_step": [1, 2, 3], "commit_confidence": [0.5, 0.25, 0.75]}
        out = self.fill([EOS[0], 5, 11], [0, 0, OPEN], **records)
        assert out["commit_step"] == [1, -1, -1] and out["commit_confidence"] == [0.5, 0, 0]
        for name in records:  # one of them alone
            assert self.fill([EOS[0], 5, 11], [0, 0, OPEN], **{name: records[name]})[name] == out[name]
        out = self.fill([EOS[0], 5, 11], [0, 0, OPEN], eos_policy="none", **records)
        assert out["commit_step"] == records["commit_step"]
        assert out["commit_confidence"] == records["commit_confidence"]

    def test_a_commit_can_end_the_sequence_in_its_own_step(self):
        out = self.fill(
            [1, 9, 9, 9], [0, OPEN, OPEN, OPEN], position=[1, 2], proposal=[EOS[0], 6], commit=[1, 1],
            commit_step=[-1] * 4, step=8,
        )  # fmt: skip
        assert out["tokens"] == [1, EOS[0], 11, 11] and out["commit_step"] == [-1, 8, -1, -1]
        assert out["state"] == [0, DIRTY, DIRTY, DIRTY]
        assert out["info"]["committed"] == 2 and out["info"]["changed"] == 3

    def test_what_ends_as_it_began_has_not_changed(self):
        out = self.fill([EOS[0], 11, 11], [0, OPEN, 0], position=[1, 2], proposal=[6, 7], commit=[1, 1], edit=[1, 1])
        assert out["tokens"] == [EOS[0], 11, 11] and out["state"] == [0, 0, EDITED]
        assert out["info"]["changed"] == 0 and out["info"]["committed"] == 1 and out["info"]["edited"] == 1

    def test_remasking_the_end_reopens_the_sequence(self):
        out = self.fill([1, EOS[0], 9], [0, 0, OPEN], position=[1], proposal=[-1], remask=[1], mask_token_id=MASK_ID)
        assert out["info"]["first_eos"] == -1 and out["info"]["done"] == 0 and out["tokens"] == [1, MASK_ID, 9]


class TestIsolation:
    def test_nothing_outside_the_window_is_touched(self):
        g = generator(6)
        for _ in range(40):
            case = random_case(g, 8, 32, 10)
            got, _ = check(case)
            inside = torch.zeros(8, 33, dtype=torch.bool)
            inside.scatter_(1, case["position"].long() % 33, True)
            inside &= torch.arange(33) < reference.per_row(case.get("end"), 8, 32)[:, None]
            for name in ("tokens", "state", "commit_step", "commit_confidence"):
                if name in case:
                    assert torch.equal(got[name][~inside[:, :32]], case[name][~inside[:, :32]]), name

    @pytest.mark.parametrize("eos_policy", ["none", "fill"])
    def test_no_neighbour_in_memory_is_touched(self, eos_policy):
        g = generator(7)
        for _ in range(20):
            case = random_case(g, 4, 16, 8, eos_policy, few_open=True)
            around, inner = {}, dict(case)
            for name in set(MUTATED) & set(case):
                value = case[name]
                around[name] = numerics.poison_(value.new_empty(6, *value.shape[1:]))
                inner[name] = around[name][1:5]
                inner[name].copy_(value)
            guards = {name: t[[0, -1]].clone() for name, t in around.items()}
            ops.remask_(**inner)
            for name, guard in guards.items():
                assert torch.equal(around[name][[0, -1]].nan_to_num(7), guard.nan_to_num(7)), name

    def test_any_batch_gives_the_same_rows(self):
        g = generator(8)
        case = random_case(g, 64, 48, 16, "fill", few_open=True)
        for name in MASKS:
            case[name] = random_mask(g, 64, 16)
        case["seed"] = torch.arange(64)
        case["end"] = torch.randint(49, (64,), generator=g, dtype=torch.int32)
        got, info = check(case)
        for index in (torch.randperm(64, generator=g), *(slice(64 - size, 64) for size in range(1, 65))):
            part = {name: rows(value, index) for name, value in clone(case).items()}
            part_info = ops.remask_(**part)
            assert torch.equal(part_info, info[index])
            assert_same(part, {name: rows(value, index) for name, value in got.items()})

    def test_any_number_of_threads(self):
        case = random_case(generator(9), 64, 2000, 500, "fill")
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(clone(case))
                results[-1]["info"] = ops.remask_(**results[-1])
        finally:
            torch.set_num_threads(before)
        assert_same(*results)


@pytest.mark.on_cpu  # a GPU would have to wait for the values
class TestErrors:
    B, T, W = 4, 10, 6

    def good(self):
        B, T, W = self.B, self.T, self.W
        case = {
            "tokens": torch.zeros(B, T, dtype=torch.long),
            "state": torch.ones(B, T, dtype=torch.uint8),
            "position": torch.arange(W, dtype=torch.int32).repeat(B, 1),
            "proposal": torch.ones(B, W, dtype=torch.long),
            "confidence": torch.ones(B, W),
            "commit_step": torch.zeros(B, T, dtype=torch.int32),
            "commit_confidence": torch.zeros(B, T),
            "step": torch.zeros(B, dtype=torch.int32),
            "seed": torch.zeros(B, dtype=torch.long),
            "origin": torch.zeros(B, dtype=torch.int32),
            "end": torch.full((B,), T, dtype=torch.int32),
            "mask_token_id": MASK_ID,
            "vocab_size": VOCAB,
        }
        return case | {name: torch.ones(B, W, dtype=torch.bool) for name in MASKS}

    def refuses(self, message, **changed):
        case = self.good() | changed
        case = {name: value for name, value in case.items() if value is not None}
        before = clone(case)
        with pytest.raises(RuntimeError, match="remask_: " + message):
            ops.remask_(**case)
        on_cpu = {name: v for name, v in before.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        assert_same(case, on_cpu)

    ON_CANVAS = ("tokens", "state", "commit_step", "commit_confidence")
    ON_WINDOW = ("position", "proposal", "confidence", *MASKS)
    PER_ROW = ("step", "seed", "origin", "end")

    def test_the_good_call_is_good(self):
        ops.remask_(**self.good())

    @pytest.mark.parametrize("name", ON_CANVAS + ON_WINDOW + PER_ROW)
    def test_dtype(self, name):
        self.refuses(rf"{name} must have dtype .*; got Double", **{name: self.good()[name].double()})

    @pytest.mark.parametrize("name", ON_CANVAS[1:] + ON_WINDOW + PER_ROW)
    def test_device(self, name):
        self.refuses(f"{name} must be on the device of tokens", **{name: self.good()[name].to("meta")})

    @pytest.mark.parametrize("name", ON_CANVAS[1:] + ON_WINDOW)
    def test_rank_and_shape(self, name):
        good = self.good()[name]
        for bad in (good[0], good[None], good[:-1]):
            self.refuses(f"{name} must have shape", **{name: bad})
        if name != "position":  # it sets W
            self.refuses(f"{name} must have shape", **{name: good[:, :-1].contiguous()})

    def test_rank_of_tokens(self):
        self.refuses("tokens must have shape", tokens=self.good()["tokens"][0])

    @pytest.mark.parametrize("name", ON_CANVAS + ON_WINDOW)
    def test_stride(self, name):
        self.refuses(f"{name} must be contiguous", **{name: self.good()[name].t().contiguous().t()})

    def test_parameter_shape(self):
        good = self.good()
        self.refuses(r"step must have shape \[4\]", step=good["step"][:1])
        self.refuses("seed must hold one value", seed=good["seed"][:3])
        self.refuses("origin must have at most one dimension", origin=good["origin"][None])

    def test_width(self):
        wide = torch.zeros(1, 4097, dtype=torch.long)
        with pytest.raises(RuntimeError, match=r"position must have at most 4096 slots \(W\); got W = 4097"):
            ops.remask_(wide, wide.to(torch.uint8), wide.int() - 1, wide)

    @pytest.mark.parametrize("bad", [-2, 10, 2**31 - 1])
    def test_position_range(self, bad):
        position = self.good()["position"]
        position[3, 5] = bad
        self.refuses(rf"position must be -1 or a canvas position below 10; got {bad} at \[3, 5\]", position=position)

    def test_position_twice(self):
        position = self.good()["position"]
        position[2, 5] = 1
        self.refuses("position must be distinct within a row; got 1 twice in row 2", position=position)

    @pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1])
    def test_end_range(self, bad):
        end = self.good()["end"]
        end[2] = bad
        self.refuses(rf"end must be from 0 to 10; got {bad} for row 2", end=end)

    def test_proposal_beyond_the_vocabulary(self):
        proposal = self.good()["proposal"]
        proposal[3, 2] = VOCAB
        message = r"proposal must be below vocab_size = 12; got 12 at \[3, 2\]"
        self.refuses(message, proposal=proposal)
        self.refuses(message, proposal=proposal, state=torch.zeros(self.B, self.T, dtype=torch.uint8), commit=None)
        # fine where it would not be written, or where the vocabulary is not known
        for state, mask in ((0, "commit"), (OPEN, "edit"), (FROZEN, "commit"), (FROZEN, "edit")):
            case = self.good() | {"proposal": proposal, "state": torch.full((self.B, self.T), state, dtype=torch.uint8)}
            for other in set(MASKS) - {mask}:
                del case[other]
            check(case)
        check(self.good() | {"proposal": proposal, "end": torch.full((self.B,), 2, dtype=torch.int32)})
        case = self.good() | {"proposal": proposal, "vocab_size": 0}
        del case["renoise"]
        check(case)

    def test_missing(self):
        self.refuses("confidence is required when commit_confidence is to be recorded", confidence=None)
        self.refuses("mask_token_id must be a token id when remask is given; got -1", mask_token_id=-1)
        self.refuses("seed is required by renoise", seed=None)
        self.refuses("vocab_size must be at least 1 when renoise is given; got 0", vocab_size=0)

    def test_values(self):
        self.refuses(r"vocab_size must be 0 \(unknown\) or up to 2\^32 - 1; got -1", vocab_size=-1)
        self.refuses(r"vocab_size must be 0 \(unknown\) or up to 2\^32 - 1; got 4294967296", vocab_size=2**32)
        self.refuses("eos_policy must be one of none, fill; got stop", eos_policy="stop")
        self.refuses("fill_token_id must be a token id under eos_policy fill; got -1", eos_policy="fill")


class TestRegistration:
    def test_names_agree_with_params_h(self):
        header = (Path(__file__).parents[2] / "csrc/common/params.h").read_text()
        enum = re.search(r"enum Info : int32_t \{(.*?)\}", header, re.S).group(1)
        columns = [name.strip().removeprefix("kInfo") for name in enum.split(",")]
        assert columns.pop() == "Columns"
        assert [re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in columns] == list(ops.INFO_FIELDS)
        bits = dict(re.findall(r"kState(\w+) = (\d+)", header))
        assert {name: int(bit) for name, bit in bits.items()} == {
            name.title(): getattr(ops, f"STATE_{name}") for name in ("OPEN", "FROZEN", "EDITED", "DIRTY")
        }

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_opcheck(self, seed):
        case = random_case(generator(seed), 4, 12, 6, "fill")
        positional = [case.pop(name) for name in ("tokens", "state", "position", "proposal")]
        torch.library.opcheck(op, positional, case)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        def step(case):
            info = ops.remask_(**case)
            return info + 1, case["tokens"] * 2

        case = random_case(generator(2), 4, 12, 6, "fill")
        eager, compiled = clone(case), clone(case)
        want = step(eager)
        got = torch.compile(step, fullgraph=True, backend=backend)(compiled)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert_same(compiled, eager)
