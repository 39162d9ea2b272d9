# SPDX-License-Identifier: Apache-2.0
"""Decoders that change the length, against their restatements (`restated_length.py`), token for token."""

import dataclasses

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import restated_length as restated
from decodings import FEW_MASK, LateCount, Table, canvas_of, decode, lively, ragged, sure
from host_reads import reads_between_polls
from plain_llama import PlainLlama
from published import block_causal, blocks_of
from small_models import EOS, KINDS, MASK, PAD, prompts

EXPAND, DELETE = 90, 91


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def liking(tokens, gain, seed=17):
    """A random model that proposes these tokens often, and itself in plain."""
    model = lively(seed=seed)
    with torch.no_grad():
        model.lm_head.weight[tokens] *= gain
    return model, PlainLlama(model)


@pytest.fixture(scope="module")
def edits():
    return liking([EXPAND, DELETE], 1.8)


def assert_same(out, row, text):
    """Row `row` of a decoding, without its padding, is the restated text, and nothing but padding stands behind it."""
    assert text.slack > numerics.TWO_PROGRAMS, f"a near tie ({text.slack:.1e}): this comparison needs another seed"
    end = int(out.length[row])
    here = slice(end - len(text.row), end)
    assert out.sequences[row, here].tolist() == text.tokens.tolist()
    assert torch.equal(out.commit_step[row, here], text.commit_step)
    assert out.num_forwards[row] == text.num_forwards and out.complete[row]
    numerics.assert_same_probabilities(out.confidence[row, here], text.confidence)
    assert (out.sequences[row, end:] == PAD).all() and (out.commit_step[row, end:] == -1).all()
    assert out.sequences.shape[1] == out.length.max()


