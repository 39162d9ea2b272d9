# SPDX-License-Identifier: Apache-2.0
"""Prompts: padding without a mask, no prompt at all, and canvases of models without a mask token."""

import warnings

import pytest
import torch

import dlmkernels as dk
from small_models import MASK, PAD, build, prompts

N = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return build(seed=3, sharpness=3.0)


def padded():
    ids, mask = prompts(3, 7), torch.ones(3, 7, dtype=torch.int64)
    for row, count in ((0, 3), (2, 1)):
        ids[row, :count], mask[row, :count] = PAD, 0
    return ids, mask


class TestPadding:
    def test_is_inferred(self, model):
        ids, mask = padded()
        with_mask, without = dk.generate(model, ids, mask, **N), dk.generate(model, ids, **N)
        assert torch.equal(with_mask.sequences, without.sequences)
        assert not torch.equal(without.sequences, dk.generate(model, ids, torch.ones_like(mask), **N).sequences)
        for row, count in enumerate((3, 0, 1)):
            assert torch.equal(dk.generate(model, ids[row, count:], **N).generated[0], without.generated[row])

    def test_is_inferred_in_a_canvas_and_for_likelihoods(self, model):
        ids, mask = padded()
        ids[:, 4] = MASK
        assert torch.equal(dk.infill(model, ids).sequences, dk.infill(model, ids, mask).sequences)
        ids, answer = padded()[0], prompts(3, 4, seed=2)
        answer[1, 2:] = PAD
        valid = (answer != PAD).long()
        ours = dk.log_likelihood(model, ids, answer, seed=3, num_samples=3)
        assert torch.equal(ours.total, dk.log_likelihood(model, ids, answer, mask, valid, seed=3, num_samples=3).total)

    def test_inside_a_prompt_it_is_a_token(self, model):
        ids = prompts(1, 6)
        ids[0, 3] = PAD
        assert torch.equal(
            dk.generate(model, ids, **N).sequences, dk.generate(model, ids, torch.ones_like(ids), **N).sequences
        )

    @pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id"])
    def test_may_be_part_of_the_prompt(self, field):
        """A padding token that is also an end or a start token is taken as it stands, with a warning where it varies."""
        model = build(seed=3)
        setattr(model.config, field, PAD)
        ids, _ = padded()
        ones = torch.ones_like(ids)
        with pytest.warns(UserWarning, match="input_ids may be padded with token 0"):
            out = dk.generate(model, ids, **N)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(out.sequences, dk.generate(model, ids, ones, **N).sequences)
            ids[:, 0], ids[:, 1] = PAD, 5
            dk.generate(model, ids, **N)

    def test_on_the_right(self, model):
        ids = prompts(2, 6)
        ids[1, 4:] = PAD
        with pytest.raises(ValueError, match=r"ends with the padding token \(0\) in row 1.*pad prompts on the left"):
            dk.generate(model, ids, **N)
        dk.generate(model, ids, torch.ones_like(ids), **N)

    def test_nothing_else(self, model):
        ids = prompts(2, 6)
        ids[1] = PAD
        with pytest.raises(ValueError, match="row 1 of input_ids holds nothing but padding"):
            dk.generate(model, ids, **N)

    def test_last_of_several_end_tokens(self, model):
        """Without a padding token of its own, a model pads with its first end token."""
        model = build(seed=3, sharpness=3.0)
        model.config.pad_token_id = None
        model.generation_config.pad_token_id = None
        ids = prompts(4, 6)
        ends = tuple(range(4, 40))[::-1]
        out = dk.generate(model, ids, eos_token_id=ends, max_new_tokens=16)
        filled = (out.commit_step == -1)[:, 6:]
        assert filled.any() and (out.generated[filled] == ends[0]).all()


def test_longest_canvas_counts_the_offset_of_positions():
    """RoBERTa counts positions from pad_token_id + 1 on: its table is that much shorter."""
    model = build("roberta")
    longest = model.config.max_position_embeddings - PAD - 1
    ids = prompts(1, longest - 4)
    assert dk.generate(model, ids, max_new_tokens=4, steps=1).complete.all()
    with pytest.raises(ValueError, match=f"canvas of {longest + 1}, longer than .* of {longest}"):
        dk.generate(model, ids, max_new_tokens=5)


@pytest.mark.parametrize("alignment", ["same", "shift"])
@pytest.mark.parametrize("scale", [0.7, 2.0])
def test_guidance_is_the_formula(model, alignment, scale):
    """u + (s + 1)(c - u), u with masks in place of the prompt, from the model's own attention with all in view."""
    ids = prompts(2, 6)
    canvas = torch.cat((ids, torch.full((2, 8), MASK)), 1)
    seen = torch.zeros(2, 1, 14, 14)
    hidden = canvas.masked_fill(torch.arange(14) < 6, MASK)
    conditional, blind = (model(x, attention_mask=seen).logits.double() for x in (canvas, hidden))
    z = blind + (scale + 1) * (conditional - blind)
    z[..., MASK] = -torch.inf
    z = z[:, 6:] if alignment == "same" else z[:, 5:-1]
    out = dk.generate(
        model, ids, max_new_tokens=8, steps=1, cfg_scale=scale, logit_alignment=alignment, eos_policy="none"
    )
    p, token = z.softmax(-1).max(-1)
    assert torch.equal(out.generated, token)
    torch.testing.assert_close(out.confidence[:, 6:].double(), p, rtol=1e-3, atol=1e-5)


