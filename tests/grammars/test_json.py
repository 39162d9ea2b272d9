# SPDX-License-Identifier: Apache-2.0
"""JSON schemas held in decodings: every answer of every rule is valid, however long, alone, in a batch, in an engine."""

import json
import time

import jsonschema
import numpy as np
import pytest
import torch

import dlmkernels as dk
from decodings import lively
from dlmkernels.grammars import make
from dlmkernels.grammars.texts import token_texts
from engines import engine_for
from json_model import drawn, tokenizer
from small_models import prompts

PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
}  # fmt: skip
SCHEMAS = [
    PERSON, {"type": "string"}, {"type": "integer", "exclusiveMinimum": 3, "maximum": 77}, {"type": "number"},
    {"type": ["boolean", "null"]}, {"enum": ["a\"b", 1, None, {"x": [1]}, "é\n"]}, {"const": {"a": "b c"}},
    {"type": "integer", "enum": [1, "x", True, 2]}, {"type": "array", "items": {"type": "boolean"}},
    {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 4}, {"type": "array", "maxItems": 0},
    {"prefixItems": [{"const": 1}, {"const": "x"}, {"type": "null"}], "items": False, "minItems": 2},
    {"prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "minItems": 3}, {"type": "object"},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"], "type": "object"},
    {"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "object", "additionalProperties": False},
    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["z"]},
    {"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"const": "l"}, {"$ref": "#/$defs/y"}]}, "y": {"type": "null"}}},
    {"type": "string", "pattern": "^[ab]{2,3}$"}, {"type": "string", "pattern": "b"}, {"minLength": 2, "maxLength": 3},
    {"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}, {"type": "string", "format": "uuid"},
    {"allOf": [{"type": "null"}]}, {"title": "anything"}, True,
]  # fmt: skip


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_texts_of_a_schema_satisfy_it(schema, words):
    grammar, texts = dk.json_schema(schema, words), token_texts(words)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "uuid"]))
    rng, seen = np.random.default_rng(5), set()
    for _ in range(30):
        text = drawn(grammar.automaton, texts, rng, most=60)
        validator.validate(json.loads(text))
        seen.add(text)
    assert seen


def test_the_other_values_of_a_schema_are_refused(words):
    """By the automaton, of texts that are as they should be and of texts that are not."""
    machine = dk.json_schema(PERSON, words).automaton

    def takes(text):
        state = machine.start
        for token in words(text, add_special_tokens=False)["input_ids"]:
            state = machine.table[machine.class_of[token], state]
        return bool(machine.final[state])

    good = ['{"name": "ab", "age": 3}', '{"name":"","age":130,"tags":[]}', '{"name": "a", "age": 0, "tags": ["a","b"]}']
    bad = ['{"name": "ab"}', '{"age": 3, "name": "ab"}', '{"name": "ab", "age": 131}', '{"name": "ab", "age": 3', "[]",
           '{"name": "ab", "age": -1}', '{"name": "abcdefghijklm", "age": 3}', '{"name": "a"b", "age": 3}'
           '{"name": "ab", "age": 3, "tags": ["c"]}', '{"name": "ab", "age": 3} ', ""]  # fmt: skip
    assert [takes(text) for text in good] == [True] * 3 and not any(map(takes, bad))


RULES = [
    {"rule": dk.Threshold(0.3)}, {"rule": dk.Quota()}, {"rule": dk.EntropyBound(0.5), "temperature": 1.0},
    {"rule": dk.Backtracking(2)}, {"rule": dk.TokenEditing(0.4, 0.3)},
    {"rule": dk.Threshold(0.3), "cache": "dual"},
    {"rule": dk.Threshold(0.3), "eos_policy": "block"}, {"rule": dk.Quota(), "eos_policy": "none"},
]  # fmt: skip


def answer_of(out, row, words):
    """A row's answer as a value, read as far as its end token."""
    tokens = out.generated[row].tolist()
    end = tokens.index(1) if 1 in tokens else int(out.length[row]) - out.prompt_length
    return json.loads(words.decode(tokens[:end]))


