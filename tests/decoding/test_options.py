# SPDX-License-Identifier: Apache-2.0
"""No option without effect; numbers of any kind; configurations as values."""

import copy
import dataclasses
import inspect
import pickle
import re

import numpy as np
import pytest
import torch

import dlmkernels as dk
from dlmkernels import scores
from dlmkernels.decoding import names
from dlmkernels.decoding.rules.named import parse_rule
from small_models import MASK, build, prompts


@pytest.fixture(scope="module")
def model():
    return build(seed=3, sharpness=3.0)


SHORT = {"max_new_tokens": 16, "block_length": 8, "eos_policy": "none"}
SAMPLED = SHORT | {"temperature": 1.0, "seed": 3}
BLOCKS = SHORT | {"attention": "block"}
KEPT = BLOCKS | {"cache": "block"}
UNUSUAL = tuple(range(4, 40))
#: a field, a value that is not its default, and a decoding in which it makes a difference; one line for each field
ACTS = [
    ("max_new_tokens", 8, SHORT), ("block_length", 4, SHORT), ("sub_block_length", 2, KEPT), ("steps", 4, SHORT),
    ("rule", dk.Threshold(0.3), SHORT), ("score", "margin", SHORT), ("temperature", 1.0, SHORT | {"seed": 3}),
    ("top_k", 2, SAMPLED), ("top_p", 0.3, SAMPLED), ("top_p_first", True, SAMPLED | {"top_k": 3, "top_p": 0.5}),
    ("keep_crossing", False, SAMPLED | {"top_p": 0.5}), ("distribution", "tempered", SAMPLED | {"temperature": 0.5}),
    ("order_temperature", 0.5, SHORT | {"seed": 3}), ("cache", "dual", SHORT),
    ("sub_block_cache", True, KEPT | {"sub_block_length": 2}), ("warmup", 3, SHORT | {"cache": "dual"}),
    ("refresh_interval", 2, SHORT | {"cache": "dual"}), ("vicinity", (3, 3), SHORT | {"cache": "dual"}),
    ("fuse_commit", False, KEPT), ("seed", 4, SAMPLED), ("cfg_scale", 1.0, SHORT), ("mask_token_id", 90, SHORT),
    ("eos_token_id", UNUSUAL, SHORT | {"eos_policy": "fill"}), ("pad_token_id", 9, SHORT | {
        "eos_token_id": UNUSUAL, "eos_policy": "fill"}),
    ("suppress_token_ids", UNUSUAL, SHORT), ("constraint", torch.arange(MASK) > 60, SHORT),
    ("logit_bias", {5: 100.0}, SHORT),
    ("defer_token_ids", UNUSUAL, SHORT), ("eos_policy", "none", {"max_new_tokens": 16, "eos_token_id": UNUSUAL}),
    ("logit_alignment", "shift", SHORT), ("attention", "causal", SHORT), ("block_grid", "absolute", BLOCKS),
    ("seeded", True, BLOCKS | {"attention": "causal"}),
]  # fmt: skip
#: a field, a value, and a decoding in which it can make none
IDLE = [
    ("steps", 4, {"rule": dk.Threshold(0.5)}), ("score", "margin", {"rule": dk.EntropyBound(0.5)}),
    ("score", "margin", {"rule": dk.Ancestral(), "temperature": 1.0}), ("temperature", 1.0, {
        "rule": dk.RenoisedEntropyBound()}),
    ("top_k", 5, {}), ("top_p", 0.9, {}),
    ("top_p_first", True, {"temperature": 1.0, "top_p": 0.5}), ("keep_crossing", False, {"temperature": 1.0}),
    ("distribution", "tempered", {}), ("distribution", "filtered", {}),
    ("order_temperature", 0.5, {"score": "random", "rule": dk.Quota()}), ("order_temperature", 0.5, {"rule": dk.RunEditing()}),
    ("order_temperature", 0.5, {"rule": dk.Ancestral()}), ("sub_block_cache", True, {}),
    ("sub_block_cache", True, {"attention": "block", "cache": "block"}), ("warmup", 2, {}), ("refresh_interval", 2, {}),
    ("vicinity", (1, 1), {}), ("vicinity", (0, 4), {"cache": "prefix"}), ("fuse_commit", False, {}),
    ("fuse_commit", False, {"attention": "causal-context", "cache": "block"}),
    ("fuse_commit", False, {"attention": "block", "cache": "block", "seeded": True}),
    ("defer_token_ids", (5,), {"rule": dk.PathPlanning(), "temperature": 1.0}), ("block_grid", "absolute", {}),
    ("block_grid", "absolute", {"attention": "causal"}), ("eos_policy", "block", {
        "attention": "causal", "cache": "block", "logit_alignment": "shift", "rule": dk.Strided()}),
    *((name, value, {"attention": "causal", "cache": "block", "logit_alignment": "shift", "rule": dk.Strided()})
      for name, value in (("block_length", 8), ("sub_block_length", 2), ("score", "margin"), ("steps", 8),
                          ("defer_token_ids", (5,)), ("order_temperature", 1.0), ("seeded", True),
                          ("fuse_commit", False))),
    ("sub_block_length", 2, {"attention": "reordered", "cache": "block", "rule": dk.Reordered()}),
    ("warmup", 2, {"cache": "prefix", "rule": dk.EntropyPipeline()}),
]  # fmt: skip


