# SPDX-License-Identifier: Apache-2.0
"""What requests may ask for beyond a configuration, of `generate` and of the engine alike."""

import pytest
import torch
import transformers

import dlmkernels as dk
import numerics
from decodings import lively, ragged
from dlmkernels.decoding.copies import seed_of_copy
from dlmkernels.decoding.stops import stop_at
from engines import engine_for
from small_models import EOS, MASK, PAD, VOCAB, prompts

COMMON = {"block_length": 8, "eos_policy": "none", "rule": dk.Threshold(0.4), "max_new_tokens": 24}


class Letters:
    """A tokenizer of a letter a token: id 4 is "a"."""

    mask_token_id = MASK

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i + 93) for i in ids if not skip_special_tokens or i not in (PAD, EOS, MASK))


@pytest.fixture(scope="module")
def model():
    return dk.adapt(lively())


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.parts, self.drafts, self.ended = [], 0, 0

    def put(self, tokens):
        assert not self.ended
        self.parts.append(tokens.tolist())

    def put_draft(self, tokens):
        self.drafts += 1

    def end(self):
        self.ended += 1

    @property
    def tokens(self):
        return [i for part in self.parts for i in part]


def by_engine(model, rows, options, **request):
    """The same requests through an engine of two slots."""
    new = options["max_new_tokens"]
    engine = engine_for(model, 2, 48, **{k: v for k, v in options.items() if k not in ("max_new_tokens", "tokenizer")},
                        tokenizer=options.get("tokenizer"))  # fmt: skip
    ids = [engine.add_request(row.tolist(), max_new_tokens=new, **request) for row in rows]
    found = {output.request_id: output for output in engine if output.is_finished()}
    return [found[name] for name in ids]


# --- stop strings -----------------------------------------------------------------------------------------------------


def test_where_a_stop_string_ends():
    assert stop_at([4, 5, 6, 7, 8], ("bc", "d"), Letters()) == 3
    assert stop_at([4, 5, 6, 7, 8], ("de",), Letters(), known=3) == 5
    assert stop_at([4, 5], ("x",), Letters()) is None and stop_at([4, 5], (), Letters()) is None


@pytest.mark.parametrize("options", [{}, {"rule": dk.TokenEditing(0.4, 0.3)}, {"cache": "dual"},
                                     {"rule": dk.EntropyPipeline(1.0)}], ids=str)  # fmt: skip
def test_stop_strings(model, options):
    rows, ids, valid = ragged()
    options = COMMON | {"tokenizer": Letters()} | options
    whole = dk.generate(model, ids, valid, **options)
    texts = whole.text()
    stops = (texts[0][5:7], texts[1][11:12])
    out = dk.generate(model, ids, valid, stop_strings=stops, **options)
    start, was_cut = whole.prompt_length, 0
    served = by_engine(model, rows, options, stop_strings=stops)
    for row, text in enumerate(texts):
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        starts = [text.find(stop) for stop in stops if stop in text]
        keep = min(ends) if ends else len(text)
        was_cut += keep < len(text)
        wanted = whole.sequences[row, start : start + keep].tolist()
        assert out.sequences[row, start : start + keep].tolist() == wanted == served[row].generated_tokens
        assert (out.sequences[row, start + keep :] == PAD).all() and not out.decoded[row, start + keep :].any()
        assert out.length[row] == start + keep and out.complete[row]
        assert served[row].finish_reason == ("stop" if ends else "length") and served[row].complete
        assert served[row].text == text[: min(starts, default=len(text))] == out.text()[row]
        whole_row = Letters().decode(rows[row].tolist()) + served[row].text
        assert out.text(full=True)[row] == whole_row
    assert was_cut >= 2
    if "rule" not in options or isinstance(options["rule"], dk.Threshold):
        assert out.num_forwards.sum() < whole.num_forwards.sum()  # what is not wanted is not decoded


def test_bad_stop_strings(model):
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        dk.generate(model, prompts(1, 5), stop_strings="x", **COMMON)
    with pytest.raises(ValueError, match="stop_strings must hold non-empty strings; got ''"):
        dk.generate(model, prompts(1, 5), stop_strings=["a", ""], tokenizer=Letters(), **COMMON)


