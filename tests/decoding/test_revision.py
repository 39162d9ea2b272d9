# SPDX-License-Identifier: Apache-2.0
"""Rules that take tokens back, against their restatements (`restated_revision.py`), token for token."""

import copy

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import restated_revision as restated
from decodings import FEW_MASK, Table, assert_rows_same, assert_same, canvas_of, decode, lively, ragged, sure
from dlmkernels.decoding.rules.base import row_mean
from plain_llama import PlainLlama
from published import block_causal, blocks_of
from small_models import EOS, MASK, PAD, build, prompts

NEW = 16


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def plain(model):
    return PlainLlama(model)


@pytest.fixture(scope="module")
def calm():
    """Where inputs or temperatures multiply rounding errors: a model with less of a temper, and itself in plain."""
    model = lively()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight") or name == "lm_head.weight":
                p.mul_(0.6 if name == "lm_head.weight" else 0.4)
    return model, PlainLlama(model)


SEEDS = torch.tensor([11, 2**40 + 5, 7])


def compare(model, plain, make, rule, restated_options=None, seeds=SEEDS, seed=0, **options):
    """Every row of a padded ragged batch against its request restated alone; how many tokens were taken back."""
    rows, ids, valid = ragged(seed=seed)
    ours = {"rule": rule, "max_new_tokens": NEW, "eos_policy": "none"} | options
    if not rule.uses_steps:  # it has its own number of steps
        ours.pop("steps", None)
    out = dk.generate(model, ids, valid, seed=seeds, **ours)
    alone = dk.generate(model, rows[0], seed=seeds[:1], **ours)
    assert torch.equal(alone.sequences[0, -NEW:], out.sequences[0, -NEW:])
    assert torch.equal(alone.commit_step[0, -NEW:], out.commit_step[0, -NEW:])
    requests = []
    for row, prompt in enumerate(rows):
        request = restated.revise(
            plain, canvas_of(prompt, NEW), len(prompt), MASK, make(), seed=int(seeds[row]),
            block_length=options.get("block_length"), steps=options.get("steps"), **(restated_options or {}),
        )  # fmt: skip
        assert_same(out, row, request)
        requests.append(request)
    return requests


class TestTokenEditing:
    @pytest.mark.parametrize("block_length", [None, 8, 5])
    @pytest.mark.parametrize("tau,tau_edit,post", [(0.95, 0.9, 16), (0.5, 0.0, 16), (0.5, 0.0, 2), (0.3, 0.5, 0)])
    def test_rule(self, model, plain, tau, tau_edit, post, block_length):
        compare(
            model, plain, lambda: restated.token_editing(tau, tau_edit, post), dk.TokenEditing(tau, tau_edit, post),
            {"max_steps": lambda length, planned: length + post}, block_length=block_length,
        )  # fmt: skip

    def test_edits_do_happen(self, model):
        ids = prompts(4, 8)
        base = {"max_new_tokens": NEW, "eos_policy": "none"}
        edited = dk.generate(model, ids, rule=dk.TokenEditing(0.5, 0.3), **base)
        plainly = dk.generate(model, ids, rule=dk.Threshold(0.5, strict=True), **base)
        assert not torch.equal(edited.sequences, plainly.sequences)
        assert (edited.num_forwards > edited.commit_step.amax(1) + 1).any()  # post-steps

    def test_end_token_counts_when_its_block_is_finished(self):
        """An end token that a later step may edit away fills nothing before."""
        model = build(seed=4)
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 3
        out = dk.generate(model, prompts(6, 5), rule=dk.TokenEditing(0.5, 0.5), max_new_tokens=32, block_length=8)
        ended = 0
        for row in out.generated:
            at = (row == EOS).nonzero().flatten()
            if len(at):
                assert (row[at[0] + 1 :] == PAD).all()
                ended += 1
        assert ended and out.complete.all()

    def test_nothing_is_filled_before(self):
        """Four steps and one more that edits nothing: the end token of the first step does not cut them short."""
        table = Table([sure(2, 0.97), sure(1, 0.6), sure(3, 0.5), sure(1, 0.4)])
        out = decode(table, [FEW_MASK] * 4, rule=dk.TokenEditing(), eos_policy="fill", eos_token_id=2, pad_token_id=4)
        assert out.num_forwards.tolist() == [5] and out.sequences.tolist() == [[2, 4, 4, 4]]


