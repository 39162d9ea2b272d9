# SPDX-License-Identifier: Apache-2.0
"""Every rule against its restatement (`restated_rules.py`): slot for slot on random steps with many ties, and token
for token in whole decodings."""

import dataclasses
import math

import pytest
import torch

import dlmkernels as dk
import numerics
import published
import restated_rules as restated
from decodings import FEW_MASK, Table, assert_rows_same, assert_same, decode, lively, ragged, sure
from dlmkernels import ops, scores
from dlmkernels.decoding.standing import Standing, Tables
from dlmkernels.decoding.state import State
from dlmkernels.decoding.step import Step
from dlmkernels.demo import run as demo
from dlmkernels.demo.tasks import TASKS
from dlmkernels.window import TokenWindow
from plain_llama import PlainLlama
from small_models import MASK, prompts

ROWS, SLOTS, LENGTH, START = 300, 12, 16, 5


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def plain(model):
    return PlainLlama(model)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def random_step(seed=0, index=0, num_steps=5, rows=ROWS):
    """A step of `rows` requests: some of the 16 positions of a block open, confidences in sixteenths, some -inf."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(0, SLOTS + 1, (rows, 1), generator=g)
    places = torch.rand(rows, LENGTH, generator=g).argsort(1)
    is_open = places < count
    columns = torch.arange(LENGTH).expand(rows, -1)
    ranked = torch.where(is_open, columns, columns + LENGTH).sort(1).values[:, :SLOTS]
    position = torch.where(ranked < LENGTH, ranked + START, -1).int()
    used = position >= 0

    def values(low, high, otherwise):
        x = torch.randint(low, high + 1, (rows, SLOTS), generator=g) / 16
        return torch.where(used & (torch.rand(rows, SLOTS, generator=g) > 0.05), x, otherwise).flatten()

    n = rows * SLOTS
    stats = ops.TokenConfidence(
        token=torch.randint(0, 50, (n,), generator=g), argmax=torch.zeros(n, dtype=torch.int64),
        confidence=values(0, 16, -torch.inf), margin=values(0, 16, 0.0), entropy=values(0, 24, 0.0),
        logsumexp=torch.zeros(n), p_given=torch.zeros(n), flags=torch.zeros(n, dtype=torch.int32),
    )  # fmt: skip
    state_open = torch.zeros(rows, START + LENGTH + 3, dtype=torch.bool)
    state_open[:, START : START + LENGTH] = is_open
    canvas = State.of(
        torch.zeros(rows, START + LENGTH + 3, dtype=torch.int64), state_open, torch.zeros(rows),
        seed=torch.arange(rows),
    )  # fmt: skip
    at_start = (count[:, 0] + torch.randint(0, 4, (rows,), generator=g)).int()
    nothing = torch.zeros(rows, dtype=torch.int32)
    standing = Standing(
        step=nothing + index, entered=nothing, block_start=nothing + START, block_length=nothing + LENGTH,
        num_steps=nothing + num_steps, behind=nothing, open_at_start=at_start, width=LENGTH,
        planned=nothing + 1,
        tables=Tables((num_steps,), LENGTH, nothing),
    )  # fmt: skip
    return Step(
        stats=stats, window=TokenWindow(position, canvas.origin), eligible=used, standing=standing,
        raw_logits=torch.zeros(n, 1), score_of=scores.Probability(), canvas=canvas,
    )  # fmt: skip


def rows_of(step, order):
    """The same step with other rows."""
    n = len(step.eligible)

    def pick(x):
        return x.view(n, -1)[order].flatten() if x.numel() else x

    def of_rows(x, **others):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return dataclasses.replace(
            x, **{k: v[order] for k, v in fields.items() if isinstance(v, torch.Tensor)}, **others
        )

    tables = step.standing.tables

    return dataclasses.replace(
        step, stats=ops.TokenConfidence(*map(pick, step.stats)), eligible=step.eligible[order],
        canvas=of_rows(step.canvas), standing=of_rows(step.standing, tables=Tables(tables.plans, tables.steps, tables.first[order])),
        window=TokenWindow(step.window.positions[order], step.window.origin[order]),
    )  # fmt: skip


def cases(step):
    """The step's rows as plain lists."""
    for b in range(len(step.eligible)):
        w = int(step.eligible[b].sum())
        yield restated.Case(
            step.window.positions[b, :w].tolist(), step.score[b, :w].tolist(), step.entropy[b, :w].tolist(),
            int(step.index[b]), int(step.num_steps[b]), int(step.open_at_start[b]), START, LENGTH,
        )  # fmt: skip


