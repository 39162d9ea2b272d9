# SPDX-License-Identifier: Apache-2.0
"""What strangers ask of an engine: refusals at once, what was told stays so, models without a mask token."""

import numpy as np
import pytest
import torch

import dlmkernels as dk
import research
from decodings import lively
from engines import engine_for
from small_models import VOCAB, build, prompts

ENDS = tuple(range(10, 30))
RULES = [dk.Threshold(0.3), dk.TokenEditing(0.4, 0.3, 4), dk.WideInNarrowOut(0.3, 0.4), dk.Backtracking(2)]


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


@pytest.mark.parametrize("policy", ["fill", "block"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_has_been_told_stays(model, rule, policy):
    """Also where an end token cuts a block that is done."""
    engine = engine_for(model, rule=rule, eos_policy=policy, eos_token_id=ENDS, block_length=4)
    told = {}
    for k in range(6):
        engine.add_request(prompts(1, 4, seed=k)[0].tolist(), str(k), max_new_tokens=8, streaming=True, seed=k)
    for output in engine:
        before = told.get(output.request_id, [])
        assert output.generated_tokens[: len(before)] == before
        told[output.request_id] = output.generated_tokens
    assert len(told) == 6


@pytest.mark.parametrize(("options", "message"), [
    ({"result_handler": 5}, "result_handler must be a callable that takes a RequestOutput; got int"),
    ({"on_step": 5}, "on_step must be a callable that takes a RequestOutput; got int"),
    ({"logit_bias": {1000: 1.0}}, "logit_bias must have token ids from 0 to 96 as keys; got 1000"),
    ({"constraint": torch.ones(4, VOCAB, dtype=torch.bool)}, r"constraint must have shape \[n\], \[3, n\]"),
    ({"constraint": torch.ones(2, 3, VOCAB, dtype=torch.bool)}, r"constraint must have shape .* got \[2, 3, 97\]"),
    ({"constraint": torch.tensor(True)}, "constraint must have at least one dimension"),
    ({"request_id": 17}, "request_id must be a string; got int: pass max_new_tokens=17 by keyword"),
    ({"given": 5}, "given must be a sequence of token ids; got int"),
    ({"given": torch.tensor([[-1, 5, 6]])}, r"given must be one sequence of token ids, \[n\]; got shape \[1, 3\]"),
    ({"suffix": torch.ones(2, dtype=torch.int64, device="meta")}, "suffix must be a dense tensor that holds values"),
    ({"constraint": torch.ones(VOCAB)}, "constraint must be an int32 bitmask or bool, on cpu; got torch.float32 on cpu"),
    ({"constraint": torch.ones(4, dtype=torch.int32, device="meta")}, "constraint must be .* got torch.int32 on meta"),
    ({"constraint": torch.ones(4, dtype=torch.int32).to_sparse()}, "constraint must be an int32 bitmask or bool, on"),
    ({"logits_processor": 5}, "logits_processor must be a function of token ids and scores, .* got 5"),
])  # fmt: skip
def test_what_can_never_be_decoded(model, options, message):
    engine = engine_for(model)
    with pytest.raises((ValueError, TypeError), match=message):
        engine.add_request([5, 6, 7], max_new_tokens=3, **options)
    assert list(engine) == []


@pytest.mark.parametrize("constraint", [
    torch.ones(VOCAB), torch.ones(1, 1, 1, 4, dtype=torch.int32), torch.ones(4, dtype=torch.int32).to_sparse(),
    torch.ones(VOCAB, dtype=torch.complex64),
], ids=str)  # fmt: skip
def test_what_can_constrain_no_request_of_an_engine(model, constraint):
    with pytest.raises(ValueError, match="constraint must "):
        dk.Engine(model, slots=1, max_length=32, constraint=constraint)


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("temperature", 1, True), ("temperature", 1.0, True), ("block_length", 1, 1.0), ("block_length", 1, True),
    ("eos_token_id", 1, True), ("eos_token_id", (1,), (True,)), ("eos_token_id", (1,), (1.0,)),
])  # fmt: skip
def test_equal_values_of_another_type(model, name, good, bad):
    """What an earlier request had does not make them valid."""
    engine = engine_for(model)
    engine.add_request([5], max_new_tokens=2, **{name: good})
    with pytest.raises(ValueError, match=rf"{name}(\[0\])? must be"):
        engine.add_request([5], max_new_tokens=2, **{name: bad})