class TestRunEditing:
    @pytest.mark.parametrize("block_length", [None, 8, 5])
    @pytest.mark.parametrize("tau,sure", [(0.5, 0.9), (0.3, 0.6), (0.9, 0.3)])
    def test_hard(self, model, plain, tau, sure, block_length):
        compare(
            model, plain, lambda: restated.run_editing(tau, sure), dk.RunEditing(tau, sure, soft=False),
            {"max_steps": lambda length, planned: 2 * length}, block_length=block_length,
        )  # fmt: skip

    @pytest.mark.parametrize("block_length", [8, 5])
    def test_soft(self, calm, block_length):
        model, plain = calm
        table = plain.weights["model.embed_tokens.weight"]
        options = {"max_steps": lambda length, planned: 2 * length, "embed": restated.soft_inputs(table, MASK)}
        soft = compare(
            model, plain, lambda: restated.run_editing(0.5, 0.5), dk.RunEditing(0.5, 0.5), options,
            block_length=block_length,
        )  # fmt: skip
        hard = compare(
            model, plain, lambda: restated.run_editing(0.5, 0.5), dk.RunEditing(0.5, 0.5, soft=False),
            {"max_steps": lambda length, planned: 2 * length}, block_length=block_length,
        )  # fmt: skip
        assert any(not torch.equal(a.confidence, b.confidence) for a, b in zip(soft, hard))


class TestBacktracking:
    @pytest.mark.parametrize("block_length", [None, 8])
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_rule(self, model, plain, count, block_length):
        requests = compare(
            model, plain, lambda: restated.backtracking(count), dk.Backtracking(count), block_length=block_length
        )
        if count > 1:
            assert any(r.num_forwards > NEW / count for r in requests)


class TestWideInNarrowOut:
    @pytest.fixture(scope="class")
    def loaded(self, tmp_path_factory):
        checkpoint = checkpoints.llada()
        return checkpoint.plain, dk.load(checkpoint.write(tmp_path_factory.mktemp("llada")))

    @pytest.mark.parametrize(
        "tau,tau_back,block_length,seed", [(0.3, 0.3, 24, 0), (0.2, 0.5, 8, 0), (0.15, 0.9, 24, 1), (0.0, 0.1, 7, 0)]
    )
    def test_rule(self, loaded, tau, tau_back, block_length, seed):
        plain, model = loaded
        requests = {}
        for blind in (True, False):
            options = {"block_length": block_length, "tau": tau, "tau_back": tau_back, "blind": blind}

            def alone(canvas, start, options=options, blind=blind):
                request = restated.wino(plain, canvas, start, MASK, **options)
                requests[blind, start] = request
                return request

            if blind:
                rule = dk.WideInNarrowOut(tau, tau_back)
                assert_rows_same(model, alone, 24, seed, rule=rule, block_length=block_length)
            else:  # a token that is seen is taken back elsewhere
                for prompt in ragged(seed=seed)[0]:
                    alone(canvas_of(prompt, 24), len(prompt))
        pairs = [(r, requests[False, start]) for (blind, start), r in requests.items() if blind]
        assert any(not torch.equal(a.commit_step, b.commit_step) for a, b in pairs)

    def test_preset(self, loaded):
        plain, model = loaded
        assert_rows_same(
            model, lambda c, s: restated.wino(plain, c, s, MASK, block_length=128, tau=0.6, tau_back=0.9), 20,
            config=dk.preset("wino"),
        )  # fmt: skip

    @pytest.mark.parametrize("options", [{"cache": "dual"}, {"logit_alignment": "shift"}, {"attention": "causal"}])
    def test_refused(self, model, options):
        with pytest.raises(
            ValueError, match="rule WideInNarrowOut needs a model of a known type with attention='full'"
        ):
            dk.generate(model, prompts(1, 4), rule=dk.WideInNarrowOut(), max_new_tokens=4, **options)


class TestPathPlanning:
    @pytest.mark.parametrize("stickiness", [0.0, 1.0, 2.0])
    @pytest.mark.parametrize("steps", [16, 7, 1])
    def test_rule(self, model, plain, stickiness, steps):
        requests = compare(
            model, plain, lambda: restated.path_planning(stickiness), dk.PathPlanning(stickiness),
            {"max_steps": lambda length, planned: planned}, steps=steps,
        )  # fmt: skip
        assert all(r.num_forwards == steps for r in requests)

    def test_blocks(self, model, plain):
        compare(
            model, plain, lambda: restated.path_planning(1.0), dk.PathPlanning(), block_length=8, steps=10,
            restated_options={"max_steps": lambda length, planned: planned},
        )  # fmt: skip


