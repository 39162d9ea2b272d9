# SPDX-License-Identifier: Apache-2.0
"""Causal families, whose requests advance by themselves: I-DLM, Nemotron-Labs' self-speculation, WeDLM."""

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import published
from checkpoints import MASK, PAD, our_logits, write
from decodings import assert_rows_same, assert_same
from dlmkernels.models.adapt import adapt
from host_reads import reads_between_polls
from small_models import prompts


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def causal(length):
    return torch.ones(length, length).tril().bool()


def rare_together(counts, probabilities):
    """Counts and probabilities with everything expected fewer than ten times as one outcome."""
    often = probabilities * counts.sum() >= 10
    if (~often & (probabilities > 0)).any() and probabilities[~often].sum() * counts.sum() < 5:
        often[torch.where(often, probabilities, 2.0).argmin()] = False
    together = [torch.cat((x[often], x[~often].sum()[None])) for x in (counts.double(), probabilities.double())]
    return together[0], together[1]


class TestStrided:
    @pytest.fixture(scope="class")
    def echo(self, tmp_path_factory):
        """A checkpoint whose drafts are accepted about half of the time."""
        checkpoint = checkpoints.i_dlm(4)
        row = checkpoint.weights["model.embed_tokens.weight"]
        for i in range(checkpoints.LAYERS):
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                checkpoint.weights[f"model.layers.{i}.{part}.weight"] *= 0.25
        # one token that mostly follows itself, and is what masks look like
        row[MASK] = row[5] * 0.8
        checkpoint.weights["lm_head.weight"][5] = 0.6 * row[5]
        return checkpoint, dk.load(checkpoint.write(tmp_path_factory.mktemp("echo")))

    def test_logits(self, loaded):
        checkpoint, model = loaded("i-dlm", checkpoints.i_dlm)
        tokens = prompts(2, 23)
        numerics.assert_close(
            "logits", our_logits(model, tokens, causal_block=1), checkpoint.double(tokens, causal(23)),
            checkpoint.plain(tokens, causal(23)),
        )  # fmt: skip
        assert adapt(model).family.name == "i-dlm"

    @pytest.mark.parametrize("stride", [2, 3, 4])
    @pytest.mark.parametrize("which", ["plain", "echo"])
    def test_published_decoder(self, which, stride, loaded, echo):
        checkpoint, model = echo if which == "echo" else loaded("i-dlm", checkpoints.i_dlm)
        assert_rows_same(
            model, lambda c, s: published.introspective(checkpoint.plain, c[:s], 17, MASK, stride=stride), 17,
            rule=dk.Strided(stride), temperature=0.0, top_k=0, top_p=1.0, seed=1,
        )  # fmt: skip

    def test_greedy_is_one_after_another_in_fewer_forwards(self, echo):
        _, model = echo
        options = {"max_new_tokens": 40, "temperature": 0.0, "eos_policy": "none"}
        ids = prompts(4, 7)
        out = dk.generate(model, ids, rule=dk.Strided(4), **options)
        slow = dk.generate(model, ids, rule=dk.Quota(), block_length=1, cache="none", **options)
        assert torch.equal(out.sequences, slow.sequences)
        assert out.num_forwards.min() < 20 and len(set(out.num_forwards.tolist())) > 1

    def test_sampling_does_not_depend_on_the_batch(self, echo):
        _, model = echo
        rows = [prompts(1, n, seed=n)[0] for n in (3, 8, 6)]
        ids = torch.stack([torch.cat((r.new_full((8 - len(r),), PAD), r)) for r in rows])
        valid = torch.stack([torch.arange(8) >= 8 - len(r) for r in rows]).long()
        options, seeds = {"max_new_tokens": 16, "eos_policy": "none"}, torch.tensor([1, 2, 3])
        out = dk.generate(model, ids, valid, seed=seeds, **options)
        assert out.complete.all() and not (out.sequences == MASK).any()
        for i, row in enumerate(rows):
            alone = dk.generate(model, row, seed=seeds[i : i + 1], **options)
            assert torch.equal(out.generated[i], alone.generated[0]) and out.num_forwards[i] == alone.num_forwards[0]

    @pytest.mark.parametrize("leniency", [None, 1.0, 0.8])
    def test_verification(self, leniency):
        """A draft that is the argmax stands with probability p, and the text is the model's; by ratio it stands with
        min(1, p / (leniency q)), else comes one of max(0, p - q).
        """
        from types import SimpleNamespace

        from dlmkernels.decoding.programs.strided import Verifier

        draws, words, temperature = 6000, 7, 0.8
        generator = torch.Generator().manual_seed(3)
        z, wrong = torch.randn(2, words, generator=generator)
        banned = torch.tensor([6])
        p, q = (torch.softmax(x.index_fill(0, banned, -torch.inf) / temperature, -1) for x in (z, wrong))
        draft, expected = int(q.argmax()), p
        if leniency is not None:
            passes = min(1.0, float(p[draft] / (leniency * q[draft])))
            assert 0.1 < passes < 0.9
            expected = (1 - passes) * (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
            expected[draft] += passes

        zeros, seeds = torch.zeros(draws, dtype=torch.int32), torch.arange(draws)
        one = torch.full((1,), temperature)
        options = {"banned": banned, "temperature": one, "seed": seeds, "step": zeros, "distribution": "tempered"}
        canvas = SimpleNamespace(origin=zeros, step=zeros, seed=seeds)
        verify = Verifier(
            canvas, SimpleNamespace(rule=dk.Strided(2, leniency), temperature=temperature),
            SimpleNamespace(options=options, samples=True),
        )  # fmt: skip
        nothing = torch.full((draws, 1), -1)
        none, first, _, drafts = verify(
            torch.stack((z, wrong, wrong)).expand(draws, 3, words).contiguous(), nothing, zeros, zeros
        )
        assert (none == 0).all() and (first[:, 1] == -1).all()
        numerics.assert_distribution("without a draft", first[:, 0].bincount(minlength=words), p)
        if leniency is None:
            numerics.assert_distribution("draft", drafts[:, 0].bincount(minlength=words), q)
            drafts = torch.full((draws, 1), draft)
        else:
            assert (drafts == draft).all()
        canvas.step = zeros + 1
        accepted, token, probability, _ = verify(
            z.expand(draws, 3, words).contiguous(), drafts.contiguous(), zeros + 1, zeros + 1
        )
        numerics.assert_distribution("token", token[:, 0].bincount(minlength=words), expected)
        assert ((token[:, 0] == draft) == (accepted == 1)).all()
        numerics.assert_distribution("next", token[accepted == 1, 1].bincount(minlength=words), p)
        numerics.assert_same_probabilities(probability[:, 0], p[token[:, 0]])
        numerics.assert_same_probabilities(probability[accepted == 1, 1], p[token[accepted == 1, 1]])

    @pytest.mark.parametrize("filters", [{}, {"top_k": 3}], ids=str)
    @pytest.mark.parametrize("stride", [2, 4])
    def test_sampled_text_is_the_models(self, stride, filters, echo):
        """Three tokens of many requests against the product of the model's distributions, computed token by token."""
        checkpoint, model = echo
        draws, prompt, temperature = 3000, prompts(1, 6, seed=2), 2.0
        prompt[:, 2:] = 5

        def follow(text):
            z = checkpoint.plain(text[None], causal(len(text)))[0, -1].index_fill(0, torch.tensor(MASK), -torch.inf)
            if filters:
                z = z.masked_fill(z < z.topk(3).values[-1], -torch.inf)
            return torch.softmax(z / temperature, -1)

        out = dk.generate(
            model, prompt.expand(draws, -1), seed=torch.arange(draws), rule=dk.Strided(stride), max_new_tokens=3,
            temperature=temperature, eos_policy="none", **({"top_k": 0, "top_p": 1.0} | filters),
        )  # fmt: skip
        assert out.num_forwards.min() < 3  # drafts are accepted
        checked = [0, 0, 0]

        def check(text, these):
            """The distribution of what follows `text` in the requests `these` `[n, rest]`, and of what follows that."""
            if len(these) < 100 or not these.shape[1]:
                return
            p = follow(text)
            numerics.assert_distribution(f"after {text}", *rare_together(these[:, 0].bincount(minlength=len(p)), p))
            checked[3 - these.shape[1]] += 1
            for word in p.topk(3).indices:
                check(torch.cat((text, word[None])), these[these[:, 0] == word][:, 1:])

        check(prompt[0], out.generated)
        assert min(checked) > 0, checked

    def test_sampling_takes_fewer_forwards(self, echo):
        """Drafts are accepted at a temperature, with and without a leniency."""
        _, model = echo
        options = {"max_new_tokens": 24, "eos_policy": "none", "seed": torch.arange(64), "temperature": 0.8}
        ids = prompts(1, 6).index_fill(1, torch.arange(2, 6), 5).expand(64, -1)
        for leniency in (None, 1.0):
            out = dk.generate(model, ids, rule=dk.Strided(3, leniency), top_k=0, top_p=1.0, **options)
            assert out.complete.all() and out.num_forwards.float().mean() < 0.8 * 24

    @pytest.mark.parametrize("leniency", [None, 1.0])
    def test_loop_reads_nothing_on_the_host(self, leniency, echo, monkeypatch):
        """But the counts, which on a GPU travel by themselves."""

        reads, steps = reads_between_polls(monkeypatch)
        out = dk.generate(echo[1], prompts(2, 6), rule=dk.Strided(3, leniency), max_new_tokens=16, seed=1)
        assert out.complete.all() and len(steps) > 2 and reads.seen == []
        with reads:
            torch.tensor(3).item()
        assert reads.seen  # the recorder does see reads

    def test_stop_token_and_streamer(self, echo):
        _, model = echo
        options = {"max_new_tokens": 24, "temperature": 0.0, "pad_token_id": PAD}
        whole = dk.generate(model, prompts(1, 6), eos_policy="none", **options)
        eos = whole.generated[0, 9].item()
        stop = whole.generated[0].tolist().index(eos) + 1
        got = []
        streamer = type(
            "S", (), {"put": lambda self, t: got.extend(t.tolist()), "end": lambda self: got.append("end")}
        )()
        out = dk.generate(model, prompts(1, 6), eos_token_id=eos, streamer=streamer, **options)
        assert torch.equal(out.generated[0, :stop], whole.generated[0, :stop])
        assert (out.generated[0, stop:] == PAD).all() and out.num_forwards < whole.num_forwards
        assert got == [*out.sequences[0].tolist(), "end"]

    @pytest.mark.parametrize("options,match", [
        ({"attention": "full", "cache": "none"}, "rule Strided needs attention='causal'"),
        ({"cache": "none"}, "rule Strided needs .*cache='block'; got .*'none'"),
        ({"logit_alignment": "same"}, "rule Strided needs .*logit_alignment='shift'"),
        ({"cfg_scale": 1.0}, "cfg_scale cannot be used"),
    ], ids=str)  # fmt: skip
    def test_refused(self, options, match, loaded):
        _, model = loaded("i-dlm", checkpoints.i_dlm)
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(1, 4), max_new_tokens=4, **options)
        with pytest.raises(ValueError, match="stride must be an integer of at least 2; got 1"):
            dk.Strided(1)
        with pytest.raises(ValueError, match="leniency must be None or a positive number; got 0"):
            dk.Strided(leniency=0)