@pytest.mark.parametrize("options", RULES, ids=str)
def test_every_answer_is_valid_and_whole(model, words, options):
    out = dk.generate(
        model, prompts(3, 5), constraint=dk.json_schema(PERSON, words), max_new_tokens=28, block_length=8, seed=2,
        **{"eos_policy": "fill"} | options,
    )  # fmt: skip
    assert out.complete.all()
    for row in range(3):
        jsonschema.validate(answer_of(out, row, words), PERSON)


def test_tokens_are_committed_out_of_order_and_several_at_once(model, words):
    schema = {"type": "object", "required": ["a", "b"],
              "properties": {"a": {"const": "ab12"}, "b": {"type": "string", "maxLength": 4}}}  # fmt: skip
    out = dk.generate(
        model, prompts(1, 5), constraint=dk.json_schema(schema, words), max_new_tokens=28, block_length=28,
        rule=dk.Threshold(0.3), eos_policy="fill",
    )  # fmt: skip
    steps = out.commit_step[0, 5 : int(out.length[0])].tolist()
    assert sorted(steps) != steps and int(out.num_forwards[0]) < len(steps) / 2
    assert answer_of(out, 0, words)["a"] == "ab12"


@pytest.mark.parametrize("spare", [0, 1, 2, 7])
def test_the_answer_closes_before_its_canvas_ends(model, words, spare):
    grammar = dk.json_schema(PERSON, words)
    new = grammar.min_tokens + spare
    out = dk.generate(
        model, prompts(2, 5), constraint=grammar, max_new_tokens=new, block_length=4, temperature=1.0, seed=7,
        rule=dk.Threshold(0.3), eos_policy="fill",
    )  # fmt: skip
    assert out.complete.all()
    for row in range(2):
        jsonschema.validate(answer_of(out, row, words), PERSON)


def test_a_canvas_that_is_too_short_is_refused(model, words):
    grammar = dk.json_schema(PERSON, words)
    message = (
        f"constraint: json_schema needs max_new_tokens of at least {grammar.min_tokens}; got an answer of 9 tokens"
    )
    with pytest.raises(ValueError, match=message):
        dk.generate(model, prompts(1, 5), constraint=grammar, max_new_tokens=9)
    engine = engine_for(model)
    with pytest.raises(ValueError, match=message):
        engine.add_request([5, 6, 7], max_new_tokens=9, constraint=grammar)


def test_given_tokens_that_contradict_are_an_error(model, words):
    given = torch.full((1, 24), -1)
    given[0, 0] = words.convert_tokens_to_ids("z")
    with pytest.raises(ValueError, match="no answer of exactly 24 tokens satisfies json_schema"):
        dk.generate(model, prompts(1, 5), constraint=dk.json_schema(PERSON, words), max_new_tokens=24, given=given)


def test_rows_of_a_batch_do_not_depend_on_each_other(model, words):
    options = {
        "constraint": dk.json_schema(PERSON, words), "block_length": 8, "rule": dk.Threshold(0.3), "eos_policy": "fill",
    }  # fmt: skip
    several = [prompts(1, n, seed=n)[0] for n in (3, 6, 9)]
    news = (24, 40, 31)
    out = dk.generate(model, [p.tolist() for p in several], max_new_tokens=news, **options)
    for row, (prompt, new) in enumerate(zip(several, news)):
        alone = dk.generate(model, prompt[None], max_new_tokens=new, **options)
        length = int(alone.length[0]) - alone.prompt_length
        assert out.generated[row, :length].tolist() == alone.generated[0, :length].tolist()
        jsonschema.validate(answer_of(out, row, words), PERSON)