class TestRemdm:
    OPTIONS = {"t_on": 0.7, "t_off": 0.2, "alpha_on": 0.5, "eps": 1e-3}

    @pytest.mark.parametrize("strategy,eta", [("cap", 0.4), ("cap", 0.05), ("rescale", 0.5), ("conf", 0.0),
                                              ("loop", 0.3)])  # fmt: skip
    @pytest.mark.parametrize("steps,block_length", [(12, None), (24, 8)])
    def test_strategies(self, model, plain, strategy, eta, steps, block_length):
        """Greedy tokens; the choices of positions are drawn, each with its exact probability."""
        rows, ids, valid = ragged()
        rule = dk.AncestralRemask(strategy=strategy, eta=eta, **self.OPTIONS)
        taken_back = 0
        out = dk.generate(
            model, ids, valid, rule=rule, max_new_tokens=NEW, eos_policy="none", seed=SEEDS, steps=steps,
            block_length=block_length,
        )  # fmt: skip
        for row, prompt in enumerate(rows):
            act = restated.remdm(strategy, eta, **self.OPTIONS)
            backs = []

            def counted(request, view, state, act=act, backs=backs, prompt=prompt):
                state["offset"] = len(prompt)  # draws go by the position in the request
                before = sum(request.is_open)
                goes_on = act(request, view, state)
                backs.append(sum(request.is_open) > before)
                return goes_on

            request = restated.revise(
                plain, canvas_of(prompt, NEW), len(prompt), MASK, counted, seed=int(SEEDS[row]), steps=steps,
                block_length=block_length, max_steps=lambda length, planned: planned,
            )  # fmt: skip
            assert_same(out, row, request)
            taken_back += sum(backs)
        assert taken_back > 0 or eta == 0.05

    def test_a_request_that_has_ended_stays_so(self):
        """Padding behind an end token is not masked again in the blocks that follow."""
        model = build(seed=4)
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 3
        rule = dk.AncestralRemask(eta=0.5)
        out = dk.generate(model, prompts(6, 5), rule=rule, max_new_tokens=32, block_length=8, steps=24, seed=1)
        ended = 0
        for row, forwards in zip(out.generated, out.num_forwards.tolist()):
            at = (row == EOS).nonzero().flatten().tolist() or [31]
            assert (row[at[0] + 1 :] == PAD).all() and forwards == 6 * (at[0] // 8 + 1)
            ended += at[0] < 24
        assert ended


class TestRenoising:
    @pytest.mark.parametrize("bound,stability,limit,low,steps,block_length,stops", [
        (0.1, 1, 0.005, 0.4, 9, None, False), (3.0, 1, 1.5, 0.4, 12, 8, False), (60.0, 1, 9.0, 0.2, 32, 4, True),
        (60.0, 2, 9.0, 0.2, 32, 4, True), (60.0, 1, 1e-3, 0.2, 32, 4, False), (8.0, 0, 9.0, 0.4, 12, 8, True),
    ])  # fmt: skip
    def test_rule(self, calm, bound, stability, limit, low, steps, block_length, stops):
        if bound > 10:  # what a random model makes of a token is another token, unless all are much alike
            calm = copy.deepcopy(calm[0])
            embedding = calm.get_input_embeddings().weight
            embedding.copy_(embedding[:1] + 0.2 * embedding)
            calm = calm, PlainLlama(calm)
        of_a_block = steps * (block_length or NEW) // NEW
        rule = dk.RenoisedEntropyBound(bound, low, 2 * low, stability, limit, of_a_block)
        requests = compare(
            *calm, lambda: restated.renoising(bound, stability, limit), rule,
            {"max_steps": lambda length, planned: planned, "noise": True,
             "temperature": lambda i, n: low + low * (n - i) / n},
            steps=steps, block_length=block_length, distribution="tempered",
        )  # fmt: skip
        assert any(r.num_forwards < steps for r in requests) == stops

    def test_needs_no_mask_token(self):
        model = build()
        del model.config.mask_token_id
        rule, prompt = dk.RenoisedEntropyBound(steps=4), prompts(2, 5)
        config = dk.preset("diffusion-gemma", rule=rule, cache="none", max_new_tokens=8)
        out = dk.generate(model, prompt, config=config, seed=1)
        assert out.complete.all() and (out.num_forwards == 4).all()
        with pytest.raises(ValueError, match="mask_token_id is not in the model's configuration"):
            dk.generate(model, prompts(2, 5), max_new_tokens=8)


class TestBlocks:
    """Models whose blocks see what is finished: keys and values of a block are kept as its last edit left it."""

    NEW = 18
    FAMILIES = {
        # how it is loaded; length of the blocks, where they are counted from, whether logits are shifted
        "sdar": (checkpoints.sdar, None, 4, "absolute", False),
        "llada2": (checkpoints.llada2, None, 8, "absolute", False),
        "d2f-dream": (checkpoints.dream, "d2f-dream", 8, "prompt", True),
    }
    RULES = {
        "editing": (dk.TokenEditing(0.3, 0.2), lambda: restated.token_editing(0.3, 0.2, 16), lambda n, s: n + 16),
        "runs": (dk.RunEditing(0.3, 0.4, soft=False), lambda: restated.run_editing(0.3, 0.4), lambda n, s: 2 * n),
        "soft runs": (dk.RunEditing(0.3, 0.4), lambda: restated.run_editing(0.3, 0.4), lambda n, s: 2 * n),
        "backtracking": (dk.Backtracking(2), lambda: restated.backtracking(2), max),
        "planning": (dk.PathPlanning(), lambda: restated.path_planning(1.0), lambda n, s: s),
    }

    @pytest.fixture(scope="class")
    def loaded(self, tmp_path_factory):
        """Plain and loaded models by name, and with less of a temper by "calm " + name (see `calm`)."""

        def load(make, family, is_calm):
            checkpoint = make()
            for name, weight in checkpoint.weights.items():
                if is_calm and weight.dim() == 2 and "embed" not in name:
                    weight.mul_(0.6 if name == "lm_head.weight" else 0.4)
            return checkpoint.plain, dk.load(checkpoint.write(tmp_path_factory.mktemp("checkpoint")), family=family)

        return {
            "calm " * is_calm + name: load(make, family, is_calm)
            for name, (make, family, *_) in self.FAMILIES.items()
            for is_calm in (False, True)
        }

    @pytest.mark.parametrize(("cache", "fused"), [("none", True), ("block", True), ("block", False)])
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("rule", RULES)
    def test_rules(self, name, rule, cache, fused, loaded):
        plain, model = loaded["calm " * (rule == "soft runs") + name]
        _, _, length, grid, is_shifted = self.FAMILIES[name]
        ours, make, max_steps = self.RULES[rule]
        table = plain.w[plain.names["embed"] + ".weight"]

        def alone(canvas, start):
            first = start // length * length if grid == "absolute" else start
            blocks = blocks_of(first, len(canvas), length)
            if grid == "absolute":  # the last block is decoded whole
                blocks[-1] = blocks[-1][0], blocks[-1][0] + length
            whole = torch.cat((canvas, canvas.new_full((blocks[-1][1] - len(canvas),), MASK)))
            visible = block_causal(len(whole), length, 0 if grid == "absolute" else first)

            def logits(tokens, embeds=None):
                out = plain(tokens, visible, embeds=embeds)
                return (torch.cat((out[:, :1], out[:, :-1]), 1) if is_shifted else out,)

            request = restated.revise(
                logits, whole, start, MASK, make(), max_steps=max_steps, blocks=blocks,
                embed=restated.soft_inputs(table, MASK) if rule == "soft runs" else None,
            )  # fmt: skip
            for what in ("tokens", "commit_step", "confidence"):
                setattr(request, what, getattr(request, what)[: len(canvas)])
            return request

        options = {"rule": ours, "temperature": 0.0, "cache": cache, "block_length": length}
        if fused:
            assert_rows_same(model, alone, self.NEW, **options)
        else:  # one forward more a block, and nothing else
            ids = prompts(3, 13)
            together, apart = (
                dk.generate(model, ids, max_new_tokens=self.NEW, fuse_commit=f, seed=1, **options)
                for f in (True, False)
            )
            assert torch.equal(together.sequences, apart.sequences)
            numerics.assert_same_probabilities(together.confidence, apart.confidence)

    def test_what_is_kept_is_the_last_edit(self, loaded):
        """With the threshold alone, and so with other keys and values, later blocks come out differently."""
        _, model = loaded["llada2"]
        options = {"max_new_tokens": 24, "block_length": 8, "temperature": 0.0, "eos_policy": "none"}
        ids = prompts(4, 8)
        edited = dk.generate(model, ids, rule=dk.TokenEditing(0.3, 0.2), **options)
        plainly = dk.generate(model, ids, rule=dk.Threshold(0.3, strict=True), **options)
        assert not torch.equal(edited.sequences, plainly.sequences)

    def test_presets(self, loaded):
        """LLaDA2.1's and DMax' decoders by name, in the blocks that their models were trained with."""
        _, model = loaded["calm llada2"]
        for name in ("llada2.1", "llada2.1-speed", "dmax"):
            kept, anew = (
                dk.generate(model, prompts(2, 9), config=dk.preset(name, cache=cache), max_new_tokens=40)
                for cache in ("block", "none")
            )
            assert torch.equal(kept.sequences, anew.sequences) and kept.complete.all()
            assert dk.preset(name).cache == "block"


class TestDifferences:
    """Where the programs do something else, on purpose."""

    def test_path_planning_masks_as_many_as_it_should(self):
        """Four positions that score the same: one is freed a step. The program would free all of them at once."""
        out = decode(Table([sure(1, 0.7)] * 4), [FEW_MASK] * 4, rule=dk.PathPlanning())
        assert out.commit_step.tolist() == [[3, 2, 1, 0]] and out.num_forwards.tolist() == [4]

    def test_backtracking_with_one_position_left(self):
        """Two commitments are wanted and one position is open: it is taken, and nothing else is touched."""
        table = Table([sure(1, 0.9), sure(2, 0.8), sure(3, 0.7)])
        out = decode(table, [FEW_MASK, FEW_MASK, 3], rule=dk.Backtracking(2))
        assert out.commit_step.tolist() == [[0, 0, -1]]
        out = decode(table, [FEW_MASK, 2, 3], rule=dk.Backtracking(2))
        assert out.sequences.tolist() == [[1, 2, 3]] and out.num_forwards.tolist() == [1]

    def test_backtracking_averages_over_what_stands(self, model, plain):
        """Positions that were masked again do not count: with the program's average the result is another."""
        differs = False
        for seed in range(3):
            rows, ids, valid = ragged(seed=seed)
            out = dk.generate(model, ids, valid, rule=dk.Backtracking(), max_new_tokens=NEW, eos_policy="none")
            for row, prompt in enumerate(rows):
                program = restated.revise(
                    plain, canvas_of(prompt, NEW), len(prompt), MASK, restated.backtracking(2, quirk=True)
                )
                differs |= not torch.equal(out.commit_step[row, -NEW:], program.commit_step[-NEW:])
        assert differs


def test_row_mean():
    """Of the chosen values, to the last bit the same for a row alone."""
    g = torch.Generator().manual_seed(0)
    values, where = 9 * torch.rand(50, 300, generator=g), torch.rand(50, 300, generator=g) < 0.3
    where[7] = False
    out = row_mean(values, where)
    for b in range(50):
        assert torch.equal(row_mean(values[b : b + 1], where[b : b + 1]), out[b : b + 1])
        chosen = values[b, where[b]].double().tolist()
        numerics.assert_same_probabilities(out[b], torch.tensor(sum(chosen) / max(len(chosen), 1)))


@pytest.mark.parametrize("make,match", [
    (lambda: dk.AncestralRemask(strategy="often"), "strategy must be one of cap, rescale, conf, loop; got 'often'"),
    (lambda: dk.AncestralRemask(eta=-1), "eta must be a number from 0 to 1"),
    (lambda: dk.TokenEditing(max_post_steps=-1), "max_post_steps must be an integer of at least 0"),
    (lambda: dk.Backtracking(0), "count must be an integer of at least 1"),
    (lambda: dk.RenoisedEntropyBound(bound=-1), "bound must be a number of at least 0"),
])  # fmt: skip
def test_parameters(make, match):
    with pytest.raises(ValueError, match=match):
        make()
