# SPDX-License-Identifier: Apache-2.0
"""What a newcomer does first: text in, text out; prompts in any form; and the decoding that is the default."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

import dlmkernels as dk
from dlmkernels.decoding.inputs import filler, read_prompts
from dlmkernels.decoding.presets import default_config
from dlmkernels.models.families import FAMILIES
from small_models import EOS, MASK, PAD, build, prompts

CPU = torch.device("cpu")


class Letters:
    """A tokenizer of a letter a token, with the few methods that are used: id 4 is "a"."""

    chat_template, padding_side = None, "right"
    mask_token, mask_token_id, specials = "_", MASK, (PAD, EOS, MASK)

    def __call__(self, text, add_special_tokens=True):
        start = [2] if add_special_tokens else []
        return {"input_ids": start + [MASK if c == "_" else ord(c) - 93 for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if not (skip_special_tokens and i in self.specials)]
        return "".join({PAD: "<pad>", EOS: "<end>", MASK: "_", 2: "^"}.get(i, chr(i + 93)) for i in kept)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "".join(f"{m['role'][0]}{m['content']}" for m in messages) + "a"


class Chatting(Letters):
    chat_template = "…"


def rows(inputs, tokenizer=None, attention_mask=None):
    """The prompts as lists without padding."""
    found = read_prompts("input_ids", inputs, attention_mask, tokenizer, CPU, PAD)
    mask = torch.ones_like(found.tokens) if found.attention_mask is None else found.attention_mask
    assert found.tokens.dtype == torch.int64
    assert ((found.tokens == PAD) | mask.bool()).all() and (mask.diff(dim=1) >= 0).all()
    return [row[keep.bool()].tolist() for row, keep in zip(found.tokens, mask)]


# --- the forms of a prompt -------------------------------------------------------------------------------------------


def test_forms_of_ids():
    assert rows([5, 6, 7]) == rows(np.array([5, 6, 7])) == rows(torch.tensor([[5, 6, 7]])) == [[5, 6, 7]]
    assert rows([[5], [6, 7]]) == rows([torch.tensor([5]), torch.tensor([6, 7])]) == [[5], [6, 7]]
    assert rows(((np.int64(5),), (6, 7))) == [[5], [6, 7]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns_may_be_padded_on_either_side(side):
    ids, mask = ([[PAD, PAD, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])
    if side == "right":
        ids, mask = [ids[0][::-1], ids[1]], [mask[0][::-1], mask[1]]
    for kind in (dict, collections.UserDict):
        for values in (torch.tensor, list):
            encoded = kind(input_ids=values(ids), attention_mask=values(mask), token_type_ids=values([[0] * 3] * 2))
            assert rows(encoded) == [[5], [6, 7, 8]]
    assert rows({"input_ids": [5, 6]}) == [[5, 6]] and rows({"input_ids": [[5], [6, 7]]}) == [[5], [6, 7]]


def test_text_and_chats():
    assert rows("ab", Letters()) == [[2, 4, 5]]
    assert rows(["ab", "c"], Letters()) == [[2, 4, 5], [2, 6]]
    chat = [{"role": "user", "content": "b"}]
    assert rows(chat, Chatting()) == [[24, 5, 4]]  # no special tokens but those of the template
    assert rows([chat, [*chat, *chat]], Chatting()) == [[24, 5, 4], [24, 5, 24, 5, 4]]


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ("ab", {}, ValueError, "tokenizer=transformers.AutoTokenizer"),
        (["ab"], {"tokenizer": 3}, TypeError, "tokenizer must be"),
        ([{"role": "user", "content": "b"}], {"tokenizer": Letters()}, ValueError, "no chat template"),
        (["ab", 3], {"tokenizer": Chatting()}, TypeError, "must contain texts, or chats.*do not mix text and ids.* 3$"),
        ([{"content": "b"}], {"tokenizer": Chatting()}, TypeError, "got a message without 'role' in"),
        ([[5], "ab"], {"tokenizer": Letters()}, TypeError, "got a list of list and str"),
        (b"ab", {"tokenizer": Letters()}, TypeError, "texts or chats with tokenizer=…; got bytes"),
        ("ab", {"tokenizer": Letters(), "attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask can only"),
        ([[]], {}, ValueError, "no tokens in row 0"),
        ([[5], []], {}, ValueError, "no tokens in row 1"),
        ([], {}, ValueError, "empty"),
        ([[5.5]], {}, TypeError, "integers"),
        ([[True]], {}, TypeError, "integers"),
        ([5, [6]], {}, TypeError, "list of lists"),
        (3.5, {}, TypeError, "float"),
        ({"ids": [5]}, {}, ValueError, "unsupported keys ids"),
        ({"attention_mask": [1]}, {}, ValueError, "with input_ids"),
        ({"input_ids": [5], "pixel_values": [1]}, {}, ValueError, "unsupported keys pixel_values"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, {}, ValueError, "same lengths"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, {}, ValueError, "0 between tokens"),
        ({"input_ids": [5, 6], "token_type_ids": [0, 1]}, {}, ValueError, "token_type_ids must be None, or 0"),
        ({"input_ids": [5, 6], "token_type_ids": "x"}, {}, ValueError, "token_type_ids must be None, or 0"),
        ({"input_ids": [5, 6], "attention_mask": 5}, {}, TypeError, "'attention_mask'. must be a list .* got 5"),
        (
            {"input_ids": [5, 6], "attention_mask": {"a": 1}},
            {},
            TypeError,
            "'attention_mask'. must be a list or tensor",
        ),
        ({"input_ids": [[5], [6]], "attention_mask": [[1], None]}, {}, TypeError, "'attention_mask'. must be a list"),
        ({"input_ids": torch.ones(2, device="meta")}, {}, ValueError, "'input_ids'. must be a dense tensor that holds"),
        (
            "ab",
            {"tokenizer": len},
            TypeError,
            "tokenizer must be .* did not return input_ids for the text of input_ids",
        ),
        (
            "ab",
            {"tokenizer": lambda text, **k: {}},
            TypeError,
            "tokenizer must be .* function did not return input_ids",
        ),
    ],
)
def test_what_is_no_prompt(inputs, options, error, message):
    options = {"attention_mask": None, "tokenizer": None} | options
    with pytest.raises(error, match=message):
        read_prompts("input_ids", inputs, options["attention_mask"], options["tokenizer"], CPU, PAD)


def test_no_token_types():
    assert rows({"input_ids": [5, 6], "token_type_ids": None, "attention_mask": None}) == [[5, 6]]


def test_what_is_no_tokenizer():
    """Also where nothing is tokenized."""
    model, ids = build(), torch.tensor([[5, MASK]])
    for call in (dk.generate, dk.infill):
        with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer; got int"):
            call(model, ids, tokenizer=5)
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer; got int"):
        dk.Engine(model, tokenizer=5)
    with pytest.raises(ValueError, match=f"tokens contains no mask token: write token {MASK} wherever"):
        dk.infill(model, "ab", tokenizer=lambda text, **k: {"input_ids": [5, 6]})
    for value in (torch.tensor(1), {}, b"ab"):
        with pytest.raises(TypeError, match="stop_strings must be a string or a sequence of strings; got"):
            dk.generate(model, ids[:, :1], stop_strings=value, tokenizer=Letters())


def test_padding_is_never_a_mask():
    """Where no id for padding is known, the end token's and then the mask's stand in for it."""
    for mask, other in ((MASK, 0), (0, 1)):
        special = dk.decoding.config.SpecialTokens(mask, [], mask, [mask])
        assert filler(special) == other
    assert filler(dk.decoding.config.SpecialTokens(MASK, [EOS], EOS, [MASK])) == EOS


def test_all_forms_decode_alike():
    """Also as `generate(model, **tokenizer(…))`."""
    model, texts = build(), ["abc", "defgh"]
    ids = [Letters()(text)["input_ids"] for text in texts]
    options = {"max_new_tokens": 8, "rule": dk.Quota(), "eos_policy": "none"}
    singly = [dk.generate(model, torch.tensor([row]), **options) for row in ids]
    right = torch.tensor([[*ids[0], PAD, PAD], ids[1]])
    left = torch.tensor([[PAD, PAD, *ids[0]], ids[1]])
    segments = torch.zeros_like(left)
    for out in (
        dk.generate(model, texts, tokenizer=Letters(), **options),
        dk.generate(model, ids, **options),
        dk.generate(model, {"input_ids": right, "attention_mask": right != PAD}, **options),
        dk.generate(model, **{"input_ids": left, "attention_mask": left != PAD, "token_type_ids": segments}, **options),
    ):
        assert torch.equal(out.sequences[:, :6], left)
        for row in range(2):
            assert torch.equal(out.generated[row], singly[row].generated[0])
    with pytest.raises(ValueError, match="token_type_ids"):
        dk.generate(model, left, token_type_ids=segments + 1, **options)


def test_bert_sees_segment_0():
    """What `generate` passes to a model with segments is what zeros say."""
    model, ids = build("bert"), prompts(1, 5)
    canvas = torch.cat((ids, torch.full((1, 4), MASK)), 1)
    with torch.no_grad():
        z = model(canvas, token_type_ids=torch.zeros_like(canvas)).logits[0, 5:]
    z[:, MASK] = -torch.inf
    out = dk.generate(model, ids, max_new_tokens=4, steps=1, eos_policy="none")
    assert out.generated[0].tolist() == z.argmax(1).tolist()
    torch.testing.assert_close(out.confidence[0, 5:], z.softmax(1).amax(1))


def test_infill_of_text():
    out = dk.infill(build(), ["ab__c", "a_"], tokenizer=Letters(), eos_policy="none")
    assert out.complete.all() and out.sequences[0, [0, 1, 2, 5]].tolist() == [2, 4, 5, 6]
    assert [len(text) for text in out.text(skip_special_tokens=False)] == [6, 3]
    with pytest.raises(ValueError, match="no mask token: write '_'"):
        dk.infill(build(), "ab", tokenizer=Letters())


def test_the_tokenizer_names_the_mask_only_where_the_model_does_not():
    class Other(Letters):
        mask_token_id = 50

    model = build()
    out = dk.infill(model, torch.tensor([[5, MASK, 6]]), tokenizer=Other())
    assert out.sequences[0, 1] != MASK  # the model knows better
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id"):
        dk.infill(model, torch.tensor([[5, MASK, 6]]))
    assert dk.infill(model, torch.tensor([[5, 50, 6]]), tokenizer=Other()).sequences[0, 1] != 50
    named = dk.infill(model, torch.tensor([[5, 40, 50]]), tokenizer=Other(), mask_token_id=40)
    assert named.sequences[0, 1] != 40 and named.sequences[0, 2] == 50


# --- the result ------------------------------------------------------------------------------------------------------


def output(**changes):
    """Two requests: one padded on the left, one that ends before the canvas does."""
    fields = {
        "sequences": torch.tensor([[PAD, 4, 5, 6, 7], [4, 5, 6, EOS, 9]]),
        "num_forwards": torch.tensor([2, 1], dtype=torch.int32),
        "commit_step": torch.tensor([[-1, -1, -1, 0, 1], [-1, -1, 0, 0, -1]], dtype=torch.int32),
        "confidence": torch.ones(2, 5), "complete": torch.tensor([True, True]), "prompt_length": 3 - 1,
        "length": torch.tensor([5, 4], dtype=torch.int32), "origin": torch.tensor([1, 0], dtype=torch.int32),
    }  # fmt: skip
    return dk.DecodingOutput(**(fields | changes))


def test_text():
    out = output()
    assert out.text(Letters()) == ["bcd", "c"]
    assert out.text(Letters(), full=True) == ["abcd", "abc"]
    assert out.text(Letters(), skip_special_tokens=False) == ["bcd", "c<end>"]
    assert output(tokenizer=Letters()).text() == out.text(Letters())
    assert output(origin=torch.tensor([3, 0])).text(Letters()) == ["cd", "c"]
    with pytest.raises(ValueError, match=r"out.text\(tokenizer\)"):
        out.text()


def test_repr_is_one_line():
    """Four tokens in three forwards: 2 / 2 and 2 / 1 a forward, on average 1.5."""
    assert repr(output()) == (
        "DecodingOutput(batch=2, tokens=4, forwards=3, tokens_per_forward=1.50, complete=True)"
    )  # fmt: skip
    assert "complete=False" in repr(output(complete=torch.tensor([True, False])))


def test_text_ends_where_the_answer_does():
    """Padding is left out even where its id is an ordinary token, given tokens behind a mask are not."""
    model, pad = build(), 30
    model.config.pad_token_id = pad
    bias = {EOS: 100.0}
    out = dk.generate(
        model, [[5, 6]], tokenizer=Letters(), max_new_tokens=6, rule=dk.Quota(), score="position", logit_bias=bias
    )
    assert out.generated[0].tolist() == [EOS] + [pad] * 5 and out.length.tolist() == [3]
    assert out.text(skip_special_tokens=False) == ["<end>"]
    kept = dk.infill(model, torch.tensor([[5, MASK, pad, 7, pad]]), tokenizer=Letters(), eos_policy="none")
    assert kept.length.tolist() == [5] and len(kept.text(skip_special_tokens=False)[0]) == 5


# --- the default -----------------------------------------------------------------------------------------------------

FIXED = {"llada", "llada-moe", "dream", "rnd1", "diffullama"}


def test_default_of_every_family():
    """A family's own decoder where it adapts; where it takes one token a forward, the default rule."""
    for name, family in FAMILIES.items():
        config = default_config(family.preset)
        if name in FIXED or family.preset is None:
            assert config == dk.DecodingConfig(), name
        else:
            assert config == dk.preset(family.preset), name
        assert not isinstance(config.rule, (dk.Quota, dk.TimeQuota, dk.rules.Ancestral)), name
    assert FAMILIES.keys() >= FIXED and not any(FAMILIES[name].preset for name in FIXED)