class TestExpanding:
    # masks of a row: behind how many tokens, how many, how many tokens behind them
    ROWS = ((3, 4, 5), (6, 1, 0), (1, 7, 2), (4, 0, 3), (5, 3, 1))

    def canvases(self, rows=ROWS, seed=0):
        """Each alone, and all of them as a batch padded on the left."""
        alone = []
        for k, (before, masks, behind) in enumerate(rows):
            row = prompts(1, before + masks + behind, seed=100 * seed + k)[0].clamp(max=EXPAND - 1)
            row[before : before + masks] = MASK
            alone.append(row)
        longest = max(map(len, alone))
        batch = torch.stack([torch.cat((r.new_full((longest - len(r),), PAD), r)) for r in alone])
        valid = torch.stack([torch.arange(longest) >= longest - len(r) for r in alone]).long()
        return alone, batch, valid

    def compare(self, edits, rule=None, seed=0, rows=ROWS, **options):
        model, plain = edits
        rule = rule or dk.Expanding(EXPAND, DELETE)
        options = {"max_new_tokens": 9, "eos_policy": "none", "score": "entropy", "logit_alignment": "shift"} | options
        alone, batch, valid = self.canvases(rows, seed)
        out = dk.infill(model, batch, valid, rule=rule, **options)
        texts = []
        for k, row in enumerate(alone):
            text = restated.expanding(
                plain, row, MASK, expand=EXPAND, delete=[EOS] if rule.delete_token_id is None else [DELETE],
                most=options["max_new_tokens"], count=rule.count, budget=rule.budget,
                shift=options["logit_alignment"] == "shift", score=options["score"],
                block=options.get("block_length"),
            )  # fmt: skip
            assert_same(out, k, text)
            texts.append(text)
        single = dk.infill(model, alone[0], rule=rule, **options)
        assert_same(single, 0, texts[0])
        return alone, texts

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("count,most", [(1, 9), (1, 7), (2, 12), (5, 20)])
    @pytest.mark.parametrize("alignment", ["shift", "same"])
    def test_rule(self, edits, alignment, count, most, seed):
        rule = dk.Expanding(EXPAND, DELETE, count)
        self.compare(edits, rule, seed, max_new_tokens=most, logit_alignment=alignment)

    def test_cases_grow_shrink_and_reach_the_limit(self, edits):
        """What the comparisons above are worth: some of all kinds are among them."""
        lengths = []
        for seed in range(4):
            alone, texts = self.compare(edits, seed=seed, max_new_tokens=9)
            lengths += [len(t.row) - len(r) + int((r == MASK).sum()) for r, t in zip(alone, texts)]
        assert 0 in lengths and 9 in lengths and len(set(lengths)) > 4

    @pytest.mark.parametrize("options", [
        {"score": "probability"}, {"block_length": 3}, {"rule": dk.Expanding(EXPAND, DELETE, 2, budget=2)},
        {"rule": dk.Expanding(EXPAND, DELETE, budget=0)}, {"rule": dk.Expanding(EXPAND)}, {"max_new_tokens": 60},
    ], ids=str)  # fmt: skip
    def test_options(self, edits, options):
        self.compare(edits, seed=5, **options)

    def test_first_position(self, edits):
        """It has no row before it, whatever padding stands there."""
        self.compare(edits, dk.Expanding(EXPAND, DELETE, budget=0), rows=((0, 1, 5), (4, 2, 6), (0, 1, 2)), seed=7)

    def test_everything_is_deleted(self):
        """One mask a forward goes, and what stood around them comes together."""
        table = Table([sure(1, 0.9)] * 6)
        rule = dk.Expanding(2, 1)
        canvas = [[3, FEW_MASK, FEW_MASK, FEW_MASK, 4], [FEW_MASK] * 5]
        out = decode(table, canvas, rule=rule, max_new_tokens=6, pad_token_id=0)
        assert out.sequences.tolist() == [[3, 4], [0, 0]] and out.length.tolist() == [2, 0]
        assert out.num_forwards.tolist() == [3, 5] and out.complete.all()

    def test_expands_up_to_the_limit(self):
        """Where there is no more room the next likeliest token is taken; of two expansions one finds room."""
        row = [0.01, 0.01, 0.85, 0.1, 0.01, 0.02]  # token 2, the expand token, and then 3
        table = Table([torch.tensor(row).log().tolist()] * 9)
        canvas = [[4, FEW_MASK, FEW_MASK, 4]]
        for count, forwards in ((1, 2 + 4), (2, 2 + 2)):
            rule = dk.Expanding(2, 1, count)
            out = decode(table, canvas, rule=rule, max_new_tokens=4, pad_token_id=0)
            assert out.sequences.tolist() == [[4, 3, 3, 3, 3, 4]] and out.length.tolist() == [6]
            assert out.num_forwards.tolist() == [forwards - (count == 2)], count
        odd = decode(table, canvas, rule=dk.Expanding(2, 1, 2), max_new_tokens=3, pad_token_id=0)
        assert odd.sequences.tolist() == [[4, 3, 3, 3, 4]] and odd.num_forwards.tolist() == [1 + 2]
        budget = decode(table, canvas, rule=dk.Expanding(2, 1, budget=1), max_new_tokens=6, pad_token_id=0)
        assert budget.sequences.tolist() == [[4, 3, 3, 3, 4]]
        none = decode(table, canvas, rule=dk.Expanding(2, 1), max_new_tokens=2, pad_token_id=0)
        assert none.sequences.tolist() == [[4, 3, 3, 4]] and none.num_forwards.tolist() == [2]

    def test_sampling_does_not_depend_on_the_batch(self, edits):
        model, _ = edits
        alone, batch, valid = self.canvases(seed=2)
        options = {"config": dk.preset("dreamon"), "rule": dk.Expanding(EXPAND, DELETE), "max_new_tokens": 12}
        options |= {"temperature": 1.0}
        seeds = torch.arange(3, 3 + len(alone))
        out = dk.infill(model, batch, valid, seed=seeds, **options)
        again = dk.infill(model, batch, valid, seed=seeds + 100, **options)
        assert out.sequences.tolist() != again.sequences.tolist()
        for k, row in enumerate(alone):
            single = dk.infill(model, row, seed=seeds[k : k + 1], **options)
            pads, end = batch.shape[1] - len(row), out.length[k]
            assert single.length[0] == end - pads and single.num_forwards[0] == out.num_forwards[k]
            assert torch.equal(single.sequences[0], out.sequences[k, pads:end])

    def test_ids_of_the_models_configuration(self, edits):
        """They are found there, and asked for where they are not."""
        model, _ = edits
        alone, *_ = self.canvases()
        config = dk.preset("dreamon", temperature=0.0)
        with pytest.raises(ValueError, match=r"expand_token_id is not in the model's configuration: pass rule=.*Exp"):
            dk.infill(model, alone[0], config=config)
        expected = dk.infill(model, alone[0], config=config, rule=dk.Expanding(EXPAND, DELETE))
        model.generation_config.expand_token_id, model.generation_config.delete_token_id = EXPAND, DELETE
        try:
            out = dk.infill(model, alone[0], config=config)
        finally:
            del model.generation_config.expand_token_id, model.generation_config.delete_token_id
        assert torch.equal(out.sequences, expected.sequences)

    def test_ids_that_the_family_does_not_know(self, edits):
        """Logits beyond the tokenizer's ids are never chosen, but those of the tokens that the rule names."""
        model, _ = edits
        _, batch, valid = self.canvases(seed=2)
        options = {"rule": dk.Expanding(EXPAND, DELETE), "max_new_tokens": 9, "eos_policy": "none"}
        options |= {"score": "entropy", "logit_alignment": "shift"}
        known = dk.adapt(model)
        known.family = dataclasses.replace(known.family, vocab_size=97, num_tokens=EXPAND)
        expected = dk.infill(model, batch, valid, suppress_token_ids=range(92, 97), **options)
        assert torch.equal(dk.infill(known, batch, valid, **options).sequences, expected.sequences)
        assert len(set(expected.length.tolist())) > 1

    @pytest.mark.parametrize("options,match", [
        ({"max_new_tokens": 3}, "max_new_tokens must be at least the number of masks in any row, 7; got 3"),
        ({"max_new_tokens": 500}, r"tokens has length 12 and may grow to 512, more than the model's"),
        ({"cache": "dual"}, "rule Expanding needs attention='full' .* got attention='full' and cache='dual'"),
        ({"eos_policy": "fill"}, "rule Expanding needs eos_policy='none'.*got 'fill'"),
        ({"cfg_scale": 1.0}, "cfg_scale cannot be used with rule Expanding; got 1.0"),
        ({"rule": dk.Expanding(97)}, "expand_token_id must be in the model's vocabulary of 97 tokens; got 97"),
    ], ids=str)  # fmt: skip
    def test_refused(self, edits, options, match):
        model, _ = edits
        _, batch, valid = self.canvases()
        options = {"rule": dk.Expanding(EXPAND), "max_new_tokens": 8, "eos_policy": "none"} | options
        with pytest.raises(ValueError, match=match):
            dk.infill(model, batch, valid, **options)
        with pytest.raises(ValueError, match="rule Expanding fills in the mask tokens of a given sequence: use infill"):
            dk.generate(model, batch[:, :2].clamp(max=90), rule=dk.Expanding(EXPAND), eos_policy="none")
        with pytest.raises(ValueError, match="count must be an integer of at least 1; got 0"):
            dk.Expanding(EXPAND, count=0)
        with pytest.raises(ValueError, match="budget must be None or an integer of at least 0; got -1"):
            dk.Expanding(EXPAND, budget=-1)

    def test_streamer(self, edits):
        model, _ = edits
        alone, *_ = self.canvases()
        got = []
        streamer = type(
            "S", (), {"put": lambda self, t: got.extend(t.tolist()), "end": lambda self: got.append("end")}
        )()
        options = {"rule": dk.Expanding(EXPAND, DELETE), "eos_policy": "none", "max_new_tokens": 20}
        out = dk.infill(model, alone[0], streamer=streamer, **options)
        assert got == [*out.sequences[0].tolist(), "end"]

    def test_nan_logits_leave_masks_and_say_so(self):
        table = Table([[float("nan")] * 6] * 6)
        with pytest.warns(RuntimeWarning, match=r"masks are left in rows \[0\]"):
            out = decode(table, [[3, FEW_MASK, 4]], rule=dk.Expanding(2, 1), max_new_tokens=4, pad_token_id=0)
        assert out.sequences.tolist() == [[3, FEW_MASK, 4]] and not out.complete[0]


