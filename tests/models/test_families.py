# SPDX-License-Identifier: Apache-2.0
"""Every family from its published form: loaded, compared with a plain model, decoded like its published decoder."""

import json

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import published
from checkpoints import EOS, HIDDEN, MASK, PAD, UNNAMED, VOCAB, our_logits, write
from decodings import assert_rows_same, assert_same
from dlmkernels import AttentionWindow
from dlmkernels.models.adapt import adapt
from small_models import prompts

FULL = {
    "llada": checkpoints.llada, "llada-moe": checkpoints.llada_moe, "dream": checkpoints.dream,
    "rnd1": checkpoints.rnd1, "diffullama": checkpoints.diffullama, "diffugpt": checkpoints.diffugpt,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FULL)
class TestFull:
    def test_logits(self, name, loaded):
        checkpoint, model = loaded(name, FULL[name])
        tokens = prompts(2, 23)
        numerics.assert_close("logits", our_logits(model, tokens), checkpoint.double(tokens), checkpoint.plain(tokens))

    def test_facts(self, name, loaded):
        checkpoint, model = loaded(name, FULL[name])
        family = adapt(model).family
        assert family.name == UNNAMED.get(name, name) and family.attention == "full"
        assert family.logit_alignment == ("shift" if name in ("dream", "rnd1", "diffullama", "diffugpt") else "same")
        assert model.config.mask_token_id == MASK and not model.training

    def test_published_decoder(self, name, loaded):
        """LLaDA's decoder for families read in place, Dream's for shifted ones; by default where it is the default."""
        checkpoint, model = loaded(name, FULL[name])
        if adapt(model).family.logit_alignment == "same":
            restated = lambda c, s: published.llada(checkpoint.plain, c, s, MASK, steps=8)  # noqa: E731
            assert_rows_same(model, restated, 16, steps=8, seed=2)
        else:
            restated = lambda c, s: published.dream(checkpoint.plain, c[None], MASK, steps=6)[0]  # noqa: E731
            config = dk.preset("dream", temperature=0.0, top_p=1.0)
            assert_rows_same(model, restated, 16, config=config, steps=6, seed=2)

    @pytest.mark.parametrize("cache", ["prefix", "dual"])
    def test_decodes_with_kv_reuse(self, name, cache, loaded):
        _, model = loaded(name, FULL[name])
        out = dk.generate(
            model, prompts(2, 6), cache=cache, rule=dk.Threshold(0.5), max_new_tokens=16, block_length=8, top_p=1.0,
            temperature=0.0,
        )  # fmt: skip
        assert out.complete.all()

    def test_saved_again(self, name, loaded, tmp_path):
        """What `load` returns is a stock model: transformers alone reads what it saves, and so does `load`."""
        _, model = loaded(name, FULL[name])
        model.save_pretrained(tmp_path)
        tokens = prompts(1, 9)
        again = dk.load(tmp_path)
        assert adapt(again).family == adapt(model).family
        assert torch.equal(our_logits(again, tokens), our_logits(model, tokens))
        stock, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for (name, a), (_, b) in zip(model.state_dict().items(), stock.state_dict().items()):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("steps", [16, 8, 5, 3, 1])
def test_rnd1s_own_decoder(steps, loaded):
    """Its preset; steps that do not divide the tokens, too."""
    checkpoint, model = loaded("rnd1", checkpoints.rnd1)
    restated = lambda c, s: published.rnd1(checkpoint.plain, c, s, MASK, steps=steps)  # noqa: E731
    assert_rows_same(model, restated, 16, config=dk.preset("rnd1", temperature=0.0), steps=steps, seed=2)
    out = dk.generate(model, prompts(2, 5), config=dk.preset("rnd1"), max_new_tokens=16, steps=steps, seed=1)
    assert out.complete.all() and (out.num_forwards == steps).all()


class TestDiffuLLaMA:
    """Its sampler: with t steps left each mask is revealed with probability 1 / t, tokens of the filtered distribution."""

    ROWS, STEPS, LENGTH = 3000, 5, 8

    @pytest.fixture(scope="class")
    def drawn(self, loaded):
        checkpoint, model = loaded("diffullama", checkpoints.diffullama)
        ids = prompts(1, 6)
        out = dk.generate(
            model, ids.expand(self.ROWS, -1), config=dk.preset("diffullama"), max_new_tokens=self.LENGTH,
            steps=self.STEPS, seed=torch.arange(self.ROWS),
        )  # fmt: skip
        return checkpoint, ids, out

    def test_when(self, drawn):
        """So that every step is as likely as any other, whatever the position."""
        *_, out = drawn
        for step in out.commit_step[:, 6:].T:
            numerics.assert_distribution("step", step.bincount(minlength=self.STEPS), [1 / self.STEPS] * self.STEPS)
        together = out.commit_step[:, 6] * self.STEPS + out.commit_step[:, 7]
        numerics.assert_distribution(
            "pair", together.bincount(minlength=self.STEPS**2), [self.STEPS**-2] * self.STEPS**2
        )

    def test_what(self, drawn):
        """The first position in the first step: temperature 0.9, then the least set of more than 0.9."""
        checkpoint, ids, out = drawn
        canvas = torch.cat((ids, torch.full((1, self.LENGTH), MASK)), 1)
        z = checkpoint.double(canvas)[0, 5].index_fill(0, torch.tensor([MASK]), -torch.inf) / 0.9
        p = torch.softmax(z, -1)
        above = torch.where(p > p[:, None], p, 0.0).sum(1)
        p = torch.where(above > 0.9, 0.0, p)
        first = out.sequences[out.commit_step[:, 6] == 0, 6]
        assert (p > 0).sum() > 3
        numerics.assert_distribution("token", first.bincount(minlength=VOCAB), (p / p.sum()).tolist())


#: Models distilled by d3LLM have their teachers' architecture.
DISTILLED = {"d3llm-llada": checkpoints.llada, "d3llm-dream": checkpoints.dream}


