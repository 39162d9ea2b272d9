# SPDX-License-Identifier: Apache-2.0
"""Masks that are left: who left them, and that a streamer shows them; and small truths about results."""

import warnings
from dataclasses import dataclass

import pytest
import torch

import dlmkernels as dk
import numerics
from small_models import MASK, build, prompts

SHORT = {"max_new_tokens": 12, "block_length": 6, "eos_policy": "none"}


@pytest.fixture(scope="module")
def model():
    return build(sharpness=6.0)


@dataclass(frozen=True)
class NeverInRow1(dk.Rule):
    """Selects everything in the first request, nothing in the second."""

    def select(self, step):
        nothing = torch.arange(len(step.eligible)) == 1
        return step.eligible & ~nothing[:, None]


@dataclass(frozen=True)
class Leaves(dk.Rule):
    """Sees all of a block, and ends the second request's at once."""

    slots = "block"

    def act(self, step):
        nothing = (torch.arange(len(step.eligible)) == 1)[:, None]
        return dk.Action(step.eligible & ~nothing, working=step.everyone(False))


@dataclass(frozen=True)
class IdlePipeline(dk.Pipeline):
    def select_by_block(self, step, is_active):
        return torch.zeros_like(step.eligible)


def message_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call()
    texts = [w for w in caught if "masks are left" in str(w.message)]
    assert len(texts) == 1 and texts[0].filename == __file__
    return out, str(texts[0].message)


@pytest.mark.parametrize("rule", [NeverInRow1(), Leaves()])
def test_a_rule_that_selects_nothing(model, rule):
    out, message = message_of(lambda: dk.generate(model, prompts(2, 5), rule=rule, **SHORT))
    assert f"masks are left in rows [1]: the model proposed tokens there, but {rule!r} selected none" in message
    assert "NaN" not in message and out.complete.tolist() == [True, False] and (out.generated[1] == MASK).all()
    assert not out.decoded[1].any() and out.tokens_per_forward[1] == 0


def test_a_pipeline_that_selects_nothing(model):
    options = {"attention": "full", "cache": "none", "max_new_tokens": 12, "block_length": 6, "eos_policy": "none"}
    out, message = message_of(lambda: dk.generate(model, prompts(1, 5), rule=IdlePipeline(), **options))
    assert "selected none of them" in message and "NaN" not in message and int(out.num_forwards) == 12


@pytest.mark.parametrize("rule", [dk.Quota(), dk.TokenEditing(0.5, 0.5), NeverInRow1()])
def test_each_row_has_its_own_reason(rule):
    """Row 0 is decoded; the logits of row 1 are NaN; the rule leaves what it leaves."""
    broken = build(sharpness=6.0)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    ids = prompts(3, 5).masked_fill(prompts(3, 5) == 7, 8)
    ids = ids[[0, 2, 1]] if isinstance(rule, NeverInRow1) else ids
    nan_row = 2 if isinstance(rule, NeverInRow1) else 1
    ids[nan_row, 0] = 7
    _, message = message_of(lambda: dk.generate(broken, ids, rule=rule, suppress_token_ids=(7,), **SHORT))
    assert f"in rows [{nan_row}]: the model's logits there were NaN or -inf" in message
    assert ("in rows [1]: the model proposed" in message) == isinstance(rule, NeverInRow1)


@pytest.mark.parametrize("rule", [dk.Quota(), dk.TokenEditing(0.5, 0.5)])
@pytest.mark.parametrize("nan", [False, True])
def test_a_constraint_that_refuses_everything(nan, rule):
    """Nothing is allowed at one position. It is not blamed for logits that are not there."""
    model = build(sharpness=6.0)
    allowed = torch.ones(2, 12, 97, dtype=torch.bool)
    allowed[1, 2] = False
    ids = prompts(2, 5)
    if nan:
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = torch.nan
        ids[1, 0] = 7
    out, message = message_of(lambda: dk.generate(model, ids, rule=rule, constraint=allowed, **SHORT))
    if nan:
        assert "masks are left in rows [1]: the model's logits there were NaN" in message
        assert "constraint" not in message
    else:
        assert "masks are left in rows [1]: the constraint refused every token there" in message
        assert "NaN" not in message and (out.sequences == MASK).nonzero().tolist() == [[1, 7]]


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.tolist()

    def end(self):
        self.ended = True


@pytest.mark.filterwarnings("ignore:masks are left:RuntimeWarning")
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_streamer_is_shown_the_masks_that_are_left(model, own_loop):
    rule = IdlePipeline() if own_loop else Leaves()
    allowed = {} if own_loop else {"constraint": torch.arange(97) < 0}
    streamer = Recorder()
    out = dk.generate(model, prompts(1, 5), rule=rule, streamer=streamer, **SHORT, **allowed)
    assert streamer.seen == out.sequences[0].tolist() and streamer.ended and MASK in streamer.seen


def test_a_streamer_is_shown_the_padding(model):
    """As many tokens as there are, whether a request ends in its first block or in its last."""
    free = dk.generate(model, prompts(1, 5), **SHORT)
    streamer = Recorder()
    options = SHORT | {"eos_policy": "fill", "eos_token_id": int(free.generated[0, 1])}
    out = dk.generate(model, prompts(1, 5), streamer=streamer, **options)
    assert streamer.seen == out.sequences[0].tolist() and out.decoded.sum() <= 2


