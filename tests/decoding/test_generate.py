# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: what it returns, what it refuses, what it never does."""

import dataclasses

import pytest
import torch

import dlmkernels as dk
import numerics
import small_models
from decodings import LateCount, NoRepeats
from host_reads import HostReads
from small_models import EOS, MASK, PAD, build, prompts


@pytest.fixture(scope="module")
def model():
    return build()


RULES = [
    dk.Quota(), dk.TimeQuota(), dk.Threshold(0.5), dk.Factor(1.0), dk.EntropyBound(0.5), dk.StableThreshold(0.5),
    dk.CreditThreshold(0.5), dk.Ancestral(),
]  # fmt: skip
SHORT = {"max_new_tokens": 16, "block_length": 8, "eos_policy": "none"}


class TestOutput:
    @pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
    @pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
    def test_everything_is_decoded(self, model, rule, cache):
        ids = prompts(3, 7)
        out = dk.generate(model, ids, rule=rule, cache=cache, **SHORT)
        assert torch.equal(out.sequences[:, :7], ids)
        assert out.generated.shape == (3, 16) and not (out.sequences == MASK).any()
        assert out.complete.all()
        assert (out.commit_step[:, :7] == -1).all() and (out.commit_step[:, 7:] >= 0).all()
        assert (out.confidence[:, 7:] > 0).all() and (out.confidence <= 1).all()
        assert torch.equal(out.num_forwards, out.commit_step.amax(1) + 1)
        assert torch.equal(out.tokens_per_forward, 16 / out.num_forwards)

    @pytest.mark.parametrize("steps,each", [(16, 1), (8, 2), (4, 4), (2, 8)])
    def test_quota_spends_the_planned_steps(self, model, steps, each):
        out = dk.generate(model, prompts(2, 5), steps=steps, **SHORT)
        assert (out.num_forwards == steps).all()
        counts = out.commit_step[0, 5:].bincount()
        assert (counts == each).all()

    def test_blocks_are_decoded_left_to_right(self, model):
        steps = dk.generate(model, prompts(2, 5), **SHORT).commit_step[:, 5:]
        assert (steps[:, :8].amax(1) < steps[:, 8:].amin(1)).all()

    def test_threshold_commits_what_is_sure(self, model):
        out = dk.generate(model, prompts(4, 6), rule=dk.Threshold(0.5), **SHORT)
        for row in range(4):
            for positions in out.trace.order(row):
                sure = out.confidence[row, positions] >= 0.5
                assert sure.all() or len(positions) == 1

    def test_adaptive_rule_is_quicker(self, model):
        ids = prompts(4, 6)
        assert (dk.generate(model, ids, rule=dk.Threshold(0.3), **SHORT).num_forwards < 16).all()

    def test_one_dimensional_prompt(self, model):
        ids = prompts(1, 6)
        assert torch.equal(dk.generate(model, ids[0], **SHORT).sequences, dk.generate(model, ids, **SHORT).sequences)

    def test_inputs_are_untouched(self, model):
        ids = prompts(2, 6)
        before = ids.clone()
        dk.generate(model, ids, **SHORT)
        assert torch.equal(ids, before)

    def test_mask_and_suppressed_tokens_are_never_generated(self, model):
        banned = tuple(range(4, 60))
        out = dk.generate(model, prompts(3, 5), suppress_token_ids=banned, temperature=1.5, seed=3, **SHORT)
        assert not torch.isin(out.generated, torch.tensor([*banned, MASK])).any()

    def test_custom_rule_in_ten_lines(self, model):
        class HalfOfTheRest(dk.Rule):
            def select(self, step):
                return step.select("none", fill=(step.open_now + 1) // 2)

        out = dk.generate(model, prompts(2, 5), rule=HalfOfTheRest(), **SHORT)
        assert out.commit_step[0, 5:13].bincount().tolist() == [4, 2, 1, 1]

    @pytest.mark.parametrize("alignment", ["same", "shift"])
    def test_guidance_changes_the_result_and_keeps_the_prompt(self, model, alignment):
        ids = prompts(2, 6)
        plain = dk.generate(model, ids, logit_alignment=alignment, **SHORT)
        guided = dk.generate(model, ids, logit_alignment=alignment, cfg_scale=2.0, **SHORT)
        assert torch.equal(guided.sequences[:, :6], ids)
        assert not torch.equal(plain.sequences, guided.sequences)


class TestRandomness:
    SAMPLED = SHORT | {"temperature": 1.0, "rule": dk.Threshold(0.5)}

    def test_seed_decides(self, model):
        ids = prompts(2, 6)
        a, b, c = (dk.generate(model, ids, seed=s, **self.SAMPLED).sequences for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)

    def test_without_a_seed_torch_decides(self, model):
        ids = prompts(1, 6).repeat(2, 1)
        torch.manual_seed(5)
        a = dk.generate(model, ids, **self.SAMPLED).sequences
        torch.manual_seed(5)
        b = dk.generate(model, ids, **self.SAMPLED).sequences
        assert torch.equal(a, b)
        assert not torch.equal(a[0], a[1])

    @pytest.mark.parametrize("options", [
        {"temperature": 1.0}, {"score": "random", "rule": dk.Quota()}, {"order_temperature": 0.5}, {"temperature": 0.7, "top_p": 0.9},
    {"rule": dk.Ancestral(), "temperature": 1.0}, {"rule": dk.StableThreshold(0.3, 0.5), "temperature": 1.0},
    {"rule": dk.CreditThreshold(0.6)}, {"rule": dk.SmoothedThreshold(0.4)},
    {"rule": dk.TokenEditing(0.5, 0.3), "temperature": 0.5}, {"rule": dk.RunEditing(0.5, soft=False)},
    {"rule": dk.Backtracking()}, {"rule": dk.PathPlanning(), "temperature": 1.0},
    *({"rule": dk.AncestralRemask(strategy=s, eta=0.3), "temperature": 1.0} for s in ("cap", "conf", "loop")),
    {"rule": dk.ScoreAncestral(), "temperature": 1.0}, {"rule": dk.UniformState(), "temperature": 1.0},
    {"rule": dk.PredictorCorrector(strategy="constant", kappa=0.5), "temperature": 1.0},
    {"rule": dk.RenoisedEntropyBound(2.0), "distribution": "tempered", "block_length": 16}, {"rule": dk.EarlyAnswer((2.0, 1.5, 1.0))},
    ], ids=str)  # fmt: skip
    def test_a_request_does_not_depend_on_its_batch(self, model, options):
        """Alone, shuffled in a batch, or padded to a longer neighbour: the same tokens, committed at the same steps."""
        lengths = [3, 9, 6, 9, 4]
        rows = [prompts(1, n, seed=n * 7 + i)[0] for i, n in enumerate(lengths)]
        seeds = torch.arange(5) * 1000 + 17
        options = SHORT | options
        alone = [dk.generate(model, r, seed=s[None], **options) for r, s in zip(rows, seeds)]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            ids = torch.stack([torch.cat((rows[i].new_full((9 - lengths[i],), PAD), rows[i])) for i in order])
            valid = torch.stack([torch.arange(9) >= 9 - lengths[i] for i in order])
            out = dk.generate(model, ids, valid, seed=seeds[order], **options)
            for row, i in enumerate(order):
                assert torch.equal(out.generated[row], alone[i].generated[0])
                assert torch.equal(out.commit_step[row, 9:], alone[i].commit_step[0, lengths[i] :])
                assert out.num_forwards[row] == alone[i].num_forwards[0]


class TestEos:
    @pytest.fixture(scope="class")
    def ending(self):
        """A model that likes to end."""
        model = build(seed=4)
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 3
        return model

    def test_fill(self, ending):
        out = dk.generate(ending, prompts(6, 5), rule=dk.Threshold(0.9), max_new_tokens=32, block_length=8)
        ended = (out.generated == EOS).any(1)
        assert ended.any() and out.complete.all()
        for row in ended.nonzero().flatten():
            first = int((out.generated[row] == EOS).nonzero()[0])
            rest = out.generated[row, first + 1 :]
            assert (rest == PAD).all()

    def test_rows_that_end_early_cost_no_forwards(self, ending):
        ids = prompts(6, 5)
        options = {"rule": dk.Threshold(0.9), "max_new_tokens": 32, "block_length": 8}
        filled = dk.generate(ending, ids, **options)
        full = dk.generate(ending, ids, eos_policy="none", **options)
        assert (filled.num_forwards <= full.num_forwards).all() and (filled.num_forwards < full.num_forwards).any()

    def test_end_token_in_the_prompt_ends_nothing(self, model):
        ids = prompts(2, 6)
        ids[:, 2] = EOS
        out = dk.generate(model, ids, suppress_token_ids=[EOS], max_new_tokens=8)
        assert (out.commit_step[:, 6:] >= 0).all()


class TestInfill:
    def test_given_tokens_stay(self, model):
        tokens = prompts(3, 20)
        holes = torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) < 0.4
        canvas = tokens.masked_fill(holes, MASK)
        out = dk.infill(model, canvas, rule=dk.Threshold(0.7), block_length=5, eos_policy="none")
        assert torch.equal(out.sequences[~holes], tokens[~holes])
        assert not (out.sequences == MASK).any()
        assert torch.equal(out.commit_step >= 0, holes)

    def test_nothing_to_do(self, model):
        tokens = prompts(2, 10)
        out = dk.infill(model, tokens)
        assert torch.equal(out.sequences, tokens) and (out.num_forwards == 0).all()

    def test_equals_generate_when_the_masks_are_at_the_end(self, model):
        ids = prompts(2, 8)
        canvas = torch.cat((ids, torch.full((2, 16), MASK)), 1)
        a = dk.infill(model, canvas, block_length=8, eos_policy="none")
        b = dk.generate(model, ids, **SHORT)
        assert torch.equal(a.sequences, b.sequences)