@pytest.mark.parametrize(("family", "alignment"), [("dream", "shift"), ("llada", "same")])
def test_the_default_stands_on_the_family(family, alignment):
    """Alignment is the family's; the published decoder is had by its name."""
    model = build(sharpness=20)
    adapted = dk.adapt(model, family=family)
    options = {"max_new_tokens": 12, "eos_policy": "none"}
    found = dk.generate(adapted, prompts(1, 5), **options)
    meant = dk.generate(model, prompts(1, 5), rule=dk.Threshold(0.95), logit_alignment=alignment, **options)
    assert torch.equal(found.sequences, meant.sequences) and found.num_forwards[0] < 12
    published = dk.generate(adapted, prompts(1, 5), config=dk.preset("llada", max_new_tokens=12))
    assert published.num_forwards[0] == 12


# --- a bias on the logits --------------------------------------------------------------------------------------------


def test_logit_bias_is_part_of_the_distribution():
    model, ids = build("bert"), prompts(2, 5)
    canvas = torch.cat((ids, torch.full((2, 4), MASK)), 1)
    bias = torch.linspace(-2, 2, 97)
    with torch.no_grad():
        z = model(canvas).logits[:, 5:] + bias
    z[..., MASK] = -torch.inf
    options = {"max_new_tokens": 4, "steps": 1, "eos_policy": "none"}
    out = dk.generate(model, ids, logit_bias=bias, **options)
    assert torch.equal(out.generated, z.argmax(2))
    torch.testing.assert_close(out.confidence[:, 5:], z.softmax(2).amax(2))
    as_dict = dk.generate(model, ids, logit_bias={i: float(x) for i, x in enumerate(bias)}, **options)
    assert torch.equal(as_dict.sequences, out.sequences) and torch.equal(as_dict.confidence, out.confidence)