RULES = [
    (dk.Quota(), restated.quota),
    (dk.Quota(of_block=True), lambda c: restated.quota(c, of_block=True)),
    (dk.Threshold(0.5), lambda c: restated.threshold(c, 0.5)),
    (dk.Threshold(0.5, strict=True), lambda c: restated.threshold(c, 0.5, strict=True)),
    (dk.Threshold(0.9, tie=1e-5), lambda c: restated.threshold(c, 0.9, tie=1e-5)),
    (dk.Threshold(0.9, tie=0.0625), lambda c: restated.threshold(c, 0.9, tie=0.0625)),
    (dk.DynamicThreshold(0.5), lambda c: restated.dynamic(c, 0.5)),
    (dk.DynamicThreshold(0.75), lambda c: restated.dynamic(c, 0.75)),
    (dk.Frechet(0.25), lambda c: restated.frechet(c, 0.25)),
    (dk.Frechet(0.0), lambda c: restated.frechet(c, 0.0)),
    (dk.Frechet(0.75), lambda c: restated.frechet(c, 0.75)),
    (dk.EntropySum(1.0), lambda c: restated.entropy_sum(c, 1.0)),
    (dk.EntropySum(0.35), lambda c: restated.entropy_sum(c, 0.35)),
    (dk.HierarchicalThreshold(0.9, 0.4), lambda c: restated.hierarchy(c, 0.9, 0.4)),
    (dk.HierarchicalThreshold(0.75, 0.75), lambda c: restated.hierarchy(c, 0.75, 0.75)),
    (dk.LocalThreshold(0.9, 0.5, 2), lambda c: restated.local(c, 0.9, 0.5, 2)),
    (dk.LocalThreshold(0.75, 0.25, 4), lambda c: restated.local(c, 0.75, 0.25, 4)),
    (dk.LocalThreshold(0.75, 0.25, 0), lambda c: restated.local(c, 0.75, 0.25, 0)),
    (dk.LocalThreshold(0.5, 0.9, 2), lambda c: restated.local(c, 0.5, 0.9, 2)),
    (dk.DilatedSchedule(2), lambda c: restated.dilated(c, 2)),
    (dk.DilatedSchedule(3), lambda c: restated.dilated(c, 3)),
]


@pytest.mark.parametrize("rule,choose", RULES, ids=lambda r: str(r) if isinstance(r, dk.Rule) else None)
@pytest.mark.parametrize("index", [0, 2, 4, 7])
def test_one_step(rule, choose, index):
    step = random_step(seed=index, index=index)
    chosen = rule.select(step)
    taken = 0
    for row, case in enumerate(cases(step)):
        expected = sorted(set(choose(case)))
        assert chosen[row].nonzero().flatten().tolist() == expected, (row, case)
        taken += len(expected)
    assert taken > 50
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(9))[:17]
    assert torch.equal(rule.select(rows_of(step, order)), chosen[order])


