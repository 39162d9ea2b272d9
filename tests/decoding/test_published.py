# SPDX-License-Identifier: Apache-2.0
"""`generate` against plain restatements of the published decoders (`published.py`), token for token.

Compared are the tokens, the forward that committed each, the number of forwards, and (closely) the probabilities.
Batches are ragged and padded; every row must equal its request restated alone.
"""

import copy

import pytest
import torch
from torch import Tensor

import dlmkernels as dk
import numerics
import published
from decodings import (
    FEW_MASK,
    Table,
    assert_rows_same,
    assert_same,
    canvas_of,
    decode,
    lively,
    ragged,
    sure,
)
from plain_llama import PlainLlama
from small_models import KINDS, MASK, PAD, build, prompts

DECODERS = ("llama", "qwen2", "qwen3", "qwen3_moe")


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


class TestPlainLlama:
    """Itself compared with transformers' forward, and its caches with a forward of everything."""

    @pytest.fixture(scope="class")
    def exact(self, model):
        return copy.deepcopy(model).double()

    def test_full_forward(self, model, exact, plain):
        tokens = prompts(2, 21)
        gold, peer = (m(tokens, attention_mask=torch.zeros(1, 1, 21, 21, dtype=m.dtype)).logits for m in (exact, model))
        numerics.assert_close("logits", plain(tokens)[0], gold, peer)

    def test_padding(self, model, exact, plain):
        rows, ids, valid = ragged()
        positions, keep = (valid.cumsum(1) - 1).clamp(min=0), valid.bool()
        hidden = torch.zeros(3, 1, 11, 11).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
        gold, peer = (m(ids, attention_mask=hidden.to(m.dtype), position_ids=positions).logits for m in (exact, model))
        ours, _ = plain(ids, positions=positions, valid=keep)
        numerics.assert_close("logits", ours[keep], gold[keep], peer[keep])
        for row, prompt in enumerate(rows):
            pads = 11 - len(prompt)
            numerics.assert_close("alone", plain(prompt[None])[0][0], gold[row, pads:], peer[row, pads:])

    def test_parts_of_an_unchanged_canvas(self, exact, plain):
        tokens = prompts(2, 21)
        gold, _ = PlainLlama(exact)(tokens)
        peer, kept = plain(tokens)
        numerics.assert_close("prefix", plain(tokens[:, 8:], kept, 8)[0], gold[:, 8:], peer[:, 8:])
        numerics.assert_close("dual", plain(tokens[:, 8:13], kept, 8, True)[0], gold[:, 8:13], peer[:, 8:13])

    def test_what_the_caches_see(self, plain):
        """A prefix cache sees a change right of the block, a dual cache does not; neither sees one left of it."""
        tokens = prompts(1, 21)
        logits, kept = plain(tokens)
        left, right = tokens.clone(), tokens.clone()
        left[0, 3], right[0, 17] = (tokens[0, 3] + 1) % 90, (tokens[0, 17] + 1) % 90
        assert torch.equal(plain(left[:, 8:], kept, 8)[0], plain(tokens[:, 8:], kept, 8)[0])
        assert numerics.far(plain(right[:, 8:], kept, 8)[0][:, :5], logits[:, 8:13])
        assert torch.equal(plain(right[:, 8:13], kept, 8, True)[0], plain(tokens[:, 8:13], kept, 8, True)[0])
        _, replaced = plain(right[:, 8:18], kept, 8, True)
        assert torch.equal(replaced[0][0][:, 18:], kept[0][0][:, 18:])
        assert not torch.equal(replaced[0][0][:, 17], kept[0][0][:, 17])


