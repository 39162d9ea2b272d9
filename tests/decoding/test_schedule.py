# SPDX-License-Identifier: Apache-2.0
"""How many tokens each step of a fixed schedule decides, and how many steps each block gets."""

import math
from fractions import Fraction

import pytest
import torch

import dlmkernels as dk
from dlmkernels.decoding.schedule import Grid, plan_blocks
from dlmkernels.decoding.shares import counts, shares_after
from small_models import build, prompts


def numbers(n, steps, schedule, rounding):
    return counts(torch.tensor([n], dtype=torch.int32), shares_after(schedule, steps), rounding)[0].tolist()


# --- published schedules, restated ---------------------------------------------------------------------------------


def maskgit(n, steps):
    """MaskGIT's program: after each iteration floor(n cos(pi r / 2)) stay masked, at least one fewer than before."""
    masked, taken = n, []
    for i in range(1, steps + 1):
        left = 0 if i == steps else math.floor(n * math.cos(math.pi / 2 * i / steps))
        left = max(min(left, masked - 1), 0)
        taken.append(masked - left)
        masked = left
    return taken


def dllm(n, masked_share, steps):
    """dllm's program in exact numbers: the nearest number to the share that falls to a step; no step without a token."""
    taken = []
    for j in range(steps):
        before, after = masked_share(Fraction(steps - j, steps)), masked_share(Fraction(steps - j - 1, steps))
        count = round(n * (1 - after / before))
        if count:
            taken.append(count)
        n -= count
    return taken


@pytest.mark.parametrize(("n", "steps"), [(32, 8), (31, 7), (17, 17), (5, 9), (1, 3), (64, 1), (100, 13)])
def test_cosine_is_that_of_maskgit(n, steps):
    found = numbers(n, steps, "cosine", "down")
    assert found == maskgit(n, steps) and sum(found) == n


@pytest.mark.parametrize(("n", "steps"), [(32, 8), (31, 7), (15, 10), (5, 9), (45, 30), (1, 3), (100, 13), (64, 1)])
def test_nearest_is_the_rounding_of_dllm(n, steps):
    """(15, 10) and (45, 30) begin with a half, which goes to the even number."""
    for name, share in (("linear", lambda t: t), ("cosine", lambda t: math.sin(math.pi / 2 * t))):
        found, wanted = numbers(n, steps, name, "nearest"), dllm(n, share, steps)
        assert found == wanted + [0] * (steps - len(wanted)) and sum(found) == n


def test_linear_with_nearest_is_not_llada():
    assert numbers(10, 4, "linear", "nearest") == [2, 3, 2, 3]  # LLaDA: 3, 3, 2, 2


def test_requests_are_counted_by_themselves():
    n = torch.tensor([7, 0, 31, 4], dtype=torch.int32)
    for rounding in ("down", "nearest"):
        table = counts(n, shares_after("cosine", 6), rounding)
        assert table.sum(1).tolist() == n.tolist() and (table >= 0).all()
        for row, k in zip(table, n.tolist()):
            assert row.tolist() == numbers(k, 6, "cosine", rounding)


def test_shares_of_ones_own():
    assert shares_after((0.5, 0.5, 1), 3) == [0, 0.5, 0.5, 1]
    assert shares_after((0.5, 1), 4) == [0, 0.25, 0.5, 0.75, 1]
    assert shares_after(lambda r: r**2, 2) == [0, 0.25, 1]
    assert numbers(12, 3, (0.5, 0.75, 1), "down") == [6, 3, 3]
    assert dk.Quota(schedule=torch.tensor([0.25, 1.0])) == dk.Quota(schedule=[0.25, 1]) != dk.Quota()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "sine"}, ValueError, "'linear', 'cosine'"),
        ({"schedule": 3}, TypeError, "callable"),
        ({"schedule": (0.5, 0.9)}, ValueError, "end at 1"),
        ({"schedule": (0.5, 0.2, 1)}, ValueError, "not decrease"),
        ({"schedule": (float("nan"), 1)}, ValueError, r"schedule\[0\] must be a number; got nan"),
        ({"schedule": ()}, ValueError, "end at 1"),
        ({"rounding": "up"}, ValueError, "rounding must be one of down, nearest; got 'up'"),
        ({"spread": True, "schedule": "cosine"}, ValueError, "spread"),
        ({"spread": True, "rounding": "nearest"}, ValueError, "spread"),
    ],
)
def test_what_is_no_schedule(options, error, message):
    with pytest.raises(error, match=message):
        dk.Quota(**options)