class TestDecodings:
    """Whole decodings of ragged padded batches."""

    @pytest.mark.parametrize("block_length", [4, 16])
    @pytest.mark.parametrize("name,choose", [
        ("fast-dllm++", lambda c: restated.frechet(c, 0.25)),
        ("sdar", lambda c: restated.dynamic(c, 0.85)), ("sdar-static", lambda c: restated.quota(c, of_block=True)),
        ("sdar-sequential", lambda c: restated.quota(c, of_block=True)),
        ("sdar-entropy-bounded", lambda c: restated.entropy_sum(c, 0.35)),
        ("llada2", lambda c: restated.dynamic(c, 0.95)),
        ("localleap", lambda c: restated.local(c, 0.9, 0.75, 4)), ("dus", lambda c: restated.dilated(c, 2)),
        ("dinfer-threshold", lambda c: restated.threshold(c, 0.9, tie=1e-5)),
        ("dinfer-hierarchy", lambda c: restated.hierarchy(c, 0.9, 0.4)),
    ])  # fmt: skip
    def test_presets(self, model, plain, name, choose, block_length):
        def by_position(request, proposals, start):
            return [-float(i) for i in proposals.positions]

        assert_rows_same(
            model,
            lambda c, s: restated.decode(
                plain, c, s, MASK, choose, block_length=block_length,
                score=by_position if name == "sdar-sequential" else None,
            ),
            16, config=dk.preset(name, cache="none"), temperature=0.0, block_length=block_length,
        )  # fmt: skip

    @pytest.mark.parametrize("block_length", [None, 8])
    @pytest.mark.parametrize("rule,choose", [
        (dk.Threshold(0.3), lambda c: restated.threshold(c, 0.3)), (dk.Frechet(0.1), lambda c: restated.frechet(c, 0.1)),
        (dk.EntropySum(2.0), lambda c: restated.entropy_sum(c, 2.0)),
    ], ids=["Threshold", "Frechet", "EntropySum"])  # fmt: skip
    def test_reason_first(self, model, plain, rule, choose, block_length):
        def of(c, s):
            return restated.decode(
                plain, c, s, MASK, lambda case: restated.reason_first(case, len(c) - 6, choose),
                block_length=block_length,
            )  # fmt: skip

        assert_rows_same(model, of, 16, rule=dk.ReasonFirst(6, rule), block_length=block_length)
        ids = prompts(3, 5)
        out, free = (
            dk.generate(model, ids, rule=r, max_new_tokens=16, eos_policy="none")
            for r in (dk.ReasonFirst(6, rule), rule)
        )
        reasoning, answer = out.commit_step[:, 5:-6], out.commit_step[:, -6:]
        assert (reasoning.amax(1) < answer.amin(1)).all()
        assert not torch.equal(out.commit_step, free.commit_step)

    def test_reason_first_refuses(self):
        for rule in (dk.WideInNarrowOut(), dk.Strided(), dk.UniformState(), dk.ReasonFirst(4)):
            with pytest.raises(ValueError, match="rule must be a rule that is decoded block by block"):
                dk.ReasonFirst(4, rule)
        with pytest.raises(TypeError, match="rule must be a Rule"):
            dk.ReasonFirst(4, 0.9)
        with pytest.raises(ValueError, match="must have the same values for every request"):
            dk.ReasonFirst(4, dk.Threshold([0.5, 0.9]))

    @pytest.mark.parametrize("steps", [8, 4])
    def test_several_tokens_a_step(self, model, plain, steps):
        for rule, choose in (
            (dk.Quota(of_block=True), lambda c: restated.quota(c, of_block=True)),
            (dk.DynamicThreshold(0.6), lambda c: restated.dynamic(c, 0.6)),
        ):
            assert_rows_same(
                model, lambda c, s, f=choose: restated.decode(plain, c, s, MASK, f, block_length=4, steps=steps), 16,
                rule=rule, block_length=4, steps=steps,
            )  # fmt: skip

    @pytest.mark.parametrize("divergence", [0.005, 0.5])
    @pytest.mark.parametrize("history", [1, 2])
    def test_klass(self, model, plain, divergence, history):
        def watcher():
            before, calm = {}, {}

            def observe(logits, positions, index):
                if index == 0:
                    before.clear(), calm.clear()
                p = torch.softmax(logits, -1).double()
                for i, q in zip(positions, p):
                    last = before.get(i, torch.zeros_like(q))
                    kl = (q * ((q + 1e-12).log() - (last + 1e-12).log())).sum().item()
                    calm[i] = calm.get(i, 0) + 1 if kl < divergence else 0
                    before[i] = q
                return {"calm": [calm[i] >= history for i in positions]}

            return observe

        runs = []
        for block_length in (None, 8):
            options = {"block_length": block_length, "steps": 16}

            def run(c, s, options=options):
                runs.append(restated.decode(
                    plain, c, s, MASK, lambda c: restated.stable(c, 0.4), observe=watcher(), **options
                ))  # fmt: skip
                return runs[-1]

            assert_rows_same(model, run, 16, rule=dk.StableThreshold(0.4, divergence, history), **options)
        if divergence == 0.5:
            assert any(r.num_forwards < 16 for r in runs)

    @pytest.mark.parametrize("block_length", [None, 8])
    def test_credit(self, model, plain, block_length):
        def accountant():
            credit = {}

            def observe(logits, positions, index):
                if index == 0:
                    credit.clear()
                p = torch.softmax(logits, -1)
                for i, q in zip(positions, p):
                    owned = credit.get(i, torch.zeros_like(q)) * 0.8
                    owned[q.argmax()] += q.max() ** 0.2
                    credit[i] = owned
                return {"logits": logits + 0.7 * torch.log1p(torch.stack([credit[i] for i in positions]))}

            return observe

        plainly = [0, 0]

        def run(c, s):
            out = restated.decode(
                plain, c, s, MASK, lambda c: restated.threshold(c, 0.6), block_length=block_length,
                observe=accountant(),
            )  # fmt: skip
            without = restated.decode(
                plain, c, s, MASK, lambda c: restated.threshold(c, 0.6), block_length=block_length
            )
            plainly[0] += out.num_forwards
            plainly[1] += without.num_forwards
            return out

        assert_rows_same(model, run, 16, rule=dk.CreditThreshold(0.6), block_length=block_length)
        assert plainly[0] < plainly[1]  # credits do speed this up

    @pytest.mark.parametrize("block_length", [8, 4])
    def test_smoothing(self, block_length):
        """On a calmer model: what goes round through the inputs grows in the lively one, rounding errors too."""
        model = lively()
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.mul_(0.6)
        plain = PlainLlama(model)
        table = plain.weights["model.embed_tokens.weight"]
        changed = []
        for first, growth, most in ((0.15, 0.02, 0.3), (0.3, 0.1, 0.45)):

            def run(c, s, first=first, growth=growth, most=most):
                seen = {}

                def observe(logits, positions, index):
                    seen.update(zip(positions, torch.softmax(logits, -1)))
                    return {}

                def embed(request, index):
                    x = table[request.tokens].clone()
                    for i in seen if index > 0 else ():
                        if request.tokens[i] == MASK:
                            x[i] += min(first + growth * index, most) * (seen[i][:, None] * table).sum(0)
                    return x

                def choose(case):
                    return restated.threshold(case, max(1 - 0.25 * case.index, 0.2))

                options = {"block_length": block_length}
                out = restated.decode(plain, c, s, MASK, choose, observe=observe, embed=embed, **options)
                unsmoothed = restated.decode(plain, c, s, MASK, choose, **options)
                changed.append(not torch.equal(out.tokens, unsmoothed.tokens))
                return out

            assert_rows_same(
                model, run, 16, rule=dk.SmoothedThreshold(0.2, 0.25, first, growth, most), block_length=block_length
            )
        assert any(changed)

    @pytest.mark.parametrize("answer", [None, (3, 8)])
    @pytest.mark.parametrize("gap", [1.0, 3.0, 1e9])
    def test_prophet(self, model, plain, answer, gap):
        """A clear answer commits everything, the blocks behind included."""
        gaps, steps = (gap, 0.7 * gap, 0.4 * gap), 16
        first, last = answer or (0, 16)
        ends = []

        def prophet(canvas, start):
            request = published.Request(canvas, MASK)
            for block in range(2):
                begin = start + 8 * block
                shares = published.linear_quota(len(request.open(begin, begin + 8)), 8)
                for i in range(8):
                    if not request.open(begin, begin + 8):
                        break
                    logits = plain(request.tokens[None])[0][0].index_fill(1, torch.tensor([MASK]), -torch.inf)
                    two = logits[start + first : start + last].topk(2).values
                    progress = (8 * block + i + 1) / steps
                    bar = gaps[0 if progress < 0.33 else 1 if progress < 0.67 else 2]
                    mean = (two[:, 0] - two[:, 1]).mean().item()
                    request.note(abs(mean - bar))
                    if mean >= bar:
                        proposals = published.propose(logits, request.open(start, start + 16), MASK)
                        request.commit(proposals, list(range(len(proposals.positions))))
                        ends.append(request.num_forwards)
                        return request
                    proposals = published.propose(logits, request.open(begin, begin + 8), MASK)
                    published.take(request, proposals, proposals.probability, shares[i])
            return request

        assert_rows_same(model, prophet, 16, rule=dk.EarlyAnswer(gaps, answer), block_length=8)
        assert (len(ends) > 0) == (gap < 1e9)

    @pytest.mark.parametrize("with_frequency", [False, True])
    def test_position_weighted(self, model, plain, with_frequency):
        frequency = torch.rand(97, generator=torch.Generator().manual_seed(2)) ** 8
        frequency[:20] = 0

        def score(request, proposals, start):
            out = []
            for p, i, token in zip(proposals.probability, proposals.positions, proposals.token):
                if with_frequency:
                    p = min(10.0, -p * math.log(frequency[token].item() + 1e-9))
                out.append(p * math.exp(-0.25 * (i - start)))
            return out

        weighted = scores.PositionWeighted(frequency) if with_frequency else scores.PositionWeighted()
        assert_rows_same(
            model, lambda c, s: restated.decode(plain, c, s, MASK, restated.quota, block_length=8, score=score), 16,
            score=weighted, block_length=8, rule=dk.Quota(),
        )  # fmt: skip

    @pytest.mark.parametrize("sigma", [1.0, 10.0])
    def test_density_weighted(self, model, plain, sigma):
        def score(request, proposals, start):
            is_open = (request.tokens == MASK).tolist()
            return [p * restated.density(is_open, i, sigma) for p, i in zip(proposals.probability, proposals.positions)]

        assert_rows_same(
            model, lambda c, s: restated.decode(plain, c, s, MASK, restated.quota, block_length=8, score=score), 16,
            score=scores.DensityWeighted(sigma), block_length=8, rule=dk.Quota(),
        )  # fmt: skip

    def test_deferred_tokens_come_last(self, model, plain):
        """Positions that propose one of them score 0."""
        deferred = tuple(range(0, 60))
        seen = []

        def score(request, proposals, start):
            seen.extend(t in deferred for t in proposals.token)
            return [0.0 if t in deferred else p for p, t in zip(proposals.probability, proposals.token)]

        rows, ids, valid = ragged()
        out = dk.generate(model, ids, valid, defer_token_ids=deferred, max_new_tokens=16, eos_policy="none")
        for row, prompt in enumerate(rows):
            canvas = torch.cat((prompt, prompt.new_full((16,), MASK)))
            request = restated.decode(plain, canvas, len(prompt), MASK, restated.quota, score=score)
            request.slack = math.inf if request.slack == 0 else request.slack  # equal scores are meant here
            assert_same(out, row, request)
        assert any(seen) and not all(seen)

    @pytest.mark.parametrize("score", ["probability", "margin", "entropy", "random"])
    def test_deferred_is_after_all_others(self, score):
        table = Table([sure(1, 0.95), sure(2, 0.4), sure(1, 0.9), sure(3, 0.5)])
        out = decode(table, [FEW_MASK] * 4, defer_token_ids=[1], score=score, seed=3)
        steps = out.commit_step[0].tolist()
        assert sorted(steps[1::2]) == [0, 1] and steps[0::2] == [2, 3]
        assert out.sequences.tolist() == [[1, 2, 1, 3]]