NOISE = {"rule": dk.UniformState(), "temperature": 1.0, "steps": 4, "seed": 3}
SEEN = [
    {}, {"attention": "block", "block_length": 4}, {"attention": "block", "block_length": 4, "cache": "block"},
    {"attention": "causal", "block_length": 4}, {"attention": "causal", "cache": "block", "block_length": 4},
    {"attention": "causal-context", "cache": "block", "block_length": 4},
    {"attention": "causal-context", "block_length": 4, "seeded": True}, {"cache": "prefix", "block_length": 4},
    {"cache": "dual", "block_length": 4}, {"logit_alignment": "shift"},
    {"attention": "block", "block_length": 4, "cache": "block", "logit_alignment": "shift"},
]  # fmt: skip
NOTHING = torch.empty(3, 0, dtype=torch.int64)


class TestWithoutPrompt:
    @pytest.mark.parametrize("options", [*SEEN, {"cache": "delayed"}], ids=str)
    @pytest.mark.parametrize("noise", [False, True])
    def test_every_kind(self, model, options, noise):
        if noise and options.get("cache") == "delayed":
            pytest.skip("a rule that takes tokens back needs another cache")
        options = N | (NOISE if noise else {"temperature": 1.0, "seed": torch.arange(3)}) | options
        out = dk.generate(model, NOTHING, **options)
        assert out.complete.all() and out.sequences.shape == (3, 8) and out.prompt_length == 0
        assert not (out.sequences == MASK).any()
        alone = dk.generate(model, NOTHING[0], **options | ({} if noise else {"seed": torch.arange(1)}))
        assert torch.equal(alone.sequences[0], out.sequences[0])

    def test_equals_masks_alone(self, model):
        filled = dk.infill(model, torch.full((3, 8), MASK), eos_policy="none")
        assert torch.equal(dk.generate(model, NOTHING, eos_policy="none", **N).sequences, filled.sequences)

    @pytest.mark.parametrize("rule,more", [
        (dk.Reordered(4), {"attention": "reordered", "cache": "block"}),
        (dk.Pipeline(0.5), {"attention": "block", "block_length": 4}), (dk.EntropyPipeline(1.0), {"block_length": 4}),
        (dk.Lengthening(first_length=4, growth=2), {"block_length": 4}),
    ], ids=lambda v: type(v).__name__)  # fmt: skip
    def test_rules_with_loops_of_their_own(self, model, rule, more):
        assert dk.generate(model, NOTHING, rule=rule, **N, **more).complete.all()

    @pytest.mark.parametrize("rule,more", [
        (dk.Strided(), {"attention": "causal", "logit_alignment": "shift"}),
        (dk.SelfSpeculative(), {"attention": "causal-context", "seeded": True, "block_length": 4}),
    ], ids=lambda v: type(v).__name__)  # fmt: skip
    def test_rules_that_need_a_token(self, model, rule, more):
        with pytest.raises(ValueError, match="input_ids must hold at least one token with rule"):
            dk.generate(model, NOTHING, rule=rule, cache="block", **N, **more)

    def test_guidance_needs_something_given(self, model):
        with pytest.raises(ValueError, match="cfg_scale has no effect without a prompt"):
            dk.generate(model, NOTHING, cfg_scale=1.0, **N)

    def test_likelihood(self, model):
        answer = prompts(3, 4)
        out = dk.log_likelihood(model, NOTHING, answer, seed=1, num_samples=2)
        assert out.total.shape == (3,) and (out.total < 0).all()


class TestUniformNoise:
    """Models without a mask token: what is wanted is said by -1."""

    @pytest.fixture(scope="class")
    def model(self):
        model = build(seed=3, sharpness=3.0)
        del model.config.mask_token_id
        return model

    @pytest.mark.parametrize("options", SEEN, ids=str)
    def test_infill(self, model, options):
        tokens = prompts(2, 12)
        holes = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.4
        steps = NOISE | {"steps": 6}
        out = dk.infill(model, tokens.masked_fill(holes, -1), **steps | options)
        assert out.complete.all() and torch.equal(out.sequences[~holes], tokens[~holes])
        assert (out.sequences >= 0).all()

    @pytest.mark.parametrize("options", SEEN, ids=str)
    def test_generate(self, model, options):
        assert dk.generate(model, NOTHING, **N, **NOISE | options).complete.all()

    def test_masks_are_minus_one_for_all_models(self):
        model, tokens = build(), prompts(2, 10)
        tokens[:, 3:6] = MASK
        assert torch.equal(
            dk.infill(model, tokens.masked_fill(tokens == MASK, -1)).sequences, dk.infill(model, tokens).sequences
        )
        with pytest.raises(ValueError, match="tokens must hold ids from 0 to 96, or -1"):
            dk.infill(model, tokens - 90)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan"), float("inf")])
def test_an_attention_mask_says_yes_or_no(model, value):
    ids = prompts(2, 5)
    mask = torch.ones(ids.shape)
    dk.generate(model, ids, mask, max_new_tokens=4)
    mask[1, 2] = value
    with pytest.raises(ValueError, match="attention_mask must hold 0 for padding and 1 for tokens; got"):
        dk.generate(model, ids, mask, max_new_tokens=4)
    with pytest.raises(ValueError, match="attention_mask must hold 0 for padding and 1 for tokens; got"):
        dk.generate(model, {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}, max_new_tokens=4)