RULES = (
    dk.EntropyBound(0.5), dk.StableThreshold(0.5, 0.5, 1), dk.CreditThreshold(0.5), dk.SmoothedThreshold(0.5),
    dk.TokenEditing(0.5, 0.5), dk.WideInNarrowOut(0.3, 0.5), dk.EarlyAnswer(), dk.rules.Ancestral(),
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_of_rule_sees_the_biased_distribution(rule, temperature):
    """-100 is as good as a ban: the same tokens and confidences, however a rule reads the logits."""
    ids, never = prompts(2, 5), list(range(10, 60))
    options = {"max_new_tokens": 12, "rule": rule, "temperature": temperature, "seed": 3, "cfg_scale": 0.5}
    model = build()
    banned = dk.generate(model, ids, suppress_token_ids=never, **options)
    biased = dk.generate(model, ids, logit_bias=dict.fromkeys(never, -1e4), **options)
    gone = dk.generate(model, ids, logit_bias=dict.fromkeys(never, -float("inf")), **options)
    for out in (biased, gone):
        assert torch.equal(out.sequences, banned.sequences)
        torch.testing.assert_close(out.confidence, banned.confidence)
    assert not torch.equal(dk.generate(model, ids, **options).sequences, banned.sequences)


def test_probability_of_a_token_under_a_bias():
    """What a rule asks of the step, where the ops do not say it."""
    seen = {}

    class Looks(dk.Quota):
        def select(self, step):
            seen["p"], seen["z"] = step.probability_of(step.token), step.logits()
            seen["confidence"], seen["token"] = step.confidence, step.token
            return super().select(step)

    dk.generate(build(), prompts(1, 4), max_new_tokens=4, steps=1, rule=Looks(), logit_bias={9: 2.5, 11: -1.5})
    torch.testing.assert_close(seen["p"], seen["confidence"])
    p = seen["z"].softmax(2).gather(2, seen["token"][..., None])[..., 0]
    torch.testing.assert_close(p, seen["confidence"])


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(3), r"logit_bias must have shape \[97\], one number for each logit; got \[3\]"),
        (torch.zeros(1, 97), r"logit_bias must be a float tensor .* got torch.float32 of shape \[1, 97\]$"),
        (torch.full((97,), torch.nan), r"logit_bias must be a float tensor .* shape \[97\] with NaN or \+inf in it$"),
        (torch.zeros(97, dtype=torch.int64), r"logit_bias must be a float tensor .* got torch.int64 of shape \[97\]$"),
        ({97: 1.0}, "ids from 0 to 96 as keys; got 97"),
        ({-1: 1.0}, "logit_bias must have token ids"),
        ({"a": 1.0}, "logit_bias must have token ids"),
        ({3: float("inf")}, "logit_bias must have -inf or numbers"),
        ({3: float("nan")}, "logit_bias must have -inf or numbers"),
        ([1.0], "logit_bias must be"),
    ],
)
def test_what_is_no_bias(bias, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(build(), prompts(1, 4), logit_bias=bias, max_new_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("demo", r"'demo': load it first, with dlmkernels\.load\('demo'\)"),
        (nn.Linear, "the class Linear: pass an instance"),
    ],
)
def test_what_is_no_model(wrong, hint):
    for use in (lambda: dk.generate(wrong, prompts(1, 4)), lambda: dk.Engine(wrong)):
        with pytest.raises(TypeError, match=f"model must be a torch module that returns logits; got {hint}"):
            use()