class TestLengthening:
    RULE = dk.Lengthening(0.5, 0.3, 6, 4, 6, 0.3, 0.6)
    ENDS = list(range(1, MASK, 4))  # so many that one of them is often the likeliest

    @pytest.fixture(scope="class")
    def ending(self):
        model = lively()
        model.generation_config.eos_token_id = self.ENDS
        return model, PlainLlama(model)

    def compare(self, pair, rule, most=40, seed=0, block=8, **options):
        model, plain = pair
        rows, ids, valid = ragged(seed=seed)
        options |= {"rule": rule, "eos_policy": "none", "max_new_tokens": most, "block_length": block}
        out = dk.generate(model, ids, valid, **options)
        texts = []
        for k, prompt in enumerate(rows):
            text = restated.lengthening(
                plain, prompt, MASK, eos=self.ENDS, most=most, block=block, first=rule.first_length, growth=rule.growth,
                window=rule.end_window, enough=rule.end_enough, certain=rule.end_certain, high=rule.threshold,
                low=rule.doubt,
            )  # fmt: skip
            assert_same(out, k, text)
            texts.append(text)
        assert_same(dk.generate(model, rows[0], **options), 0, texts[0])
        return [len(t.row) - len(r) for r, t in zip(rows, texts)]

    @pytest.mark.parametrize("seed", (1, 2, 3))
    @pytest.mark.parametrize("rule", [
        RULE, dk.Lengthening(0.9, 0.1, 3, 8, 4, 0.2, 0.9), dk.Lengthening(0.3, 0.6, 1, 2, 2, 0.5, 1.0),
        dk.Lengthening(0.5, 0.3, 10, 3, 5, -1.0, 0.6), dk.Lengthening(0.9, 0.5, 2, 1, 3, 0.4, 1.0),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("block", [8, 5, None])
    def test_rule(self, ending, rule, block, seed):
        self.compare(ending, rule, seed=seed, block=block)

    def test_cases_differ_in_length(self, ending):
        """Some requests stop growing before the largest length, others reach it; masks are inserted in some."""
        lengths = [n for seed in range(1, 5) for n in self.compare(ending, self.RULE, seed=seed)]
        calm = dk.Lengthening(0.5, 0.0, 6, 4, 6, 0.3, 0.6)
        without = [n for seed in range(1, 5) for n in self.compare(ending, calm, seed=seed)]
        assert len(set(lengths)) > 3 and lengths != without and min(lengths) < 40
        assert 15 in self.compare(ending, self.RULE, most=15, seed=1)

    @pytest.mark.parametrize("most", [1, 5, 6, 7, 9, 13])
    def test_no_room_left(self, ending, most):
        """The largest length is reached in the middle of a growth, and inserted is what fits."""
        greedy = dk.Lengthening(0.9, 0.9, 6, 4, 6, 0.9, 1.0)
        lengths = self.compare(ending, greedy, most=most)
        assert max(lengths) == most

    def test_only_what_fits_is_inserted(self):
        """Four masks would come in the place of one; there is room for one more, and what is decided stays."""
        unsure = [0.3, 0.2, 0.2, 0.2, 0.05, 0.05]
        rows = [sure(0, 0.99), sure(2, 0.99), torch.tensor(unsure).log().tolist(), sure(3, 0.99), sure(4, 0.95)]
        rule = dk.Lengthening(0.9, 0.5, 3, 4, 2, 0.0, 1.0)
        with pytest.warns(UserWarning, match="does not know model type"):
            out = dk.generate(
                Table(rows).eval(), torch.tensor([[5 - 1]]), mask_token_id=FEW_MASK, eos_token_id=1, eos_policy="none",
                rule=rule, max_new_tokens=4,
            )  # fmt: skip
        # one look; one mask more, so that there are four and no room; then positions 2 and 4 at once, and so on
        assert out.length.tolist() == [5] and out.sequences[0, 1:].tolist() == [2, 0, 3, 4]

    def test_sampling_does_not_depend_on_the_batch(self, ending):
        model, _ = ending
        rows, ids, valid = ragged(seed=3)
        options = {"rule": self.RULE, "max_new_tokens": 40, "block_length": 8, "temperature": 0.7, "eos_policy": "fill"}
        seeds = torch.tensor([4, 5, 6])
        out = dk.generate(model, ids, valid, seed=seeds, **options)
        for k, row in enumerate(rows):
            single = dk.generate(model, row, seed=seeds[k : k + 1], **options)
            pads, end = ids.shape[1] - len(row), out.length[k]
            assert single.length[0] == end - pads and single.num_forwards[0] == out.num_forwards[k]
            assert torch.equal(single.sequences[0], out.sequences[k, pads:end])

    def test_end_token(self, ending):
        """With "fill", a request is done when nothing is open before its end token."""
        model, _ = ending
        rows, ids, valid = ragged(seed=1)
        options = {"rule": self.RULE, "max_new_tokens": 40, "block_length": 8, "pad_token_id": PAD}
        whole = dk.generate(model, ids, valid, eos_policy="none", **options)
        out = dk.generate(model, ids, valid, eos_policy="fill", **options)
        assert (out.num_forwards <= whole.num_forwards).all() and (out.num_forwards < whole.num_forwards).any()
        for row, end in zip(out.sequences, out.length):
            ends = torch.isin(row[:end], torch.tensor(self.ENDS)).nonzero().flatten()
            ends = ends[ends >= ids.shape[1]]
            assert len(ends) and (row[ends[0] + 1 :] == PAD).all()

    def test_preset(self, ending):
        model, plain = ending
        ids = prompts(2, 5, seed=8)
        out = dk.generate(model, ids, config=dk.preset("daedal"), max_new_tokens=100)
        for k in range(2):
            assert_same(out, k, restated.lengthening(plain, ids[k], MASK, eos=self.ENDS, most=100, block=32))

    @pytest.mark.parametrize("options,match", [
        ({"cache": "prefix"}, "rule Lengthening reads the whole canvas, which needs cache='none'; got cache='prefix'"),
        ({"attention": "causal"}, "rule Lengthening needs .* got attention='causal' and cache='none'"),
        ({"sub_block_length": 4}, "sub_block_length cannot be used with rule Lengthening; got 4"),
        ({"eos_token_id": []}, "eos_token_id is needed by rule Lengthening"),
    ], ids=str)  # fmt: skip
    def test_refused(self, ending, options, match):
        model, _ = ending
        with pytest.raises(ValueError, match=match):
            dk.generate(
                model, prompts(1, 4), **{"rule": self.RULE, "max_new_tokens": 8, "eos_policy": "none"} | options
            )
        with pytest.raises(ValueError, match="rule Lengthening continues a prompt: use generate"):
            dk.infill(model, canvas_of(prompts(1, 4)[0], 3), rule=self.RULE)
        with pytest.raises(ValueError, match="growth must be an integer of at least 1; got 0"):
            dk.Lengthening(growth=0)

    def test_too_wide(self, ending):
        model, _ = ending
        table = Table([[0.0] * 6] * 5000).eval()
        with (
            pytest.warns(UserWarning),
            pytest.raises(ValueError, match=r"windows of up to 4096 positions.*got block_length=None and"),
        ):
            dk.generate(
                table, torch.tensor([[2]]), mask_token_id=FEW_MASK, eos_token_id=1, rule=self.RULE, max_new_tokens=4500
            )


class TestSplitEditing:
    NEW = 16

    @pytest.fixture(scope="class")
    def pairs(self):
        return [liking([EXPAND, DELETE], gain, seed) for gain, seed in ((1.3, 17), (1.1, 18))]

    def compare(self, pair, rule, seed=0, block=8, again=None):
        model, plain = pair
        rows, ids, valid = ragged(seed=seed)
        options = {"rule": rule, "max_new_tokens": self.NEW, "block_length": block, "eos_policy": "none"}
        out = dk.generate(model, ids, valid, **options)
        texts = []
        for k, prompt in enumerate(rows):
            text = restated.split_editing(
                plain, canvas_of(prompt, self.NEW), len(prompt), MASK, delete=DELETE, split=EXPAND,
                threshold=rule.threshold, edit_threshold=rule.edit_threshold, post=rule.max_post_steps,
                block_length=block, seen_anew=again,
            )  # fmt: skip
            assert_same(out, k, text)
            texts.append(text)
        assert_same(dk.generate(model, rows[0], **options), 0, texts[0])
        return texts

    @pytest.mark.parametrize("block", [8, 5, None])
    @pytest.mark.parametrize("tau,tau_edit,post", [(0.5, 0.0, 16), (0.5, 0.5, 4), (0.3, 0.2, 0), (0.9, 0.6, 1)])
    @pytest.mark.parametrize("which,seed", [(0, 0), (0, 3), (1, 1), (1, 2)])
    def test_rule(self, pairs, which, seed, tau, tau_edit, post, block):
        self.compare(pairs[which], dk.SplitEditing(tau, tau_edit, post, DELETE, EXPAND), seed, block)

    def test_blocks_come_back_and_are_varied(self, pairs):
        """What the comparisons above are worth: the search for another change is among them, and so are both edits."""
        again = []
        for seed in range(2):
            texts = self.compare(pairs[0], dk.SplitEditing(0.5, 0.0, 16, DELETE, EXPAND), seed, block=5, again=again)
            assert all(not {EXPAND, DELETE} & set(t.tokens[-self.NEW :].tolist()) for t in texts)
            assert any(not x.original for t in texts for x in t.row)
        assert again

    FAMILIES = {"llada2": (checkpoints.llada2, 8), "sdar": (checkpoints.sdar, 4)}

    @pytest.mark.parametrize("cache", ["none", "block"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_block_causal(self, name, cache, tmp_path):
        """Blocks that begin within the prompt, whose keys and values are kept as the last edit left them."""
        make, length = self.FAMILIES[name]
        checkpoint = make()
        checkpoint.weights["lm_head.weight"][[EXPAND, DELETE]] *= 1.3
        model, plain = dk.load(checkpoint.write(tmp_path)), checkpoint.plain
        rule = dk.SplitEditing(0.4, 0.1, 6, DELETE, EXPAND)
        rows, ids, valid = ragged(seed=2)
        options = {"rule": rule, "max_new_tokens": 18, "temperature": 0.0, "eos_policy": "none", "cache": cache}
        options |= {"block_length": length}
        out = dk.generate(model, ids, valid, **options)
        for k, prompt in enumerate(rows):
            first = len(prompt) // length * length
            blocks = [(b, b + length) for b, _ in blocks_of(first, len(prompt) + 18, length)]
            whole = canvas_of(prompt, blocks[-1][1] - len(prompt))
            visible = block_causal(len(whole), length, 0)
            text = restated.split_editing(
                lambda tokens, v=visible: plain(tokens, v), whole, len(prompt), MASK, delete=DELETE, split=EXPAND,
                threshold=0.4, edit_threshold=0.1, post=6, blocks=blocks,
            )  # fmt: skip
            assert text.slack > numerics.TWO_PROGRAMS
            assert out.sequences[k, -18:].tolist() == text.tokens[len(prompt) : len(prompt) + 18].tolist()
            assert out.commit_step[k, -18:].tolist() == text.commit_step[len(prompt) : len(prompt) + 18].tolist()
            assert out.num_forwards[k] == text.num_forwards and out.length[k] == out.sequences.shape[1]

    @pytest.mark.parametrize("trial", [0, 13, 17, 23])
    @pytest.mark.parametrize("post", [0, 1])
    def test_splits_without_end(self, trial, post):
        """Positions that split again and again: the last forward a block may have commits everything."""
        z = torch.randn(7, 6, generator=torch.Generator().manual_seed(trial)) * 2
        z[:, 0] += 3.0
        text = restated.split_editing(
            lambda tokens: z[None, : tokens.shape[1]], torch.tensor([4] + [FEW_MASK] * 6), 1, FEW_MASK, delete=1,
            split=0, threshold=0.99, edit_threshold=0.99, post=post, block_length=6,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="does not know model type"):
            out = dk.generate(
                Table(z).eval(), torch.tensor([[4]]), mask_token_id=FEW_MASK, eos_policy="none", max_new_tokens=6,
                rule=dk.SplitEditing(0.99, 0.99, post, 1, 0),
            )  # fmt: skip
        assert_same(out, 0, text)
        assert out.num_forwards[0] == 6 + post + 1

    def test_everything_is_deleted(self):
        """Masks come in for what is deleted, until the last forward forbids it."""
        row = torch.tensor([0.02, 0.9, 0.03, 0.02, 0.02, 0.01]).log().tolist()  # 1, the delete token, and then 2
        rule = dk.SplitEditing(0.5, 0.0, 3, 1, 0)
        with pytest.warns(UserWarning, match="does not know model type"):
            out = dk.generate(
                Table([row] * 5).eval(), torch.tensor([[4]]), mask_token_id=FEW_MASK, eos_policy="none", rule=rule,
                max_new_tokens=4,
            )  # fmt: skip
        assert out.sequences.tolist() == [[4, 2, 2, 2, 2]] and out.complete.all()

    def test_the_mask_is_never_proposed(self):
        """Where the mask is likeliest the next token is taken, at masks and in place of tokens."""
        row = torch.tensor([0.01, 0.01, 0.3, 0.04, 0.04, 0.6]).log().tolist()
        with pytest.warns(UserWarning, match="does not know model type"):
            out = dk.generate(
                Table([row] * 5).eval(), torch.tensor([[4]]), mask_token_id=FEW_MASK, eos_policy="none",
                rule=dk.SplitEditing(0.5, 0.0, 3, 1, 0), max_new_tokens=4,
            )  # fmt: skip
        assert out.sequences.tolist() == [[4, 2, 2, 2, 2]] and out.num_forwards.tolist() == [2]

    def test_preset_and_refusals(self, pairs):
        model, _ = pairs[0]
        options = {"config": dk.preset("llada2.2"), "cache": "none", "block_length": 8, "max_new_tokens": 16}
        with pytest.raises(ValueError, match=r"delete_token_id is not in the model's configuration: pass rule=.*Split"):
            dk.generate(model, prompts(1, 5), **options)
        with pytest.raises(ValueError, match="split_token_id must be in the model's vocabulary of 97 tokens; got 200"):
            dk.generate(model, prompts(1, 5), **options, rule=dk.SplitEditing(0.5, 0.0, 16, DELETE, 200))
        with pytest.raises(ValueError, match="rule SplitEditing continues a prompt: use generate"):
            dk.infill(model, canvas_of(prompts(1, 4)[0], 3), rule=dk.SplitEditing())
        with pytest.raises(ValueError, match="max_post_steps must be an integer of at least 0; got -1"):
            dk.SplitEditing(max_post_steps=-1)
        model.config.delete_token_id, model.config.split_token_id = DELETE, EXPAND
        try:
            out = dk.generate(model, prompts(2, 5), **options)
        finally:
            del model.config.delete_token_id, model.config.split_token_id
        assert out.complete.all() and not torch.isin(out.generated, torch.tensor([DELETE, EXPAND])).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    """A row of a batch whose rows end in different columns is the request alone."""
    model = lively(kind)
    canvas = prompts(2, 12, seed=3).clamp(max=EXPAND - 1)
    canvas[0, 3:7] = canvas[1, 5] = MASK
    valid = torch.ones_like(canvas)
    valid[1, :2] = 0
    options = {"rule": dk.Expanding(EXPAND, DELETE), "max_new_tokens": 9, "eos_policy": "none"}
    out = dk.infill(model, canvas, valid, **options)
    alone = dk.infill(model, canvas[1, 2:], **options)
    assert torch.equal(out.sequences[1, 2 : out.length[1]], alone.sequences[0])
    rows, ids, valid = ragged(seed=1)
    options = {"rule": TestLengthening.RULE, "max_new_tokens": 40, "block_length": 8}
    options |= {"eos_token_id": TestLengthening.ENDS}
    out = dk.generate(model, ids, valid, **options)
    alone = dk.generate(model, rows[0], **options)
    assert torch.equal(out.sequences[0, ids.shape[1] - len(rows[0]) : out.length[0]], alone.sequences[0])


def test_prompt_as_embeddings(edits):
    model, _ = edits
    _, ids, valid = ragged(seed=1)
    options = CASES["lengthening"] | {"eos_token_id": TestLengthening.ENDS}
    out = dk.generate(model, ids, valid, **options)
    embedded = dk.generate(model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=valid, **options)
    assert torch.equal(out.generated, embedded.generated) and torch.equal(out.length, embedded.length)


CASES = {
    "expanding": {"rule": dk.Expanding(EXPAND, DELETE, 2), "max_new_tokens": 25, "eos_policy": "none"},
    "expanding one": {"rule": dk.Expanding(EXPAND, DELETE), "max_new_tokens": 25, "eos_policy": "none"},
    "lengthening": {"rule": TestLengthening.RULE, "max_new_tokens": 40, "block_length": 8, "eos_token_id": EXPAND},
    "lengthening fast": {
        "rule": dk.Lengthening(0.3, 0.5, 1, 9, 4, 0.6, 0.9), "max_new_tokens": 40, "eos_token_id": EXPAND,
        "eos_policy": "none",
    },
    "splitting": {
        "rule": dk.SplitEditing(0.5, 0.0, 16, DELETE, EXPAND), "max_new_tokens": 24, "block_length": 8,
        "eos_policy": "none",
    },
}  # fmt: skip


def run(name, model):
    if "expanding" in name:
        _, batch, valid = TestExpanding().canvases(seed=3)
        return dk.infill(model, batch, valid, **CASES[name])
    _, ids, valid = ragged(seed=4)
    return dk.generate(model, ids, valid, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_late_counts_change_nothing(name, edits, monkeypatch):
    """A host that learns late how long a request has become makes room for what it may be."""
    model, _ = edits
    at_once = run(name, model)
    monkeypatch.setattr("dlmkernels.decoding.programs.base.OpenCount", LateCount)
    late = run(name, model)
    for what in ("sequences", "commit_step", "num_forwards", "length"):
        assert torch.equal(getattr(at_once, what), getattr(late, what)), what
    numerics.assert_same_probabilities(at_once.confidence, late.confidence)
    assert late.complete.all()


@pytest.mark.filterwarnings("ignore:dlmkernels does not know")
def test_a_late_host_sees_all_masks(monkeypatch):
    """One mask becomes many, and the last of them is the surest: it is among those that are looked at."""
    rows = torch.tensor([[0.0, 0.0, 5.0, 2.0 + i, 0.0, 0.0] for i in range(8)])
    rule = dk.Expanding(2, 1)
    options = {"rule": rule, "mask_token_id": FEW_MASK, "max_new_tokens": 7, "eos_policy": "none"}
    outputs = []
    for counts in (None, LateCount):
        if counts:
            monkeypatch.setattr("dlmkernels.decoding.programs.base.OpenCount", counts)
        outputs.append(dk.infill(Table(rows).eval(), torch.tensor([[4, FEW_MASK, 4]]), **options))
    at_once, late = outputs
    assert at_once.length[0] == 9 and (at_once.commit_step[0, 1:8].diff() != 1).any()
    assert torch.equal(at_once.sequences, late.sequences) and torch.equal(at_once.commit_step, late.commit_step)


@pytest.mark.parametrize("name", [name for name in CASES if name != "splitting"])
def test_loop_reads_nothing_on_the_host(name, edits, monkeypatch):
    """But the counts, which on a GPU travel by themselves. (Of `SplitEditing` see `test_generate.py`.)"""
    reads, steps = reads_between_polls(monkeypatch, 0)
    out = run(name, edits[0])
    assert out.complete.all() and len(steps) > 2 and reads.seen == []
    with reads:
        torch.tensor(3).item()
    assert reads.seen  # the recorder does see reads


def test_forwards_take_what_is_there(edits, monkeypatch):
    """A forward takes as many columns as the longest row that is not done, and not the largest length."""
    from dlmkernels.models.adapt import DiffusionModel

    taken, hidden = [], DiffusionModel.hidden

    def record(self, tokens, *more):
        taken.append(tokens.shape[1])
        return hidden(self, tokens, *more)

    monkeypatch.setattr(DiffusionModel, "hidden", record)
    out = dk.infill(
        edits[0], canvas_of(prompts(1, 4)[0].clamp(max=89), 3), rule=dk.Expanding(EXPAND, DELETE), max_new_tokens=60,
        eos_policy="none",
    )  # fmt: skip
    assert taken[0] == 7 and max(taken) < 64 and out.length[0] <= max(taken)