# --- several answers, suffixes ----------------------------------------------------------------------------------------


def test_several_answers(model):
    rows, ids, valid = ragged()
    options = COMMON | {"temperature": 1.0}
    out = dk.generate(model, ids, valid, num_return_sequences=3, seed=torch.tensor([5, 6, 7]), **options)
    assert len(out.sequences) == 9
    served = by_engine(model, rows[:1], options, num_return_sequences=3, seed=5)
    for row, prompt in enumerate(rows):
        answers = []
        for copy in range(3):
            alone = dk.generate(model, prompt, seed=seed_of_copy(5 + row, copy), **options)
            assert torch.equal(out.generated[3 * row + copy], alone.generated[0])
            answers.append(alone.generated[0].tolist())
        assert len(set(map(tuple, answers))) == 3
        if row == 0:
            assert served[0].generated_tokens == answers[0]
    with pytest.raises(ValueError, match=r"num_return_sequences=2 needs randomness.* Pass a temperature above 0"):
        dk.generate(model, ids, valid, num_return_sequences=2, **COMMON)


def test_seeds_of_copies_are_spread():
    seeds = {seed_of_copy(seed, copy) for seed in range(50) for copy in range(50)}
    assert len(seeds) == 2500 and all(-(2**63) <= seed < 2**63 for seed in seeds) and seed_of_copy(-3, 0) == -3


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}], ids=str)
def test_a_suffix(model, options):
    rows, ids, valid = ragged()
    options, behind = COMMON | options, torch.tensor([30, 31, 32])
    out = dk.generate(model, ids, valid, suffix=behind, **options)
    given = torch.cat((torch.full((24,), -1), behind))
    want = dk.generate(model, ids, valid, given=given, **options | {"max_new_tokens": 27})
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    assert not torch.equal(out.generated[:, :24], dk.generate(model, ids, valid, **options).generated)
    served = by_engine(model, rows, options, suffix=[30, 31, 32])
    assert [s.generated_tokens for s in served] == out.generated[:, :24].tolist()


def test_suffixes_behind_answers_of_their_own_length(model):
    rows, ids, valid = ragged()
    behind, lengths = torch.tensor([[30, 31], [32, 33], [34, 35]]), (20, 9, 13)
    out = dk.generate(model, ids, valid, suffix=behind, **COMMON | {"max_new_tokens": lengths})
    for row, (prompt, length) in enumerate(zip(rows, lengths)):
        alone = dk.generate(model, prompt, suffix=behind[row], **COMMON | {"max_new_tokens": length})
        assert torch.equal(out.generated[row, : length + 2], alone.generated[0])
        assert alone.generated[0, -2:].tolist() == behind[row].tolist()