class TestLlada:
    @pytest.mark.parametrize("block_length", [None, 8, 4])
    @pytest.mark.parametrize("steps", [None, 16, 8, 4])
    def test_quota(self, model, plain, block_length, steps):
        assert_rows_same(
            model, lambda c, s: published.llada(plain, c, s, MASK, block_length=block_length, steps=steps), 16,
            config=dk.preset("llada"), block_length=block_length, steps=steps,
        )  # fmt: skip

    @pytest.mark.parametrize("steps", [3, 5, 7, 11])
    def test_steps_that_do_not_divide_the_masks(self, model, plain, steps):
        assert_rows_same(model, lambda c, s: published.llada(plain, c, s, MASK, steps=steps), 16, steps=steps)

    @pytest.mark.parametrize("cfg_scale", [0.5, 1.0])
    @pytest.mark.parametrize("block_length", [None, 8])
    def test_guidance(self, model, plain, cfg_scale, block_length):
        options = {"cfg_scale": cfg_scale, "block_length": block_length, "steps": 8}
        assert_rows_same(model, lambda c, s: published.llada(plain, c, s, MASK, **options), 16, **options)

    def test_infilling(self, model, plain):
        """Masks anywhere, several of them in a row's first block and none in another row's."""
        canvas = prompts(3, 24)
        holes = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)) < 0.4
        holes[1, :12] = False
        canvas = canvas.masked_fill(holes, MASK)
        for block_length, steps in ((None, None), (None, 6), (12, None), (12, 10)):
            out = dk.infill(
                model, canvas, rule=dk.Quota(), block_length=block_length, steps=steps, eos_policy="none"
            )  # fmt: skip
            for row in range(3):
                request = published.llada(plain, canvas[row], 0, MASK, block_length=block_length, steps=steps)
                assert_same(out, row, request)

    def test_random_order(self, model, plain):
        """Which positions is chance; how many, and what they become, is not."""
        ids = prompts(2, 6)
        out = dk.generate(
            model, ids, score="random", max_new_tokens=16, steps=5, seed=torch.tensor([4, 5]), eos_policy="none"
        )
        assert not torch.equal(out.commit_step[0], out.commit_step[1])
        for row in range(2):
            tokens = canvas_of(ids[row], 16)
            for step, count in enumerate(published.linear_quota(16, 5)):
                now = (out.commit_step[row] == step).nonzero().flatten().tolist()
                assert len(now) == count
                proposals = published.propose(plain(tokens[None])[0][0], now, MASK)
                tokens[now] = torch.tensor(proposals.token)
            assert torch.equal(tokens, out.sequences[row])


class TestFastDllm:
    @pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
    @pytest.mark.parametrize("block_length", [None, 8, 4])
    @pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
    def test_threshold(self, model, plain, threshold, block_length, cache):
        options = {"cache": cache, "block_length": block_length}
        assert_rows_same(
            model, lambda c, s: published.fast_dllm(plain, c, s, MASK, threshold=threshold, **options), 16,
            config=dk.preset("fast-dllm"), rule=dk.Threshold(threshold), **options,
        )  # fmt: skip

    @pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
    @pytest.mark.parametrize("block_length", [None, 8])
    @pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
    def test_factor(self, model, plain, factor, block_length, cache):
        options = {"cache": cache, "block_length": block_length}
        assert_rows_same(
            model, lambda c, s: published.fast_dllm(plain, c, s, MASK, factor=factor, **options), 16,
            rule=dk.Factor(factor), **options,
        )  # fmt: skip

    @pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
    @pytest.mark.parametrize("threshold", [0.3, 0.9])
    def test_shifted_logits(self, model, plain, threshold, cache):
        options = {"cache": cache, "block_length": 8}
        assert_rows_same(
            model, lambda c, s: published.fast_dllm(plain, c, s, MASK, threshold=threshold, shift=True, **options), 16,
            rule=dk.Threshold(threshold), logit_alignment="shift", **options,
        )  # fmt: skip

    @pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
    def test_infilling(self, model, plain, cache):
        """Blocks from the first column on; one row has nothing to do in the first block, one nothing at all."""
        canvas = prompts(3, 24)
        holes = torch.rand(3, 24, generator=torch.Generator().manual_seed(5)) < 0.5
        holes[1, :8], holes[2] = False, False
        canvas = canvas.masked_fill(holes, MASK)
        options = {"cache": cache, "block_length": 8}
        out = dk.infill(model, canvas, rule=dk.Threshold(0.6), eos_policy="none", **options)
        for row in range(3):
            assert_same(out, row, published.fast_dllm(plain, canvas[row], 0, MASK, threshold=0.6, **options))

    def test_caches_matter(self, model):
        """The caches change the result, so the comparisons above do compare them."""
        ids = prompts(4, 9)
        options = {"max_new_tokens": 24, "block_length": 8, "rule": dk.Threshold(0.6), "eos_policy": "none"}
        none, prefix, dual = (dk.generate(model, ids, cache=c, **options) for c in ("none", "prefix", "dual"))
        assert not torch.equal(none.sequences, prefix.sequences)
        assert not torch.equal(prefix.sequences, dual.sequences)