# --- backbones of any kind -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Logits that say which time it is: token `10 t` is the likeliest, unless there are none."""

    def __init__(self, wrap=lambda z: z):
        super().__init__()
        self.table, self.wrap, self.seen = nn.Parameter(torch.zeros(1)), wrap, []

    def forward(self, tokens, time=None, attention_mask=None):
        self.seen.append((time, attention_mask))
        z = torch.zeros(*tokens.shape, 20)
        at = 5 if time is None else (10 * time).round().long()[:, None, None].expand(*tokens.shape, 1)
        z = z.index_fill(2, torch.tensor([5]), 3.0) if time is None else z.scatter(2, at, 3.0)
        return self.wrap(z)


Named = collections.namedtuple("Named", "loss logits")
WRAPS = {
    "tensor": lambda z: z, "tuple": lambda z: (z, None), "list": lambda z: [z], "dict": lambda z: {"logits": z},
    "object": lambda z: type("Out", (), {"logits": z})(), "namedtuple": lambda z: Named(None, z),
}  # fmt: skip
IDS = {"mask_token_id": 19, "eos_policy": "none"}


@pytest.mark.parametrize("wrap", WRAPS)
def test_whatever_a_module_returns(wrap):
    net = Net(WRAPS[wrap]).eval()
    out = dk.generate(dk.Backbone(net), [[1, 2]], max_new_tokens=4, **IDS)
    assert out.generated.tolist() == [[5] * 4] and net.seen[0] == (None, None)