class TestEndOfBlock:
    """`eos_policy="block"`: dInfer's early end."""

    def test_fill_ends_within_the_block(self):
        table = Table([sure(1, 0.95), sure(2, 0.9), sure(3, 0.8), sure(3, 0.7)])
        for policy, forwards, text in (
            ("fill", 2, [1, 2, 4, 4]),
            ("block", 4, [1, 2, 4, 4]),
            ("none", 4, [1, 2, 3, 3]),
        ):
            out = decode(table, [FEW_MASK] * 4, eos_policy=policy, eos_token_id=2, pad_token_id=4)
            assert out.num_forwards.tolist() == [forwards] and out.sequences.tolist() == [text]

    @pytest.mark.parametrize("block_length", [4, 8])
    def test_ends_after_its_block(self, model, plain, block_length):
        rows, ids, valid = ragged(seed=1)
        ended = 0
        for eos in range(4, 10):
            out = dk.generate(
                model, ids, valid, eos_policy="block", eos_token_id=eos, pad_token_id=0, max_new_tokens=24,
                rule=dk.Threshold(0.6), block_length=block_length,
            )  # fmt: skip
            for row, prompt in enumerate(rows):
                canvas = torch.cat((prompt, prompt.new_full((24,), MASK)))
                request = restated.decode(
                    plain, canvas, len(prompt), MASK, lambda c: restated.threshold(c, 0.6), block_length=block_length
                )
                assert request.slack > numerics.TWO_PROGRAMS
                text, steps = request.tokens[len(prompt) :], request.commit_step[len(prompt) :]
                at = (text == eos).nonzero().flatten()
                stop = int(at[0]) + 1 if len(at) else 24
                block_end = min(-(-stop // block_length) * block_length, 24)
                assert torch.equal(out.generated[row, :stop], text[:stop])
                assert (out.generated[row, stop:] == 0).all()
                assert torch.equal(out.commit_step[row, -24:][:stop], steps[:stop])
                assert (out.commit_step[row, -24:][stop:] == -1).all()
                assert out.num_forwards[row] == steps[:block_end].max() + 1
                ended += stop < 24
        assert ended > 0


class TestDreamOrigin:
    def test_number_of_commits(self):
        """Every open position by itself: binomial counts with the chance 1 - t[i+1] / t[i]."""
        rows, length, steps = 3000, 2, 4
        table = Table([sure(1, 0.9)] * length)
        out = decode(
            table, [[FEW_MASK] * length] * rows, config=dk.preset("dream-origin"), temperature=0.0, steps=steps,
            seed=torch.arange(rows), logit_alignment="same",
        )  # fmt: skip
        t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
        stays, expected = 1.0, []
        for i in range(steps):
            chance = 1 - t[i + 1] / t[i] if i < steps - 1 else 1.0
            expected.append(stays * chance)
            stays *= 1 - chance
        numerics.assert_distribution("step", out.commit_step.flatten().bincount(), expected)
        pairs = (out.commit_step[:, 0] * steps + out.commit_step[:, 1]).bincount(minlength=steps**2)
        joint = [a * b for a in expected for b in expected]
        numerics.assert_distribution("independence", pairs, joint)


class TestErrors:
    @pytest.mark.parametrize("make,match", [
        (lambda: dk.LocalThreshold(radius=-1), "radius must be an integer of at least 0"),
        (lambda: dk.DilatedSchedule(1), "base must be an integer of at least 2; got 1"),
        (lambda: dk.StableThreshold(history=0), "history must be an integer of at least 1"),
        (lambda: dk.Threshold(math.nan), "threshold must be a number"),
        (lambda: dk.Threshold(0.9, tie=-1), "tie must be None or a number of at least 0"),
        (lambda: dk.Ancestral(eps=2), "eps must be a number from 0 to 1"),
        (lambda: scores.DensityWeighted(0.0), "sigma must be a positive number"),
    ])  # fmt: skip
    def test_parameters(self, make, match):
        with pytest.raises(ValueError, match=match):
            make()

    def test_statistics_must_be_asked_for(self, model):
        class Careless(dk.Rule):
            needs = frozenset()

            def select(self, step):
                return step.select("none", score=-step.entropy, fill=1)

        with pytest.raises(ValueError, match=r"reads step.entropy, which its `needs` does not include"):
            dk.generate(model, prompts(1, 4), rule=Careless(), max_new_tokens=4)


@pytest.fixture(scope="module")
def shipped():
    return demo.load()


# decoders of models that have learnt to judge a token that stands there, which the shipped one has not
OF_EDITORS = (
    "llada2.1", "llada2.1-speed", "dmax", "diffusion-gemma", "duo", "psi", "psi-rescale", "psi-loop", "psi-constant",
)  # fmt: skip
# it drops half of the prompt, of which an addition needs every digit
EVICTING = ("sparse-dllm",)
# these need causal attention, and say so
OF_CAUSAL_MODELS = ("i-dlm", "nemotron-speculative", "wedlm")
# these need tokens that insert and delete, and say so
OF_MODELS_WITH_EDITS = ("dreamon", "llada2.2")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [
    name for name, preset in dk.PRESETS.items()
    if name not in OF_CAUSAL_MODELS + OF_MODELS_WITH_EDITS and preset.rule.noise != "continuous"
])  # fmt: skip
def test_every_preset_decodes_the_shipped_model(shipped, name):
    """Right additions; the shift of the models that were trained with one is left out."""
    problems = TASKS["addition"].make(2, seed=2)
    options = {"config": demo.for_full_attention(dk.preset(name))}
    out = demo.decode(*shipped, problems, torch.arange(2), options)
    assert out.complete.all()
    for problem, text in zip(problems, shipped[1].batch_decode(out.sequences)):
        assert name in OF_EDITORS + EVICTING or TASKS["addition"].check(problem, text)


@pytest.mark.parametrize("name", OF_CAUSAL_MODELS)
def test_presets_of_causal_models_are_refused(shipped, name):
    ids = shipped[1](TASKS["addition"].make(1)[0].prompt, return_tensors="pt").input_ids
    with pytest.raises(ValueError, match="cache must be one of"):
        dk.generate(shipped[0], ids, config=dk.preset(name), max_new_tokens=4)


@pytest.mark.parametrize("name", OF_MODELS_WITH_EDITS)
def test_presets_that_need_tokens_are_refused(shipped, name):
    decodes = dk.infill if dk.preset(name).rule.decodes == "infillings" else dk.generate
    ids = shipped[1](TASKS["addition"].make(1)[0].prompt, return_tensors="pt").input_ids
    with pytest.raises(ValueError, match="_token_id is not in the model's configuration: pass rule="):
        decodes(shipped[0], ids, config=demo.for_full_attention(dk.preset(name)), max_new_tokens=4)