def test_a_callable_that_falls_is_refused_when_it_is_used():
    with pytest.raises(ValueError, match="not decrease"):
        dk.generate(build(), prompts(1, 4), max_new_tokens=8, steps=4, rule=dk.Quota(schedule=lambda r: 1 - r))


# --- in a decoding ---------------------------------------------------------------------------------------------------


def committed(out):
    """Tokens that each forward committed in each request."""
    return [torch.bincount(row[row >= 0]).tolist() for row in out.commit_step]


@pytest.mark.parametrize("constrained", [False, True])
def test_a_decoding_follows_the_schedule(constrained):
    class Anything(dk.Constraint):
        def accepts(self, tokens, proposed):
            return torch.ones_like(proposed, dtype=torch.bool)

    given = torch.full((2, 16), -1)
    given[1, 3:8] = 20  # 11 masks in the other request
    options = {"constraint": Anything()} if constrained else {}
    for rule, wanted in (
        (dk.Quota(schedule="cosine"), [maskgit(16, 5), maskgit(11, 5)]),
        (dk.Quota(rounding="nearest"), [dllm(16, lambda t: t, 5), dllm(11, lambda t: t, 5)]),
        (dk.Quota(schedule=(0.25, 0.25, 0.5, 0.75, 1)), [[4, 1, 3, 4, 4], [3, 1, 2, 3, 2]]),
    ):
        out = dk.generate(
            build(), prompts(2, 4), max_new_tokens=16, steps=5, rule=rule, given=given, eos_policy="none", **options
        )
        assert committed(out) == wanted and out.complete.all()


def test_steps_that_blocks_do_not_divide():
    """What is left over goes to the first blocks, one step each."""
    out = dk.generate(
        build(), prompts(2, 4), max_new_tokens=30, block_length=10, steps=14, rule=dk.Quota(), eos_policy="none"
    )
    assert committed(out)[0] == committed(out)[1] == [2] * 5 + [2] * 5 + [3, 3, 2, 2]
    with pytest.raises(ValueError, match=r"at least the number of blocks, 3 .of 10 tokens.*got 2"):
        dk.generate(build(), prompts(2, 4), max_new_tokens=30, block_length=10, steps=2, rule=dk.Quota())


def test_steps_of_parts_and_of_blocks_beyond_the_plan():
    """Parts of blocks count as blocks; a request whose prompt stands across a block has one more, with the least."""
    config = dk.DecodingConfig(block_length=8, sub_block_length=4, steps=9, rule=dk.Quota(), block_grid="absolute")
    origin = torch.tensor([0, 3], dtype=torch.int32)
    grid = Grid.of(config, origin, 11, 27, grows=True)
    assert grid.planned.tolist() == [2, 2] and grid.count == 3
    blocks = plan_blocks(config, grid)
    assert [b.num_steps for b in blocks] == [3, 2, 2, 2, 2, 2]


# --- the default -----------------------------------------------------------------------------------------------------


def test_the_default_rule_decodes_in_parallel_and_steps_ask_for_a_schedule():
    config = dk.DecodingConfig()
    assert isinstance(config.rule, dk.Threshold)
    assert config.replace(steps=8).rule == dk.DecodingConfig(steps=8).rule == dk.Quota()
    assert config.replace(steps=8).replace(steps=None).rule == config.rule
    assert config.replace(steps=8, rule=dk.TimeQuota()).rule == dk.TimeQuota()
    named = dk.DecodingConfig(rule=dk.Threshold(config.rule.threshold))
    assert named.replace(steps=8).rule == named.rule  # who names a rule gets it
    assert dk.preset("fast-dllm").replace(steps=8).rule == dk.Threshold(0.9)
    out = dk.generate(build(), prompts(1, 4), max_new_tokens=32, steps=8, eos_policy="none")
    assert committed(out) == [[4] * 8]
    sure = dk.generate(build(sharpness=60), prompts(1, 4), max_new_tokens=32, eos_policy="none")
    assert sure.num_forwards[0] < 20