def test_the_mask_is_passed_where_there_is_padding():
    net = Net().eval()
    dk.generate(dk.Backbone(net, vocab_size=20), [[1, 2], [3]], max_new_tokens=2, **IDS)
    assert net.seen[0][1].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    dk.generate(dk.Backbone(net, lambda net, x: net(x.tokens)), [[1, 2], [3]], max_new_tokens=2, **IDS)
    assert net.seen[-1][1] is None


@pytest.mark.parametrize("guided", [False, True])
def test_time_falls_with_the_steps(guided):
    """Steps of the whole generation, over two blocks; both halves of a guided batch are told the same."""
    net, inputs = Net().eval(), []

    def call(net, x):
        inputs.append(x)
        return net(x.tokens, x.timesteps)

    scale = {"cfg_scale": 1.0} if guided else {}
    out = dk.generate(
        dk.Backbone(net, call, vocab_size=20), [[1], [2]], max_new_tokens=8, block_length=4, steps=5, **IDS, **scale
    )
    times = [x.timesteps.tolist() for x in inputs]
    assert times == [[pytest.approx(1 - k / 5)] * (4 if guided else 2) for k in range(5)]
    assert out.generated[0].tolist() == [10, 10, 8, 6, 4, 4, 2, 2]
    assert [(int(x.moment.step[0]), int(x.moment.num_steps[0])) for x in inputs] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 2),
        (1, 2),
    ]
    assert [round(float(x.moment.masked[0]), 3) for x in inputs] == [1.0, 0.75, 0.625, 0.5, 0.25]
    first = inputs[1].sigma(1e-3)
    torch.testing.assert_close(first, -torch.log1p(-(1 - 1e-3) * inputs[1].timesteps))
    assert inputs[0].positions.tolist()[0] == list(range(9))


