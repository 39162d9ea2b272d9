# SPDX-License-Identifier: Apache-2.0
"""What tasks and arguments say about decoding: honoured, or refused by name."""

import json

import pytest

import dlmkernels as dk
from dlmkernels.evaluation.arguments import read_settings
from dlmkernels.evaluation.generation import DEFAULT_LENGTH, read_generation, seed_of
from dlmkernels.evaluation.tally import Records, Tally

KNOWN_SEED = 1577726722538906551
PLAIN = dk.DecodingConfig()


def read(kwargs, config=PLAIN, prefer=None):
    stated = frozenset(n for n in config.__dataclass_fields__ if getattr(config, n) != getattr(PLAIN, n))
    return read_generation(kwargs, config, stated, prefer)


def test_arguments_become_a_configuration():
    settings = read_settings(
        "demo", batch_size=1, device="cpu", preset="llada", rule="threshold:0.8", steps=None, slots=3,
        suppress_token_ids="1+2", defer_token_ids=7, eos_token_id="[4, 5]", max_new_tokens=32,
    )  # fmt: skip
    config = settings.config()
    assert config.rule == dk.Threshold(0.8) and config.eos_policy == "none" and config.max_new_tokens == 32
    assert tuple(config.suppress_token_ids) == (1, 2) and tuple(config.defer_token_ids) == (7,)
    assert tuple(config.eos_token_id) == (4, 5) and settings.slots == 3
    assert read_settings("demo", batch_size="8").slots == 8


@pytest.mark.parametrize(
    "given, message",
    [
        ({"temprature": 1}, "unknown temprature"),
        ({"trust_remote_code": True}, "never run"),
        ({"gen_length": 9}, "max_new_tokens"),
        ({"logit_bias": 1}, "cannot be given as text"),
        ({"preset": "lada"}, "unknown preset"),
        ({"rule": "treshold:0.9"}, "unknown rule"),
        ({"rule": 0.9}, "rule must be a string"),
        ({"suppress_token_ids": "1,x"}, "suppress_token_ids must be integers"),
        ({"temperature": -1}, "temperature"),
        ({"slots": 0}, "slots"),
        ({"max_length": 1}, "max_length"),
        ({"mc_num": 0}, "mc_num"),
        ({"likelihood_batch": 0}, "likelihood_batch"),
        ({"rolling_block": 0}, "rolling_block"),
        ({"likelihood": "exact"}, "likelihood must be one of"),
        ({"check_greedy": "yes"}, "check_greedy"),
        ({"deterministic": 2}, "deterministic"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"prefer": "me"}, "prefer must be one of"),
        ({"too_long": "cut"}, "too_long must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"batch_size": "auto"}, "--batch_size must be a number"),
        ({"batch_size": 4, "slots": 2}, "set the same value"),
        ({"max_batch_size": 4}, "no automatic batch size"),
    ],
)
def test_refused_arguments(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_settings("demo", **given)


@pytest.mark.parametrize("pretrained", [None, "", 3])
def test_a_model_is_needed(pretrained):
    with pytest.raises(ValueError, match="pretrained must name the model"):
        read_settings(pretrained)


def test_kwargs_are_honoured():
    how = read({"until": ["\n\n", "Q:"], "max_gen_toks": 40, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (how.max_new_tokens, how.until) == (40, ("\n\n", "Q:"))
    assert how.options == {"temperature": 0.7, "top_p": 0.9}
    greedy = read({"until": "x", "do_sample": False, "temperature": 0.0, "top_p": 0.95})
    assert greedy.until == ("x",) and greedy.options == {} and greedy.max_new_tokens == DEFAULT_LENGTH
    assert read({"do_sample": True}).options == {"temperature": 1.0}
    ours = read({"rule": "factor:0.5", "block_length": 8, "infill": True})
    assert ours.options == {"rule": dk.Factor(0.5), "block_length": 8} and ours.infill


def test_contradictions_are_decided_by_the_user():
    sdar = dk.preset("sdar", top_p=0.9)
    kwargs = {"do_sample": False, "max_gen_toks": 99}
    with pytest.raises(ValueError, match=r"set temperature=0\.0 \(not 1\.0\).*prefer=model.*prefer=task"):
        read(kwargs, sdar)
    assert read(kwargs, sdar, "task").options == {"temperature": 0.0, "top_p": 1.0}
    assert read(kwargs, sdar, "model").options == {}
    long = PLAIN.replace(max_new_tokens=64)
    with pytest.raises(ValueError, match=r"max_new_tokens=99 \(not 64\)"):
        read(kwargs, long)
    assert read(kwargs, long, "model").max_new_tokens == 64 and read(kwargs, long, "task").max_new_tokens == 99
    assert read({}, long).max_new_tokens == 64 and read({"max_gen_toks": 64}, long).max_new_tokens == 64


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_beams": 4}, "unsupported num_beams"),
        ({"repetition_penalty": 1.1}, "unsupported repetition_penalty"),
        ({"until": [""]}, "until must be"),
        ({"until": 3}, "until must be"),
        ({"max_gen_toks": 0}, "max_gen_toks must be"),
        ({"max_gen_toks": 8, "max_new_tokens": 9}, "contradict each other"),
        ({"do_sample": "no"}, "do_sample must be true or false"),
        ({"do_sample": False, "temperature": 0.5}, "has no effect with do_sample=False"),
        ({"do_sample": True, "temperature": 0}, "needs a temperature above 0"),
        ({"temperature": "warm"}, "temperature must be a number"),
        ({"infill": 1}, "infill must be true or false"),
        ("until", "must be a dictionary"),
    ],
)
def test_refused_kwargs(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read(kwargs)


def test_seeds_follow_from_the_content_alone():
    a = seed_of(0, "prompt", {"x": 1, "y": 2}, 0)
    assert a == seed_of(0, "prompt", {"y": 2, "x": 1}, 0) and 0 <= a < 2**63
    others = {
        seed_of(1, "prompt", {"x": 1, "y": 2}, 0),
        seed_of(0, "prompt", {"x": 1, "y": 2}, 1),
        seed_of(0, "prompT"),
    }
    assert len(others | {a}) == 4
    assert a == KNOWN_SEED  # in any process: Python's own hashes differ from one to the next


def test_tallies_add_up(tmp_path):
    one, two = (
        Tally(answers=1, new_tokens=10, forwards=5, decoded_tokens=20, seconds=2.0),
        Tally(answers=1, seconds=4.0),
    )
    two.estimate(3.0), two.estimate(float("nan"))
    both = (one + two).summary()
    assert both["answers"] == 2 and both["tokens_per_forward"] == 4 and both["new_tokens_per_second"] == 2.5
    assert both["likelihoods_estimated"] == 2 and both["likelihood_standard_error"] == 3.0
    records = Records(str(tmp_path / "sub/r.jsonl"), rank=1, world_size=2)
    records.add(total=-1.0, standard_error=float("nan"))
    assert json.loads((tmp_path / "sub/r.jsonl.rank1").read_text()) == {"total": -1.0, "standard_error": None}