@pytest.mark.parametrize("name", DISTILLED)
class TestD3LLM:
    def load(self, name, folder):
        checkpoint = DISTILLED[name]()
        return checkpoint, dk.load(checkpoint.write(folder), family=name)

    def test_default_decoding(self, name, tmp_path):
        """Its pipeline, in blocks of 32."""
        checkpoint, model = self.load(name, tmp_path)
        told = {"block": 32, "threshold": 0.5, "add": 0.1, "decoded": 0.95, "pad": PAD}
        told |= {"shift": "dream" in name, "best_of_all": "llada" in name}
        restated = lambda c, s: published.multi_block(checkpoint.plain, c[:s], 48, MASK, **told)  # noqa: E731
        assert_rows_same(model, restated, 48, seed=1)

    def test_saved_again(self, name, tmp_path):
        _, model = self.load(name, tmp_path)
        model.save_pretrained(tmp_path / "again")
        again = dk.load(tmp_path / "again")
        assert adapt(again).family == adapt(model).family and adapt(again).family.name == name
        teacher = adapt(dk.load(tmp_path)).family
        alike = ("logit_alignment", "attention", "mask_token_id", "eos_token_ids", "num_tokens", "vocab_size")
        assert all(getattr(adapt(again).family, fact) == getattr(teacher, fact) for fact in alike)


# --- blocks after a finished context ---------------------------------------------------------------------------------

BLOCKS = {
    "sdar": checkpoints.sdar, "sdar-moe": checkpoints.sdar_moe, "llada2": checkpoints.llada2,
    "fast-dllm-v2": checkpoints.fast_dllm_v2, "a2d-bd3lm": checkpoints.a2d_qwen3, "nemotron": checkpoints.nemotron,
    "d2f-llada": checkpoints.llada, "d2f-dream": checkpoints.dream, "shifted": checkpoints.rnd1,
}  # fmt: skip
UNNAMED |= {"a2d-bd3lm": "a2d-bd3lm", "d2f-llada": "d2f-llada", "d2f-dream": "d2f-dream", "shifted": "bd3-lm"}
#: How the restated decoder is told of each family, and how ours is told what differs from the family's defaults.
RESTATED = {
    "sdar": {"block": 4}, "sdar-moe": {"block": 4}, "llada2": {"block": 8},
    "fast-dllm-v2": {"block": 8, "shift": True, "seeded": True, "part": 4},
    "a2d-bd3lm": {"block": 8, "grid": "both-ways"},
    "nemotron": {"block": 8, "grid": "prompt", "attention": "causal-context", "seeded": True, "strict": False},
    "d2f-llada": {"block": 8, "grid": "prompt"}, "d2f-dream": {"block": 8, "grid": "prompt", "shift": True},
    "shifted": {"block": 8, "shift": True},
}  # fmt: skip
OURS = {
    "llada2": {"block_length": 8}, "fast-dllm-v2": {"sub_block_length": 4},
    "a2d-bd3lm": {"block_length": 8}, "d2f-llada": {"block_length": 8}, "d2f-dream": {"block_length": 8},
    "shifted": {"block_length": 8, "logit_alignment": "shift"},
}  # fmt: skip


#: A block's first token comes from the finished one, or the open block attends differently: it is appended apart.
NEVER_FUSED = ("fast-dllm-v2", "nemotron")


@pytest.mark.parametrize("name", BLOCKS)
class TestBlocks:
    def test_logits(self, name, loaded):
        checkpoint, model = loaded(name, BLOCKS[name])
        tokens = prompts(2, 23)
        for window, visible in (
            ({}, None), ({"causal_block": 4}, published.block_causal(23, 4, 0)),
            ({"causal_block": 1}, torch.ones(23, 23).tril().bool()),
            ({"causal_block": 8, "block_origin": torch.tensor([5, 5], dtype=torch.int32)},
             published.block_causal(23, 8, 5)),
        ):  # fmt: skip
            numerics.assert_close(
                "logits", our_logits(model, tokens, **window), checkpoint.double(tokens, visible),
                checkpoint.plain(tokens, visible),
            )  # fmt: skip

    @pytest.mark.parametrize("cache,fused", [("block", True), ("block", False), ("none", True)])
    @pytest.mark.parametrize("threshold", [0.3, 0.7])
    def test_published_decoder(self, name, threshold, cache, fused, loaded):
        """Ragged prompts that end within a block, at its end, and before the first block is full."""
        checkpoint, model = loaded(name, BLOCKS[name])
        told = RESTATED[name] | {"threshold": threshold, "fused": fused or cache == "none"}
        if told.get("attention") == "causal-context":
            told["fused"] = False
        ours = OURS.get(name, {}) | {"cache": cache}
        if not fused and name not in NEVER_FUSED:
            ours["fuse_commit"] = False
        rule = dk.Threshold(threshold, strict=told.get("strict", True))
        assert_rows_same(
            model, lambda c, s: published.block_diffusion(checkpoint.plain, c[:s], 18, MASK, **told), 18,
            rule=rule, temperature=0.0, seed=1, **ours,
        )  # fmt: skip

    def test_commit_is_fused(self, name, loaded):
        """One forward a block less; the tokens are the same."""
        _, model = loaded(name, BLOCKS[name])
        options = OURS.get(name, {}) | {"cache": "block", "temperature": 0.0, "eos_policy": "none"}
        options |= {"rule": dk.Threshold(0.5), "max_new_tokens": 32}
        if name in NEVER_FUSED:
            with pytest.raises(ValueError, match="fuse_commit=False has no effect"):
                dk.generate(model, prompts(2, 16), fuse_commit=False, **options)
            return
        together, apart = (dk.generate(model, prompts(2, 16), fuse_commit=f, **options) for f in (True, False))
        assert torch.equal(together.sequences, apart.sequences)
        saved = apart.num_forwards - together.num_forwards
        blocks = 32 // (options.get("block_length") or adapt(model).block_length)
        assert (saved == blocks).all()

    def test_defaults(self, name, loaded):
        """`generate` alone reuses keys and values, and forwards what it must."""
        _, model = loaded(name, BLOCKS[name])
        if adapt(model).family.preset is None:
            with pytest.raises(ValueError, match="block_length is needed"):
                dk.generate(model, prompts(2, 9), max_new_tokens=12)
            return
        out = dk.generate(model, prompts(2, 9), max_new_tokens=12, seed=1)
        assert out.complete.all() and (out.num_forwards <= 16).all()

    def test_saved_again(self, name, loaded, tmp_path):
        _, model = loaded(name, BLOCKS[name])
        model.save_pretrained(tmp_path)
        tokens = prompts(1, 9)
        again = dk.load(tmp_path)
        assert adapt(again).family == adapt(model).family
        assert adapt(again).block_length == adapt(model).block_length
        assert torch.equal(our_logits(again, tokens), our_logits(model, tokens))


