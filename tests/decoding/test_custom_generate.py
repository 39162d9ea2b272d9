# SPDX-License-Identifier: Apache-2.0
"""transformers' front door: what its `generate` hands to a custom function is honoured, or refused by name."""

import functools
import warnings

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import stopping_criteria as hf_criteria

import dlmkernels as dk
from dlmkernels.decoding import custom_generate as door
from small_models import EOS, PAD, VOCAB, build, prompts

N = 12


@pytest.fixture(scope="module")
def model():
    return build(seed=3, sharpness=3.0)


def theirs(model, *args, **options):
    return model.generate(*args, custom_generate=dk.custom_generate, **{"max_new_tokens": N} | options)


def padded():
    ids = prompts(2, 6)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_tokenized_prompts(model):
    """What a tokenizer returns, with its mask: the tokens of each prompt alone."""
    inputs = padded()
    out = theirs(model, **inputs)
    assert torch.equal(out, dk.generate(model, **inputs, max_new_tokens=N).sequences)
    alone = theirs(model, inputs["input_ids"][:1, 2:])
    assert torch.equal(alone[0], out[0, 2:])
    assert torch.equal(theirs(model, inputs["input_ids"]), out)  # transformers infers the mask


def test_decoding_config(model):
    ids = prompts(1, 6)
    options = {"rule": dk.Threshold(0.3), "eos_policy": "none"}
    ours = dk.generate(model, ids, max_new_tokens=N, **options).sequences
    for config in (dk.DecodingConfig(**options), options):
        assert torch.equal(theirs(model, ids, decoding_config=config), ours)
    named = theirs(model, ids, decoding_config="klass")
    assert torch.equal(named, dk.generate(model, ids, config="klass", max_new_tokens=N).sequences)


def test_sampling(model):
    """Temperature and filters act, also where transformers makes no processor of a temperature of 1."""
    inputs = {name: x.repeat(4, 1) for name, x in padded().items()}
    for options in ({}, {"temperature": 0.5, "top_k": 5, "top_p": 0.8}):
        torch.manual_seed(5)
        out = theirs(model, **inputs, do_sample=True, **options)
        torch.manual_seed(5)
        ours = {"temperature": 1.0, "top_k": 50} | options
        assert torch.equal(out, dk.generate(model, **inputs, max_new_tokens=N, **ours).sequences)
    torch.manual_seed(5)
    assert not torch.equal(theirs(model, **inputs, do_sample=True), theirs(model, **inputs))


def test_return_dict(model):
    inputs = padded()
    out = theirs(model, **inputs, return_dict_in_generate=True)
    ours = dk.generate(model, **inputs, max_new_tokens=N)
    for name in ("sequences", "commit_step", "confidence", "num_forwards", "complete"):
        assert torch.equal(out[name], getattr(ours, name)), name


class Recorder:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("partial", [False, True])
def test_streamer(model, partial):
    """The prompt once, the answer, the end; transformers itself keeps the streamer from a custom function."""
    ids, recorder = prompts(1, 6), Recorder()
    if partial:
        function = functools.partial(dk.custom_generate, streamer=recorder)
        out = model.generate(ids, custom_generate=function, max_new_tokens=N)
    else:
        out = theirs(model, ids, streamer=recorder)
    assert recorder.tokens == out[0].tolist() and recorder.ended == 1


def test_embedded_prompts(model):
    """With embeddings alone the answer is returned, as transformers does; with ids too, they come first."""
    inputs = padded()
    embeds, mask = model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"]
    ours = dk.generate(model, **inputs, max_new_tokens=N).generated
    assert torch.equal(theirs(model, inputs_embeds=embeds, attention_mask=mask), ours)


def test_position_ids(model):
    inputs = padded()
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(theirs(model, **inputs, position_ids=counted), theirs(model, **inputs))
    with pytest.raises(ValueError, match="position_ids must count"):
        theirs(model, **inputs, position_ids=counted + 3)


def test_end_and_padding_tokens(model):
    ids = prompts(1, 6)
    plain = theirs(model, ids)[0, 6:].tolist()
    end = plain[4]
    first = plain.index(end)
    out = theirs(
        model, ids, eos_token_id=end, pad_token_id=7, decoding_config={"score": "position", "rule": dk.Quota()}
    )
    ours = dk.generate(
        model, ids, max_new_tokens=N, eos_token_id=end, pad_token_id=7, score="position", rule="quota"
    ).sequences
    assert torch.equal(out, ours) and first >= 0
    where = ours[0, 6:].tolist()
    if end in where:
        assert set(where[where.index(end) + 1 :]) <= {7}
    never = theirs(model, ids, eos_token_id=None, pad_token_id=9)
    assert torch.equal(never, dk.generate(model, ids, max_new_tokens=N, eos_token_id=[], pad_token_id=9).sequences)