class TestCaches:
    """What later forwards of a block take, and which take the whole canvas."""

    @pytest.mark.parametrize("vicinity,warmup,refresh", [
        ((4, 4), 1, None), ((0, 3), 1, None), ((5, 0), 2, None), ((0, 0), 3, None), ((0, 0), 1, 2), ((2, 40), 2, 3),
    ])  # fmt: skip
    @pytest.mark.parametrize("cache", ["prefix", "dual"])
    @pytest.mark.parametrize("shift", [False, True])
    def test_vicinity_refresh(self, model, plain, vicinity, warmup, refresh, cache, shift):
        options = {"block_length": 8, "cache": cache}
        if cache == "prefix" and vicinity == (0, 3):
            # all that stands right of the block is forwarded anyway
            with pytest.raises(ValueError, match=r"vicinity=\(0, 3\) has no effect"):
                dk.generate(model, prompts(1, 4), rule=dk.Threshold(0.6), vicinity=vicinity, **options)
            return
        assert_rows_same(
            model,
            lambda c, s: published.fast_dllm(
                plain, c, s, MASK, threshold=0.6, vicinity=vicinity, warmup=warmup, refresh=refresh, shift=shift,
                **options,
            ),
            24, rule=dk.Threshold(0.6), vicinity=vicinity, warmup=warmup, refresh_interval=refresh,
            logit_alignment="shift" if shift else "same", **options,
        )  # fmt: skip

    @pytest.mark.parametrize("warmup,refresh", [(2, 4), (2, None), (1, None), (1, 3)])
    @pytest.mark.parametrize("threshold", [None, 0.5])
    @pytest.mark.parametrize("block_length", [8, 24])
    @pytest.mark.parametrize("shift", [False, True])
    def test_delayed(self, model, plain, warmup, refresh, threshold, block_length, shift):
        assert_rows_same(
            model,
            lambda c, s: published.delayed(
                plain, c, s, MASK, block_length=block_length, warmup=warmup, refresh=refresh, threshold=threshold,
                shift=shift,
            ),
            24, rule=dk.Quota() if threshold is None else dk.Threshold(threshold), block_length=block_length,
            cache="delayed", warmup=warmup, refresh_interval=refresh, logit_alignment="shift" if shift else "same",
        )  # fmt: skip

    @pytest.mark.parametrize("cache", ["none", "delayed", "dual"])
    def test_first_position_with_shifted_logits(self, model, cache):
        """It is read from its own row, in a request that is padded as in one alone."""
        options = {"rule": dk.Quota(), "logit_alignment": "shift", "cache": cache, "eos_policy": "none"}
        canvas = prompts(1, 9)[0]
        canvas[:2] = canvas[5:7] = MASK
        alone = dk.infill(model, canvas, **options)
        padded = torch.cat((canvas.new_full((4,), PAD), canvas))
        both = torch.stack((prompts(1, 13, seed=3)[0].index_fill(0, torch.arange(6, 9), MASK), padded))
        valid = torch.stack((torch.ones(13), torch.arange(13) >= 4))
        out = dk.infill(model, both, valid, **options)
        assert torch.equal(out.sequences[1, 4:], alone.sequences[0])
        assert torch.equal(out.commit_step[1, 4:], alone.commit_step[0])

    def test_delayed_under_guidance(self, model):
        """Both halves of the batch keep what they have read: with nothing kept for long, the result is the exact one."""
        options = {"max_new_tokens": 12, "cfg_scale": 0.7, "eos_policy": "none"}
        exact, often, seldom = (
            dk.generate(model, ragged()[1], ragged()[2], **options, **cache)
            for cache in ({}, {"cache": "delayed", "refresh_interval": 1}, {"cache": "delayed"})
        )
        assert torch.equal(exact.sequences, often.sequences) and not torch.equal(exact.sequences, seldom.sequences)

    def test_presets(self, model, plain):
        assert_rows_same(
            model, lambda c, s: published.delayed(plain, c, s, MASK, block_length=32, refresh=4), 40,
            config=dk.preset("dkv-cache"),
        )  # fmt: skip
        plainly = {"rule": dk.Quota(), "score": "probability", "temperature": 0.0, "top_p": 1.0}
        assert_rows_same(
            model, lambda c, s: published.delayed(plain, c, s, MASK, block_length=24, warmup=1, refresh=4, shift=True),
            24, seed=1, config=dk.preset("dkv-cache-dream", **plainly),
        )  # fmt: skip
        assert_rows_same(
            model,
            lambda c, s: published.fast_dllm(
                plain, c, s, MASK, threshold=0.9, block_length=16, cache="dual", vicinity=(16, 16)
            ),
            40, config=dk.preset("dinfer-vicinity"), block_length=16, eos_policy="none",
        )  # fmt: skip

    @pytest.mark.parametrize("options,match", [
        ({"vicinity": 3, "cache": "dual"}, "vicinity must be two integers of at least 0; got 3"),
        ({"vicinity": (0, -1), "cache": "dual"}, "vicinity must be two integers"),
        ({"warmup": 0}, "warmup must be an integer of at least 1; got 0"),
        ({"refresh_interval": 0}, "refresh_interval must be None or an integer of at least 1; got 0"),
        ({"cache": "delayed", "rule": dk.TokenEditing()}, "cache='delayed' needs a rule that never changes decided tokens"),
    ])  # fmt: skip
    def test_refused(self, model, options, match):
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(1, 4), max_new_tokens=4, **options)


