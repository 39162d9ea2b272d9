# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma against transformers' own forward and its own `generate`, which is fed the draws of our kernels."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

import dlmkernels as dk
import numerics
from dlmkernels import reference
from dlmkernels.cache import KVCache
from dlmkernels.window import AttentionWindow

pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma yet")
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

VOCAB, CANVAS, WINDOW, PAD, EOS, END_OF_TURN = 61, 8, 6, 0, 1, 7
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 24, "num_global_key_value_heads": 1,
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24, "max_position_embeddings": 128,
    "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
VISION = {
    "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
}  # fmt: skip


def build(seed=0, sharpness=1.0, **text):
    """A random model in which every parameter matters; `sharpness` scales its logits before they are capped."""
    config = DiffusionGemmaConfig(
        text_config=TEXT | text, vision_config=dict(VISION), canvas_length=CANVAS, image_token_id=VOCAB - 1
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # the two stacks have their own
                buffer.uniform_(0.5, 1.5, generator=generator)
        model.model.decoder.norm.weight.mul_(sharpness)
        # At full strength what one step rounds grows five times with every step, in float32 against float64 too.
        model.model.decoder.self_conditioning.down_proj.weight.mul_(0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def prompts(batch, length, seed=1):
    return torch.randint(8, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(batch, length, seed=1):
    """Prompts padded on the left by 0, 3, 6, … tokens, and their mask."""
    ids, mask = prompts(batch, length, seed), torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        ids[row, : 3 * row], mask[row, : 3 * row] = PAD, 0
    return ids, mask


class TestForward:
    """Every logit, in float32 with float64 as the measure; contexts and canvases are longer than the sliding window."""

    def theirs(self, model, ids, mask, canvas, said):
        seen = torch.nn.functional.pad(mask, (0, CANVAS), value=1)
        return model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=canvas, self_conditioning_logits=said,
            decoder_attention_mask=seen,
        ).logits  # fmt: skip

    def ours(self, model, ids, mask, canvas, said, appended=()):
        """Logits of the canvas after the prompt, which is read in parts that end at `appended` and at its end."""
        model, cache = dk.adapt(model), KVCache(ids.shape[1] + CANVAS)
        origin = (mask == 0).sum(1, dtype=torch.int32)
        columns = torch.arange(cache.num_slots, dtype=torch.int32).expand(len(ids), -1)
        slots, positions = torch.where(columns < origin[:, None], -1, columns), (columns - origin[:, None]).clamp(min=0)

        def hidden(tokens, first, opinion=None, **visibility):
            last = first + tokens.shape[1]
            at = slots[:, first:last].contiguous()
            window = AttentionWindow(at, torch.stack((origin, torch.full_like(origin, last)), 1), cache, **visibility)
            return model.hidden(tokens, positions[:, first:last], window, opinion=opinion)

        bounds = [0, *appended, ids.shape[1]]
        for first, last in itertools.pairwise(bounds):
            hidden(ids[:, first:last], first, causal_block=1)
        opinion = None
        if said is not None:
            opinion = model.mean_embedding(said.flatten(0, 1), 0.0).unflatten(0, said.shape[:2])
        end = torch.full_like(origin, ids.shape[1])
        return model.logits(hidden(canvas, ids.shape[1], opinion, context_end=end))

    @pytest.mark.parametrize("text", [
        {}, {"global_head_dim": 512, "sliding_window": 4}, {"head_dim": 256, "global_head_dim": 256},
        {"attention_bias": True, "num_attention_heads": 6, "num_global_key_value_heads": 2},
        {"layer_types": ["full_attention"] * 3, "final_logit_softcapping": 3.0},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("conditioned", [False, True])
    @torch.no_grad()
    def test_every_logit(self, text, conditioned):
        model = build(**text)
        ids, mask = ragged(3, 19)
        canvas = prompts(3, CANVAS, seed=5)
        said = 3 * torch.randn(3, CANVAS, VOCAB, generator=torch.Generator().manual_seed(3)) if conditioned else None
        gold = self.theirs(copy.deepcopy(model).double(), ids, mask, canvas, said)
        peer = self.theirs(model, ids, mask, canvas, said)
        for appended in ((), (11,), (7, 8, 15)):
            numerics.assert_close("logits", self.ours(model, ids, mask, canvas, said, appended), gold, peer)

    @torch.no_grad()
    def test_what_was_said_matters(self, model):
        ids, mask = ragged(2, 9)
        canvas = prompts(2, CANVAS, seed=5)
        said = 3 * torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(2))
        assert numerics.far(self.ours(model, ids, mask, canvas, None), self.ours(model, ids, mask, canvas, said))


class TheirGenerate:
    """transformers' `generate` with the draws that our kernels make: by seed, position in the request and step."""

    def __init__(self, model, seeds):
        self.model, self.seeds = model, seeds

    def draw(self, what, index):
        at = (self.seeds[:, None, None], self.position[:, :, None], self.now[:, None, None])
        return reference.philox(*at, what, index)

    def noise(self, batch_size, device):
        return reference.uniform_below(self.draw("renoise", torch.zeros(1, dtype=torch.int64))[..., 0], VOCAB)

    def sample(self, probabilities, num_samples):
        noise = reference.gumbel(self.draw("token", torch.arange(VOCAB)))
        return (probabilities.log() + noise.flatten(0, 1)).argmax(-1, keepdim=True)

    def __call__(self, ids, mask, **options):
        model, batch = self.model, len(ids)
        self.position = torch.arange(ids.shape[1] - CANVAS, ids.shape[1]) - (mask == 0).sum(1, keepdim=True)
        self.step = torch.zeros(batch, dtype=torch.int64)
        prepare_sampler, prepare, denoise = (
            getattr(model, name) for name in ("_prepare_sampler", "_prepare_denoiser_inputs", "_denoising_step")
        )

        def sampler(*args):
            made = prepare_sampler(*args)
            made.initialize_canvas = self.noise
            return made

        def begin(**inputs):
            self.step += 1  # the encoder's forward
            self.position = self.position + CANVAS
            self.now = torch.full((batch,), -1)
            return prepare(**inputs)

        def step(**inputs):
            self.now = self.step.clone()
            self.step += ~inputs["finished_denoising"]
            return denoise(**inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "_prepare_sampler", sampler, raising=False)
            patch.setattr(model, "_prepare_denoiser_inputs", begin, raising=False)
            patch.setattr(model, "_denoising_step", step, raising=False)
            patch.setattr(torch, "multinomial", self.sample)
            return model.generate(ids, attention_mask=mask, **options)


def published(bound=0.1, steps=6, stability=1, confidence=0.005, t_min=0.4, t_max=0.8):
    """A generation configuration as a checkpoint has one."""
    return DiffusionGemmaGenerationConfig(
        sampler_config=EntropyBoundSamplerConfig(bound), max_denoising_steps=steps, stability_threshold=stability,
        confidence_threshold=confidence, t_min=t_min, t_max=t_max, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD,
    )  # fmt: skip


def compare(model, ids, mask, max_new_tokens, seeds):
    """Both decode; equal tokens and counts. Returns our output."""
    theirs = TheirGenerate(model, seeds)(ids, mask, max_new_tokens=max_new_tokens)
    ours = dk.generate(model, ids, mask, max_new_tokens=max_new_tokens, seed=seeds)
    assert ours.complete.all() and ours.generated.shape == (len(ids), max_new_tokens)
    length = theirs.sequences.shape[1]  # it ends with the canvas in which the last request ended
    assert torch.equal(ours.sequences[:, :length], theirs.sequences[:, : ours.sequences.shape[1]])
    assert (ours.sequences[:, length:] == PAD).all()
    answers = theirs.sequences[:, ids.shape[1] :]
    forwards = ((answers != PAD).sum(1) / theirs.tokens_per_forward).round()
    ends = torch.isin(answers, torch.tensor([EOS, END_OF_TURN])).cumsum(1) > 0
    canvases = (~ends).sum(1).clamp(max=answers.shape[1] - 1) // CANVAS + 1
    assert torch.equal(ours.num_forwards, (forwards + canvases).int())
    return ours


class TestGenerate:
    SEEDS = torch.tensor([3, -8, 5_000_000_000])

    @pytest.mark.parametrize("options", [
        {}, {"bound": 6.0}, {"bound": 30.0, "t_min": 0.1, "t_max": 2.0, "steps": 9}, {"steps": 1}, {"stability": 0},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("max_new_tokens", [CANVAS, 3 * CANVAS])
    def test_same_tokens(self, model, options, max_new_tokens):
        model.generation_config = published(**options)
        compare(model, *ragged(3, 19), max_new_tokens, self.SEEDS)

    def test_image_tokens_without_an_image(self, model):
        """The encoder reads padding in their place, or their tokens: as this version of transformers does."""
        model = copy.deepcopy(model)
        model.generation_config = published(bound=6.0)
        ids, mask = ragged(3, 19)
        ids[:, 14] = model.config.image_token_id = 12  # what it says most
        out = compare(model, ids, mask, 3 * CANVAS, self.SEEDS)
        assert (out.generated[:, :CANVAS] == 12).any()

    @pytest.mark.parametrize("stability", [1, 2])
    def test_requests_stop_each_for_itself(self, stability):
        """When the likeliest tokens stay and are likely: canvases take fewer steps, and not all rows the same."""
        model = build(seed=3, sharpness=12.0)
        model.generation_config = published(60.0, 16, stability, confidence=0.7, t_min=0.2)
        out = compare(model, *ragged(3, 11), 4 * CANVAS, self.SEEDS)
        assert (out.num_forwards < 4 * 17).all() and len(out.num_forwards.unique()) > 1

    def test_end_tokens(self, model):
        """Some requests end in their first canvas, some later; what follows an end token is padding."""
        model.generation_config = published(bound=9.0)
        batch = 8
        out = compare(model, prompts(batch, 5), torch.ones(batch, 5), 4 * CANVAS, torch.arange(batch))
        ends = torch.isin(out.generated, torch.tensor([EOS, END_OF_TURN]))
        first = torch.where(ends.any(1), ends.int().argmax(1) // CANVAS, 4)
        assert len(first.unique()) > 2
        after = ends.cumsum(1) - ends.int() > 0
        assert (out.generated[after] == PAD).all() and (out.commit_step[:, 5:][after & ~ends] >= -1).all()

    def test_the_last_canvas_is_whole(self, model):
        model.generation_config = published(bound=6.0)
        out = compare(model, *ragged(2, 9), CANVAS + 3, self.SEEDS[:2])
        whole = dk.generate(model, *ragged(2, 9), max_new_tokens=2 * CANVAS, seed=self.SEEDS[:2]).generated
        assert torch.equal(out.generated, whole[:, : CANVAS + 3])

    def test_a_request_does_not_depend_on_its_batch(self, model):
        model.generation_config = published(bound=6.0)
        ids, mask = ragged(3, 13)
        together = dk.generate(model, ids, mask, max_new_tokens=2 * CANVAS, seed=self.SEEDS)
        for row in range(3):
            alone = dk.generate(model, ids[row, 3 * row :], max_new_tokens=2 * CANVAS, seed=self.SEEDS[row : row + 1])
            assert torch.equal(alone.generated[0], together.generated[row])
            assert torch.equal(alone.num_forwards[0], together.num_forwards[row])

    def test_self_conditioning_is_fed(self, model):
        """Without it other tokens come out: the comparisons above would notice."""
        model.generation_config = published(bound=6.0)
        deaf = copy.deepcopy(model)
        with torch.no_grad():
            deaf.model.decoder.self_conditioning.down_proj.weight.zero_()
        a, b = (dk.generate(m, prompts(2, 9), max_new_tokens=CANVAS, seed=1).generated for m in (model, deaf))
        assert not torch.equal(a, b)

    def test_defaults_are_those_of_transformers(self, model):
        model.generation_config = DiffusionGemmaGenerationConfig()
        defaults = model.generation_config._get_default_generation_params()
        rule = dk.preset("diffusion-gemma").rule
        assert rule == dk.RenoisedEntropyBound(
            defaults["sampler_config"].entropy_bound, defaults["t_min"], defaults["t_max"],
            defaults["stability_threshold"], defaults["confidence_threshold"], defaults["max_denoising_steps"],
        )  # fmt: skip
        out = dk.generate(model, prompts(1, 5), max_new_tokens=CANVAS, seed=1, eos_token_id=())
        named = dk.generate(
            model, prompts(1, 5), config=dk.preset("diffusion-gemma", max_new_tokens=CANVAS, seed=1, eos_token_id=())
        )
        assert out.num_forwards == 49 and torch.equal(out.generated, named.generated)
        model.generation_config = None
        unsaid = dk.generate(model, prompts(1, 5), max_new_tokens=CANVAS, seed=1, eos_token_id=())
        assert torch.equal(unsaid.generated, out.generated)

    def test_prompt_as_embeddings(self, model):
        model.generation_config = published(bound=6.0)
        ids = prompts(2, 9)
        options = {"max_new_tokens": 2 * CANVAS, "seed": 1}
        embedded = dk.generate(model, inputs_embeds=model.get_input_embeddings()(ids), **options)
        assert torch.equal(embedded.generated, dk.generate(model, ids, **options).generated)

    def test_bfloat16(self, model):
        model = copy.deepcopy(model).bfloat16()
        model.generation_config = published(bound=6.0)
        out = dk.generate(model, *ragged(2, 9), max_new_tokens=2 * CANVAS, seed=1)
        assert out.complete.all() and (out.num_forwards % 7 == 0).all()

    def test_other_rules(self, model):
        """A rule that masks is told that there is no mask; with an id to stand for it, it decodes."""
        with pytest.raises(ValueError, match="mask_token_id is not in the model's configuration"):
            dk.generate(model, prompts(1, 5), rule=dk.Quota(), max_new_tokens=CANVAS)
        out = dk.generate(model, prompts(1, 5), rule=dk.Quota(), mask_token_id=4, max_new_tokens=CANVAS)
        assert out.complete.all() and (out.generated != 4).all()

    def test_guidance(self, model):
        """Both halves are conditioned on what they said; a scale too small to matter changes nothing."""
        model.generation_config = published(bound=6.0)
        options = {"max_new_tokens": 2 * CANVAS, "seed": 3, "mask_token_id": 4}
        plain, hardly, guided = (dk.generate(model, prompts(2, 9), cfg_scale=s, **options) for s in (0.0, 1e-9, 2.0))
        assert torch.equal(plain.sequences, hardly.sequences) and not torch.equal(plain.sequences, guided.sequences)


class TestLoad:
    def test_published_form(self, model, tmp_path):
        model.generation_config = published(bound=6.0)
        model.save_pretrained(tmp_path)
        loaded = dk.load(tmp_path)
        assert type(loaded) is DiffusionGemmaForBlockDiffusion and loaded.config.dlm_family == "diffusion-gemma"
        for (name, ours), (_, theirs) in zip(loaded.state_dict().items(), model.state_dict().items()):
            assert torch.equal(ours, theirs), name
        options = {"max_new_tokens": 2 * CANVAS, "seed": 1}
        expected = dk.generate(model, prompts(2, 9), **options)
        assert torch.equal(dk.generate(loaded, prompts(2, 9), **options).generated, expected.generated)
        loaded.save_pretrained(tmp_path / "again")
        again = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "again")
        assert torch.equal(dk.generate(again, prompts(2, 9), **options).generated, expected.generated)

    def test_as_another_family(self, model, tmp_path):
        model.config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="family must be 'diffusion-gemma' for this model; got 'llada'"):
            dk.load(tmp_path, family="llada")

    @pytest.mark.parametrize("name", [
        "model.decoder.layers.1.self_attn.k_proj.weight", "model.decoder.self_conditioning.down_proj.weight",
        "model.encoder.language_model.layers.0.layer_scalar",
    ])  # fmt: skip
    def test_missing_weights(self, model, tmp_path, name):
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[name]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"missing keys: .*{name}"):
            dk.load(tmp_path)


def test_errors(model):
    ids = prompts(1, 5)
    for options in ({"cache": "none"}, {"attention": "full", "cache": "none"}, {"attention": "causal"}):
        with pytest.raises(ValueError, match="attention='causal-context' and cache='block' are needed"):
            dk.generate(model, ids, max_new_tokens=4, **options)
    with pytest.raises(ValueError, match="family must be 'diffusion-gemma' for this model; got 'masked'"):
        dk.adapt(model, family="masked")
    both_ways = copy.deepcopy(model)
    both_ways.config.text_config.use_bidirectional_attention = "all"
    with pytest.raises(ValueError, match="model must have a causal encoder"):
        dk.adapt(both_ways)
    with pytest.raises(ValueError, match="cfg_scale needs a mask token"):
        dk.generate(model, ids, max_new_tokens=4, cfg_scale=1.0)
    assert torch.equal(dk.infill(model, ids).sequences, ids)  # without a mask token, -1 is what is wanted
    with pytest.raises(ValueError, match="model must have full attention"):
        dk.log_likelihood(model, ids, ids)
    with pytest.raises(ValueError, match="longer than the model's max_position_embeddings of 128"):
        dk.generate(model, ids, max_new_tokens=124)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        dk.RenoisedEntropyBound(steps=0)


def test_logits_in_slices():
    """The mean embedding that a forward takes in is made of slices as well."""
    model = build(sharpness=3.0)
    ids = torch.arange(8, 20).view(2, 6)
    whole, sliced = (
        dk.generate(model, ids, max_new_tokens=16, seed=3, lm_head="logits", logits_budget=budget)
        for budget in (1 << 28, 3 * VOCAB * 4)
    )
    assert torch.equal(sliced.sequences, whole.sequences)
    numerics.assert_same_probabilities(sliced.confidence, whole.confidence)
    with pytest.raises(ValueError, match="lm_head='fused' cannot be used here"):
        dk.generate(model, ids, max_new_tokens=16, seed=3, lm_head="fused")