def test_in_an_engine_schemas_share_forwards(model, words):
    grammars = [
        dk.json_schema(PERSON, words), dk.json_object(words), dk.regex("(ab|12)+", words),
        dk.json_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 1}, words),
    ]  # fmt: skip
    engine = engine_for(model, slots=3, max_length=64, tokenizer=words, reserve=False, eos_policy="fill")
    asked = [(prompts(1, 3 + k, seed=k)[0].tolist(), 24 + k, grammars[k % 4]) for k in range(8)]
    ids = [engine.add_request(p, max_new_tokens=n, constraint=g, seed=1) for p, n, g in asked]
    found = {output.request_id: output for output in engine}
    assert len(engine._rounds.pool.lanes) == 1
    for k, (name, (prompt, new, grammar)) in enumerate(zip(ids, asked)):
        output = found[name]
        assert output.complete and output.finish_reason in ("eos", "length"), output
        alone = dk.generate(
            model, torch.tensor([prompt]), max_new_tokens=new, constraint=grammar, seed=1, block_length=8,
            rule=dk.Threshold(0.4), eos_policy="fill",
        )  # fmt: skip
        assert output.generated_tokens == alone.generated[0, : int(alone.length[0]) - len(prompt)].tolist()
        if k % 4 == 0:
            jsonschema.validate(json.loads(output.text), PERSON)
        elif k % 4 != 2:
            assert isinstance(json.loads(output.text), (dict, list))


def test_compiled_once_for_each_tokenizer(words):
    same = {"properties": dict(PERSON["properties"]), **{k: v for k, v in PERSON.items() if k != "properties"}}
    assert dk.json_schema(PERSON, words) is dk.json_schema(json.dumps(same), words)
    assert dk.json_schema(PERSON, tokenizer()) is not dk.json_schema(PERSON, words)
    for k in range(make.KEPT + 3):
        dk.regex(f"a{{{k + 1}}}", words)
    assert len(make._compiled[words]._kept) == make.KEPT
    assert "min_tokens=14" in repr(dk.json_schema(PERSON, words)), repr(dk.json_schema(PERSON, words))


def many(more):
    """A short schema that becomes huge when its references are followed."""
    names = [f"a{k}" for k in range(12)]
    after = [*({"$ref": f"#/$defs/{name}"} for name in names[1:]), {"type": "null"}]
    return {"$ref": "#/$defs/a0", "$defs": {
        name: {"type": "array", "prefixItems": [inner] * 10, **more} for name, inner in zip(names, after)
    }}  # fmt: skip


