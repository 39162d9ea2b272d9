# SPDX-License-Identifier: Apache-2.0
"""Drafted decoding: drafters of every form against their restatements, and tokens against one token a forward."""

import copy

import pytest
import torch
import transformers as hf

import dlmkernels as dk
import drafter_checkpoints
import numerics
from dlmkernels.cache import KVCache
from dlmkernels.models.adapt import adapt
from dlmkernels.models.drafters import Tapped
from dlmkernels.window import AttentionWindow
from drafter_checkpoints import FORMS
from small_models import DECODER, EOS, MASK, PAD, prompts

VOCAB = 97


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def target(kind="llama", layers=4, seed=5, sharpness=4.0, **options):
    """A causal model in which much depends on context."""
    config = DECODER | {"num_hidden_layers": layers, "mask_token_id": None} | options
    torch.manual_seed(seed)
    classes = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
               "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}  # fmt: skip
    build, of = (getattr(hf, name) for name in classes[kind])
    if kind == "gpt2":
        config = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": 256,
                  "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}  # fmt: skip
    model = of(build(**config)).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(std=(sharpness if "lm_head" in name else 8.0 if "embed" in name else 1.5) / p.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    with torch.no_grad():
        return target()


@pytest.fixture(scope="module")
def drafters(model, tmp_path_factory):
    made = {}

    def get(form):
        if form not in made:
            folder, config, weights = drafter_checkpoints.write(tmp_path_factory.mktemp(form), form)
            made[form] = dk.load_drafter(folder, model), config, weights
        return made[form]

    return get


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_drafts(form, model, drafters):
    """Hidden states and drafts of a block, whose text was injected in two parts, against the restatement."""
    drafter, config, weights = drafters(form)
    ids = prompts(2, 14, seed=3)
    assert drafter.form.taps == (0, 2)
    taps, exact = (
        torch.cat([m(ids, output_hidden_states=True).hidden_states[i + 1] for i in (0, 2)], -1)
        for m in (model, copy.deepcopy(model).double())
    )
    tapped = Tapped(adapt(model), drafter.form.taps)
    slots = torch.arange(14, dtype=torch.int32).expand(2, -1).contiguous()
    tapped.model.hidden(ids, slots.long(), AttentionWindow(slots, causal_block=1))
    numerics.assert_close("taps", tapped.take(), exact, taps)

    rows, cache = drafter.form.block_size, KVCache(20, 2)
    for part in (slice(0, 9), slice(9, 13)):
        drafter.inject(taps[:, part], slots[:, part].contiguous(), slots[:, part].long(), cache)
    place = torch.arange(13, 13 + rows, dtype=torch.int32).expand(2, -1).contiguous()
    window = AttentionWindow(place, torch.tensor([[0, 13 + rows]] * 2, dtype=torch.int32), cache)
    hidden = drafter.hidden(ids[:, 13], place.long(), window)
    embeddings = model.get_input_embeddings().weight
    for b in range(2):
        known = form, config, weights, embeddings, taps[b, :13], int(ids[b, 13]), rows, MASK
        expected, peer = (drafter_checkpoints.plain_hidden(*known, dtype) for dtype in (torch.float64, torch.float32))
        numerics.assert_close("hidden", hidden[b], expected, peer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_same_tokens_as_one_a_forward(form, batch, model, drafters):
    drafter, _, _ = drafters(form)
    rows = [prompts(1, 3 + i % 7, seed=i)[0].tolist() for i in range(batch)]
    options = {"max_new_tokens": 21, "eos_policy": "none"}
    plain = dk.generate(model, rows, rule=dk.NextToken(), **options)
    out = dk.generate(model, rows, drafter=drafter, **options)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.complete.all() and (out.num_forwards <= plain.num_forwards).all()
    assert (plain.num_forwards == 21).all()


@pytest.mark.parametrize("form", FORMS)
def test_drafts(form, model, drafters, monkeypatch):
    """What is drafted in a decoding, behind whatever was accepted before, against the restatement."""
    from dlmkernels.decoding.programs.drafted import DraftedProgram

    drafter, config, weights = drafters(form)
    drafted, original = [], DraftedProgram.draft

    def noted(self, anchor, used, window):
        drafts = original(self, anchor, used, window)
        drafted.append((self.last.clone(), drafts.clone()))
        return drafts

    monkeypatch.setattr(DraftedProgram, "draft", noted)
    rows = [prompts(1, n, seed=n)[0] for n in (4, 9)]
    out = dk.generate(model, [row.tolist() for row in rows], drafter=drafter, max_new_tokens=12, eos_policy="none")
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(drafted) == out.num_forwards.max() - 1
    for b in range(2):
        text = out.sequences[b, 9 - len(rows[b]) :]
        states = model(text[None], output_hidden_states=True).hidden_states
        taps = torch.cat([states[i + 1][0] for i in drafter.form.taps], -1)
        for last, drafts in drafted[: int(out.num_forwards[b]) - 1]:
            at = int(last[b]) - (9 - len(rows[b]))
            room = min(drafter.form.block_size, len(text) - at)
            hidden = drafter_checkpoints.plain_hidden(
                form, config, weights, embeddings, taps[:at], int(text[at]), room, MASK
            )  # fmt: skip
            expected = drafter_checkpoints.plain_drafts(form, config, weights, hidden, head, int(text[at]))
            expected = expected[: len(text) - at - 1]
            assert drafts[b, : len(expected)].tolist() == expected
            assert (drafts[b, len(expected) :] == -1).all()


class TestTransformers:
    """transformers' own drafter and its own loop, of one request."""

    @pytest.fixture(scope="class")
    def theirs(self, drafters, model):
        if not hasattr(hf, "MuseGlimmerAssistantModel"):
            pytest.skip("this transformers has no MuseGlimmerAssistant")
        drafter, config, weights = drafters("muse")
        assistant = hf.MuseGlimmerAssistantModel(hf.MuseGlimmerAssistantConfig(**config)).eval()
        assistant.load_state_dict(weights)
        return assistant, drafter

    def test_logits(self, theirs, model):
        assistant, drafter = theirs
        ids = prompts(1, 21, seed=4)
        states = model(ids, output_hidden_states=True).hidden_states
        taps = torch.cat([states[i + 1] for i in drafter.form.taps], -1)
        block = torch.cat((ids[:, -1:], ids.new_full((1, 5), MASK)), 1)
        known = hf.cache_utils.DFlashCache(config=assistant.config)
        known.set_previous_accepted_tokens(20)
        hidden = assistant(
            noise_embeds=model.get_input_embeddings()(block), context_hidden_states=taps[:, :-1],
            position_ids=torch.arange(26)[None], cache=known,
        ).last_hidden_state  # fmt: skip
        cache, place = KVCache(26, 1), torch.arange(26, dtype=torch.int32)[None]
        drafter.inject(taps[:, :-1], place[:, :20].contiguous(), place[:, :20].long(), cache)
        window = AttentionWindow(place[:, 20:].contiguous(), torch.tensor([[0, 26]], dtype=torch.int32), cache)
        ours = drafter.hidden(ids[:, -1], place[:, 20:].long(), window)
        head = model.get_output_embeddings()
        assert not numerics.far(drafter.logits(ours), head(hidden))

    @pytest.mark.parametrize("length", [5, 12])
    def test_generate(self, length, theirs, model):
        assistant, drafter = theirs
        ids = prompts(1, length, seed=length)
        expected = model.generate(
            ids, assistant_model=assistant, speculation_type="dflash", max_new_tokens=24, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        out = dk.generate(model, ids, drafter=drafter, max_new_tokens=24, eos_policy="none")
        assert torch.equal(out.sequences, expected)


SAMPLERS = [{"temperature": 1.3}, {"temperature": 0.7, "top_k": 8}, {"temperature": 1.0, "top_p": 0.8}]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@pytest.mark.parametrize("form", ["dflash", "dflash2", "dspark-rnn", "speculators-reduced"])
def test_drawn_tokens_are_those_of_one_a_forward(form, options, model, drafters):
    drafter, _, _ = drafters(form)
    rows = [prompts(1, 3 + i, seed=i)[0].tolist() for i in range(4)]
    options = options | {"max_new_tokens": 20, "eos_policy": "none", "seed": torch.tensor([3, 4, 5, 6])}
    plain = dk.generate(model, rows, rule=dk.NextToken(), **options)
    out = dk.generate(model, rows, drafter=drafter, **options)
    assert torch.equal(out.sequences, plain.sequences)
    for i, row in enumerate(rows):
        alone = dk.generate(model, row, drafter=drafter, **options | {"seed": 3 + i})
        assert torch.equal(alone.generated[0], out.generated[i])
        assert alone.num_forwards[0] == out.num_forwards[i]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2"])
def test_targets(kind, tmp_path):
    """Other causal models: one token a forward is what transformers says, and so is a drafted text."""
    model, ids = target(kind), prompts(1, 6)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    options = {"max_new_tokens": 12, "eos_policy": "none"}
    assert torch.equal(dk.generate(model, ids, rule=dk.NextToken(), **options).sequences, expected)
    drafter = dk.load_drafter(drafter_checkpoints.write(tmp_path, "dflash2")[0], model)
    assert torch.equal(dk.generate(model, ids, drafter=drafter, **options).sequences, expected)


@pytest.mark.parametrize("options", [
    {"eos_token_id": tuple(range(20, 32))},
    {"eos_policy": "none", "constraint": torch.arange(VOCAB) % 3 > 0},
    {"eos_policy": "none", "logit_bias": {7: 5.0}, "suppress_token_ids": (4, 5)},
    {"eos_policy": "none", "max_new_tokens": [3, 17, 1, 9]},
], ids=["end tokens", "constraint", "bias", "lengths"])  # fmt: skip
@pytest.mark.parametrize("form", ["dflash", "dspark"])
def test_options(form, options, model, drafters):
    drafter, _, _ = drafters(form)
    rows = [prompts(1, 3 + i, seed=i)[0].tolist() for i in range(4)]
    options = {"max_new_tokens": 20} | options
    plain = dk.generate(model, rows, rule=dk.NextToken(), **options)
    for width in (None, 1, 3, "auto"):
        out = dk.generate(model, rows, rule=dk.Drafted(drafter, width), **options)
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.complete, plain.complete)


def test_engine(model, drafters):
    drafter, _, _ = drafters("dflash")
    with dk.Engine(model, slots=3, max_length=64, rule=dk.Drafted(drafter)) as engine:
        asked = [prompts(1, 4 + i, seed=i)[0] for i in range(5)]
        names = [engine.add_request(ids.tolist(), max_new_tokens=10) for ids in asked]
        for name, ids in zip(names, asked):
            *_, last = engine.request_id_iter(name)
            alone = dk.generate(model, ids, rule=dk.NextToken(), max_new_tokens=10).generated[0].tolist()
            assert last.generated_tokens == alone[: len(last.generated_tokens)] and last.generated_tokens


def test_refusals(model, drafters):
    drafter, _, _ = drafters("dflash")
    ids = prompts(1, 4)
    with pytest.raises(ValueError, match="loaded for another model"):
        dk.generate(target(seed=6), ids, drafter=drafter)
    with pytest.raises(ValueError, match="drafter and rule"):
        dk.generate(model, ids, drafter=drafter, rule=dk.NextToken())
    with pytest.raises(TypeError, match="drafter must be what"):
        dk.generate(model, ids, drafter="z-lab/Qwen3-8B-DFlash")
    with pytest.raises(ValueError, match="at most the drafter's 5 drafts; got 6"):
        dk.Drafted(drafter, 6)
    with pytest.raises(ValueError, match="width must be None or an integer of at least 1"):
        dk.Drafted(drafter, 0)
    with pytest.raises(ValueError, match="cfg_scale cannot be used with rule Drafted"):
        dk.generate(model, ids, drafter=drafter, cfg_scale=1.0, mask_token_id=None)
    with pytest.raises(ValueError, match="block_length=4 has no effect"):
        dk.generate(model, ids, drafter=drafter, block_length=4)
    with pytest.raises(ValueError, match="input_ids must hold at least one token"):
        dk.generate(model, ids[:, :0], drafter=drafter)
    with pytest.raises(ValueError, match="compiled model"):
        dk.generate(adapt(model).compiled(), ids, drafter=drafter)