class TestDream:
    SCORES = (("maskgit_plus", "probability"), ("topk_margin", "margin"), ("entropy", "entropy"))

    @pytest.mark.parametrize("steps", [16, 6, 1])
    @pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}], ids=str)
    @pytest.mark.parametrize("alg,score", SCORES)
    def test_algorithms(self, model, plain, alg, score, filters, steps):
        assert_rows_same(
            model, lambda c, s: published.dream(plain, c[None], MASK, steps=steps, alg=alg, **filters)[0], 16,
            config=dk.preset("dream", temperature=0.0, top_p=1.0), score=score, steps=steps, **filters,
        )  # fmt: skip

    def test_preset(self, model, plain):
        assert_rows_same(
            model, lambda c, s: published.dream(plain, c[None], MASK, steps=12, top_p=0.95)[0], 22,
            config=dk.preset("dream", temperature=0.0), steps=12,
        )  # fmt: skip

    def test_more_steps_than_masks(self, model, plain):
        """Steps whose share is nothing are run, as published: the time grid is what is divided."""
        assert_rows_same(
            model, lambda c, s: published.dream(plain, c[None], MASK, steps=20)[0], 8,
            config=dk.preset("dream", temperature=0.0, top_p=1.0), steps=20,
        )  # fmt: skip

    @pytest.mark.parametrize("steps", [1, 2, 7, 16, 32, 64, 100, 128, 256, 512])
    def test_schedule(self, steps):
        """`TimeQuota` takes what the float32 arithmetic of the program does, for any number of masks."""

        class Recorder:
            num_steps, open_now = torch.tensor([steps]), torch.arange(513, dtype=torch.int32)

            def select(self, rule, fill):
                self.fill = fill

        step = Recorder()
        t = torch.linspace(1, 1e-3, steps + 1)
        for i in range(steps):
            step.index = torch.tensor([i])
            dk.TimeQuota().select(step)
            share = 1 - t[i + 1] / t[i] if i < steps - 1 else 1
            assert torch.equal(step.fill.int(), (step.open_now.float() * share).int())


class TestEntropyBound:
    @pytest.mark.parametrize("bound", [0.01, 0.5, 3.0])
    @pytest.mark.parametrize("block_length", [None, 8])
    def test_bound(self, model, plain, bound, block_length):
        assert_rows_same(
            model, lambda c, s: published.entropy_bounded(plain, c, s, MASK, bound=bound, block_length=block_length),
            16, rule=dk.EntropyBound(bound), block_length=block_length,
        )  # fmt: skip


# --- every kind of model, on its own attention -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def any_model(request):
    """With its own attention in plain torch."""
    return lively(request.param, seed=3)