def outcome(out):
    return [x.tolist() for x in (out.sequences, out.commit_step, out.confidence, out.num_forwards)]


def test_every_field_is_swept():
    how = {"lm_head", "logits_budget"}  # what is computed is the same: see test_head.py
    assert {name for name, *_ in ACTS} | how == {field.name for field in dataclasses.fields(dk.DecodingConfig)}


@pytest.mark.parametrize("name,value,options", ACTS, ids=lambda v: v if isinstance(v, str) else "")
def test_an_option_acts(model, name, value, options):
    ids = prompts(3, 7)
    options = options | ({"block_length": 8} if "block_length" not in options and name != "block_length" else {})
    options = {key: kept for key, kept in options.items() if key != name}
    assert outcome(dk.generate(model, ids, **options)) != outcome(dk.generate(model, ids, **options, **{name: value}))


@pytest.mark.parametrize("name,value,options", IDLE, ids=lambda v: v if isinstance(v, str) else "")
def test_an_idle_option_is_refused_by_name(model, name, value, options):
    ids, options = prompts(2, 6), {"max_new_tokens": 8} | options
    if options.get("attention") in ("block", "causal-context"):
        options["block_length"] = 4
    for call in (
        lambda: dk.generate(model, ids, **options, **{name: value}),
        lambda: dk.generate(model, ids, config=dk.DecodingConfig().replace(**options, **{name: value})),
        lambda: dk.generate(model, ids, config=dk.DecodingConfig(**options, **{name: value})),
        lambda: dk.generate(model, ids, config=options | {name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name}=.* has no effect"):
            call()


def test_an_option_of_infill(model):
    canvas = torch.full((1, 6), MASK)
    with pytest.raises(ValueError, match="max_new_tokens=9 has no effect"):
        dk.infill(model, canvas, max_new_tokens=9)


def test_a_preset_may_hold_what_lies_idle(model):
    """Filters of a sampler at temperature 0, the intervals of a cache that is switched off: they came along."""
    ids = prompts(1, 5)
    for config in (dk.preset("dkv-cache", cache="none"), dk.preset("dream", temperature=0.0, distribution="raw")):
        assert dk.generate(model, ids, config=config, max_new_tokens=8).complete.all()
    with pytest.raises(ValueError, match="warmup=3 has no effect"):
        dk.generate(model, ids, config=dk.preset("dkv-cache", cache="none"), warmup=3, max_new_tokens=8)


def test_numbers_of_any_kind(model):
    ids = prompts(2, 5)
    plain = dk.generate(
        model, ids, max_new_tokens=8, block_length=4, temperature=0.5, top_k=5, seed=7, cache="dual", vicinity=(1, 2),
        rule=dk.Threshold(0.5),
    )  # fmt: skip
    other = dk.generate(
        model, ids, max_new_tokens=np.int64(8), block_length=torch.tensor(4), temperature=np.float32(0.5),
        top_k=np.int32(5), seed=np.int64(7), cache="dual", vicinity=[1, np.int64(2)], rule=dk.Threshold(np.float32(0.5)),
    )  # fmt: skip
    assert outcome(plain) == outcome(other)
    for seeds in ([7, 8], np.array([7, 8]), (7, 8)):
        assert outcome(dk.generate(model, ids, max_new_tokens=8, temperature=1.0, seed=seeds)) == outcome(
            dk.generate(model, ids, max_new_tokens=8, temperature=1.0, seed=torch.tensor([7, 8]))
        )
    banned = dk.generate(model, ids, max_new_tokens=8, suppress_token_ids=torch.tensor([5, 6]))
    assert outcome(banned) == outcome(dk.generate(model, ids, max_new_tokens=8, suppress_token_ids=(5, 6)))


NO_NUMBERS = [True, "x", None, float("nan"), 1j, object()]
BAD = [*NO_NUMBERS, [1, 2], torch.zeros(2)]
#: where there may be one for each request
EACH_BAD = [*NO_NUMBERS, [1, "x"], [1, -1], [], torch.zeros(2, 2), {1: 2}]


@pytest.mark.parametrize("name,values", [
    ("max_new_tokens", [*EACH_BAD, 0, -1, 2**40, 1.5, [3, 1.5]]), ("warmup", [*BAD, 0, -1, 2**40, 1.5]),
    *((name, [*BAD, 0, 2**40]) for name in ("block_length", "sub_block_length", "steps", "refresh_interval")),
    ("temperature", [*EACH_BAD, -1, float("inf"), 1e-40, 1e39, [1, 1e39]]),
    ("order_temperature", [*BAD, -1, float("inf"), 1e-40, 1e39]),
    ("top_k", [*EACH_BAD, -1, 2**31]), ("top_p", [*EACH_BAD, -0.1, 1.1]), ("cfg_scale", [*BAD, -1, float("inf"), 1e39]),
    ("vicinity", [True, "xy", 3, (1,), (1, -1), (1, 2.5)]), ("seed", [True, "a", 1.5, 2**63, -(2**63) - 1, ["a"]]),
    *((name, [1, "yes"]) for name in ("top_p_first", "keep_crossing", "sub_block_cache", "fuse_commit", "seeded")),
    *((name, [5, "such", ["none"]]) for name in (
        "cache", "distribution", "eos_policy", "logit_alignment", "attention", "block_grid", "score")),
    *((name, ["x", 1.5, True]) for name in ("mask_token_id", "pad_token_id", "eos_token_id")),
    *((name, ["x", 5, [1.5], [True]]) for name in ("suppress_token_ids", "defer_token_ids")),
    ("rule", ["luck", "threshold:x", 5]), ("constraint", ["x", 5]),
    ("logit_bias", ["x", 5, {"a": 1.0}, {5: float("nan")}, {5: float("inf")}, {5: 1e39}, {5: 10**400}, {5: True}, torch.zeros(2, 2),
                    torch.zeros(3).int(), torch.zeros(3, device="meta")]),
])  # fmt: skip
def test_bad_values_are_named(name, values):
    default = getattr(dk.DecodingConfig(), name)
    for value in values:
        if value is None and default is None:
            continue
        with pytest.raises((ValueError, TypeError), match=name):
            dk.DecodingConfig(**{name: value})


def classes(module, base):
    return [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, base) and c is not base]


PARAMETRIC = [*classes(dk, dk.Rule), *classes(scores, dk.Score)]


@pytest.mark.parametrize("kind", PARAMETRIC, ids=lambda c: c.__name__)
def test_bad_parameters_are_named(kind):
    """Of every rule and score: what is no number, NaN, or of the wrong kind."""
    if kind is dk.VariableLength:
        return
    for field in dataclasses.fields(kind):
        assert field.name in kind.limits, f"{kind.__name__}.{field.name} is not checked"
        for value in ("x", float("nan"), [None], object()):
            with pytest.raises((ValueError, TypeError), match=field.name):
                kind(**{field.name: value})
        if field.default not in (True, False, None) and isinstance(field.default, int | float):
            assert kind(**{field.name: np.asarray(field.default)}) == kind()
            with pytest.raises(ValueError, match=field.name):
                kind(**{field.name: True})


@pytest.mark.parametrize(
    "name", ["temperature", "top_k", "cfg_scale", "max_new_tokens", "vicinity", "seed", "eos_token_id"]
)
def test_what_holds_no_readable_values(name):
    """Tensors without values, sets, whose order is arbitrary, and bytes; integers beyond any float."""
    sparse = torch.ones(2, dtype=torch.int64).to_sparse()
    for value in (torch.empty((), device="meta"), torch.empty(2, device="meta"), sparse, {1, 2}, frozenset([1]), b"x"):
        if name == "seed" and isinstance(value, torch.Tensor):  # `generate` checks these
            continue
        with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
            dk.DecodingConfig(**{name: value})


@pytest.mark.parametrize("value", [10**400, -(10**400), [10**400]])
def test_integers_beyond_any_float(value):
    for name in ("temperature", "top_p", "cfg_scale"):
        with pytest.raises(ValueError, match=rf"^{name}(\[0\])? must be .* got"):
            dk.DecodingConfig(**{name: value})
    with pytest.raises(ValueError, match=r"threshold(\[0\])? must be a number within the range of float32; got"):
        dk.Threshold(value)


def test_tensors_that_generate_reads(model):
    ids = prompts(1, 5)
    nothing = torch.zeros(1, 5, dtype=torch.int64, device="meta")
    for options in (
        {"attention_mask": nothing}, {"seed": nothing[0, :1]}, {"negative_prompt": nothing, "cfg_scale": 1.0},
        {"rule": lambda: dk.Quota(schedule=torch.empty(2, device="meta"))},
    ):  # fmt: skip
        name = next(iter(options)).replace("rule", "schedule")
        with pytest.raises(ValueError, match=f"^{name} must be a dense tensor that holds values; got one on"):
            dk.generate(model, ids, **{k: v() if callable(v) else v for k, v in options.items()})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: dk.RenoisedEntropyBound(t_min=5, t_max=1), "t_min must be at most t_max=1; got 5"),
    (lambda: dk.AncestralRemask(strategy="loop", t_on=0.1, t_off=0.9), "t_off must be less than t_on=0.1; got 0.9"),
    (lambda: dk.PredictorCorrector(strategy="constant", t_on=0.1, t_off=0.1), "t_off must be less than t_on=0.1"),
    (lambda: scores.PositionWeighted(torch.tensor([0.5, torch.nan])), "frequency must hold finite numbers of at least"),
    (lambda: scores.PositionWeighted(torch.tensor([0.5, -1.0])), "frequency must hold finite numbers of at least 0"),
    (lambda: scores.PositionWeighted(torch.ones(2, device="meta")), "frequency must be a dense tensor that holds"),
    (lambda: dk.Quota(schedule=[10**400]), r"schedule\[0\] must be a number within the range of float32"),
    (lambda: dk.KVCache(-1), "num_slots must be an integer of at least 0; got -1"),
    (lambda: dk.KVCache("x"), "num_slots must be an integer of at least 0; got 'x'"),
])  # fmt: skip
def test_bad_ranges(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert dk.RenoisedEntropyBound(t_min=0.5, t_max=0.5).temperature(3, 8) == 0.5


def test_frequencies_of_another_vocabulary(model):
    with pytest.raises(ValueError, match="frequency must have one value for each of the 97 tokens of the model; got 3"):
        dk.generate(model, prompts(1, 5), score=scores.PositionWeighted(torch.ones(3)), rule=dk.Quota(), **SHORT)


@pytest.mark.parametrize("make", [
    lambda: dk.Threshold("x"), lambda: dk.Threshold(float("nan")), lambda: dk.Factor(-1), lambda: dk.Strided(0),
    lambda: dk.Threshold(strict="no"), lambda: dk.EarlyAnswer(answer=(5, 2)), lambda: dk.EarlyAnswer((1, 2)),
    lambda: dk.Backtracking(2.5), lambda: dk.Threshold(1e39), lambda: dk.CreditThreshold(weight=float("inf")),
])  # fmt: skip
def test_bad_rules(make):
    with pytest.raises((ValueError, TypeError), match=r"must (be|have)"):
        make()


@pytest.mark.parametrize(("name", "hint"), [
    ("temprature", "did you mean temperature?"), ("Temperature", "did you mean temperature?"),
    ("do_sample", "pass temperature=…"), ("max_tokens", "pass max_new_tokens=…"), ("num_beams", "not available"),
    ("threshold", r"pass rule=dlmkernels.Threshold(…)"), ("slot", "did you mean slots, an argument of Engine?"),
    ("slots", "it is an argument of Engine, and is not accepted here"),
    ("foo", "Known options: steps, "), ("foo", "Further arguments of generate: attention_mask, "),
])  # fmt: skip
def test_unknown_options_are_explained(model, name, hint):
    with pytest.raises(TypeError, match=re.escape(f"unknown decoding option {name}") + ".*" + re.escape(hint)):
        dk.generate(model, prompts(1, 5), **{name: 1})


def test_hints_about_options_are_true():
    """Names with a hint are unknown, and the arguments of functions are those that they have."""
    fields = dk.DecodingConfig.__dataclass_fields__
    assert not names.HINTS.keys() & fields.keys()
    for function, known in (
        (dk.generate, names.OF_GENERATE), (dk.Engine.__init__, names.OF_ENGINE),
        (dk.Engine.add_request, names.OF_REQUESTS),
    ):  # fmt: skip
        parameters = inspect.signature(function).parameters
        assert set(known) <= set(parameters)
        left_out = {"self", "model", "input_ids", "overrides", "options"}
        assert function is dk.Engine.add_request or set(parameters) - left_out == set(known)
    for hint in names.HINTS.values():
        for option in re.findall(r"pass (\w+)=", hint):
            assert option in {*fields, *names.OF_GENERATE}, option


@pytest.mark.parametrize(("name", "message"), [
    ("KLASS", "did you mean 'klass'?"), ("gpt", "has 70 of them, such as llada"),
    ("threshold:0.9", "that is a rule; pass rule='threshold:0.9', or --rule threshold:0.9"),
])  # fmt: skip
def test_unknown_presets_are_explained(name, message):
    with pytest.raises(ValueError, match=re.escape(message.replace("70", str(len(dk.PRESETS))))):
        dk.preset(name)


@pytest.mark.parametrize(("text", "message"), [
    ("EntropyBound:0.1", "did you mean 'entropy-bound:0.1'?"), ("Threshold(0.9)", "did you mean 'threshold:0.9'?"),
    ("treshold", "did you mean 'threshold'?"), ("klass", "that is a preset"), ("beam", "known: quota, time-quota"),
])  # fmt: skip
def test_unknown_rules_are_explained(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_rule(text)


@pytest.mark.parametrize(("options", "message"), [
    ({"eos_policy": "stop"}, r"eos_policy must be one of none, fill, block; got 'stop'\. An end token ends"),
    ({"eos_token_id": "</s>"}, r"got '</s>': pass tokenizer\.convert_tokens_to_ids\('</s>'\)"),
    ({"suppress_token_ids": "0"}, r"sequence of token ids; got '0': pass tokenizer\.convert_tokens_to_ids"),
    ({"logit_bias": {"0": -5}}, r"logit_bias must have token ids \(integers of at least 0\) as keys; got '0'"),
    ({"logit_bias": {0: "a"}}, "logit_bias must have -inf or numbers that fit into float32 as values; got 'a'"),
    ({"seed": "a"}, "seed must be an integer; got 'a'"), ({"seed": 2**63}, "seed must be an integer of at most 92"),
    ({"top_k": -1}, "top_k must be an integer of at least 0; got -1"),
])  # fmt: skip
def test_messages_teach(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dk.DecodingConfig(**options)


def test_forms_of_a_configuration(model):
    ids = prompts(1, 5)
    named = dk.generate(model, ids, config="klass", max_new_tokens=8)
    assert outcome(named) == outcome(dk.generate(model, ids, config=dk.preset("klass"), max_new_tokens=8))
    fields = dk.generate(model, ids, config={"rule": dk.Threshold(0.3), "max_new_tokens": 8})
    assert outcome(fields) == outcome(dk.generate(model, ids, rule=dk.Threshold(0.3), max_new_tokens=8))
    with pytest.raises(TypeError, match="config must be a DecodingConfig, the name of a preset, or a dict"):
        dk.generate(model, ids, config=5)
    with pytest.raises(TypeError, match=r"unknown decoding option ruler: did you mean rule\?"):
        dk.generate(model, ids, config={"ruler": 1})
    with pytest.raises(TypeError, match="config must be a dict of fields of DecodingConfig; got the key 1"):
        dk.generate(model, ids, config={1: 2, "steps": 3})
    with pytest.raises(ValueError, match=r"unknown preset 'klasse': did you mean 'klass'\?"):
        dk.generate(model, ids, config="klasse")


def test_configurations_are_values():
    """Equality, hash, copies and pickles, also with tensors in them."""

    def make(last=1):
        return dk.DecodingConfig(
            seed=torch.tensor([1, last]), constraint=torch.tensor([True, False]),
            score=scores.PositionWeighted(torch.tensor([0.5, 0.5])), suppress_token_ids=[3, 4],
        )  # fmt: skip

    config = make()
    assert config == make() and hash(config) == hash(make()) and config != make(2)
    assert config != dk.DecodingConfig() and config != config.replace(temperature=1.0) and config != 5
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config and same.asked == config.asked and "seed" in repr(same)
    for name, preset in dk.PRESETS.items():
        assert pickle.loads(pickle.dumps(preset)) == preset and not preset.asked, name


def test_a_double_precision_model():
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16.*got float64: call model.float\(\)"):
        dk.generate(build().double(), prompts(1, 4), max_new_tokens=4)