class TestSelfSpeculative:
    @pytest.fixture(scope="class")
    def echo(self, tmp_path_factory):
        """A checkpoint whose drafts are often accepted, and often not."""
        checkpoint = checkpoints.nemotron(4)
        for i in range(checkpoints.LAYERS):
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                checkpoint.weights[f"encoder.layers.{i}.{part}.weight"] *= 0.4
        # one token that mostly follows itself and some others, and is what masks look like
        row = checkpoint.weights["encoder.embed_tokens.weight"]
        row[1::2] += row[5] * 0.5
        row[MASK] = row[5] * 0.8
        checkpoint.weights["diffusion_head.weight"][5] = 0.6 * row[5]
        return checkpoint, dk.load(checkpoint.write(tmp_path_factory.mktemp("speculative")))

    @pytest.mark.parametrize("block", [2, 5, 8, 32])
    @pytest.mark.parametrize("which", ["plain", "echo"])
    def test_published_decoder(self, which, block, loaded, echo):
        checkpoint, model = echo if which == "echo" else loaded("nemotron", checkpoints.nemotron)
        assert_rows_same(
            model, lambda c, s: published.self_speculative(checkpoint.plain, c[:s], 21, MASK, block=block), 21,
            config=dk.preset("nemotron-speculative"), block_length=block, seed=1,
        )  # fmt: skip

    CAUSAL = {"config": dk.DecodingConfig(), "attention": "causal", "logit_alignment": "shift", "seeded": False,
              "block_length": 1}  # fmt: skip

    @pytest.mark.parametrize("which", ["plain", "echo"])
    def test_greedy_is_one_after_another_in_fewer_forwards(self, which, loaded, echo):
        _, model = echo if which == "echo" else loaded("nemotron", checkpoints.nemotron)
        options = {"max_new_tokens": 40, "eos_policy": "none"}
        ids = prompts(4, 7)
        out = dk.generate(model, ids, config=dk.preset("nemotron-speculative"), **options)
        for cache in ("none", "block"):
            slow = dk.generate(model, ids, **self.CAUSAL | options | {"cache": cache})
            assert torch.equal(out.sequences, slow.sequences)
        if which == "echo":
            assert out.num_forwards.min() < 20 and len(set(out.num_forwards.tolist())) > 1

    def test_sampling_is_that_of_one_after_another(self, echo):
        """Four tokens after a prompt, drafts of some of them having been accepted or not."""
        rows = 4000
        _, model = echo
        ids = prompts(1, 5).expand(rows, -1)
        options = {"max_new_tokens": 5, "temperature": 1.5, "top_k": 3, "eos_policy": "none"}
        out = dk.generate(model, ids, config=dk.preset("nemotron-speculative"), seed=torch.arange(rows), **options)
        assert out.complete.all() and len(set(out.num_forwards.tolist())) > 2
        checkpoint, _ = echo
        states = {(): 1.0}
        for _ in range(4):
            after = {}
            for text, weight in states.items():
                tokens = torch.cat((ids[0], torch.tensor(text, dtype=torch.int64)))
                z = checkpoint.plain(tokens[None], causal(len(tokens)))[0, -1].index_fill(0, torch.tensor(MASK), -1e30)
                best = z.topk(3)
                for p, token in zip(torch.softmax(best.values / 1.5, 0).tolist(), best.indices.tolist()):
                    after[(*text, token)] = after.get((*text, token), 0.0) + weight * p
            states = after
        likely = [text for text, p in states.items() if p * rows > 10]
        assert len(likely) > 20
        number = {text: i for i, text in enumerate(likely)}
        got = torch.tensor([number.get(tuple(text), len(likely)) for text in out.generated[:, :4].tolist()])
        p = [states[text] for text in likely]
        numerics.assert_distribution("text", got.bincount(minlength=len(likely) + 1), [*p, 1 - sum(p)])

    def test_sampling_does_not_depend_on_the_batch(self, echo):
        _, model = echo
        rows = [prompts(1, n, seed=n)[0] for n in (3, 8, 6)]
        ids = torch.stack([torch.cat((r.new_full((8 - len(r),), PAD), r)) for r in rows])
        valid = torch.stack([torch.arange(8) >= 8 - len(r) for r in rows]).long()
        options = {"config": dk.preset("nemotron-speculative"), "max_new_tokens": 16, "eos_policy": "none"}
        options |= {"temperature": 1.0}
        seeds = torch.tensor([1, 2, 3])
        out = dk.generate(model, ids, valid, seed=seeds, **options)
        assert out.complete.all() and not (out.sequences == MASK).any()
        for i, row in enumerate(rows):
            alone = dk.generate(model, row, seed=seeds[i : i + 1], **options)
            assert torch.equal(out.generated[i], alone.generated[0]) and out.num_forwards[i] == alone.num_forwards[0]

    def test_stop_token_and_streamer(self, echo):
        _, model = echo
        options = {"config": dk.preset("nemotron-speculative"), "max_new_tokens": 24, "pad_token_id": PAD}
        whole = dk.generate(model, prompts(1, 6), eos_policy="none", **options)
        eos = whole.generated[0, 9].item()
        stop = whole.generated[0].tolist().index(eos) + 1
        got = []
        streamer = type(
            "S", (), {"put": lambda self, t: got.extend(t.tolist()), "end": lambda self: got.append("end")}
        )()
        out = dk.generate(model, prompts(1, 6), eos_token_id=eos, streamer=streamer, **options)
        assert torch.equal(out.generated[0, :stop], whole.generated[0, :stop])
        assert (out.generated[0, stop:] == PAD).all() and out.num_forwards < whole.num_forwards
        assert got == [*out.sequences[0].tolist(), "end"]

    def test_loop_reads_nothing_on_the_host(self, echo, monkeypatch):
        """But the counts, which on a GPU travel by themselves."""

        reads, rounds = reads_between_polls(monkeypatch)
        for temperature in (0.0, 1.0):
            rounds.clear()
            config = dk.preset("nemotron-speculative", temperature=temperature)
            out = dk.generate(echo[1], prompts(2, 6), config=config, max_new_tokens=20)
            assert out.complete.all() and len(rounds) > 2 and reads.seen == []

    @pytest.mark.parametrize("options,match", [
        ({"attention": "full", "cache": "none", "seeded": False}, "rule SelfSpeculative needs attention='causal-con"),
        ({"cache": "none"}, "rule SelfSpeculative needs .*cache='block'.*got .*'none'"),
        ({"seeded": False}, "rule SelfSpeculative needs .*seeded=True; got .*False"),
        ({"logit_alignment": "shift"}, "rule SelfSpeculative needs logit_alignment='same'"),
        ({"cfg_scale": 1.0}, "cfg_scale cannot be used"),
        ({"block_length": 1}, "block_length must be at least 2 with rule SelfSpeculative; got 1"),
    ], ids=str)  # fmt: skip
    def test_refused(self, options, match, loaded):
        _, model = loaded("nemotron", checkpoints.nemotron)
        config = dk.preset("nemotron-speculative")
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(1, 4), config=config, max_new_tokens=4, **options)
        with pytest.raises(ValueError, match="rule SelfSpeculative continues a prompt"):
            dk.infill(model, torch.tensor([[5, MASK]]), config=config)