def own_logits(model, pads: int = 0):
    """The model's own forward, everything but `pads` columns on the left visible, positions counted after them."""
    kind = model.config.model_type

    def forward(tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        valid = (torch.arange(length) >= pads)[None]
        positions = (torch.arange(length) - pads).clamp(min=0)[None]
        if kind == "roberta":
            positions = positions + model.config.pad_token_id + 1
        if kind in DECODERS:
            mask = torch.zeros(1, 1, length, length).masked_fill(~valid, torch.finfo(torch.float32).min)
        else:
            mask = valid.long()
        return model(tokens, attention_mask=mask, position_ids=positions).logits

    return forward


class TestKinds:
    def test_parameters_are_random(self, any_model):
        if any_model.config.model_type == "qwen2":
            assert all(b.abs().max() > 0.1 for n, b in any_model.named_parameters() if n.endswith("q_proj.bias"))
        if any_model.config.model_type == "qwen3":
            assert all((w - 1).abs().max() > 0.1 for n, w in any_model.named_parameters() if "q_norm" in n)

    @pytest.mark.parametrize("steps", [16, 6])
    def test_llada(self, any_model, steps):
        assert_rows_same(
            any_model, lambda c, s: published.llada(own_logits(any_model), c, s, MASK, steps=steps), 16, steps=steps
        )

    def test_fast_dllm(self, any_model):
        assert_rows_same(
            any_model,
            lambda c, s: published.fast_dllm(own_logits(any_model), c, s, MASK, threshold=0.5, block_length=8),
            16, rule=dk.Threshold(0.5), block_length=8,
        )  # fmt: skip

    def test_dream(self, any_model):
        assert_rows_same(
            any_model, lambda c, s: published.dream(own_logits(any_model), c[None], MASK, steps=6)[0], 16,
            config=dk.preset("dream", temperature=0.0, top_p=1.0), steps=6,
        )  # fmt: skip

    def test_padding_is_the_models_own(self, any_model):
        """The model's own treatment of padding: attention mask and position ids given to its own forward."""
        _, ids, valid = ragged()
        out = dk.generate(any_model, ids, valid, max_new_tokens=16, steps=8, eos_policy="none")
        for row in range(3):
            pads = int((valid[row] == 0).sum())
            request = published.llada(own_logits(any_model, pads), canvas_of(ids[row], 16), ids.shape[1], MASK, steps=8)
            assert_same(out, row, request)

    @pytest.mark.parametrize("kind", ["bert", "roberta"])
    def test_default_positions(self, kind):
        """A prompt without padding needs no position ids: ours are the ones these models take by default."""
        model = build(kind)
        assert_rows_same(
            model, lambda c, s: published.llada(lambda t: model(t).logits, c, s, MASK, steps=8), 16, steps=8
        )


# --- where the programs do something else, on purpose ----------------------------------------------------------------


class TestDifferences:
    """Each: a case in which the program does one thing (`quirk=True`), and dlmkernels, by its own rule, another."""

    M = FEW_MASK

    def test_ties_go_to_the_lowest_position_and_id(self):
        row = [0.0, 2.0, 2.0, -1.0, 2.0, -9.0]
        out = decode(Table([row] * 4), [self.M] * 4)
        assert out.sequences.tolist() == [[1, 1, 1, 1]]
        assert out.commit_step.tolist() == [[0, 1, 2, 3]]
        request = published.llada(Table([row] * 4).logits, torch.tensor([self.M] * 4), 0, self.M)
        assert request.tokens.tolist() == [1, 1, 1, 1] and request.commit_step.tolist() == [0, 1, 2, 3]

    def test_softmax_in_bfloat16_forgets_the_order(self):
        """0.9987 and 0.9995 are both 1 in bfloat16: LLaDA's program then takes either; we take the surer one."""
        rows = torch.tensor([[0, 8, 0, 0, 0, -90], [0, 0, 9, 0, 0, -90]], dtype=torch.bfloat16)
        table, canvas = Table(rows), torch.tensor([self.M] * 2)
        program = published.llada(table.logits, canvas, 0, self.M, quirk=True)
        assert program.slack == 0 and program.confidence.tolist() == [1, 1]
        out = decode(table, canvas.tolist())
        assert out.commit_step.tolist() == [[1, 0]]
        torch.testing.assert_close(out.confidence[0], torch.softmax(rows.float(), -1).amax(-1))
        assert published.llada(table.logits, canvas, 0, self.M).commit_step.tolist() == [1, 0]

    def test_softmax_in_float64_changes_nothing_here(self, model, plain):
        """Fast-dLLM's float64 softmax of float32 logits: the same tokens and forwards."""

        def no_mask(tokens, *reuse):
            logits, kept = plain(tokens, *reuse)
            return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf), kept

        for cache in ("none", "prefix", "dual"):
            options = {"threshold": 0.6, "block_length": 8, "cache": cache}
            assert_rows_same(
                model, lambda c, s, o=options: published.fast_dllm(no_mask, c, s, MASK, quirk=True, **o), 16,
                rule=dk.Threshold(0.6), block_length=8, cache=cache,
            )  # fmt: skip

    def test_mask_token_is_never_proposed(self):
        """Where the mask is the likeliest token LLaDA's program commits it, and Fast-dLLM's never ends."""
        table = Table([sure(1, 0.3, 0.6), sure(2, 0.9), sure(3, 0.2, 0.7)])
        canvas = torch.tensor([self.M] * 3)
        assert published.llada(table.logits, canvas, 0, self.M, quirk=True).tokens.tolist() == [self.M, 2, self.M]
        with pytest.raises(published.Endless):
            published.fast_dllm(table.logits, canvas, 0, self.M, threshold=0.9, quirk=True)
        with pytest.raises(published.Endless):
            published.entropy_bounded(table.logits, canvas, 0, self.M, bound=0.1, quirk=True)
        for rule in (dk.Quota(), dk.Threshold(0.7), dk.EntropyBound(0.1)):
            out = decode(table, canvas.tolist(), rule=rule)
            assert out.sequences.tolist() == [[1, 2, 3]] and out.complete.all()
            # what remains is renormalised
            torch.testing.assert_close(out.confidence, torch.tensor([[0.3 / 0.4, 0.9, 0.2 / 0.3]]))

    def test_masks_left_of_the_block_do_not_compete(self):
        """LLaDA's program lets a mask in the prompt take a place in the block's quota, and leaves another open."""
        table, canvas = Table([sure(1, 0.9), sure(0, 0.5), sure(2, 0.8), sure(3, 0.7)]), [self.M, 0, self.M, self.M]
        program = published.llada(table.logits, torch.tensor(canvas), 2, self.M, quirk=True)
        assert program.tokens.tolist() == [1, 0, 2, self.M]
        out = decode(table, canvas)
        assert out.sequences.tolist() == [[1, 0, 2, 3]] and out.commit_step.tolist() == [[0, -1, 1, 2]]
        # blocks of two: each counts its own masks
        out = decode(table, canvas, block_length=2)
        assert out.commit_step.tolist() == [[0, -1, 1, 2]]
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"input_ids holds the mask token.*infill"):
            dk.generate(table.eval(), torch.tensor([canvas]), mask_token_id=self.M)

    def test_steps_without_a_share_are_not_run(self):
        table, canvas = Table([sure(1, 0.9), sure(2, 0.8)]), [self.M] * 2
        assert published.llada(table.logits, torch.tensor(canvas), 0, self.M, steps=5, quirk=True).num_forwards == 5
        assert published.llada(table.logits, torch.tensor(canvas), 0, self.M, steps=5).num_forwards == 2
        assert decode(table, canvas, steps=5).num_forwards.tolist() == [2]

    def test_factor_has_no_exception_for_the_last_position(self):
        """Rank 2 of 2 needs 1 - 1/3; with 0.6 it fails, and Fast-dLLM's program commits it all the same."""
        table, canvas = Table([sure(1, 0.6), sure(2, 0.9)]), [self.M] * 2
        program = published.fast_dllm(table.logits, torch.tensor(canvas), 0, self.M, factor=1.0, quirk=True)
        assert program.commit_step.tolist() == [0, 0]
        assert decode(table, canvas, rule=dk.Factor(1.0)).commit_step.tolist() == [[1, 0]]
        # with a third position behind it, it is no longer the last, and both agree
        table, canvas = Table([sure(1, 0.6), sure(2, 0.9), sure(3, 0.5)]), [self.M] * 3
        program = published.fast_dllm(table.logits, torch.tensor(canvas), 0, self.M, factor=1.0, quirk=True)
        out = decode(table, canvas, rule=dk.Factor(1.0))
        assert program.commit_step[1] == out.commit_step[0, 1] == 0
        assert (program.commit_step == 0).sum() == (out.commit_step == 0).sum() == 1

    def test_dream_counts_each_request_for_itself(self):
        """Six masks beside two: the program commits four of both, too few of one and two too many of the other."""
        table = Table([sure(i % 5, 0.9 - 0.05 * i) for i in range(8)])
        six, two = [0, 1, *[self.M] * 6], [0, 1, 2, self.M, 4, 3, self.M, 1]
        canvas = torch.tensor([six, two])
        program = published.dream(table.logits, canvas, self.M, steps=1, quirk=True)
        assert (program[0].tokens == self.M).sum() == 2
        assert program[1].tokens.tolist() == [self.M, self.M, 2, 2, 4, 3, 0, 1]  # given tokens are masked again
        options = {"config": dk.preset("dream", temperature=0.0, top_p=1.0), "steps": 3}
        out = decode(table, canvas.tolist(), **options)
        restated = published.dream(table.logits, canvas, self.M, steps=3)
        program = published.dream(table.logits, canvas, self.M, steps=3, quirk=True)
        assert not torch.equal(program[0].commit_step, restated[0].commit_step)
        for row in range(2):
            assert_same(out, row, restated[row])
            alone = decode(table, canvas[row].tolist(), **options)
            assert torch.equal(alone.sequences[0], out.sequences[row])
            assert torch.equal(alone.commit_step[0], out.commit_step[row])

    def test_nucleus_keeps_equal_logits_together(self):
        """0.3, 0.3, 0.2 …: sorting keeps the first of two equals, which is chance; going by value keeps both."""
        row = torch.tensor([0.15, 0.3, 0.3, 0.2, 0.05, 1e-12]).log().tolist()
        other = torch.tensor([0.02, 0.02, 0.02, 0.55, 0.39, 1e-12]).log().tolist()
        out = decode(
            Table([row, other]), [self.M] * 2, top_p=0.25, distribution="filtered", score="probability", steps=2
        )
        assert out.sequences.tolist() == [[1, 3]]
        torch.testing.assert_close(out.confidence, torch.tensor([[0.5, 1.0]]))

    def test_fast_dllm_on_dream_enters_a_block_like_any_step(self, model, plain):
        """The program gives each block's first forward to its first position alone, however unsure that is."""
        prompt = prompts(1, 9)[0]
        canvas, options = canvas_of(prompt, 16), {"threshold": 0.3, "block_length": 8, "shift": True}
        for cache in ("prefix", "dual"):
            program = published.fast_dllm(plain, canvas, 9, MASK, cache=cache, quirk=True, **options)
            out = dk.generate(
                model, prompt, max_new_tokens=16, block_length=8, rule=dk.Threshold(0.3), cache=cache,
                logit_alignment="shift", eos_policy="none",
            )  # fmt: skip
            for start in (9, 17):
                entry = program.commit_step[start : start + 8].min()
                assert (program.commit_step == entry).nonzero().flatten().tolist() == [start]
            assert (out.commit_step[0, 9:17] == 0).sum() > 1

    def test_a_request_can_stop_at_its_end_token(self, plain, model):
        """The programs decode the full length; with "fill" the text up to the end token is the same."""
        rows, ids, valid = ragged(seed=1)
        options = {"rule": dk.Threshold(0.6), "block_length": 8, "max_new_tokens": 32, "pad_token_id": PAD}
        cut = 0
        for eos in range(4, 12):
            out = dk.generate(model, ids, valid, eos_policy="fill", eos_token_id=eos, **options)
            for row, prompt in enumerate(rows):
                request = published.fast_dllm(
                    plain, canvas_of(prompt, 32), len(prompt), MASK, threshold=0.6, block_length=8
                )
                assert request.slack > numerics.TWO_PROGRAMS
                text = request.tokens[len(prompt) :]
                ends = (text == eos).nonzero().flatten().tolist()
                stop = ends[0] + 1 if ends else 32
                assert torch.equal(out.generated[row, :stop], text[:stop])
                assert (out.generated[row, stop:] == PAD).all()
                assert out.num_forwards[row] <= request.num_forwards
                cut += stop < 32
        assert cut > 0
