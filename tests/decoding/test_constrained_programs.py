# SPDX-License-Identifier: Apache-2.0
"""Constraints in the programs that do not go block after block."""

import pytest
import torch

import dlmkernels as dk
from decodings import NoRepeats, lively, ragged
from small_models import VOCAB, prompts

NEW = 16
CAUSAL = {"attention": "causal", "logit_alignment": "shift", "cache": "block"}
PROGRAMS = {
    "Strided": {"rule": dk.Strided(3), **CAUSAL},
    "SelfSpeculative": {
        "rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block", "block_length": 4,
    },
    "Reordered": {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
    "Pipeline": {"rule": dk.Pipeline(0.3, 0.3, 0.5), "attention": "block", "cache": "block", "block_length": 4},
    "EntropyPipeline": {"rule": dk.EntropyPipeline(1.0), "block_length": 4},
}  # fmt: skip
SEEDS = torch.tensor([5, 6, 7])
SAMPLED = [{}, {"temperature": 1.0}]


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


def options_of(name, more):
    return {"max_new_tokens": NEW, "eos_policy": "none"} | PROGRAMS[name] | more


def check_rows(model, options):
    """The batch, of which each row is what it is alone."""
    rows, ids, valid = ragged([5, 8, 3], seed=4)
    out = dk.generate(model, ids, valid, seed=SEEDS, **options)
    for k, row in enumerate(rows):
        want = dk.generate(model, row, seed=SEEDS[k : k + 1], **options)
        assert torch.equal(out.generated[k], want.generated[0]) and torch.equal(
            out.commit_step[k, -NEW:], want.commit_step[0, -NEW:]
        )
        assert out.num_forwards[k] == want.num_forwards[0]
    return out


@pytest.mark.parametrize("more", SAMPLED, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_allowed_tokens(model, name, more):
    """Other tokens for every position."""
    allowed = torch.rand(NEW, VOCAB, generator=torch.Generator().manual_seed(3)) < 0.2
    out = check_rows(model, options_of(name, more | {"constraint": allowed}))
    assert out.complete.all() and allowed[torch.arange(NEW), out.generated].all()
    free = dk.generate(model, ragged([5, 8, 3], seed=4)[1], seed=SEEDS, **options_of(name, more))
    assert not torch.equal(free.generated, out.generated)


@pytest.mark.parametrize("more", SAMPLED, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_checkers(model, name, more):
    out = check_rows(model, options_of(name, more | {"constraint": NoRepeats()}))
    answers = out.generated
    assert out.complete.all() and (answers[:, 1:] != answers[:, :-1]).all()


@pytest.mark.parametrize("name", PROGRAMS)
def test_everything_is_accepted(model, name):
    class Anything(dk.Constraint):
        def accepts(self, tokens, proposed):
            return proposed >= 0

    options = options_of(name, {"temperature": 1.0, "seed": SEEDS})
    _, ids, valid = ragged([5, 8, 3], seed=4)
    out, want = (dk.generate(model, ids, valid, **options | x) for x in ({"constraint": Anything()}, {}))
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    assert torch.equal(out.num_forwards, want.num_forwards)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_accepted(model, name):
    """The decoding comes to an end, and says why."""

    class Nothing(dk.Constraint):
        attempts = 3

        def accepts(self, tokens, proposed):
            return torch.zeros_like(proposed, dtype=torch.bool)

    with pytest.warns(RuntimeWarning, match="the constraint refused every token there"):
        out = dk.generate(model, prompts(2, 5), **options_of(name, {"constraint": Nothing()}))
    assert not out.complete.any() and not out.decoded.any()


@pytest.mark.parametrize(("name", "fewer"), [
    ("Strided", {"rule": dk.Strided(2)}), ("SelfSpeculative", {"block_length": 2}),
])  # fmt: skip
def test_drafts_change_nothing(model, name, fewer):
    """However many are drafted, what is verified is the best of what is accepted then, token after token."""
    ids, constraint = prompts(1, 6), {"constraint": NoRepeats()}
    many, few = (dk.generate(model, ids, **options_of(name, constraint | more)) for more in ({}, fewer))
    assert torch.equal(many.generated, few.generated) and (many.generated[:, 1:] != many.generated[:, :-1]).all()


@pytest.mark.parametrize(("options", "message"), [
    ({"rule": dk.Strided(3, 1.0), **CAUSAL, "temperature": 1.0, "seed": 1}, "drafts are then accepted by a"),
    ({"rule": dk.Lengthening(), "eos_token_id": 5}, "moves tokens to other positions"),
    ({"rule": dk.SplitEditing(0.5, 0.2, 3, 90, 91)}, "moves tokens to other positions"),
])  # fmt: skip
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=f"constraint cannot be used with rule .* ?{message}"):
        dk.generate(model, prompts(1, 4), max_new_tokens=8, constraint=NoRepeats(), **options)