def test_nothing_to_decode(model):
    out = dk.infill(model, prompts(2, 8))
    assert out.num_forwards.tolist() == [0, 0] and out.tokens_per_forward.tolist() == [0.0, 0.0]
    assert out.complete.all() and not out.decoded.any() and out.trace.order() == []


@pytest.mark.parametrize("distribution", ["raw", "tempered"])
def test_confidence_of_the_likeliest_token(model, distribution):
    """`argmax_confidence` is of the configured distribution: temperature does not touch the raw one."""
    ids = prompts(1, 5)
    rule = dk.Ancestral(eps=0.5)
    temperature = 0.05
    out = dk.generate(
        model, ids, rule=rule, steps=1, temperature=temperature, seed=1, distribution=distribution, max_new_tokens=6,
        eos_policy="none",
    )  # fmt: skip
    canvas = torch.cat((ids, torch.full((1, 6), MASK)), 1)
    adapted = dk.adapt(model)
    with torch.no_grad():
        hidden = adapted.hidden(
            canvas, torch.arange(11)[None], dk.AttentionWindow(torch.arange(11, dtype=torch.int32)[None])
        )
        z = adapted.logits(hidden[0]).double()[5:]
    z[:, MASK] = -torch.inf
    p = torch.softmax(z / (temperature if distribution == "tempered" else 1), -1).amax(-1)
    assert (out.confidence[0, 5:] <= 1 + 1e-5).all()
    torch.testing.assert_close(out.confidence[0, 5:].double(), p, rtol=1e-4, atol=1e-6)


def test_the_token_that_crosses_top_p(model):
    """With `keep_crossing=False` the token that crosses is left out: at a small top_p the likeliest is left alone."""
    options = {"temperature": 1.0, "top_p": 0.5, "seed": 2, "distribution": "filtered", "steps": 1} | SHORT
    options |= {"block_length": 12}
    kept, left_out = (dk.generate(model, prompts(4, 5), keep_crossing=k, **options) for k in (True, False))
    assert not torch.equal(kept.sequences, left_out.sequences)
    assert (left_out.confidence[:, 5:] >= kept.confidence[:, 5:] - 1e-6)[
        kept.sequences[:, 5:] == left_out.generated
    ].all()


class TestStages:
    """`EarlyAnswer`: which gap counts at which forward, as Prophet's program has it (it counts the forward it is in)."""

    @pytest.mark.parametrize("steps", [3, 12, 100])
    def test_stages(self, model, steps):
        from dlmkernels.decoding.rules.history import EarlyAnswer

        clear, never = 0.0, 1e9
        for stage in range(3):
            gaps = tuple(clear if s == stage else never for s in range(3))
            out = dk.generate(
                model,
                prompts(1, 5),
                rule=EarlyAnswer(gaps),
                steps=steps,
                max_new_tokens=max(steps, 4),
                eos_policy="none",
            )
            # the first forward number n = 1, 2, … of which n / steps is in the stage; else the last forward
            low, high = ((-1.0, 0.33), (0.33, 0.67), (0.67, 2.0))[stage]
            first = next((n for n in range(1, steps + 1) if low <= n / steps < high), steps)
            assert int(out.num_forwards) == first, (steps, stage)


class TestTimes:
    def test_loop_keeps_the_share_of_the_forward_process(self):
        """Over 20 steps, intervals that cross a boundary of the loop included, alpha(s) is decided at every time s."""
        rule = dk.AncestralRemask(strategy="loop", eta=0.02)
        intervals, decided, crossed = 19, 0.0, 0
        for i in range(intervals):
            width = (1 - rule.eps) / intervals
            t, s = 1 - width * i, 1 - width * (i + 1)
            a, b = rule.alpha(t), rule.alpha(s)
            sigma = rule._sigma(t, (1 - b) / a if a > 0 else 1.0)
            decided = decided * (1 - sigma) + (1 - decided) * (b - (1 - sigma) * a) / (1 - a)
            crossed += (t > rule.t_on) != (s > rule.t_on) or (t > rule.t_off) != (s > rule.t_off)
            assert abs(decided - rule.alpha(s)) < numerics.TWO_PROGRAMS
        assert crossed == 2

    @pytest.mark.parametrize("steps", [5, 10, 20, 40])
    def test_a_boundary_on_the_grid_is_met(self, steps):
        """Times are rounded, so that one that is t_on on paper is no later and no earlier than it."""
        rule = dk.Ancestral(eps=0.0, denoise=False)
        for i in range(steps):
            t, s = rule.times(i, steps)
            assert t == float(f"{(steps - i) / steps:.10g}") and s == float(f"{(steps - i - 1) / steps:.10g}")

    def test_dreams_share_is_exact(self, model):
        """On a grid down to 0 the share of what is open is a whole number: one token a forward."""
        out = dk.generate(model, prompts(1, 5), rule=dk.TimeQuota(eps=0.0), steps=12, **SHORT | {"block_length": 12})
        assert sorted(out.commit_step[0, 5:].tolist()) == list(range(12))