class TestStreaming:
    class Recorder:
        def __init__(self):
            self.blocks, self.drafts, self.ended = [], [], False

        def put(self, value):
            self.blocks.append(value.clone())

        def put_draft(self, value):
            self.drafts.append(value.clone())

        def end(self):
            self.ended = True

    def test_prompt_drafts_blocks_end(self, model):
        ids, recorder = prompts(1, 6), self.Recorder()
        out = dk.generate(model, ids, streamer=recorder, rule=dk.Quota(), **SHORT)
        assert torch.equal(torch.cat(recorder.blocks), out.sequences[0]) and recorder.ended
        assert len(recorder.blocks) == 3 and len(recorder.drafts) == 16
        masks = [int((d == MASK).sum()) for d in recorder.drafts]
        assert masks == list(range(15, -1, -1))

    def test_one_request_only(self, model):
        for bad in (print, [print]):
            with pytest.raises(
                TypeError, match=r"streamer must have the methods put and end, such as .*function print"
            ):
                dk.generate(model, prompts(1, 6), streamer=bad, **SHORT)
        with pytest.raises(ValueError, match=r"streamer can follow only one request; got a batch of 2"):
            dk.generate(model, prompts(2, 6), streamer=self.Recorder(), **SHORT)
        with pytest.raises(ValueError, match=r"streamer can follow only one request; got a batch of 2"):
            dk.infill(model, torch.tensor([[5, MASK], [MASK, 6]]), streamer=self.Recorder())

    def test_infill_takes_one_for_each_row(self, model):
        recorders = [self.Recorder(), None, self.Recorder()]
        out = dk.infill(model, torch.tensor([[5, MASK, 7], [6, 7, MASK], [MASK, 7, 8]]), streamer=recorders)
        for row in (0, 2):
            assert torch.equal(torch.cat(recorders[row].blocks), out.sequences[row]) and recorders[row].ended