class TestBlockDecoding:
    """What holds for every model with blocks, shown on SDAR and (both kinds of attention in turn) Nemotron."""

    @pytest.fixture(scope="class")
    def sdar(self, loaded):
        return loaded("sdar", checkpoints.sdar)[1]

    OPTIONS = {"max_new_tokens": 19, "temperature": 0.0, "eos_policy": "none", "rule": dk.Threshold(0.5)}

    def test_guidance(self, sdar):
        rows = [prompts(1, n)[0] for n in (5, 9)]
        ids = torch.stack([torch.cat((rows[0].new_full((4,), PAD), rows[0])), rows[1]])
        valid = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
        for options in ({"seeded": False}, {"seeded": True}, {"logit_alignment": "shift"}):
            options = self.OPTIONS | options | {"cfg_scale": 0.7}
            exact = dk.generate(sdar, ids, valid, cache="none", **options)
            assert torch.equal(dk.generate(sdar, ids, valid, cache="block", **options).sequences, exact.sequences)
            assert not torch.equal(
                dk.generate(sdar, ids, valid, **options | {"cfg_scale": 0.0}).sequences, exact.sequences
            )

    def test_infilling(self, sdar):
        """Blocks without a mask are passed over and their keys and values appended with the next."""
        canvas = prompts(3, 27)
        holes = torch.rand(3, 27, generator=torch.Generator().manual_seed(3)) < 0.4
        holes[:, 8:16], holes[1, :16], holes[2, 4:] = False, False, False
        holes[2, 0] = True
        canvas = canvas.masked_fill(holes, MASK)
        options = {name: value for name, value in self.OPTIONS.items() if name != "max_new_tokens"}
        for alignment in ("same", "shift"):
            options |= {"logit_alignment": alignment}
            exact = dk.infill(sdar, canvas, cache="none", **options)
            for fused in (True, False):
                ours = dk.infill(sdar, canvas, cache="block", fuse_commit=fused, **options)
                assert torch.equal(ours.sequences, exact.sequences) and ours.complete.all()

    def test_sampling_does_not_depend_on_the_batch(self, sdar):
        rows = [prompts(1, n, seed=n)[0] for n in (3, 8, 6)]
        ids = torch.stack([torch.cat((r.new_full((8 - len(r),), PAD), r)) for r in rows])
        valid = torch.stack([torch.arange(8) >= 8 - len(r) for r in rows]).long()
        options = self.OPTIONS | {"temperature": 1.0, "cache": "block"}
        seeds = torch.tensor([11, 12, 13])
        out = dk.generate(sdar, ids, valid, seed=seeds, **options)
        for i, row in enumerate(rows):
            alone = dk.generate(sdar, row, seed=seeds[i : i + 1], **options)
            assert torch.equal(out.generated[i], alone.generated[0])
            assert torch.equal(out.commit_step[i, 8:], alone.commit_step[0, len(row) :])

    @pytest.mark.parametrize("name", ["sdar", "nemotron", "fast-dllm-v2"])
    def test_stop_token(self, name, loaded):
        """A request that has ended is not forwarded again and leaves its neighbours as they were."""
        _, model = loaded(name, BLOCKS[name])
        ids, options = prompts(6, 7), self.OPTIONS | {"cache": "block", "max_new_tokens": 24}
        whole = dk.generate(model, ids, **options)
        ended = 0
        for eos in range(4, 40, 3):
            out = dk.generate(model, ids, **options | {"eos_policy": "fill", "eos_token_id": eos, "pad_token_id": PAD})
            for row in range(6):
                text = whole.generated[row].tolist()
                stop = text.index(eos) + 1 if eos in text else 24
                assert torch.equal(out.generated[row, :stop], whole.generated[row, :stop])
                assert (out.generated[row, stop:] == PAD).all()
                ended += stop <= 12
                assert out.num_forwards[row] < whole.num_forwards[row] or stop > 12
        assert ended > 1

    def test_streamer(self, sdar):
        class Streamer:
            def __init__(self):
                self.got = []

            def put(self, tokens):
                self.got += tokens.tolist()

            def end(self):
                self.got.append("end")

        streamer = Streamer()
        out = dk.generate(sdar, prompts(1, 6), streamer=streamer, **self.OPTIONS)
        assert streamer.got == [*out.sequences[0].tolist(), "end"]

    @pytest.mark.parametrize("options,match", [
        ({"cache": "dual"}, r"cache must be one of none, block, focus with attention='block'; got 'dual'"),
        ({"attention": "full"}, r"cache must be one of none, prefix, dual, delayed, dllm-cache, sparse-dllm, d2cache with attention='full'; got 'block'"),
        ({"attention": "full", "cache": "none", "seeded": True}, "seeded needs a context"),
        ({"attention": "diagonal"}, "attention must be one of"),
        ({"block_grid": "hexagonal"}, "block_grid must be one of"),
        ({"sub_block_length": 0}, "sub_block_length must be None or an integer of at least 1"),
    ], ids=str)  # fmt: skip
    def test_refused(self, sdar, options, match):
        with pytest.raises(ValueError, match=match):
            dk.generate(sdar, prompts(1, 4), **self.OPTIONS | options)

    def test_unknown_model_attends_by_itself(self):
        class Odd(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(8, 8)

            def forward(self, tokens):
                return type("Out", (), {"logits": self.table(tokens)})()

        with pytest.warns(UserWarning), pytest.raises(ValueError, match="attention='block' needs a model of a known"):
            dk.generate(Odd().eval(), torch.tensor([[1, 2]]), mask_token_id=7, attention="block", block_length=4)


THRESHOLD = {"rule": dk.Threshold(0.5), "temperature": 0.0}
EMBEDDED = [
    *[("llada", {"cache": c, "block_length": 6} | THRESHOLD) for c in ("none", "prefix", "dual", "delayed")],
    *[("dream", {"cache": c, "block_length": 6} | THRESHOLD) for c in ("none", "prefix", "dual")],
    *[(name, {"cache": c} | THRESHOLD) for name in ("sdar", "llada2", "nemotron", "fast-dllm-v2") for c in ("none", "block")],
    ("sdar", {"cache": "block", "fuse_commit": False} | THRESHOLD), ("sdar", {"cfg_scale": 0.5} | THRESHOLD),
    ("a2d-bd3lm", {"cache": "block", "block_length": 4} | THRESHOLD), ("d2f-dream", {"cache": "block"} | THRESHOLD),
    ("fast-dllm-v2", {"sub_block_length": 4, "sub_block_cache": True}),
    ("nemotron", {"config": dk.preset("nemotron-speculative")}), ("i-dlm", {"temperature": 0.0}), ("i-dlm", {"seed": 3}),
    ("wedlm", {"temperature": 0.0}), ("wedlm", {"cache": "none"} | THRESHOLD),
    ("d2f-llada", {"cache": "block", "block_length": 5}), ("d2f-llada", {"cache": "none", "block_length": 5}),
    ("llada", {"config": dk.preset("d3llm"), "block_length": 5}),
    ("llada", {"config": dk.preset("d3llm-prefix"), "block_length": 5}),
    ("llada", {"cfg_scale": 0.5, "cache": "dual"}), ("llada", {"config": dk.preset("dinfer-vicinity"), "block_length": 6}),
    ("llada", {"config": dk.preset("dinfer-smoothing")}), ("llada", {"config": dk.preset("dinfer-smoothing"), "cfg_scale": 0.5}),
    ("llada", {"config": dk.preset("wino"), "block_length": 6}), ("llada", {"config": dk.preset("saber")}),
    ("llada2", {"config": dk.preset("dmax")}), ("llada2", {"config": dk.preset("llada2.1")}),
    ("diffugpt", {}), ("rnd1", {"seed": 3}),
]  # fmt: skip


@pytest.mark.parametrize("name,options", EMBEDDED, ids=lambda value: value if isinstance(value, str) else "")
def test_embedded_prompts(name, options, loaded):
    """The embeddings of a prompt's tokens decode like the tokens, whatever reads them; other embeddings do not.

    The end token is what stands where the prompts were, and ends nothing.
    """
    _, model = loaded(name, (FULL | BLOCKS | {"i-dlm": checkpoints.i_dlm, "wedlm": checkpoints.wedlm})[name])
    ids = prompts(2, 9)
    valid = torch.ones(2, 9, dtype=torch.int64)
    valid[0, :4] = 0
    ends = getattr(options.get("config"), "eos_policy", "fill") != "none"
    options = {"max_new_tokens": 12, "seed": 1, "pad_token_id": EOS} | ({"eos_token_id": EOS} if ends else {}) | options
    embeds = model.get_input_embeddings()(ids)
    expected = dk.generate(model, ids, valid, **options)
    out = dk.generate(model, attention_mask=valid, inputs_embeds=embeds, **options)
    assert torch.equal(out.generated, expected.generated) and (out.sequences[:, :9] == EOS).all()
    assert torch.equal(out.commit_step, expected.commit_step) and torch.equal(out.num_forwards, expected.num_forwards)
    alone = dk.generate(model, inputs_embeds=embeds[:1, 4:], **options)
    assert torch.equal(alone.generated, dk.generate(model, ids[0, 4:], **options).generated)
    other = dk.generate(model, attention_mask=valid, inputs_embeds=embeds.roll(1, 1), **options)
    assert not torch.equal(other.generated, expected.generated)


def test_embedded_prompts_of_models_without_embeddings():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(8, 8))

        def forward(self, tokens):
            return type("Out", (), {"logits": self.table[tokens]})()

    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="inputs_embeds needs a transformers model; got Odd"),
    ):
        dk.generate(Odd().eval(), inputs_embeds=torch.zeros(1, 2, 8), mask_token_id=7)