def test_bans(model):
    ids = prompts(2, 6)
    usual = theirs(model, ids)[:, 6:]
    often = usual.flatten().bincount().topk(3).indices.tolist()
    for options in ({"suppress_tokens": often}, {"bad_words_ids": [[i] for i in often]}):
        out = theirs(model, ids, **options)
        assert not torch.isin(out[:, 6:], torch.tensor(often)).any()
        assert torch.equal(out, dk.generate(model, ids, max_new_tokens=N, suppress_token_ids=often).sequences)
    begin = usual[:, 0].tolist()
    out = theirs(model, ids, begin_suppress_tokens=begin)[:, 6:]
    assert not torch.isin(out[:, 0], torch.tensor(begin)).any()
    assert (theirs(model, ids, forced_eos_token_id=EOS, eos_token_id=None)[:, -1] == EOS).all()


def test_repetition_penalty(model):
    ids = prompts(2, 6)
    out = theirs(model, ids, repetition_penalty=3.0)
    assert torch.equal(out, dk.generate(model, ids, max_new_tokens=N, repetition_penalty=3.0).sequences)
    assert not torch.equal(out, theirs(model, ids))


def test_shortest_answer():
    """End tokens are banned in so many positions, and in no other."""
    model = build(seed=4)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    ids = prompts(4, 6)
    free = theirs(model, ids)[:, 6:]
    assert (free[:, :5] == EOS).any()
    for options in ({"min_new_tokens": 5}, {"min_length": 11}):
        out = theirs(model, ids, **options)[:, 6:]
        assert not (out[:, :5] == EOS).any() and (out[:, 5:] == EOS).any()
    allowed = torch.ones(1, N, VOCAB, dtype=torch.bool)
    allowed[:, :5, EOS] = False
    assert torch.equal(out, dk.generate(model, ids, max_new_tokens=N, constraint=allowed).generated)


@pytest.mark.parametrize("options,match", [
    ({"num_beams": 2}, "num_beams=2"), ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty=1.2"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"), ({"max_time": 1.0}, "max_time=1.0"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True.*confidence"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0.*cfg_scale"), ({"bad_words_ids": [[5, 6]]}, "bad_words_ids"),
    ({"min_p": 0.1, "do_sample": True}, "min_p=0.1"), ({"typical_p": 0.5, "do_sample": True}, "typical_p=0.5"),
    ({"sequence_bias": [[[5], 2.0]]}, "sequence_bias"), ({"forced_bos_token_id": 5}, "forced_bos_token_id=5"),
    ({"exponential_decay_length_penalty": (2, 1.5)}, "exponential_decay_length_penalty"),
    ({"cache_implementation": "static"}, "cache_implementation"), ({"length_penalty": 2.0}, "length_penalty"),
    ({"low_memory": True}, "low_memory"), ({"negative_prompt_ids": torch.tensor([[4, 5]])}, "negative_prompt_ids"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "PrefixConstrainedLogitsProcessor"),
    ({"logits_processor": LogitsProcessorList([type("Mine", (LogitsProcessor,), {})()])}, "Mine cannot be used"),
    ({"stopping_criteria": StoppingCriteriaList([hf_criteria.MaxTimeCriteria(3.0)])}, "MaxTimeCriteria cannot be used"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"decoding_config": {"max_new_tokens": 9}, "max_new_tokens": None}, "max_new_tokens=9 of decoding_config"),
    ({"decoding_config": "llada", "eos_token_id": 5}, "eos_token_id"),
    ({"decoding_config": 5}, "config must be"),
], ids=lambda v: None if isinstance(v, str) else ",".join(v))  # fmt: skip
def test_refused(model, options, match):
    with pytest.raises((ValueError, TypeError), match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(model, prompts(1, 6), **options)


def test_assistant(model):
    with pytest.raises(ValueError, match="assistant_model cannot be used"):
        theirs(model, prompts(1, 6), assistant_model=build(seed=1))


def test_cache_of_the_user(model):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="cannot be used with dlmkernels, which has its own KV cache"):
        theirs(model, prompts(1, 6), past_key_values=DynamicCache())


def test_what_the_checkpoint_asks_for():
    """Of its own accord a checkpoint's option makes no error of every call, but a warning."""
    model = build()
    expected = theirs(model, prompts(1, 6))
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.warns(UserWarning, match="no_repeat_ngram_size=3 of the model's generation config is ignored"):
        out = theirs(model, prompts(1, 6))
    assert torch.equal(out, expected)


def test_every_field_is_listed_once():
    """A field that a version of transformers adds must be put into one of the lists."""
    fields = {name for name in GenerationConfig().__dict__ if not name.startswith("_")}
    lists = (door.HONOURED, door.INDIFFERENT, set(door.REFUSED))
    assert not fields - set().union(*lists)
    for name in set().union(*lists):
        assert sum(name in one for one in lists) == 1, name