class TestTrace:
    def test_canvas_at(self, model):
        out = dk.generate(model, prompts(2, 6), rule=dk.Threshold(0.4), **SHORT)
        assert (out.trace.canvas_at(-1, MASK)[:, 6:] == MASK).all()
        last = int(out.commit_step.max())
        assert torch.equal(out.trace.canvas_at(last, MASK), out.sequences)
        assert sorted(sum(out.trace.order(0), [])) == list(range(6, 22))

    def test_text_and_plot(self, model, tmp_path):
        out = dk.generate(model, prompts(1, 6), rule=dk.Quota(), **SHORT)
        text = out.trace.text(lambda ids: "".join("_" if i == MASK else "x" for i in ids), MASK)
        lines = text.splitlines()
        assert len(lines) == 17 and lines[0].endswith("_" * 16) and lines[-1].endswith("x" * 16)
        out.trace.plot(tmp_path / "trace.png")
        assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


class TestErrors:
    @pytest.mark.parametrize("kwargs,match", [
        ({"input_ids": torch.zeros(1, 4)}, r"input_ids must be an int64 tensor.*float32"),
        ({"input_ids": []}, r"input_ids is empty"),
        ({"input_ids": [[5], [3, 2**63]]}, r"input_ids must contain token ids, which fit into 64 bits; got 9223372036854775808"),
        ({"input_ids": [-(2**63) - 1]}, r"input_ids must contain token ids, which fit into 64 bits; got -9223372036854775809"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"input_ids must have shape.*\[0, 4\]"),
        ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"input_ids must have shape"),
        ({"input_ids": torch.full((1, 4), 97)}, r"input_ids must hold ids from 0 to 96; got ids from 97"),
        ({"input_ids": torch.full((1, 4), -5)}, r"input_ids must hold ids"),
        ({"input_ids": torch.full((1, 4), MASK)}, r"input_ids holds the mask token.*infill"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, r"input_ids must be on the model's device"),
        ({"max_new_tokens": 253}, r"canvas of 257.*max_position_embeddings of 256"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask must have the shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, r"pad prompts on the left"),
        ({"attention_mask": torch.zeros(1, 4)}, r"attention_mask leaves row 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be an integer of at least 1; got 0"),
        ({"temperature": -1.0}, r"temperature must be a number of at least 0; got -1"),
        ({"temperature": float("nan")}, r"temperature must be a number"),
        ({"top_p": 1.5}, r"top_p must be a number from 0 to 1; got 1.5"),
        ({"score": "luck"}, r"score must be one of.*'luck'"),
        ({"cache": "paged"}, r"cache must be one of.*'paged'"),
        ({"steps": 1, "block_length": 8, "max_new_tokens": 16}, r"steps must be at least the number of blocks, 2"),
        ({"mask_token_id": 500}, r"mask_token_id must be in the model's vocabulary.*500"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed must be int64 of shape \[1\]"),
    ], ids=lambda v: None if isinstance(v, str) else ",".join(v))  # fmt: skip
    def test_value(self, model, kwargs, match):
        ids = kwargs.pop("input_ids", torch.arange(4, 8)[None])
        with pytest.raises(ValueError, match=match):
            dk.generate(model, ids, **{"max_new_tokens": 8} | kwargs)

    def test_unknown_option(self, model):
        with pytest.raises(TypeError, match=r"unknown decoding option blocklength: did you mean block_length\?"):
            dk.generate(model, prompts(1, 4), blocklength=4)

    def test_rule_of_the_wrong_kind(self, model):
        with pytest.raises(TypeError, match=r"rule must be a Rule.*got 0\.9"):
            dk.generate(model, prompts(1, 4), rule=0.9)
        with pytest.raises(ValueError, match="unknown rule 'luck'"):
            dk.generate(model, prompts(1, 4), rule="luck")

    @pytest.mark.parametrize(("rule", "score", "limit"), [
        (dk.Threshold(95), "probability", "threshold=95 of Threshold can never be reached, since score='probability' is at most 1"),
        (dk.Threshold(0.95), "entropy", "threshold=0.95 of Threshold can never be reached, since score='entropy' is at most 0"),
        (dk.Threshold((0.5, 1.5)), "margin", "threshold=1.5 of Threshold can never be reached, since score='margin' is at most 1"),
        (dk.HierarchicalThreshold(0.9, 2), "probability", "low=2 of HierarchicalThreshold can never be reached"),
        (None, "random", "threshold=0.95 of Threshold can never be reached, since score='random' is at most 0"),
    ])  # fmt: skip
    def test_thresholds_that_no_score_reaches(self, model, rule, score, limit):
        with pytest.raises(ValueError, match=limit):
            dk.generate(model, prompts(2, 4), max_new_tokens=4, rule=rule, score=score)

    def test_thresholds_that_a_score_reaches(self, model):
        by_entropy = dk.generate(model, prompts(1, 4), max_new_tokens=8, rule=dk.Threshold(-50.0), score="entropy")
        assert by_entropy.num_forwards.tolist() == [1]
        one_each = dk.generate(model, prompts(1, 4), max_new_tokens=8, rule=dk.Threshold(1.0, strict=True))
        assert one_each.num_forwards.tolist() == [8]

    def test_training_mode(self):
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            dk.generate(build().train(), prompts(1, 4))

    def test_mask_token_unknown(self):
        model = build()
        del model.config.mask_token_id
        with pytest.raises(ValueError, match="mask_token_id is not in the model's configuration"):
            dk.generate(model, prompts(1, 4))

    def test_cache_on_an_unknown_model(self):
        class Odd(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(8, 8)

            def forward(self, tokens):
                return type("Out", (), {"logits": self.table(tokens)})()

        with pytest.warns(UserWarning), pytest.raises(ValueError, match="cache='dual' needs a model of a known type"):
            dk.generate(Odd().eval(), torch.tensor([[1, 2]]), mask_token_id=7, cache="dual")

    def test_unknown_model_without_cache_decodes(self):
        class Bigram(torch.nn.Module):
            """Whatever stands left, plus one."""

            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(10, 10)
                self.table.weight.data = torch.eye(10).roll(1, 1) * 20

            def forward(self, tokens):
                left = tokens.roll(1, 1)
                sure = (left != 9).float()[..., None]
                return type("Out", (), {"logits": self.table(left) * sure})()

        with pytest.warns(UserWarning, match="without KV-cache reuse"):
            out = dk.generate(Bigram().eval(), torch.tensor([[2], [4]]), max_new_tokens=4, mask_token_id=9)
        assert out.generated.tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]

    def test_nan_logits_leave_masks_and_say_so(self):
        """Rows whose logits are NaN stay masked and are reported; their neighbours are decoded as if alone."""
        model = build()
        ids = prompts(2, 6)
        alone = dk.generate(model, ids[:1], **SHORT)
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = torch.nan
        ids[1, 0], ids[0] = 7, ids[0].masked_fill(ids[0] == 7, 8)
        with pytest.warns(RuntimeWarning, match=r"masks are left in rows \[1\]"):
            out = dk.generate(model, ids, **SHORT)
        assert out.complete.tolist() == [True, False] and (out.generated[1] == MASK).all()
        assert torch.equal(out.sequences[0], alone.sequences[0])