def test_a_loop_of_its_own_tells_the_share_of_masks():
    inputs = []

    def call(net, x):
        inputs.append(x)
        return net(x.tokens, x.timesteps)

    dk.generate(
        dk.Backbone(Net().eval(), call, vocab_size=20), [[1]], max_new_tokens=4, block_length=2,
        rule=dk.EntropyPipeline(-1.0, best_of_all=False), **IDS,
    )  # fmt: skip
    assert [float(x.timesteps[0]) for x in inputs] == [1.0, 0.75, 0.5, 0.25]
    assert all(x.moment.progress is None for x in inputs)


def test_logits_that_pad_the_vocabulary_are_dropped():
    def padded(z):
        return torch.cat([z, torch.full((*z.shape[:2], 12), 50.0)], -1)

    exact, wide = (dk.Backbone(Net(wrap).eval(), vocab_size=20) for wrap in (lambda z: z, padded))
    for how in ({}, {"temperature": 1.0, "seed": 3}, {"cfg_scale": 1.0}):
        options = {"max_new_tokens": 6, **IDS, **how}
        want, found = (dk.generate(one, [[1, 2], [3]], **options) for one in (exact, wide))
        assert torch.equal(found.sequences, want.sequences) and int(found.sequences.max()) < 20


def test_ids_that_no_vocabulary_has():
    backbone = dk.Backbone(Net().eval())
    for name, value in (("mask_token_id", 2**70), ("pad_token_id", 2**31), ("eos_token_id", -(2**63)),
                        ("suppress_token_ids", [2**70]), ("defer_token_ids", [2**70])):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}\S* must be a token id, an integer; got -?\d+"):
            dk.generate(backbone, [[1, 2]], **{"max_new_tokens": 4} | IDS | {name: value})
    with pytest.raises(ValueError, match="top_logprobs must be at most the number of logits, 20; got 100"):
        dk.generate(backbone, [[1, 2]], max_new_tokens=4, top_logprobs=100, **IDS)


def test_what_a_backbone_cannot_be():
    net = Net().eval()
    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        dk.Backbone(lambda x: x)
    with pytest.raises(TypeError, match="callable"):
        dk.Backbone(net, call=3)
    with pytest.raises(ValueError, match="vocab_size"):
        dk.Backbone(net, vocab_size=0)
    for wrap, error, message in (
        (lambda z: None, TypeError, "call must return logits: a tensor"),
        (lambda z: (), TypeError, "call must return logits: a tensor"),
        (lambda z: {"z": z}, TypeError, "call must return logits: a tensor"),
        (lambda z: z[0], ValueError, "of shape .1, 6, V"),
        (lambda z: z[:, :3], ValueError, "of shape .1, 6, V"),
        (lambda z: z[..., :7], ValueError, "20 logits"),
    ):
        with pytest.raises(error, match=message):
            dk.generate(dk.Backbone(Net(wrap).eval(), vocab_size=20), [[1, 2]], max_new_tokens=4, **IDS)
    for device in ("x", "", "cuda:x"):
        with pytest.raises(ValueError, match=f"device must be a torch.device or its name, .* got '{device}'"):
            dk.Backbone(net, device=device)
    for device in (-1, 5, []):
        with pytest.raises(TypeError, match=r"device must be a torch\.device or its name"):
            dk.Backbone(net, device=device)
    for options, message in (
        ({"cache": "dual"}, "cache"),
        ({"attention": "causal"}, "attention"),
        ({"max_new_tokens": 9}, "max_position"),
    ):
        with pytest.raises(ValueError, match=message):
            dk.generate(
                dk.Backbone(net, vocab_size=20, max_length=8), [[1, 2]], **{"max_new_tokens": 4} | options, **IDS
            )
    with pytest.raises(ValueError, match="device must be given"):
        dk.generate(dk.Backbone(nn.Identity().eval()), [[1, 2]], max_new_tokens=4, **IDS)
    with pytest.raises(ValueError, match="training"):
        dk.generate(dk.Backbone(Net().train(), vocab_size=20), [[1, 2]], max_new_tokens=4, **IDS)


def test_dir_lists_what_is_public():
    names = dir(dk)
    assert {"generate", "infill", "load", "Engine", "regex", "Threshold"} <= set(names)
    assert not {"torch", "importlib"} & set(names) and names == sorted(set(names))