@pytest.mark.parametrize(("options", "message"), [
    ({"rule": dk.NextToken()}, "since rule NextToken predicts the first token of the answer from the last of the prompt"),
    ({"cfg_scale": 1.0}, r"since guidance \(cfg_scale\) masks the prompt"),
])  # fmt: skip
def test_without_a_prompt(model, options, message):
    with pytest.raises(ValueError, match="input_ids must hold at least one token, " + message):
        dk.Engine(model, slots=1, max_length=32, reserve=False).add_request([], max_new_tokens=2, **options)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda e: e.get_result(timeout="x"), ValueError, "timeout must be None or a number; got 'x'"),
    (lambda e: e.get_result(timeout=float("nan")), ValueError, "timeout must be None or a number; got nan"),
    (lambda e: e.join("x"), ValueError, "timeout must be None or a number; got 'x'"),
    (lambda e: e.stop(timeout="x"), ValueError, "timeout must be None or a number; got 'x'"),
    (lambda e: e.get_result([]), TypeError, "request_id must be a string; got list"),
    (lambda e: e.cancel_request([]), TypeError, "request_id must be a string; got list"),
    (lambda e: e.register_result_handler(5, print), TypeError, "request_id must be a string; got int"),
    (lambda e: e.add_requests(5), TypeError, "inputs must be a list of prompts; got int"),
    (lambda e: e.add_requests("ab"), TypeError, "inputs must be a list of prompts; got str"),
    (lambda e: e.add_requests([[5], [2**40]]), ValueError, r"inputs\[1\] must hold ids .*; got 1099511627776"),
    (lambda e: e.add_requests([[5], [6] * 99]), ValueError, r"inputs\[1\] \(99 tokens\) and the answer"),
])  # fmt: skip
def test_calls(model, call, error, message):
    engine = engine_for(model)
    with pytest.raises(error, match=message):
        call(engine)
    engine.join(float("inf"))
    engine.add_request([5], "again", max_new_tokens=2)  # has not been stopped
    assert engine.get_result("again", timeout=np.float32(60)).is_finished()


@pytest.mark.parametrize(("inputs", "options", "message"), [
    (None, {}, "inputs must be a list of prompts; got NoneType"), (5, {}, "inputs must be a list of prompts; got int"),
    ([None], {}, r"inputs\[0\] must be a prompt; got None"),
    ([[5]], {"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1; got 0"),
    ([[5]], {"max_new_tokens": ["a"]}, "max_new_tokens must be an integer of at least 1; got 'a'"),
    ([[5]], {"suffix": 5}, "suffix must be a sequence of token ids; got int"),
    (torch.tensor(5), {}, r"inputs must be a list of prompts; got a tensor of shape \[\]"),
    ([[5], [2**40]], {}, r"inputs\[1\] must hold ids .*; got 1099511627776"),
    ([[5], torch.ones(1, device="meta")], {}, r"inputs\[1\] must be a dense tensor that holds values; got one on"),
    ([[5]], {"seed": torch.ones(1, device="meta")}, "seed must be a dense tensor that holds values; got one on"),
    ([[5]], {"generation_config": {"max_new_tokens": 4}}, "generation_config must be a .* GenerationConfig; got dict"),
    ([[5]], {"generation_config": ...}, "generation_config must be a .* GenerationConfig; got ellipsis"),
], ids=str)  # fmt: skip
def test_batches(model, inputs, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dk.generate_batch(model, inputs, **options)


@pytest.mark.parametrize("kind", ["duo", "langflow"])
def test_models_without_a_mask_token(kind, tmp_path):
    """Answers of different lengths, each as alone: with as many steps as it has tokens."""
    research.write(kind, tmp_path)
    model = dk.adapt(dk.load(tmp_path))
    rows, lengths = [[5, 6, 7], [8], [9, 10], [11, 12]], [6, 3, 3, 5]
    found = dk.generate_batch(model, rows, max_new_tokens=lengths, seed=[1, 2, 3, 4], slots=3)
    for output, row, length, seed in zip(found.values(), rows, lengths, (1, 2, 3, 4)):
        want = dk.generate(model, [row], max_new_tokens=length, seed=seed)
        end = int(want.length[0]) - want.prompt_length
        assert output.generated_tokens == want.generated[0, :end].tolist(), output.error
        assert output.num_forwards == int(want.num_forwards[0])


@pytest.mark.parametrize(
    "options,match",
    [
        ({"cache": "d2cache", "block_length": 4}, "cache='d2cache' decodes the answer as a single block"),
        ({"rule": dk.Lengthening(), "cfg_scale": 0.5}, "cfg_scale cannot be used with rule Lengthening"),
        ({"rule": dk.S2D2()}, "rule S2D2 needs attention='block'"),
        ({"rule": dk.NextToken(), "cfg_scale": 0.5}, "cfg_scale cannot be used with rule NextToken"),
        ({"rule": dk.Strided(3)}, "rule Strided needs attention='causal'"),
        (
            {"rule": dk.Pipeline(), "sub_block_length": 2, "block_length": 4},
            "sub_block_length cannot be used with rule",
        ),
    ],
    ids=["d2cache", "lengthening", "s2d2", "next", "strided", "pipeline"],
)
def test_what_no_program_can_decode_is_refused_at_once(options, match):
    """By the engine where it is its own, by `add_request` where it is a request's."""
    model = build()
    with pytest.raises(ValueError, match=match):
        dk.Engine(model, slots=2, max_length=48, **options)
    engine = dk.Engine(model, slots=2, max_length=48)
    with pytest.raises(ValueError, match=match):
        engine.add_request([5, 6, 7], max_new_tokens=12, **options)
    request = engine.add_request([5, 6, 7], max_new_tokens=12)
    assert engine.get_result(request).status is dk.RequestStatus.FINISHED


def test_where_a_drafter_goes():
    with pytest.raises(TypeError, match=r"unknown decoding option drafter: .*rule=dlmkernels\.Drafted\(drafter\)"):
        dk.Engine(build(), drafter=3)