#: Rules that have loops of their own.
OWN_LOOP = (dk.Strided, dk.SelfSpeculative, dk.Reordered, dk.Pipeline, dk.VariableLength)


@pytest.mark.parametrize("options", [
    {"rule": dk.Threshold(0.5), "cache": "dual"}, {"rule": dk.EntropyBound(), "cache": "prefix"},
    {"rule": dk.Quota(), "score": "random", "temperature": 1.0, "top_k": 5}, {"rule": dk.Factor(), "cfg_scale": 1.0},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "block", "logit_alignment": "shift"},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "causal-context"},
    {"rule": dk.Threshold(0.5), "cache": "delayed", "refresh_interval": 3},
    {"rule": dk.Threshold(0.5), "cache": "dual", "vicinity": (2, 3), "warmup": 2},
    {"rule": dk.Threshold(0.9, tie=1e-5), "defer_token_ids": (5,), "score": dk.scores.DensityWeighted()},
    {"score": dk.scores.PositionWeighted(torch.ones(97))},
    {"rule": dk.Threshold(0.5), "constraint": torch.ones(16, 97, dtype=torch.bool)},
    *({"config": config, "block_length": 8, "cache": "none"} for config in dk.PRESETS.values()
      if not isinstance(config.rule, OWN_LOOP) and not config.rule.token_ids and config.rule.noise != "continuous"),
    {"rule": dk.SplitEditing(0.5, 0.0, 4, 90, 91)},
], ids=lambda o: next((n for n, c in dk.PRESETS.items() if c is o.get("config")), None) or str(o))  # fmt: skip
def test_step_loop_reads_nothing_on_the_host(model, options, monkeypatch):
    """Between two polls no tensor's value reaches the host."""
    from dlmkernels.decoding import poll, state
    from dlmkernels.decoding.block_forward import BlockForward

    reads = HostReads()
    real_remask, real_forward = state.remask_, BlockForward.__call__
    steps, watching = [], []

    def forward(self, *args):
        reads.__enter__()
        watching.append(True)
        return real_forward(self, *args)

    def remask(*args, **kwargs):
        out = real_remask(*args, **kwargs)
        if watching:  # a step, and neither the first noise nor the end of a block
            watching.pop()
            reads.__exit__(None, None, None)
        steps.append(len(reads.seen))
        return out

    monkeypatch.setattr(BlockForward, "__call__", forward)
    monkeypatch.setattr(state, "remask_", remask)
    dk.generate(model, prompts(2, 6), **SHORT | options)
    assert len(steps) >= 1 and reads.seen == []
    with reads:
        poll.OpenCount(4, 4).submit(torch.tensor([1, 2])), torch.tensor(3).item()
    assert reads.seen  # the recorder does see reads