CIRCULAR = []
CIRCULAR.append(CIRCULAR)
REFUSED = [
    ("{", "schema is not valid JSON"), ([], "schema must be an object or true; got"),
    (False, "schema must be an object or true; got False"),
    ({"type": "text"}, "schema.type must be one or more of object"), ({"not": {}}, "schema: unsupported keyword not"),
    ({"type": "array", "uniqueItems": True}, "schema: unsupported keyword uniqueItems"),
    ({"type": "number", "minimum": 0.5}, "schema: unsupported keyword minimum"),
    ({"type": "integer", "minimum": 0.5}, "bounds of an integer must be integers"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer is at least 3 and at most 2"),
    ({"oneOf": [{}]}, "schema: unsupported keyword oneOf"),
    ({"anyOf": []}, "schema.anyOf must be a non-empty list of schemas"),
    ({"anyOf": [{}], "type": "null"}, "schema: anyOf cannot be combined with type"),
    ({"allOf": [{}, {}]}, "schema.allOf must be a list of exactly one schema"), ({"$ref": "#/x"}, "there is no #/x"),
    ({"$ref": "http://a/b"}, "which point into this schema"),
    ({"properties": {"a": {"$ref": "#"}}}, "# contains itself, but recursive schemas"),
    ({"enum": []}, "schema.enum must be a non-empty list"), ({"type": "null", "const": 1}, "have no value in common"),
    ({"type": "string", "format": "email"}, "schema.format must be one of date, time"),
    ({"type": "string", "pattern": ".*"}, "can match a quotation mark"), ({"pattern": "("}, "is not a supported"),
    ({"type": "string", "pattern": "a", "minLength": 2}, "pattern cannot be combined with minLength"),
    ({"type": "string", "minLength": -1}, "schema.minLength must be an integer from 0 to 4096; got -1"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems must be at most maxItems; got 3 and 2"),
    ({"prefixItems": [{}], "items": False, "minItems": 2}, "no array has at least 2 and at most 1 items"),
    ({"properties": []}, "schema.properties must be an object"), ({"required": "a"}, "schema.required must be a list"),
    ({"required": ["a"], "additionalProperties": False}, "names 'a', which is not in properties"),
    ({"type": "integer", "minimum": 5, "maximum": 20, "exclusiveMinimum": True},
     "schema.exclusiveMinimum: bounds of an integer must be integers; got True"),
    ({"type": "integer", "maximum": 10**5000}, "schema.maximum must have at most 100 digits"),
    ('{"maximum": 1' + "0" * 5000 + "}", "schema is not valid JSON: Exceeds the limit"),
    ({"type": "integer", "minimum": 10**20}, "integers have at most 18 digits, so none is at least 1000"),
    ({"properties": {1: {"type": "integer"}}}, "schema.properties must have strings as names; got 1"),
    ({1: 2}, "schema: keywords must be strings; got 1"), ("[" * 100_000, "schema is not valid JSON: it is nested too deeply"),
    ({"type": "string", "format": []}, "schema.format must be one of date, time"),
    ({"const": {1, 2}}, "schema.const must be a JSON value; got {1, 2}"),
    ({"enum": [1, float("nan")]}, "schema.enum must be a JSON value; got nan"),
    ({"const": CIRCULAR}, "schema.const must be a JSON value; got [[...]]"),
    ({"const": 10**5000}, "schema.const must be a JSON value; got an integer of too many digits"),
    ({"const": {1: 2}}, "schema.const must be a JSON value; got {1: 2}"),
    ({"$ref": "#foo"}, "schema.$ref must be '#' or '#/…', which point into this schema; got '#foo'"),
    ({"type": "number", "minimum": 0, "maximum": 5}, "schema: unsupported keywords maximum, minimum (see json_schema)"),
    ({"type": "string", "pattern": "a(?=b)b"}, "'a(?=b)b' is not a supported regular expression: lookahead and"),
    ({"type": "string", "pattern": "a{1000000}"}, "schema.pattern: 'a{1000000}' is too large: written without"),
    ({"type": "array", "maxItems": 4096}, "schema is too large: written without repetition counts, it has more than"),
    ({"type": "array", "minItems": None}, "schema.minItems must be an integer from 0 to 4096; got None"),
    (many({}), "schema is too large: the regular expression of #/$defs/"),
    (many({"maxItems": 0}), "schema is too large: with its references followed, it has over 20000 subschemas"),
    ({"anyOf": [{"pattern": f"^(a|b)*a(a|b){{10}}{k}$"} for k in range(40)]}, "its patterns together take too long"),
    ({"properties": {"a": {"multipleOf": 2, "type": "integer"}}}, "schema.a: unsupported keyword multipleOf"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_by_name(schema, message, words):
    with pytest.raises(ValueError) as raised:
        dk.json_schema(schema, words)
    assert message in str(raised.value)


@pytest.mark.parametrize("schema", [
    {"type": "string", "maxLength": 4096}, {"type": "array", "items": {"type": "string", "maxLength": 1000}},
    {"enum": [f"{k * 123456789:032x}" for k in range(1000)]},
])  # fmt: skip
def test_large_schemas_compile_quickly(schema, words):
    begin = time.process_time()
    dk.json_schema(schema, words)
    assert time.process_time() - begin < 8  # about one second on an idle core


def test_schemas_nested_without_end_are_refused(words):
    schema = {"type": "null"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        dk.json_schema(schema, words)


def test_without_interegular(words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "interegular", None)
    with pytest.raises(ImportError, match=r'regex needs interegular: pip install "dlmkernels\[grammar\]"'):
        dk.regex("a", words)


def test_other_arguments(words):
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers; got int"):
        dk.regex("a", 3)
    with pytest.raises(TypeError, match="pattern must be a string; got int"):
        dk.regex(3, words)