@pytest.mark.parametrize("embeds,match", [
    (torch.zeros(2, 9), r"inputs_embeds must have shape \[batch, length, 48\]; got \[2, 9\]"),
    (torch.zeros(2, 9, 40), r"inputs_embeds must have shape \[batch, length, 48\]; got \[2, 9, 40\]"),
    (torch.zeros(2, 9, 48).double(), r"inputs_embeds must be torch.float32 on cpu; got torch.float64"),
], ids=["rank", "width", "dtype"])  # fmt: skip
def test_embedded_prompts_are_checked(embeds, match, loaded):
    _, model = loaded("llada", checkpoints.llada)
    with pytest.raises(ValueError, match=match):
        dk.generate(model, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
        dk.generate(model, prompts(1, 4), inputs_embeds=torch.zeros(1, 4, 48))


# --- facts that tell families apart, ids, refusals -------------------------------------------------------------------


class TestFacts:
    def test_one_model_type_two_families(self):
        """LLaDA-8B and LLaDA-MoE are both of type 'llada'."""
        from dlmkernels.models.published import plan

        dense, moe = plan(checkpoints.llada().config), plan(checkpoints.llada_moe().config)
        assert (dense.family.name, dense.model_class.__name__) == ("llada", "LlamaForCausalLM")
        assert (moe.family.name, moe.model_class.__name__) == ("llada-moe", "Qwen3MoeForCausalLM")
        assert plan(checkpoints.llada_moe().config | {"model_type": "lladamoe"}).family.name == "llada-moe"

    def test_block_lengths_tell_sdar_from_i_dlm(self):
        from dlmkernels.models.published import plan

        assert plan(checkpoints.sdar(block_size=64).config).family.name == "sdar"
        with pytest.raises(ValueError, match="Pass family='sdar' or family='i-dlm'"):
            plan(checkpoints.sdar(block_size=None).config)
        assert plan(checkpoints.sdar(block_size=None).config, "sdar").family.name == "sdar"

    def test_a_stock_model_by_another_name_must_be_explained(self):
        from dlmkernels.models.published import plan

        with pytest.raises(ValueError, match=r"family='masked'.*family='a2d-bd3lm'"):
            plan(checkpoints.a2d_qwen3().config)

    def test_dense_layers_of_a_mixture(self, tmp_path):
        config = checkpoints.llada_moe().config | {"moe_layer_freq": [0, 1]}
        from dlmkernels.models.published import plan

        assert plan(config).config.mlp_only_layers == [0] and plan(config).config.intermediate_size == 80

    @pytest.mark.parametrize("name,changes,match", [
        ("llada", {"block_type": "sequential"}, r"block_type='sequential'.*'llama'"),
        ("llada", {"include_qkv_bias": True}, r"include_qkv_bias=True"),
        ("llada", {"alibi": True}, r"alibi=True"),
        ("llada", {"d_model": None}, r"lacks d_model"),
        ("llada-moe", {"shared_expert_intermediate_size": 32}, r"shared_expert_intermediate_size=32"),
        ("llada-moe", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        ("llada-moe", {"moe_router_enable_expert_bias": True}, r"moe_router_enable_expert_bias=True"),
        ("dream", {"use_sliding_window": True}, r"use_sliding_window=True"),
        ("llada2", {"use_bias": True}, r"use_bias=True"),
        ("llada2", {"score_function": "softmax"}, r"score_function='softmax'"),
        ("llada2", {"num_shared_experts": 0}, r"num_shared_experts=0"),
        ("llada2", {"rotary_dim": 16}, r"rotary_dim=16, which contradicts partial_rotary_factor=0.5"),
        ("nemotron", {"dlm_paradigm": "autoregressive"}, r"dlm_paradigm='autoregressive'"),
    ])  # fmt: skip
    def test_what_the_stock_class_does_not_do(self, name, changes, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            dk.load(write(tmp_path, (FULL | BLOCKS)[name], **changes))

    @pytest.mark.parametrize("name", FULL | BLOCKS)
    def test_weights_that_do_not_fit(self, name, tmp_path):
        last = sorted((FULL | BLOCKS)[name]().weights)[-1]
        with pytest.raises(ValueError, match="missing keys"):
            dk.load(write(tmp_path, (FULL | BLOCKS)[name], lambda w: w.pop(last)), family=UNNAMED.get(name))
        with pytest.raises(ValueError, match=r"unexpected keys: model\.extra"):
            dk.load(
                write(tmp_path, (FULL | BLOCKS)[name], lambda w: w.update({"model.extra": torch.zeros(2)})),
                family=UNNAMED.get(name),
            )

    @pytest.mark.parametrize("name", FULL | BLOCKS)
    def test_weights_of_another_shape(self, name, tmp_path):
        def damage(weights):
            key = next(k for k in weights if weights[k].dim() == 1)
            weights[key] = torch.zeros(HIDDEN + 8)

        with pytest.raises(ValueError, match=r"wrong shapes: \S+ \[56\], expected \[\d+\]"):
            dk.load(write(tmp_path, (FULL | BLOCKS)[name], damage), family=UNNAMED.get(name))

    @pytest.mark.parametrize("name,key,damage,match", [
        ("llada-moe", "model.layers.0.mlp.experts.3.up_proj.weight", None, r"layers\.0\.mlp\.experts\.gate_up_proj does not"),
        ("llada-moe", "model.layers.1.mlp.experts.3.down_proj.weight", (5, 24), r"layers\.1\.mlp\.experts\.down_proj does not"),
        ("llada2", "model.layers.0.attention.query_key_value.weight", (5, HIDDEN),
         r"layers\.0\.self_attn\.q_proj\.weight does not fit: query_key_value has 5 rows; expected 160"),
    ], ids=["missing", "shape", "in one matrix"])  # fmt: skip
    def test_weights_that_cannot_be_put_together(self, name, key, damage, match, tmp_path):
        """Experts become one tensor, and a matrix of queries, keys and values three."""

        def change(weights):
            del weights[key]
            weights.update({} if damage is None else {key: torch.zeros(damage)})

        with pytest.raises(ValueError, match=match):
            dk.load(write(tmp_path, (FULL | BLOCKS)[name], change))

    @pytest.mark.parametrize(
        "name,field", [("llada-moe", "hidden_size"), ("llada2", "head_dim"), ("llada2", "num_experts")]
    )
    def test_fields_that_are_missing(self, name, field, tmp_path):
        folder = write(tmp_path, (FULL | BLOCKS)[name])
        config = json.loads((folder / "config.json").read_text())
        del config[field]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"cannot be loaded: '{field}' is missing or unknown"):
            dk.load(folder)

    @pytest.mark.parametrize("block_size", [0, -4, "four", 4.0])
    def test_block_sizes_that_are_none(self, block_size, tmp_path):
        with pytest.raises(ValueError, match=f"its configuration has block_size={block_size!r}"):
            dk.load(write(tmp_path, checkpoints.sdar, block_size=block_size))

    def test_mislabelled(self, tmp_path):
        """The weights of one family under the configuration of another."""
        other = checkpoints.dream()
        with pytest.raises(ValueError, match=r"unexpected keys: .*self_attn.k_proj.bias"):
            dk.load(write(tmp_path, checkpoints.llada, lambda w: (w.clear(), w.update(other.weights))))

    def test_family_is_checked(self, tmp_path):
        with pytest.raises(ValueError, match=r"family must be one of masked, .*'lada'"):
            dk.load(write(tmp_path, checkpoints.llada), family="lada")

    def test_shards(self, tmp_path):
        checkpoint = checkpoints.llada_moe()
        model = dk.load(checkpoint.write(tmp_path, shards=3))
        tokens = prompts(1, 9)
        numerics.assert_close("logits", our_logits(model, tokens), checkpoint.double(tokens), checkpoint.plain(tokens))
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ValueError, match="model-00002-of-00003"):
            dk.load(tmp_path)

    def test_pickle_is_read_when_asked_for(self, tmp_path):
        checkpoint = checkpoints.dream()
        checkpoint.write(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(checkpoint.weights, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            dk.load(tmp_path)
        assert dk.load(tmp_path, allow_pickle=True).config.dlm_family == "dream"


class TestTraps:
    """Facts of single families that are easily got wrong, where no test above is about them."""

    def test_thresholds_are_strict_where_they_are_published_so(self):
        strict = {
            name: config.rule.strict
            for name, config in dk.PRESETS.items()
            if isinstance(config.rule, (dk.Threshold, dk.DynamicThreshold))
        }
        for name in ("sdar", "llada2", "fast-dllm-v2"):  # d2f: tests/decoding/test_pipeline.py
            assert strict[name]
        for name in ("fast-dllm", "nemotron"):
            assert not strict[name]

    @pytest.mark.parametrize("name", ["sdar", "llada2", "i-dlm", "wedlm", "nemotron"])
    def test_temperature_0(self, name, loaded):
        """Nothing is divided by it (SDAR's program does): the tokens are the likeliest, whatever the seed and filters."""
        _, model = loaded(name, (BLOCKS | {"i-dlm": checkpoints.i_dlm, "wedlm": checkpoints.wedlm})[name])
        filters = {"top_k": 3} if dk.PRESETS[name].distribution == "filtered" else {}
        options = {"temperature": 0.0, "max_new_tokens": 16, "eos_policy": "none"} | filters
        one, other = (dk.generate(model, prompts(2, 9), seed=seed, **options) for seed in (1, 2))
        assert torch.equal(one.sequences, other.sequences) and one.complete.all()
        assert one.confidence.isfinite().all() and (one.confidence[:, 9:] > 0).all()
        drawn = dk.generate(model, prompts(2, 9), seed=1, **options | {"temperature": 1.5, "top_k": 0, "top_p": 1.0})
        assert not torch.equal(drawn.sequences, one.sequences)

    def test_fast_dllm_v2_by_name(self, loaded):
        """The preset, in blocks of 32 and parts of 8 as its model was published with."""
        checkpoint, model = loaded("fast-dllm-v2", checkpoints.fast_dllm_v2)
        assert_rows_same(
            model,
            lambda c, s: published.block_diffusion(
                checkpoint.plain, c[:s], 40, MASK, block=32, part=8, threshold=0.9, shift=True, seeded=True
            ),
            40, config=dk.preset("fast-dllm-v2"), block_length=32,
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["fast-dllm-v2", "sdar", "shifted"])
    @pytest.mark.parametrize("threshold", [0.3, 0.9])
    def test_cache_of_a_blocks_parts(self, name, threshold, loaded):
        """Keys and values of the rest of the block are those of a part's first forward: an approximation."""
        checkpoint, model = loaded(name, BLOCKS[name])
        told = RESTATED[name] | {"block": 16, "part": 4, "threshold": threshold}
        ours = {"block_length": 16, "sub_block_length": 4, "rule": dk.Threshold(threshold, strict=True)}
        ours |= {"cache": "block", "temperature": 0.0, "logit_alignment": "shift" if told.get("shift") else "same"}
        assert_rows_same(
            model, lambda c, s: published.block_diffusion(checkpoint.plain, c[:s], 24, MASK, reuse=True, **told), 24,
            sub_block_cache=True, **ours,
        )  # fmt: skip
        exact, reused, refreshed = (
            dk.generate(model, prompts(2, 9), max_new_tokens=24, eos_policy="none", **ours, **more)
            for more in ({}, {"sub_block_cache": True}, {"sub_block_cache": True, "refresh_interval": 1})
        )
        assert torch.equal(exact.sequences, refreshed.sequences)
        assert not torch.equal(exact.confidence, reused.confidence)

    def test_where_blocks_are_counted_from_matters_unless_the_prompt_is_whole_blocks(self, loaded):
        _, model = loaded("sdar", checkpoints.sdar)
        options = {"max_new_tokens": 16, "temperature": 0.0, "rule": dk.Threshold(0.5), "eos_policy": "none"}
        for length, same in ((12, True), (10, False)):
            grids = [dk.generate(model, prompts(2, length), block_grid=g, **options) for g in ("absolute", "both-ways")]
            assert torch.equal(grids[0].sequences, grids[1].sequences) == same

    def test_seven_query_heads_a_key_head(self, tmp_path, monkeypatch):
        """Dream and Qwen2.5-7B have groups of 7, which is no power of two."""
        monkeypatch.setattr(checkpoints, "HEADS", 7)
        monkeypatch.setattr(checkpoints, "GROUPS", 1)
        config = {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": HIDDEN}
        monkeypatch.setattr(checkpoints, "QWEN", checkpoints.QWEN | config)
        checkpoint = checkpoints.checkpoint(
            checkpoints.QWEN | {"model_type": "Dream"}, checkpoints.decoder_shapes(biases="qkv", groups=1), 3,
            heads=7, groups=1,
        )  # fmt: skip
        model = dk.load(checkpoint.write(tmp_path))
        tokens = prompts(2, 13)
        numerics.assert_close("logits", our_logits(model, tokens), checkpoint.double(tokens), checkpoint.plain(tokens))

    def test_heads_too_wide_for_the_kernels_are_refused_by_name(self, tmp_path):
        config = checkpoints.sdar().config | {"head_dim": 520}
        from transformers import Qwen3Config, Qwen3ForCausalLM

        model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"})).eval()
        with pytest.raises(RuntimeError, match="head dimension that is a multiple of 8 and at most 512; got 520"):
            dk.generate(model, prompts(1, 4), max_new_tokens=4)


class TestAdapter:
    """A low-rank adapter beside its base, merged by the formula W + alpha / r B A."""

    RANK, ALPHA = 4, 6

    def matrices(self, checkpoint):
        generator = torch.Generator().manual_seed(9)
        found = {}
        for name, weight in checkpoint.weights.items():
            if name.endswith(("q_proj.weight", "attn_out.weight", "up_proj.weight", "down_proj.weight")):
                rows, columns = weight.shape
                module = "base_model.model." + name.removesuffix(".weight")
                found[module + ".lora_A.weight"] = torch.randn(self.RANK, columns, generator=generator) / columns**0.5
                found[module + ".lora_B.weight"] = torch.randn(rows, self.RANK, generator=generator)
        return found

    def write(self, tmp_path, make, change=None, **config):
        from safetensors.torch import save_file

        checkpoint, matrices = make(), self.matrices(make())
        for folder in ("base", "adapter"):
            (tmp_path / folder).mkdir(exist_ok=True)
        checkpoint.write(tmp_path / "base")
        config = {
            "peft_type": "LORA", "r": self.RANK, "lora_alpha": self.ALPHA, "bias": "none", "fan_in_fan_out": False,
            "base_model_name_or_path": str(tmp_path / "base"), "target_modules": ["q_proj"], "modules_to_save": None,
        } | config  # fmt: skip
        if change:
            change(matrices)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        save_file(matrices, tmp_path / "adapter" / "adapter_model.safetensors")
        return tmp_path / "adapter", checkpoint, matrices

    @pytest.mark.parametrize("scaled_by_root", [False, True])
    @pytest.mark.parametrize("name", ["llada", "dream"])
    def test_merged(self, name, scaled_by_root, tmp_path):
        folder, checkpoint, matrices = self.write(tmp_path, FULL[name], use_rslora=scaled_by_root)
        model = dk.load(folder, family="d2f-" + name)
        scale = self.ALPHA / (self.RANK**0.5 if scaled_by_root else self.RANK)
        for plain in (checkpoint.plain, checkpoint.double):
            for key, b in matrices.items():
                if key.endswith("lora_B.weight"):
                    a = matrices[key.replace("lora_B", "lora_A")]
                    module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") + ".weight"
                    plain.w[module] = plain.w[module] + (scale * b @ a).to(plain.w[module])
        tokens, visible = prompts(2, 19), published.block_causal(19, 8, 6)
        origin = torch.tensor([6, 6], dtype=torch.int32)
        numerics.assert_close(
            "logits", our_logits(model, tokens, causal_block=8, block_origin=origin),
            checkpoint.double(tokens, visible), checkpoint.plain(tokens, visible),
        )  # fmt: skip
        assert len(matrices) == 12 and adapt(model).family.block_grid == "prompt"

    def test_patterns(self, tmp_path):
        """A module may have its own alpha."""
        plain = dk.load(self.write(tmp_path, checkpoints.dream)[0], family="d2f-dream")
        own = dk.load(
            self.write(tmp_path, checkpoints.dream, alpha_pattern={"layers.1.self_attn.q_proj": 12})[0], family="dream"
        )
        base = dk.load(tmp_path / "base")
        layers = [m.model.layers[1].self_attn.q_proj.weight for m in (base, plain, own)]
        torch.testing.assert_close(layers[2] - layers[0], 2 * (layers[1] - layers[0]))
        assert torch.equal(own.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight)

    @pytest.mark.parametrize("change,config,match", [
        (None, {"peft_type": "LOHA"}, "peft_type='LOHA'"),
        (None, {"use_dora": True}, "use_dora=True"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"base_model_name_or_path": None}, "does not name its base model"),
        (lambda m: m.pop(next(iter(m))), {}, r"lacks lora_A"),
        (lambda m: m.update({"base_model.model.x.lora_A.weight": torch.zeros(4, 8),
                             "base_model.model.x.lora_B.weight": torch.zeros(8, 4)}), {}, "adapts x, which"),
        (lambda m: m.update({next(iter(m)): torch.zeros(4, 7)}), {}, r"has matrices of shapes \[48, 4\] and \[4, 7\]"),
        (lambda m: m.update({"base_model.model.lm_head.weight": torch.zeros(4, 7)}), {}, "not a LoRA matrix"),
    ], ids=["kind", "dora", "modules", "base", "half", "unknown", "shape", "other"])  # fmt: skip
    def test_refused(self, change, config, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            dk.load(self.write(tmp_path, checkpoints.llada, change, **config)[0], family="d2f-llada")

    def test_the_user_is_asked(self, tmp_path):
        folder, _, _ = self.write(tmp_path, checkpoints.dream)
        (folder / "config.json").write_text((tmp_path / "base" / "config.json").read_text())  # some are published so
        with pytest.raises(ValueError, match="pass family='dream' or family='d2f-dream'"):
            dk.load(folder)
        (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)
        with pytest.raises(ValueError, match="cannot be loaded"):
            dk.load(folder, family="d2f-dream")
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
            dk.load(folder, family="d2f-dream")


class TestIds:
    """What the family knows of its tokenizer holds for its own vocabulary alone."""

    @staticmethod
    def special(raw, family=None, **generation):
        """Ids that decoding a model of this configuration would use; no weights are made."""
        from transformers import GenerationConfig

        from dlmkernels.decoding.config import DecodingConfig
        from dlmkernels.decoding.resolve import special_tokens
        from dlmkernels.models.published import plan

        how = plan(raw, family)

        class Described:
            family, config, vocab_size = how.family, how.config, how.config.vocab_size
            model = type("M", (), {"generation_config": GenerationConfig(**generation)})

        return special_tokens(Described, DecodingConfig())

    def test_ids_of_the_family(self):
        raw = checkpoints.llada().config | {"vocab_size": 126464, "embedding_size": 126464, "eos_token_id": 126081}
        for mask in (None, 126336):
            special = self.special(raw | {"mask_token_id": mask})
            assert special.mask == 126336 and special.eos == [126081, 126348]

    def test_ids_of_the_configuration_come_first(self):
        """iLLaDA has the form of LLaDA, another tokenizer and another mask."""
        special = self.special(checkpoints.llada().config | {"mask_token_id": 5})
        assert special.mask == 5 and special.eos == [EOS]
        with pytest.raises(ValueError, match="mask_token_id is not in the model's configuration"):
            self.special(checkpoints.llada().config | {"mask_token_id": None})

    def test_all_stop_ids_count(self):
        special = self.special(checkpoints.dream().config, eos_token_id=[7, EOS])
        assert special.eos == [EOS, 7]

    def test_logits_beyond_the_tokenizer_are_forbidden(self):
        special = self.special(checkpoints.dream().config | {"vocab_size": 152064, "mask_token_id": None})
        assert special.banned == [151666, *range(151667, 152064)]
        assert self.special(checkpoints.dream().config).banned == [MASK]

    def test_forbidden_ids_are_not_generated(self, tmp_path, monkeypatch):
        """Even where they are the most likely by far."""
        from dataclasses import replace

        from dlmkernels.models import families

        model = dk.load(write(tmp_path, checkpoints.dream))
        model.lm_head.weight[90:] *= 10
        free = dk.generate(model, prompts(2, 6), max_new_tokens=8)
        assert (free.generated >= 90).any()
        small = replace(families.FAMILIES["dream"], num_tokens=90, vocab_size=VOCAB, eos_token_ids=())
        monkeypatch.setitem(families.FAMILIES, "dream", small)
        assert (dk.generate(model, prompts(2, 6), max_new_tokens=8).generated < 90).all()


def test_defaults_are_the_familys(tmp_path):
    """`generate` without a configuration runs the decoder the family was published with, where that adapts."""
    model = dk.load(write(tmp_path, checkpoints.sdar))
    ids, options = prompts(2, 6), {"max_new_tokens": 12, "seed": 3}
    ours = dk.generate(model, ids, **options)
    published_one = dk.generate(model, ids, config=dk.preset("sdar"), **options)
    assert torch.equal(ours.sequences, published_one.sequences)
    assert torch.equal(ours.commit_step, published_one.commit_step)
    plain = dk.generate(model, ids, config=dk.DecodingConfig(), **options)
    assert not torch.equal(ours.sequences, plain.sequences)


# --- models that their own code has loaded ---------------------------------------------------------------------------


def foreign(checkpoint):
    """A model as its own code would build it: another class, the published configuration and names of weights."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class ForeignConfig(PreTrainedConfig):
        model_type = checkpoint.config["model_type"]

    class ForeignModel(PreTrainedModel):
        config_class = ForeignConfig

        def __init__(self, config):
            super().__init__(config)
            for name, weight in checkpoint.weights.items():
                *path, leaf = name.split(".")
                module = self
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_parameter(leaf, torch.nn.Parameter(weight))
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, tokens):
            raise AssertionError("its own code is not called")

    return ForeignModel(ForeignConfig(**checkpoint.config)).eval()


@pytest.mark.parametrize("name", ["llada", "dream", "llada-moe"])
def test_foreign_model_shares_its_parameters(name, loaded, recwarn):
    checkpoint, model = loaded(name, FULL[name])
    other = foreign(checkpoint)
    recwarn.clear()  # of what transformers says of the old fields of its configuration
    adapted = adapt(other)
    assert adapted.reuses_kv and adapted.family.name == name and not recwarn.list
    tokens = prompts(2, 11)
    assert torch.equal(our_logits(adapted, tokens), our_logits(model, tokens))
    own = {p.data_ptr() for p in other.parameters()}
    shared = [n for n, p in adapted.model.named_parameters() if p.data_ptr() in own]
    copied = [n for n, p in adapted.model.named_parameters() if p.data_ptr() not in own]
    assert shared and all(".experts." in n for n in copied) and bool(copied) == (name == "llada-moe")


# --- protein language models -----------------------------------------------------------------------------------------


def esm(position, token_dropout):
    import transformers

    torch.manual_seed(5)
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=1, mask_token_id=32, eos_token_id=2, token_dropout=token_dropout,
        position_embedding_type=position, emb_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.EsmForMaskedLM(config).eval()
    for name, p in model.named_parameters():
        p.normal_(std=1.0 if "embed" in name else 3.0 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.2)
    return model


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("position", ["rotary", "absolute"])
class TestEsm:
    """With token dropout embeddings are scaled by the share of masks in the row: only whole rows can be forwarded."""

    def test_logits(self, position, token_dropout, tmp_path):
        model = esm(position, token_dropout)
        model.save_pretrained(tmp_path)
        loaded = dk.load(tmp_path)
        tokens = torch.randint(4, 32, (2, 19))
        tokens[0, 3:9] = tokens[1, 12] = 32
        exact = esm(position, token_dropout).double()
        numerics.assert_close("logits", our_logits(loaded, tokens), exact(tokens).logits, model(tokens).logits)

    def test_decodes_like_a_published_decoder(self, position, token_dropout):
        model = esm(position, token_dropout)
        ids = [torch.randint(4, 30, (n,)) for n in (5, 9)]
        batch = torch.stack([torch.cat((ids[0].new_full((4,), 1), ids[0])), ids[1]])
        valid = torch.stack([torch.arange(9) >= 4, torch.ones(9, dtype=torch.bool)])
        out = dk.generate(model, batch, valid.long(), max_new_tokens=8, steps=4, eos_policy="none")
        for row, prompt in enumerate(ids):
            canvas = torch.cat((prompt, prompt.new_full((8,), 32)))
            request = published.llada(lambda t: model(t).logits, canvas, len(prompt), 32, steps=4)
            assert_same(out, row, request)

    def test_embedded_prompts(self, position, token_dropout):
        model, ids = esm(position, token_dropout), torch.randint(4, 30, (2, 9))
        options = {"max_new_tokens": 8, "steps": 4, "eos_policy": "none"}
        embeds = model.get_input_embeddings()(ids)
        if token_dropout:
            with pytest.raises(ValueError, match=r"inputs_embeds cannot be used with this model: .* whole sequence"):
                dk.generate(model, inputs_embeds=embeds, **options)
            return
        out = dk.generate(model, inputs_embeds=embeds, **options)
        assert torch.equal(out.generated, dk.generate(model, ids, **options).generated)

    def test_kv_reuse_only_where_it_can_be(self, position, token_dropout):
        model = esm(position, token_dropout)
        if token_dropout:
            with pytest.raises(ValueError, match=r"cache='dual'.*token_dropout"):
                dk.generate(model, torch.full((1, 4), 5), cache="dual")
            return
        tokens, cache = torch.randint(4, 32, (2, 19)), dk.KVCache(19)
        full = our_logits(model, tokens, cache=cache)
        adapted, columns = adapt(model), torch.arange(7, 12).expand(2, 5)
        window = AttentionWindow(slots=columns.int().contiguous(), cache=cache)
        part = adapted.logits(adapted.hidden(tokens[:, 7:12], columns, window))
        numerics.assert_close("block", part, esm(position, False).double()(tokens).logits[:, 7:12], full[:, 7:12])