@pytest.mark.parametrize("options", [
    {"rule": dk.Threshold(0.5)}, {"rule": dk.Threshold(0.5), "cache": "dual"}, {"rule": dk.Quota(), "steps": 8},
    {"rule": dk.Threshold(0.5), "cache": "delayed"}, {"cache": "delayed", "warmup": 2, "refresh_interval": 3},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "block", "logit_alignment": "shift"},
    {"rule": dk.Threshold(0.5), "cache": "block", "attention": "causal-context", "seeded": True},
    {"rule": dk.TokenEditing(0.3, 0.2), "eos_policy": "fill"}, {"rule": dk.RunEditing(0.3, 0.4, soft=False)},
    {"rule": dk.Backtracking(2)}, {"rule": dk.WideInNarrowOut(0.2, 0.5)}, {"rule": dk.EarlyAnswer((0.5, 0.4, 0.3))},
    {"rule": dk.AncestralRemask(eta=0.3), "steps": 16}, {"rule": dk.RenoisedEntropyBound(steps=4), "seed": 1},
    {"rule": dk.Threshold(0.3), "constraint": NoRepeats()}, {"rule": dk.Backtracking(2), "constraint": NoRepeats()},
    {"rule": dk.Threshold(0.5), "cache": "delayed", "logit_alignment": "shift"},
    {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
    {"rule": dk.Strided(3), "attention": "causal", "logit_alignment": "shift", "cache": "block"},
    {"rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block"},
    {"rule": dk.Pipeline(0.5), "attention": "block", "logit_alignment": "shift", "cache": "block"},
    {"rule": dk.Pipeline(0.5, 0.3, 0.5), "attention": "block"}, {"rule": dk.EntropyPipeline(1.0)},
    {"rule": dk.EntropyPipeline(1.0), "cache": "prefix", "refresh_interval": 3},
], ids=str)  # fmt: skip
def test_late_counts_change_nothing(model, options, monkeypatch):
    """A host that learns late how much is open runs steps that do nothing, and misses none."""
    options = {"max_new_tokens": 32, "eos_policy": "none", "seed": 3} | options
    if not isinstance(options.get("rule"), (dk.Strided, dk.Reordered)):
        options["block_length"] = 8
    to_infill = {name: value for name, value in options.items() if name not in ("max_new_tokens", "steps")}
    canvas = prompts(2, 30)
    canvas[:, 20:] = MASK  # after two blocks and a half that are given
    canvas[0, 4] = MASK

    def run():
        yield dk.generate(model, prompts(2, 6), **options)
        if not isinstance(options.get("rule"), OWN_LOOP):
            yield dk.infill(model, canvas, **to_infill)

    at_once = list(run())
    monkeypatch.setattr("dlmkernels.decoding.programs.base.OpenCount", LateCount)
    for ours, late in zip(at_once, run()):
        assert late.complete.all()
        for name in ("sequences", "commit_step", "num_forwards"):
            assert torch.equal(getattr(ours, name), getattr(late, name)), name
        numerics.assert_same_probabilities(ours.confidence, late.confidence)