@pytest.mark.parametrize(("suffix", "message"), [
    ("9", r"suffix must be token ids, in a list or an int64 tensor; got '9': pass tokenizer"),
    ([1.5], r"suffix must be token ids, in a list or an int64 tensor; got \[1\.5\]"),
    ([MASK], r"suffix holds the mask token \(96\)"), ([VOCAB], r"suffix must hold ids from 0 to 96"),
    (torch.zeros(2, 1).long(), r"suffix must have one row for each of the 3 requests; got 2"),
    (torch.zeros(1), r"suffix must hold at least one token id, int64"),
])  # fmt: skip
def test_bad_suffixes(model, suffix, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(model, prompts(3, 5), suffix=suffix, **COMMON)


# --- between logits and proposals -------------------------------------------------------------------------------------


class Seen:
    """Remembers what a processor is asked, and forbids a token."""

    def __init__(self, banned):
        self.banned, self.asked = banned, []

    def __call__(self, ids, scores):
        self.asked.append((ids.clone(), scores.clone()))
        return scores.index_fill(1, torch.tensor([self.banned]), -torch.inf)


def test_processors_are_asked_what_is_documented(model):
    plain = dk.generate(model, prompts(1, 6), **COMMON).generated[0]
    banned, seen = int(plain[0]), Seen(int(plain[0]))
    out = dk.generate(model, prompts(1, 6), logits_processor=[seen], **COMMON)
    want = dk.generate(model, prompts(1, 6), suppress_token_ids=[banned], **COMMON)
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    assert len(seen.asked) == int(out.num_forwards[0])
    for step, (ids, scores) in enumerate(seen.asked):
        decided = (out.commit_step[0] < step) & ((out.commit_step[0] >= 0) | (torch.arange(30) < 6))
        assert scores.dtype == torch.float32 and scores.shape == (len(ids), VOCAB)
        assert torch.equal(ids, out.sequences[0][decided].expand(len(scores), -1))
        block = out.commit_step[0, 6:].view(3, 8)
        assert len(scores) == int((block[(block >= step).any(1).nonzero()[0, 0]] >= step).sum())


def test_processors_of_transformers(model):
    rows, ids, valid = ragged()
    processor = transformers.SuppressTokensLogitsProcessor([20, 21, 22, 23])
    out = dk.generate(model, ids, valid, logits_processor=processor, **COMMON)
    want = dk.generate(model, ids, valid, suppress_token_ids=[20, 21, 22, 23], **COMMON)
    assert torch.equal(out.sequences, want.sequences)
    served = by_engine(model, rows, COMMON, logits_processor=processor)
    assert [s.generated_tokens for s in served] == out.generated.tolist()


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_repetition_penalty(model, penalty):
    """The same as transformers' processor, which has to be asked on the host."""
    rows, ids, valid = ragged()
    out = dk.generate(model, ids, valid, repetition_penalty=penalty, **COMMON)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    want = dk.generate(model, ids, valid, logits_processor=theirs, **COMMON)
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    plain = dk.generate(model, ids, valid, **COMMON)
    assert not torch.equal(out.sequences, plain.sequences)
    served = by_engine(model, rows, COMMON, repetition_penalty=penalty)
    assert [s.generated_tokens for s in served] == out.generated.tolist()


def test_a_penalty_of_one_request_is_not_the_others(model):
    rows, *_ = ragged()
    engine = engine_for(model, 3, 48)
    ids = [engine.add_request(row.tolist(), max_new_tokens=24, repetition_penalty=penalty, top_logprobs=2)
           for row, penalty in zip(rows, (1.0, 3.0, 1.0))]  # fmt: skip
    found = {output.request_id: output for output in engine}
    for name, row, penalty in zip(ids, rows, (1.0, 3.0, 1.0)):
        alone = dk.generate(model, row, repetition_penalty=penalty, **COMMON)
        assert found[name].generated_tokens == alone.generated[0].tolist()


def test_bad_processors(model):
    for bad, error, message in [
        (lambda ids, scores: scores[:, 1:], ValueError, r"must return floating-point scores of shape \[\d+, 97\]"),
        (lambda ids, scores: scores.to("meta"), ValueError, r"floating-point scores of .* on cpu; got .* on meta"),
        (lambda ids, scores: scores.long(), ValueError, r"must return floating-point .* got torch\.int64 of shape"),
        (lambda ids, scores: None, ValueError, r"must return floating-point .* got NoneType"),
        ("", TypeError, "must be a function .* got ''"), ({}, TypeError, "must be a function .* got {}"),
        (torch.tensor(1.0), TypeError, r"must be a function .* got tensor\(1\.\)"),
        (lambda ids, scores: 1 / 0, ZeroDivisionError, "division"), (3, TypeError, "must be a function .* got 3"),
        (lambda ids: ids, TypeError, r"logits_processor must be a function of two arguments, the decided token ids"),
        ([3], TypeError, "logits_processor must be a function of token ids and scores, .* got 3"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            dk.generate(model, prompts(1, 5), logits_processor=bad, **COMMON)
    for options, message in [
        ({"logits_processor": Seen(5), "cfg_scale": 0.5}, "logits_processor cannot be used with cfg_scale"),
        ({"repetition_penalty": 2.0, "rule": dk.EntropyPipeline(1.0)}, "repetition_penalty cannot be used with rule"),
        ({"top_logprobs": 98}, "top_logprobs must be at most the vocabulary size, 97; got 98"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            dk.generate(model, prompts(1, 5), **COMMON | options)


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"cfg_scale": 0.5}], ids=str)
def test_log_probabilities_of_the_best(model, options):
    rows, ids, valid = ragged()
    options = COMMON | options
    out = dk.generate(model, ids, valid, top_logprobs=4, **options)
    want = dk.generate(model, ids, valid, **options)
    assert torch.equal(out.sequences, want.sequences) and out.top_ids.shape == (*out.sequences.shape, 4)
    decoded = out.decoded
    # at temperature 0 the token that is committed is the likeliest
    assert torch.equal(out.top_ids[..., 0][decoded], out.sequences[decoded])
    best = out.top_log_probability[..., 0][decoded].exp()
    numerics.assert_same_probabilities(best, out.confidence[decoded])
    assert (out.top_log_probability.diff(dim=-1) <= 0).all() and (out.top_ids[~decoded] == -1).all()
    served = by_engine(model, rows, options, top_logprobs=4)
    for row, output in enumerate(served):
        ids_of = [[i for i, _ in best] for best in output.top_logprobs]
        assert ids_of == out.top_ids[row, out.prompt_length :].tolist()


# --- who follows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rule": dk.TokenEditing(0.4, 0.3)}, {"cache": "dual"}], ids=str)
def test_a_streamer_for_every_row(model, options):
    rows, ids, valid = ragged()
    options = COMMON | options
    streamers = [Recorder(), None, Recorder()]
    out = dk.generate(model, ids, valid, streamer=streamers, **options)
    for row, streamer in enumerate(streamers):
        if streamer is not None:
            start = out.prompt_length - len(rows[row])
            assert streamer.tokens == out.sequences[row, start:].tolist() and streamer.ended == 1
            assert streamer.parts[0] == rows[row].tolist() and len(streamer.parts) > 2 and streamer.drafts > 2
    with pytest.raises(ValueError, match=r"streamer must have an entry \(or None\) for each of the 3 requests; got 2"):
        dk.generate(model, ids, valid, streamer=[None, Recorder()], **options)


def test_a_streamer_ends_at_a_stop_string(model):
    rows, ids, valid = ragged()
    options = COMMON | {"tokenizer": Letters()}
    stop = dk.generate(model, ids, valid, **options).text()[0][5:7]
    streamers = [Recorder() for _ in rows]
    out = dk.generate(model, ids, valid, streamer=streamers, stop_strings=stop, **options)
    length = int(out.length[0])
    assert streamers[0].tokens == rows[0].tolist() + out.sequences[0, out.prompt_length : length].tolist()
    assert all(streamer.ended == 1 for streamer in streamers)


def test_a_callback_after_each_step(model):
    _, ids, valid = ragged()
    reports = []
    out = dk.generate(model, ids, valid, on_step=reports.append, **COMMON)
    assert torch.equal(reports[-1].tokens, out.sequences) and not reports[-1].is_open.any()
    for step in range(int(out.num_forwards.max())):
        report = next(r for r in reports if int(r.num_forwards.max()) == step + 1)
        assert report.prompt_length == 11 and report.tokens.shape == report.is_open.shape
        done = (out.commit_step >= 0) & (out.commit_step < report.num_forwards[:, None])
        assert torch.equal(report.tokens[done], out.sequences[done]) and not report.is_open[done].any()
    with pytest.raises(TypeError, match="on_step must be callable"):
        dk.generate(model, ids, valid, on_step=3, **COMMON)


def test_streamers_of_shorter_answers_get_no_padding():
    model, (_, ids, valid) = lively(), ragged((5, 8))
    streamers = [Recorder(), Recorder()]
    out = dk.generate(model, ids, valid, streamer=streamers, max_new_tokens=[12, 5], block_length=4, eos_policy="none")
    for row, (streamer, length) in enumerate(zip(streamers, (12, 5))):
        assert streamer.tokens[-length:] == out.generated[row, :length].tolist()
        assert len(streamer.tokens) == int(valid[row].sum()) + length