class TestReordered:
    WEDLM = {"wedlm-8b": checkpoints.wedlm, "wedlm-7b": lambda: checkpoints.wedlm(qk_norm=False)}

    @pytest.mark.parametrize("name", WEDLM)
    def test_logits(self, name, loaded):
        checkpoint, model = loaded(name, self.WEDLM[name])
        tokens = prompts(2, 23)
        numerics.assert_close(
            "logits", our_logits(model, tokens, causal_block=1), checkpoint.double(tokens, causal(23)),
            checkpoint.plain(tokens, causal(23)),
        )  # fmt: skip
        assert adapt(model).family.name == "wedlm"
        assert type(model).__name__ == ("Qwen3ForCausalLM" if name == "wedlm-8b" else "Qwen2ForCausalLM")

    @pytest.mark.parametrize("window,threshold,penalty", [(4, 1.5, 0.1), (6, 3.0, 0.02), (16, 2.5, 0.0), (1, 1.0, 0.0)])
    @pytest.mark.parametrize("name", WEDLM)
    def test_published_decoder(self, name, window, threshold, penalty, loaded):
        checkpoint, model = loaded(name, self.WEDLM[name])
        options = {"window": window, "threshold": threshold, "penalty": penalty}
        assert_rows_same(
            model, lambda c, s: published.reordered(checkpoint.plain, c[:s], 18, MASK, **options), 18,
            rule=dk.Reordered(window, threshold, penalty), temperature=0.0, seed=3,
        )  # fmt: skip

    def test_without_a_cache(self, loaded):
        """The whole canvas in the same order, by any rule: a block of masks after what is decided."""
        checkpoint, model = loaded("wedlm-8b", self.WEDLM["wedlm-8b"])
        ids = prompts(1, 7)
        out = dk.generate(
            model, ids, config=dk.DecodingConfig(rule=dk.Threshold(0.4)), max_new_tokens=12, block_length=4,
            eos_policy="none",
        )  # fmt: skip
        request = published.Request(torch.cat((ids[0], torch.full((12,), MASK))), MASK)
        for begin in range(7, 19, 4):
            while masks := request.open(begin, begin + 4):
                order = [i for i in range(begin + 4) if i not in masks] + masks
                logits = checkpoint.plain(request.tokens[order][None], causal(begin + 4), torch.tensor(order))[0]
                proposals = published.propose(logits[-len(masks) :], list(range(len(masks))), MASK)
                proposals.positions = masks
                c = proposals.probability
                published.take(request, proposals, c, published.threshold_count(request, c, 0.4))
        assert_same(out, 0, request)

    def test_sampling_stopping_streaming(self, loaded):
        _, model = loaded("wedlm-8b", self.WEDLM["wedlm-8b"])
        rows = [prompts(1, n, seed=n)[0] for n in (3, 8, 6)]
        ids = torch.stack([torch.cat((r.new_full((8 - len(r),), PAD), r)) for r in rows])
        valid = torch.stack([torch.arange(8) >= 8 - len(r) for r in rows]).long()
        options, seeds = {"max_new_tokens": 21, "rule": dk.Reordered(6, 2.5)}, torch.tensor([1, 2, 3])
        whole = dk.generate(model, ids, valid, seed=seeds, eos_policy="none", **options)
        assert whole.complete.all()
        eos = whole.generated[0, 5].item()
        options |= {"eos_token_id": eos, "pad_token_id": PAD}
        out = dk.generate(model, ids, valid, seed=seeds, **options)
        for i, row in enumerate(rows):
            got = []
            streamer = type("S", (), {"put": lambda self, t: got.extend(t.tolist()), "end": lambda self: None})()  # noqa: B023
            alone = dk.generate(model, row, seed=seeds[i : i + 1], streamer=streamer, **options)
            assert torch.equal(out.generated[i], alone.generated[0]) and out.num_forwards[i] == alone.num_forwards[0]
            assert got == alone.sequences[0].tolist()
            text = whole.generated[i].tolist()
            stop = text.index(eos) + 1 if eos in text else 21
            assert torch.equal(out.generated[i, :stop], whole.generated[i, :stop])
            assert (out.generated[i, stop:] == PAD).all()

    @pytest.mark.parametrize("options,match", [
        ({"attention": "full", "cache": "none"}, "rule Reordered needs attention='reordered'"),
        ({"cache": "none"}, "rule Reordered needs .*got .*'none'"),
        ({"cfg_scale": 1.0}, "cfg_scale cannot be used"),
        ({"rule": dk.Quota()}, "needs the rule Reordered"),
    ], ids=str)  # fmt: skip
    def test_refused(self, options, match, loaded, tmp_path):
        _, model = loaded("wedlm-8b", self.WEDLM["wedlm-8b"])
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(1, 4), max_new_tokens=4, **options)
        with pytest.raises(ValueError, match="rule Reordered continues a prompt"):
            dk.infill(model, torch.tensor([[5, MASK]]))
        with pytest.raises(ValueError, match="window must be an integer of at least 1; got 0"):
            dk.Reordered(0)
        with pytest.raises(ValueError, match="qk_norm=False and attention_bias=False"):
            dk.load(write(tmp_path, checkpoints.wedlm, qk_norm=False))