GIVEN = {
    "parts": {"attention": "causal-context", "cache": "block", "seeded": True, "sub_block_length": 2},
    "shifted": {"attention": "causal", "cache": "block", "seeded": True, "logit_alignment": "shift"},
    "apart": {"attention": "block", "cache": "block", "fuse_commit": False},
    "no cache": {"attention": "causal-context", "cache": "none", "seeded": True},
}


@pytest.mark.parametrize("name", GIVEN)
def test_contexts_count_for_the_requests_that_enter_the_block(model, name):
    """What is given leaves blocks, or the first part of one, without a mask: in some rows, and in others not."""
    given = torch.full((3, 16), -1)
    given[0, :6], given[1, 4:8], given[2, 9] = 7, 8, 9
    options = {"max_new_tokens": 16, "block_length": 4, "rule": dk.Threshold(0.4), "temperature": 1.0, "seed": 4}
    options |= {"eos_policy": "none"} | GIVEN[name]
    ids = prompts(3, 6)
    out = dk.generate(model, ids, given=given, **options)
    for row in range(3):
        alone = dk.generate(model, ids[row], given=given[row], **options)
        assert torch.equal(alone.sequences[0], out.sequences[row]) and out.complete[row]
        assert torch.equal(alone.commit_step[0], out.commit_step[row])
        assert alone.num_forwards[0] == out.num_forwards[row]


