# SPDX-License-Identifier: Apache-2.0
"""Caches of features against plain restatements, alone and in ragged batches; what they refuse."""

import pytest
import torch
import transformers as hf

import dlmkernels as dk
import numerics
import published
from decodings import assert_rows_same, enliven, lively, ragged
from restated_features import PlainDLLMCache, PlainSparseCache, d2cache
from small_models import DECODER, MASK, build, prompts

STOCK = {"llama": (hf.LlamaForCausalLM, hf.LlamaConfig), "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config)}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=STOCK)
def model(request):
    """Four layers, of which the last three are not always computed."""
    build_class, config_class = STOCK[request.param]
    torch.manual_seed(5)
    return enliven(build_class(config_class(**DECODER | {"num_hidden_layers": 4})).eval(), seed=5)


#: intervals of prompt and response, and the share of what changed
SETTINGS = {
    "often": (4, 2, 0.25), "published": (50, 7, 0.25), "prompt between": (3, 4, 0.5), "nothing between": (5, 3, 0.0),
    "everything between": (6, 4, 1.0),
}  # fmt: skip


def check_alone_and_in_a_batch(model, options):
    rows, ids, valid = ragged()
    out = dk.generate(model, ids, valid, **options)
    for row, prompt in enumerate(rows):
        lengths = options["max_new_tokens"]
        length = lengths[row] if isinstance(lengths, tuple) else lengths
        alone = dk.generate(model, prompt, **options | {"max_new_tokens": length})
        pads = ids.shape[1] - len(prompt)
        end = pads + alone.sequences.shape[1]
        assert torch.equal(out.sequences[row, pads:end], alone.sequences[0])
        assert torch.equal(out.commit_step[row, pads:end], alone.commit_step[0])
        assert out.num_forwards[row] == alone.num_forwards[0]


class TestDLLMCache:
    @staticmethod
    def cached(model, setting, decode):
        """`decode(model, canvas, start)` with the restated cache, which must have chosen without near ties."""

        def restated(canvas, start):
            plain = PlainDLLMCache(model, start, *setting)
            request = decode(plain, canvas, start)
            request.note(plain.slack)
            return request

        return restated

    @pytest.mark.parametrize("name", SETTINGS)
    def test_llada(self, model, name):
        assert_rows_same(
            model, self.cached(model, SETTINGS[name], lambda m, c, s: published.llada(m, c, s, MASK, block_length=8)),
            16, config="llada", block_length=8, cache=dk.DLLMCache(*SETTINGS[name]),
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["often", "prompt between"])
    def test_threshold(self, model, name):
        """Rows come to their blocks and ends at different forwards."""
        assert_rows_same(
            model,
            self.cached(
                model, SETTINGS[name],
                lambda m, c, s: published.fast_dllm(m, c, s, MASK, threshold=0.5, block_length=8),
            ),
            24, rule=dk.Threshold(0.5), block_length=8, cache=dk.DLLMCache(*SETTINGS[name]),
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["often", "published"])
    def test_dream(self, model, name):
        """Logits that speak of the next position: the first of the response stands in a row of the prompt."""
        assert_rows_same(
            model, self.cached(model, SETTINGS[name], lambda m, c, s: published.dream(m, c[None], MASK, steps=9)[0]),
            16, config=dk.preset("dream", temperature=0.0, top_p=1.0), steps=9, cache=dk.DLLMCache(*SETTINGS[name]),
        )  # fmt: skip

    @pytest.mark.parametrize("options", [
        {"rule": dk.Quota()}, {"rule": dk.Threshold(0.4), "block_length": 8},
        {"rule": dk.Threshold(0.4), "cfg_scale": 0.5}, {"rule": dk.TokenEditing(0.4, 0.3, 4), "block_length": 8},
    ], ids=["quota", "blocks", "guided", "edited"])  # fmt: skip
    def test_without_approximation(self, model, options):
        """With intervals of 1 and a share of 1: bit for bit what there is without a cache."""
        _, ids, valid = ragged()
        options = options | {"max_new_tokens": 16, "eos_policy": "none"}
        want = dk.generate(model, ids, valid, **options)
        out = dk.generate(model, ids, valid, **options, cache=dk.DLLMCache(1, 1, 1.0))
        assert torch.equal(out.sequences, want.sequences) and torch.equal(out.confidence, want.confidence)
        assert torch.equal(out.commit_step, want.commit_step) and torch.equal(out.num_forwards, want.num_forwards)

    @pytest.mark.parametrize("options", [
        {"rule": dk.Threshold(0.4), "cfg_scale": 0.5}, {"rule": dk.Threshold(0.4), "temperature": 1.0, "seed": 3},
        {"max_new_tokens": (9, 16, 5), "rule": dk.Threshold(0.4)},
        {"rule": dk.Threshold(0.4), "eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    ], ids=["guided", "sampled", "lengths", "ends"])  # fmt: skip
    def test_alone_and_in_a_batch(self, model, options):
        options = {"max_new_tokens": 16, "eos_policy": "none", "block_length": 8} | options
        check_alone_and_in_a_batch(model, options | {"cache": dk.DLLMCache(5, 3, 0.25)})

    def test_infill(self, model):
        """Of a canvas with gaps, the prompt is what stands left of the first."""
        canvas = ragged((12,), seed=3)[0][0].clone()
        canvas[[4, 5, 7, 8, 9, 11]] = MASK
        setting = SETTINGS["often"]
        request = self.cached(model, setting, lambda m, c, s: published.llada(m, c, 0, MASK))(canvas, 4)
        assert request.slack > numerics.TWO_PROGRAMS
        out = dk.infill(model, canvas, rule=dk.Quota(), cache=dk.DLLMCache(*setting), eos_policy="none")
        assert torch.equal(out.sequences[0], request.tokens) and out.num_forwards[0] == request.num_forwards

    def test_it_saves(self, model):
        """Rows that go through the feed-forward of each layer, in a prompt of 40 and 16 forwards of a response of 16."""
        counts = [0] * 4
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda m, x, i=i: counts.__setitem__(i, counts[i] + x[0].shape[1]))
            for i, layer in enumerate(model.model.layers)
        ]
        prompt = ragged((40,))[0][0]
        dk.generate(model, prompt, rule=dk.Quota(), max_new_tokens=16, eos_policy="none", cache="dllm-cache")
        for hook in hooks:
            hook.remove()
        # all of them once, the response at forwards 7 and 14, a quarter of it at the other 13
        assert counts == [16 * 56, *[56 + 2 * 16 + 13 * 4] * 3]

    def test_by_name(self, model):
        prompt = ragged((7,))[0][0]
        options = {"rule": dk.Quota(), "max_new_tokens": 16, "eos_policy": "none"}
        named = dk.generate(model, prompt, **options, cache="dllm-cache")
        made = dk.generate(model, prompt, **options, cache=dk.DLLMCache(50, 7, 0.25))
        assert torch.equal(named.sequences, made.sequences) and torch.equal(named.confidence, made.confidence)

    def test_the_model_is_left_alone(self, model):
        prompt = ragged((7,))[0]
        before = model(prompt[0][None]).logits
        dk.generate(model, prompt[0], max_new_tokens=8, cache="dllm-cache")
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        assert torch.equal(model(prompt[0][None]).logits, before)


class TestSparseCache:
    @staticmethod
    def evicting(model, keep, pool, decode, block=8, shift=False):
        """`decode(model, canvas, start)` with the restated eviction, which must have chosen without near ties."""

        def restated(canvas, start):
            plain = PlainSparseCache(model, start, block, MASK, keep, pool, shift)
            request = decode(plain, canvas, start)
            request.note(plain.slack)
            return request

        return restated

    @pytest.mark.parametrize("keep, pool", [(0.5, 3), (0.3, 1), (0.7, 5), (0.0, 3), (1.0, 3)])
    def test_llada(self, model, keep, pool):
        assert_rows_same(
            model, self.evicting(model, keep, pool, lambda m, c, s: published.llada(m, c, s, MASK, block_length=8)),
            16, config="llada", block_length=8, cache=dk.SparseCache(keep, pool),
        )  # fmt: skip

    def test_threshold(self, model):
        """Rows come to their blocks at different forwards, and stay in them for different numbers of forwards."""
        assert_rows_same(
            model,
            self.evicting(model, 0.5, 3, lambda m, c, s: published.fast_dllm(m, c, s, MASK, threshold=0.5, block_length=8)),
            24, rule=dk.Threshold(0.5), block_length=8, cache="sparse-dllm",
        )  # fmt: skip

    def test_shifted(self, model):
        assert_rows_same(
            model,
            self.evicting(
                model, 0.5, 3,
                lambda m, c, s: published.fast_dllm(m, c, s, MASK, threshold=0.5, block_length=8, shift=True), shift=True,
            ),
            24, rule=dk.Threshold(0.5), block_length=8, cache="sparse-dllm", logit_alignment="shift",
        )  # fmt: skip

    def test_everything_kept(self, model):
        """Then it is a dual cache with a warm-up of two forwards."""
        _, ids, valid = ragged()
        options = {"rule": dk.Quota(), "max_new_tokens": 24, "block_length": 8, "eos_policy": "none"}
        want = dk.generate(model, ids, valid, **options, cache="dual", warmup=2)
        out = dk.generate(model, ids, valid, **options, cache=dk.SparseCache(keep=1.0))
        assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)

    @pytest.mark.parametrize("options", [
        {"cfg_scale": 0.5}, {"temperature": 1.0, "seed": 3}, {"max_new_tokens": (9, 16, 5)}, {"sub_block_length": 3},
    ], ids=["guided", "sampled", "lengths", "parts"])  # fmt: skip
    def test_alone_and_in_a_batch(self, model, options):
        options = {"rule": dk.Threshold(0.4), "max_new_tokens": 16, "eos_policy": "none", "block_length": 8} | options
        check_alone_and_in_a_batch(model, options | {"cache": "sparse-dllm"})

    def test_sliding_windows_are_refused(self):
        torch.manual_seed(0)
        config = hf.MistralConfig(**DECODER, sliding_window=8)
        with pytest.raises(ValueError, match="MistralAttention has a sliding window"):
            dk.generate(
                hf.MistralForCausalLM(config).eval(), ragged((12,))[0][0], max_new_tokens=16, rule=dk.Quota(),
                attention="full", cache="sparse-dllm",
            )  # fmt: skip


class TestD2Cache:
    @pytest.mark.parametrize(
        "rollout, candidates, steps", [(0.1, 6, None), (0.3, 4, None), (0.0, 1, None), (0.1, 32, 9)]
    )
    def test_quota(self, model, rollout, candidates, steps):
        assert_rows_same(
            model,
            lambda c, s: d2cache(model, c, s, MASK, rollout=rollout, candidates=candidates, steps=steps),
            24, rule=dk.Quota(), steps=steps, score=dk.scores.DensityWeighted(), cache=dk.D2Cache(rollout, candidates),
        )  # fmt: skip

    def test_shifted(self, model):
        assert_rows_same(
            model, lambda c, s: d2cache(model, c, s, MASK, rollout=0.1, candidates=6, shift=True), 24, rule=dk.Quota(),
            score=dk.scores.DensityWeighted(), cache=dk.D2Cache(0.1, 6), logit_alignment="shift",
        )  # fmt: skip

    def test_without_approximation(self, model):
        _, ids, valid = ragged()
        options = {"rule": dk.Threshold(0.4), "max_new_tokens": 16, "eos_policy": "none"}
        want = dk.generate(model, ids, valid, **options)
        out = dk.generate(model, ids, valid, **options, cache=dk.D2Cache(1.0, 16))
        assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)

    @pytest.mark.parametrize("options", [
        {"cfg_scale": 0.5}, {"temperature": 1.0, "seed": 3}, {"max_new_tokens": (9, 16, 5)},
        {"eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    ], ids=["guided", "sampled", "lengths", "ends"])  # fmt: skip
    def test_alone_and_in_a_batch(self, model, options):
        options = {"rule": dk.Threshold(0.4), "max_new_tokens": 16, "eos_policy": "none"} | options
        check_alone_and_in_a_batch(model, options | {"cache": dk.D2Cache(0.1, 4)})

    @pytest.mark.parametrize("options, message", [
        ({"block_length": 4}, "cache='d2cache' decodes the answer as a single block"),
        ({"rule": dk.TokenEditing(0.4, 0.3, 4)}, "cache='d2cache' needs a rule that never changes decided tokens; got TokenEditing"),
    ], ids=["blocks", "editing"])  # fmt: skip
    def test_refused_with_it(self, options, message):
        with pytest.raises(ValueError, match=message):
            dk.generate(build(), ragged((5,))[0][0], max_new_tokens=8, cache="d2cache", **options)

    def test_in_the_engine(self, model):
        """Its rows do not come and go: requests are decoded in batches, each as it is alone."""
        options = {"rule": dk.Threshold(0.4), "max_new_tokens": 16, "eos_policy": "none", "cache": dk.D2Cache(0.1, 4)}
        rows, *_ = ragged()
        outputs = dk.generate_batch(model, [row.tolist() for row in rows], **options)
        for row, output in zip(rows, outputs.values()):
            want = dk.generate(model, row, **options).generated[0].tolist()
            assert output.generated_tokens == want


@pytest.mark.parametrize("cache", ["dllm-cache", "sparse-dllm"])
def test_memory_of_an_engine(cache):
    """All of it is there before the first request, and decoding takes no more."""
    rows, *_ = ragged()
    options = {"rule": dk.Threshold(0.5), "cache": cache, "block_length": 8, "eos_policy": "none"}
    with dk.Engine(lively(), slots=2, max_length=64, **options) as engine:
        before = engine.memory()
        numbers = [engine.add_request(row.tolist(), max_new_tokens=16) for row in rows]
        outputs = {number: list(engine.request_id_iter(number))[-1] for number in numbers}
        assert engine.memory().caches == before.caches > 0
    for number, row in zip(numbers, rows):
        want = dk.generate(lively(), row, **options, max_new_tokens=16).generated[0].tolist()
        assert outputs[number].generated_tokens == want


@pytest.mark.parametrize("make, message", [
    (lambda: dk.D2Cache(rollout=-0.1), "rollout must be a number from 0 to 1; got -0.1"),
    (lambda: dk.D2Cache(candidates=0), "candidates must be an integer of at least 1; got 0"),
    (lambda: dk.D2Cache(sigma=0), "sigma must be a positive number, up to 1000; got 0"),
    (lambda: dk.SparseCache(keep=1.2), "keep must be a number from 0 to 1; got 1.2"),
    (lambda: dk.SparseCache(pool=2), "pool must be an odd number; got 2"),
    (lambda: dk.SparseCache(pool=0), "pool must be an integer of at least 1; got 0"),
    (lambda: dk.DLLMCache(prompt_interval=0), "prompt_interval must be an integer of at least 1; got 0"),
    (lambda: dk.DLLMCache(response_interval=2.5), "response_interval must be an integer of at least 1; got 2.5"),
    (lambda: dk.DLLMCache(share=1.5), "share must be a number from 0 to 1; got 1.5"),
    (lambda: dk.DLLMCache(share=float("nan")), "share must be a number from 0 to 1; got nan"),
    (lambda: dk.DecodingConfig(cache="dllm"), "cache must be one of .*dllm-cache.*; got 'dllm'"),
])  # fmt: skip
def test_limits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("options, message", [
    ({"attention": "causal"}, "cache='dllm-cache' needs attention='full'; got attention='causal'"),
    ({"rule": dk.EntropyPipeline(1.0)}, "block by block and does not move tokens; got EntropyPipeline"),
    ({"rule": dk.SplitEditing(0.3, 0.2, 3, 90, 91)}, "does not move tokens; got SplitEditing"),
    ({"refresh_interval": 3}, "refresh_interval=3 has no effect"), ({"warmup": 3}, "warmup=3 has no effect"),
    ({"vicinity": (1, 1)}, "vicinity=.* has no effect"),
])  # fmt: skip
def test_refused_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        dk.generate(build(), ragged((5,))[0][0], max_new_tokens=8, cache="dllm-cache", **options)


@pytest.mark.parametrize("kind", ["bert", "qwen3_moe"])
def test_models_refused(kind):
    with pytest.raises(ValueError, match="cache='dllm-cache' needs a model of type llama, qwen2, qwen3; got one of"):
        dk.generate(lively(kind), ragged((5,))[0][0], max_new_tokens=8, cache="dllm-cache")


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="cache='dllm-cache' needs a model that is not compiled"):
        dk.generate(dk.adapt(build(), compile=True), ragged((5,))[0][0], max_new_tokens=8, cache="dllm-cache")


@pytest.mark.parametrize(
    "options", [{"config": "d2cache"}, {"config": "d2cache-order"}, {"cache": "d2cache", "rule": dk.Quota()}], ids=str
)
def test_a_shorter_answer_beside_a_longer_one(options):
    """What stands behind a row's end is no decided neighbour of its last positions."""
    model, options = lively(), options | {"eos_policy": "none"}
    for seed in range(2):
        long, short = (prompts(1, 8, seed=s) for s in (seed, seed + 50))
        both = dk.generate(model, torch.cat((long, short)), max_new_tokens=[56, 40], **options)
        alone = dk.generate(model, short, max_new_tokens=40, **options)
        assert torch.equal(both.generated[1, :40], alone.generated[0])
        engine = dk.Engine(model, slots=2, max_length=64, **options)
        output = engine.get_result(engine.add_request(short[0].tolist(), max_new_tokens=40))
        assert output.generated_tokens == alone.generated[0].tolist()
