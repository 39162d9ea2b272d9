# SPDX-License-Identifier: Apache-2.0
"""Automata over tokens against Python's own regular expressions, and grammars against all ways to fill a canvas."""

import itertools
import random
import re
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlmkernels.decoding.bitmask import unpack
from dlmkernels.decoding.constraint import AnswerPlace
from dlmkernels.grammars.automaton import TokenAutomaton, why_empty
from dlmkernels.grammars.expression import automaton_of
from dlmkernels.grammars.grammar import Grammar
from dlmkernels.grammars.make import regex
from dlmkernels.grammars.numbers import integers
from dlmkernels.grammars.texts import token_texts
from json_model import tokenizer

TEXTS = [None, None, "a", "b", "ab", "ba", "aab", "", "é"]
PAD, EOS, MASK, VOCAB = 0, 1, 9, 10
PATTERNS = ["(ab)*", "a{1,3}b?", "[^b]+|b", "(a|ba)*é", "ab|a(a|b)b"]


def automaton(pattern):
    return TokenAutomaton.of(pattern, TEXTS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reads_sequences_as_the_expression_reads_their_text(pattern):
    machine, lengths = automaton(pattern), []
    usable = [token for token, text in enumerate(TEXTS) if text]
    for count in range(4):
        for tokens in itertools.product(usable, repeat=count):
            state = machine.start
            for token in tokens:
                state = machine.table[machine.class_of[token], state]
            matches = re.fullmatch(pattern, "".join(TEXTS[t] for t in tokens)) is not None
            assert machine.final[state] == matches, tokens
            lengths += [count] * matches
    assert machine.shortest == min(lengths)


def drawn_pattern(draw, depth=3):
    """A random expression over a, b and é, which Python reads in the same way."""
    kind = draw.choice(["set"] if depth == 0 else ["set", "concatenation", "either", "repeated", "repeated", "flags"])
    if kind == "set":
        return draw.choice(["a", "b", "é", "[ab]", "[^a]", ".", "[^aé]", "()", r"[\d]", r"\w", "A"])
    parts = [drawn_pattern(draw, depth - 1) for _ in range(draw.choice([2, 2, 3]))]
    if kind == "concatenation":
        return "".join(parts)
    if kind == "either":
        return f"(?:{'|'.join(parts)})"
    if kind == "flags":
        return f"(?i:{parts[0]})"
    return f"(?:{parts[0]}){draw.choice(['*', '+', '?', '{2}', '{1,}', '{0,2}', '{,2}', '{2,3}', '{0}'])}"


@pytest.mark.parametrize("seed", range(60))
def test_random_expressions_match_what_python_matches(seed):
    interegular = pytest.importorskip("interegular")
    draw = random.Random(seed)
    pattern = drawn_pattern(draw)
    made = automaton_of(pattern)
    for count in range(6):
        for text in map("".join, itertools.product("abé", repeat=count)):
            state = made.start
            for character in text:
                state = made.delta[state, made.symbols.get(character, made.symbols[None])]
            # \w of interegular is ASCII only
            expected = re.fullmatch(pattern, text, 0 if "(?i" in pattern and "é" in pattern else re.ASCII)
            if r"\w" not in pattern or "é" not in text:
                assert made.final[state] == bool(expected), (pattern, text)
    reference = interegular.parse_pattern(pattern).to_fsm().reduce()
    live = sum(reference.islive(state) for state in reference.states)
    assert len(made.final) - 1 == max(live, 1), pattern


@pytest.mark.parametrize(("pattern", "message"), [
    ("a{100000}", "pattern: 'a{100000}' is too large: written without repetition counts, it has more than 100000"),
    ("a{1000}{1000}", "has more than 100000 states"), ("(){1000000000}", "has more than 100000 states"),
    ("(a|b)*a(a|b){20}", "has more than 10000 states, or takes too long"), ("(a?){4000}", "or takes too long to compute"),
    ("a" * 100_001, "it has 100001 characters, more than 100000"),
    ("[ -\U0010ffff]", "its character ranges span more than 200000 characters; use negated sets, such as"),
    ("(" * 3000 + "a" + ")" * 3000, "has groups nested too deeply"),
    ("a{5,2}", "regular expression: the repetition {5,2} has a minimum above its maximum"),
    ("^a", "regular expression: '^' is not needed, because the pattern always matches the whole answer"),
    ("a$", "regular expression: '$' is not needed, because the pattern always matches the whole answer"),
    ("a(?=b)b", "lookahead and lookbehind are not implemented"), ("(?#x)a", "its syntax is invalid"),
    ("[]", "regex: no text matches the pattern '[]'"),
])  # fmt: skip
def test_patterns_are_refused_quickly(pattern, message):
    words = tokenizer()
    regex("a", words)
    begin = time.process_time()
    with pytest.raises(ValueError) as raised:
        regex(pattern, words)
    assert time.process_time() - begin < 8  # about one second on an idle core
    assert message in str(raised.value)


@pytest.mark.parametrize("pattern", ["", "|", "(?:)", "a{0}"])
def test_patterns_of_no_text(pattern):
    assert automaton(pattern).shortest == 0 and automaton(pattern).final.tolist() == [True, False]


def bound(pattern, start, ends, eos=(EOS,)):
    return Grammar(automaton(pattern), "regex").bound(AnswerPlace(start, ends, MASK, PAD, eos, (MASK,), VOCAB))


def is_answer(pattern, tokens, eos):
    """Whether a filled answer is right: text, an end token and anything behind it, or padding."""
    for k, token in enumerate([*tokens, EOS if eos else None]):
        if (token == EOS and eos) or token == PAD or k == len(tokens):
            body = tokens[:k]
            return all(t < len(TEXTS) and TEXTS[t] for t in body) and bool(
                re.fullmatch(pattern, "".join(TEXTS[t] for t in body))
            )
    raise AssertionError


def completions(pattern, answer, eos):
    """All right answers that a canvas can become."""
    options = [range(1, VOCAB - 1) if token == MASK else [token] for token in answer]
    return [tokens for tokens in itertools.product(*options) if is_answer(pattern, tokens, eos)]


@pytest.mark.parametrize("eos", [(EOS,), ()])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_allows_what_some_way_to_fill_the_masks_has(pattern, eos):
    draw = random.Random(pattern)
    length, start, seen = 4, 2, 0
    rows = completions(pattern, [MASK] * length, eos)
    grammar = bound(pattern, start, (start + length,), eos)
    for _ in range(8):
        if not rows:
            with pytest.raises(ValueError, match="no answer of exactly 4 tokens"):
                grammar.allowed(torch.full((1, 6), MASK), torch.tensor([[2]]))
            return
        whole = draw.choice(rows)
        answer = [token if draw.random() < 0.4 else MASK for token in whole]
        canvas = torch.tensor([[2, 3, *answer]])
        positions = torch.tensor([[0, *range(start, start + length), -1]], dtype=torch.int32)
        found = unpack(grammar.allowed(canvas, positions), VOCAB - 1)[0]
        assert found[0].all() and found[-1].all()
        for place in range(length):
            open_here = [*answer[:place], MASK, *answer[place + 1 :]]
            want = {tokens[place] for tokens in completions(pattern, open_here, eos)}
            assert set(found[1 + place].nonzero().flatten().tolist()) == want
            seen += len(want)
    assert seen > 20


@pytest.mark.parametrize("pattern", PATTERNS)
def test_accepts_what_can_stand_together(pattern):
    """What is accepted can be completed, the first right one is among it, and nothing more could be, left to right."""
    draw, length = random.Random(pattern), 4
    rows = completions(pattern, [MASK] * length, (EOS,))
    grammar, refused = bound(pattern, 1, (1 + length, 1 + length)), 0
    for _ in range(12):
        answers = [[t if draw.random() < 0.3 else MASK for t in draw.choice(rows)] for _ in range(2)]
        wanted = [
            [draw.randrange(1, VOCAB - 1) if draw.random() < 0.6 else -1 for _ in range(length)] for _ in range(2)
        ]
        tokens = torch.tensor([[2, *answer] for answer in answers])
        proposed = torch.tensor([[-1, *new] for new in wanted])
        accepted = grammar.accepts(tokens, proposed)
        assert not (accepted & (proposed < 0)).any()
        for answer, new, verdict in zip(answers, wanted, accepted[:, 1:].tolist()):
            for place, token in enumerate(new):
                if token >= 0:
                    trial = [*answer[:place], token, *answer[place + 1 :]]
                    assert bool(completions(pattern, trial, (EOS,))) == verdict[place]
                    answer = trial if verdict[place] else answer
                    refused += not verdict[place]
    assert refused


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match=r"pattern: '\(a' is not a supported regular expression"):
        automaton("(a")
    with pytest.raises(ValueError, match=r"pattern: '\(\?=a\)\(b\)\\\\1' is not a supported"):
        automaton(r"(?=a)(b)\1")
    with pytest.raises(ValueError, match="no text of the tokenizer's tokens matches"):
        Grammar(automaton("xyz"), "regex")
    with pytest.raises(ValueError, match="unterminated character set at position 0"):
        automaton("[0-")