@pytest.mark.parametrize(("cache", "narrow"), [("prefix", {}), ("dual", {"vicinity": (0, 3)})])
def test_a_vicinity_ends_with_the_canvas(model, cache, narrow):
    """Left of the first column there is nothing, and what stands at the end is forwarded all the same."""
    canvas = prompts(2, 16)
    canvas[:, 1:14:2] = MASK
    canvas[:, -1] = MASK
    options = {"cache": cache, "rule": dk.Quota(), "eos_policy": "none"}
    wide, narrow = (dk.infill(model, canvas, **options, **v) for v in ({"vicinity": (5, 3)}, narrow))
    assert torch.equal(wide.sequences, narrow.sequences) and torch.equal(wide.commit_step, narrow.commit_step)


def test_a_row_that_is_given_another_request_keeps_nothing():
    from dlmkernels.decoding.state import State

    def state(tokens, seed):
        is_open = torch.arange(5).expand(len(tokens), 5) > 2
        return tokens, is_open, torch.zeros(len(tokens), dtype=torch.int32), 5, torch.full((len(tokens),), seed)

    tokens, is_open, origin, end, seed = state(prompts(3, 5), 3)
    used = State.of(tokens, is_open, origin, end, seed=seed)
    tensors = [f.name for f in dataclasses.fields(State) if f.name != "parameters"]
    before = {name: getattr(used, name) for name in tensors}
    for name in ("commit_step", "confidence", "step", "block", "entered"):
        before[name].fill_(9)
    kept = {name: x[0].clone() for name, x in before.items() if x is not None}
    other = State.of(*state(prompts(2, 5, seed=1), 8)[:4], seed=torch.tensor([8, 8]))
    used.admit(torch.tensor([2, 1]), *state(prompts(2, 5, seed=1), 8))
    for name, x in before.items():
        assert getattr(used, name) is x  # written, not replaced
        if x is not None:
            assert torch.equal(x[0], kept[name])
            assert torch.equal(x[[2, 1]], getattr(other, name) + (name == "epoch"))


@pytest.mark.parametrize("options", [
    {"cache": "none"}, {"cache": "prefix"}, {"cache": "dual", "block_length": 4},
    {"cache": "block", "attention": "causal", "block_length": 4},
], ids=str)  # fmt: skip
def test_first_position_of_a_padded_row(model, options):
    """With shifted logits it has no row before it, and keeps its own: not that of the padding."""
    rows = [prompts(1, n, seed=n)[0] for n in (9, 5, 8)]
    for row in rows:
        row[0] = row[3] = MASK
    ids = torch.stack([torch.cat((r.new_full((9 - len(r),), PAD), r)) for r in rows])
    valid = torch.stack([torch.arange(9) >= 9 - len(r) for r in rows]).long()
    options = {"rule": dk.Quota(), "logit_alignment": "shift", "eos_policy": "none"} | options
    out = dk.infill(model, ids, valid, **options)
    for k, row in enumerate(rows):
        if options["cache"] in ("none", "prefix"):  # blocks of an infilling are counted from the batch's first column
            alone = dk.infill(model, row, **options)
            assert torch.equal(alone.sequences[0], out.sequences[k, 9 - len(row) :])
        other = dk.infill(model, ids.masked_fill(valid == 0, 7), valid, **options)
        assert torch.equal(other.sequences[k, 9 - len(row) :], out.sequences[k, 9 - len(row) :])


def test_preset():
    config = dk.preset("fast-dllm", max_new_tokens=64)
    assert config.cache == "dual" and config.rule == dk.Threshold(0.9) and config.max_new_tokens == 64
    with pytest.raises(ValueError, match=r"unknown preset 'fastdllm': did you mean 'fast-dllm'\?"):
        dk.preset("fastdllm")


@pytest.mark.parametrize("kind", small_models.KINDS)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed"])
def test_every_kind_decodes(kind, cache):
    model = build(kind)
    out = dk.generate(model, prompts(2, 6), cache=cache, rule=dk.Threshold(0.5), **SHORT)
    assert out.complete.all()