def test_why_a_pattern_matches_nothing():
    assert why_empty("[a-c]+1", ["1", "a", None]).endswith("no token contains any of the characters 'bc'")
    assert why_empty("xyz", ["y", "xy"]).endswith("no token contains any of the characters 'z'")
    assert why_empty("[]", ["1", "2"]) == "no text matches the pattern '[]'"
    assert why_empty("12", ["21", "1"]) == "the tokenizer's tokens cannot form any text that matches"


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 1200), (-25, 7), (-120, -5), (99, 1001), (10, 10), (-1, 1)])
def test_integers_between_bounds(low, high):
    found = [k for k in range(-1300, 1300) if re.fullmatch(integers(low, high), str(k))]
    assert found == list(range(low, high + 1))
    assert not re.fullmatch(integers(low, high), "007") and not re.fullmatch(integers(low, high), "-0")


def test_integers_without_a_bound():
    assert re.fullmatch(integers(5, None), "9" * 18) and not re.fullmatch(integers(5, None), "4")
    assert re.fullmatch(integers(None, -3), "-33") and not re.fullmatch(integers(None, -3), "0")


def test_texts_of_bytes():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = ['{"key": [12, true]}', "naïve 日本"] * 5
    made.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ))  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    texts = token_texts(fast)
    for text in ('{"key": [12, true]}', " naïve", "a\nb"):
        assert "".join(texts[i] for i in fast(text)["input_ids"]) == text
    assert texts[0] is None and None in texts[1:]  # parts of characters


def test_texts_of_pieces():
    vocab = {"<eos>": 0, "▁a": 1, "b": 2, "<0x0A>": 3, "<0xE9>": 4, "▁": 5, "a": 6}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    fast.add_tokens(["<think>"])
    assert token_texts(fast) == [None, " a", "b", "\n", None, " ", "a", "<think>"]


def test_texts_that_do_not_add_up():
    class Shouts(PreTrainedTokenizerFast):
        def convert_ids_to_tokens(self, ids, **options):
            return [token.upper() for token in super().convert_ids_to_tokens(ids, **options)]

    plain = tokenizer()
    with pytest.raises(ValueError, match="tokenizer: the tokens of"):
        token_texts(Shouts(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>"))


def test_a_class_of_tokens_does_the_same_everywhere():
    machine = automaton(PATTERNS[3])
    assert len(np.unique(machine.table, axis=0)) == len(machine.table) <= len(TEXTS)
    assert (machine.table[0] == len(machine.final) - 1).all() and machine.class_of[0] == 0
