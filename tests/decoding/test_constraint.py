# SPDX-License-Identifier: Apache-2.0
"""Constraints: allowed tokens, and checkers that refuse what a rule proposes, against plain restatements."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import dlmkernels as dk
import numerics
import published
import restated_rules as restated
from decodings import LENGTHS, NoRepeats, assert_rows_same, assert_same, canvas_of, lively, ragged
from dlmkernels.decoding.bitmask import pack, unpack
from dlmkernels.demo import run as demo
from dlmkernels.demo.tasks import MASK_ID, TASKS
from joint_model import Joint
from plain_llama import PlainLlama
from small_models import EOS, MASK, VOCAB, build, prompts

pytestmark = pytest.mark.filterwarnings("ignore:dlmkernels does not know:UserWarning")
NEW = 12
SHORT = {"max_new_tokens": NEW, "block_length": 6, "eos_policy": "none"}
MASKED_RULES = [
    dk.Quota(), dk.TimeQuota(), dk.Threshold(0.3), dk.Factor(2.0), dk.EntropyBound(0.5), dk.EntropySum(1.0),
    dk.DynamicThreshold(0.3), dk.HierarchicalThreshold(0.4, 0.2), dk.LocalThreshold(0.5, 0.2, 2), dk.DilatedSchedule(2),
    dk.StableThreshold(0.3, 0.5), dk.CreditThreshold(0.4), dk.SmoothedThreshold(0.3), dk.EarlyAnswer((1.0, 0.8, 0.5)),
    dk.Ancestral(), dk.ScoreAncestral(), dk.TokenEditing(0.4, 0.3), dk.RunEditing(0.3, 0.5), dk.Backtracking(),
    dk.WideInNarrowOut(0.3, 0.3), dk.PathPlanning(), *(
        dk.AncestralRemask(strategy=s, eta=0.3) for s in ("cap", "rescale", "conf", "loop")
    ),
]  # fmt: skip
UNIFORM_RULES = [
    dk.UniformState(),
    dk.UniformState(denoise=False),
    dk.PredictorCorrector(eta=0.3),
    dk.RenoisedEntropyBound(1.0, steps=6),
]


def options_for(rule):
    """What each rule needs to run on a model with full attention and to draw."""
    draws = (rule.draws or isinstance(rule, dk.AncestralRemask)) and "temperature" not in rule.ignores
    drawn = {"temperature": 1.0} if draws else {}
    return SHORT | {"rule": rule, "seed": 3} | drawn


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


def random_sets(rows, columns, seed=5, share=0.15):
    """Some allowed tokens at every position, the mask and the end token never among them: bool `[rows, columns, V]`."""
    allowed = torch.rand(rows, columns, VOCAB, generator=torch.Generator().manual_seed(seed)) < share
    allowed[..., 4], allowed[..., MASK], allowed[..., EOS] = True, False, False
    return allowed


class Balanced(dk.Constraint):
    """Texts whose brackets close. Tokens are "(", ")" or neither, by their id modulo 3.

    A proposal is accepted while the masks that are left can still be filled so that all brackets close.
    """

    def __init__(self, start):
        self.start, self.calls = start, 0

    @staticmethod
    def can_close(tokens):
        low = high = 0  # fewest and most open brackets, over all ways to fill the masks
        for token in tokens:
            kind = "*" if token == MASK else "()-"[token % 3]
            low += {"(": 1, ")": -1, "*": -1, "-": 0}[kind]
            high += {"(": 1, ")": -1, "*": 1, "-": 0}[kind]
            if high < 0:
                return False
            low = max(low, 0)
        return low == 0

    def accepts(self, tokens, proposed):
        assert tokens.device.type == "cpu" == proposed.device.type
        self.calls += 1
        accepted = torch.zeros_like(proposed, dtype=torch.bool)
        for row in range(len(tokens)):
            now = tokens[row].tolist()
            for i, token in enumerate(proposed[row].tolist()):
                if token >= 0:
                    before, now[i] = now[i], token
                    accepted[row, i] = self.can_close(now[self.start :])
                    now[i] = token if accepted[row, i] else before
        return accepted


class Automaton:
    """Runs of digits and letters in turn, by token id modulo 2, none longer than `longest`: a finite automaton."""

    def __init__(self, longest):
        self.longest = longest

    def step(self, state, kind):
        last, run = state
        run = run + 1 if kind == last else 1
        return (kind, run) if run <= self.longest else None

    def matches(self, tokens):
        state = (None, 0)
        for token in tokens:
            state = state and self.step(state, token % 2)
        return state is not None


class LeftToRight(dk.Constraint):
    """What the automaton can read next, at the first open position of the answer; nothing anywhere else."""

    def __init__(self, automaton, start):
        self.automaton, self.start = automaton, start

    def allowed(self, tokens, positions):
        sets = torch.zeros(*positions.shape, VOCAB, dtype=torch.bool)
        for row, columns in enumerate(positions.tolist()):
            state, i = (None, 0), self.start
            while i < tokens.shape[1] and tokens[row, i] != MASK:
                state, i = self.automaton.step(state, int(tokens[row, i]) % 2), i + 1
            if i in columns:
                for kind in (0, 1):
                    sets[row, columns.index(i), kind::2] = self.automaton.step(state, kind) is not None
        return pack(sets)


def constrained(plain, canvas, start, choose, block_length, allowed=None, accepts=None, attempts=100, steps=None):
    """One request: like `restated_rules.decode`, and every step decides again until nothing is refused.

    `allowed(position)` lists tokens; `accepts(tokens, {position: token})` the positions that are all right.
    """
    request = published.Request(canvas, MASK)
    blocks = published.blocks_of(start, len(canvas), block_length)
    refusals = 0
    for begin, end in blocks:
        at_start, index = len(request.open(begin, end)), 0
        planned = steps // len(blocks) if steps else end - begin
        while eligible := request.open(begin, end):
            logits = published.forward(plain, request.tokens)[0].clone()
            for i in eligible if allowed else ():
                keep = torch.tensor(allowed(i))
                logits[i] = torch.full_like(logits[i], -torch.inf).index_copy(0, keep, logits[i, keep])
            for _ in range(attempts):
                proposals = published.propose(logits, eligible, MASK)
                case = restated.Case(
                    eligible, proposals.probability, proposals.entropy, index, planned, at_start, begin, end - begin
                )
                chosen = sorted(set(choose(case)))
                score = sorted(proposals.probability, reverse=True)
                request.note(*(a - b for a, b in itertools.pairwise(score) if a - b > 0))
                request.note(*(proposals.lead[i] for i in chosen))
                if accepts is None:
                    break
                written = {eligible[i]: proposals.token[i] for i in chosen}
                good = accepts(request.tokens.tolist(), written)
                if len(good) == len(written):
                    break
                for i in set(written) - set(good):
                    logits[i, written[i]] = -torch.inf
                    refusals += 1
                chosen = [i for i in chosen if eligible[i] in good]
            request.commit(proposals, chosen)
            index += 1
    return request, refusals


CHOICES = [
    (dk.Quota(), restated.quota, {"steps": 6}), (dk.Quota(), restated.quota, {}),
    (dk.Threshold(0.3), lambda c: restated.threshold(c, 0.3), {}),
    (dk.DynamicThreshold(0.4), lambda c: restated.dynamic(c, 0.4), {}),
    (dk.HierarchicalThreshold(0.4, 0.2), lambda c: restated.hierarchy(c, 0.4, 0.2), {}),
]  # fmt: skip
BY_RULE = pytest.mark.parametrize("rule,choose,extra", CHOICES, ids=lambda v: str(v) if isinstance(v, dk.Rule) else "")


class TestAllowedTokens:
    @BY_RULE
    def test_like_the_restatement(self, model, plain, rule, choose, extra):
        """One set for each position: proposals and confidences of the renormalised distribution."""
        sets = random_sets(1, NEW)[0]

        def run(canvas, start):
            return constrained(
                plain, canvas, start, choose, 6, allowed=lambda i: sets[i - start].nonzero().flatten().tolist(), **extra
            )[0]

        assert_rows_same(model, run, NEW, rule=rule, block_length=6, constraint=sets, **extra)
        assert_rows_same(model, run, NEW, rule=rule, block_length=6, constraint=pack(sets), **extra)

    @pytest.mark.parametrize("rule", [*MASKED_RULES, *UNIFORM_RULES], ids=str)
    def test_every_rule_keeps_to_them(self, model, rule):
        _, ids, valid = ragged()
        sets = random_sets(3, NEW)
        free = dk.generate(model, ids, valid, **options_for(rule))
        out = dk.generate(model, ids, valid, constraint=sets, **options_for(rule))
        assert out.complete.all() and sets.gather(2, out.generated[..., None]).all()
        assert not sets.gather(2, free.generated[..., None]).all()

    @pytest.mark.parametrize("cache,more", [
        ("prefix", {}), ("dual", {}), ("delayed", {}), ("none", {"cfg_scale": 1.0}), ("none", {"temperature": 1.0}),
        ("block", {"attention": "block"}), ("block", {"attention": "causal-context", "seeded": True}),
    ])  # fmt: skip
    def test_every_cache_keeps_to_them(self, model, cache, more):
        sets = random_sets(3, NEW)
        options = SHORT | {"constraint": sets, "cache": cache, "seed": 2} | more
        out = dk.generate(model, prompts(3, 7), rule=dk.Threshold(0.3), **options)
        assert out.complete.all() and sets.gather(2, out.generated[..., None]).all()

    def test_a_step_sees_the_renormalised_distribution(self, model):
        """Probability, margin, entropy and logits, beside those of the whole distribution restricted and divided."""
        seen = []

        class Watch(dk.Rule):
            def __init__(self, sets=None):
                self.sets = sets

            def select(self, step):
                names = ("token", "confidence", "margin", "entropy")
                seen.append([getattr(step, name) for name in names] + [step.logits()])
                return step.eligible

        sets = random_sets(1, 6)
        for constraint in (None, sets):
            dk.generate(model, prompts(2, 5), rule=Watch(), max_new_tokens=6, constraint=constraint)
        *_, logits = seen[0]
        token, confidence, margin, entropy, masked = seen[1]
        p = torch.softmax(logits.double(), -1) * sets
        p /= p.sum(-1, keepdim=True)
        two = p.topk(2).values
        assert torch.equal(token, p.argmax(-1))
        numerics.assert_same_probabilities(confidence, two[..., 0].float())
        numerics.assert_same_probabilities(margin, (two[..., 0] - two[..., 1]).float())
        numerics.assert_same_probabilities(entropy, -torch.special.xlogy(p, p).sum(-1).float())
        assert torch.equal(masked, logits.masked_fill(~sets, -torch.inf))

    def test_fewer_words_than_logits(self, model):
        """A tokenizer that knows fewer tokens than the model has logits: the others are not allowed."""
        known = torch.ones(40, dtype=torch.bool)
        options = SHORT | {"temperature": 3.0, "seed": 1}
        free, kept = (dk.generate(model, prompts(3, 5), constraint=c, **options).generated for c in (None, known))
        assert (free >= 40).any() and (kept < 40).all()

    def test_behind_the_answer_everything_is_allowed(self):
        """A canvas that grows to hold a whole last block."""
        model = lively("qwen3")
        sets = random_sets(1, 9)[0]
        out = dk.generate(
            model, prompts(2, 6), max_new_tokens=9, block_length=8, attention="block", block_grid="absolute",
            cache="block", constraint=sets, eos_policy="none",
        )  # fmt: skip
        assert out.complete.all() and sets.expand(2, -1, -1).gather(2, out.generated[..., None]).all()

    def test_infill_counts_from_the_first_column(self, model):
        sets = random_sets(1, 20)[0]
        tokens = prompts(2, 20)
        tokens[:, 3:9] = tokens[:, 15:] = MASK
        out = dk.infill(model, tokens, constraint=sets, block_length=5, eos_policy="none")
        holes = tokens == MASK
        assert sets.expand(2, -1, -1).gather(2, out.sequences[..., None])[holes].all()
        assert torch.equal(out.sequences[~holes], tokens[~holes])

    def test_a_position_without_tokens_is_left(self, model):
        sets = random_sets(1, NEW)[0]
        sets[4] = False
        with pytest.warns(RuntimeWarning, match="the constraint refused every token there"):
            out = dk.generate(model, prompts(2, 5), constraint=sets, **SHORT)
        assert not out.complete.any() and (out.generated[:, 4] == MASK).all()
        assert (out.generated == MASK).sum() == 2

    def test_without_a_constraint_nothing_is_masked(self, model, monkeypatch):
        from dlmkernels.decoding import propose

        seen, real = [], propose.token_confidence

        def record(logits, **options):
            seen.append(options.get("bitmask"))
            return real(logits, **options)

        monkeypatch.setattr(propose, "token_confidence", record)
        for constraint in (None, torch.ones(VOCAB, dtype=torch.bool)):
            seen.clear()
            out = dk.generate(model, prompts(2, 5), rule=dk.Threshold(0.3), constraint=constraint, **SHORT)
            assert len(seen) >= int(out.num_forwards.max())
            assert all((bitmask is None) == (constraint is None) for bitmask in seen)

    @pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 128])
    def test_packing(self, vocab):
        allowed = torch.rand(3, 2, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.5
        words = pack(allowed)
        assert words.shape == (3, 2, math.ceil(vocab / 32)) and words.dtype == torch.int32
        for i, j, v in itertools.product(range(3), range(2), range(vocab)):
            assert (int(words[i, j, v // 32]) >> v % 32 & 1) == allowed[i, j, v]
        assert torch.equal(unpack(words, vocab), allowed)


class TestChecker:
    @BY_RULE
    def test_like_the_restatement(self, model, plain, rule, choose, extra):
        """Ragged and padded, and alone: the same tokens as one request in plain Python."""
        refusals = []

        def run(canvas, start):
            checker = Balanced(start)

            def accepts(tokens, written):
                proposed = torch.full((1, len(tokens)), -1)
                for i, token in written.items():
                    proposed[0, i] = token
                return checker.accepts(torch.tensor([tokens]), proposed)[0].nonzero().flatten().tolist()

            request, refused = constrained(plain, canvas, start, choose, 6, accepts=accepts, **extra)
            refusals.append(refused)
            assert Balanced.can_close(request.tokens[start:].tolist())
            return request

        rows, ids, valid = ragged()
        options = SHORT | {"rule": rule} | extra
        out = dk.generate(model, ids, valid, constraint=Balanced(max(LENGTHS)), **options)
        for row, prompt in enumerate(rows):
            request = run(canvas_of(prompt, NEW), len(prompt))
            alone = dk.generate(model, prompt, constraint=Balanced(len(prompt)), **options)
            assert_same(out, row, request)
            assert_same(alone, 0, request)
        assert sum(refusals) > 3

    @pytest.mark.parametrize("rule", MASKED_RULES, ids=str)
    def test_every_rule_obeys(self, model, rule):
        _, ids, valid = ragged()
        free = dk.generate(model, ids, valid, **options_for(rule))
        out = dk.generate(model, ids, valid, constraint=Balanced(11), **options_for(rule))
        assert out.complete.all() and not (out.generated == MASK).any()
        assert all(Balanced.can_close(text) for text in out.generated.tolist())
        assert not all(Balanced.can_close(text) for text in free.generated.tolist())

    @pytest.mark.parametrize("rule", [dk.Quota(), dk.Threshold(0.1), dk.RunEditing(0.1), dk.PathPlanning()], ids=str)
    def test_neighbours(self, rule):
        """A model that repeats itself, and tokens of which two are refused for each other's sake."""
        model = build(seed=3, sharpness=2.0)
        free = dk.generate(model, prompts(3, 7), steps=4, **SHORT | {"block_length": 12})
        assert (free.generated[:, 1:] == free.generated[:, :-1]).any()
        out = dk.generate(model, prompts(3, 7), constraint=NoRepeats(), **options_for(rule))
        assert out.complete.all() and not (out.sequences[:, 7:] == out.sequences[:, 6:-1]).any()

    @pytest.mark.parametrize("rule", MASKED_RULES, ids=str)
    def test_one_that_accepts_everything_changes_nothing(self, model, rule):
        class Anything(dk.Constraint):
            calls = 0

            def accepts(self, tokens, proposed):
                self.calls += 1
                return torch.ones_like(proposed, dtype=torch.bool)

        _, ids, valid = ragged()
        constraint = Anything()
        out = dk.generate(model, prompts(1, 5), constraint=constraint, **options_for(rule))
        assert 0 < constraint.calls <= int(out.num_forwards)
        free = dk.generate(model, ids, valid, **options_for(rule))
        out = dk.generate(model, ids, valid, constraint=Anything(), **options_for(rule))
        for name in ("sequences", "commit_step", "confidence", "num_forwards"):
            assert torch.equal(getattr(free, name), getattr(out, name)), name

    @pytest.mark.parametrize("rule", [dk.Threshold(0.3), dk.TokenEditing(0.4, 0.3), dk.Backtracking()], ids=str)
    def test_a_request_does_not_depend_on_its_batch(self, model, rule):
        rows, ids, valid = ragged()
        options = options_for(rule) | {"temperature": 0.7, "seed": torch.arange(3)}
        out = dk.generate(model, ids, valid, constraint=Balanced(11), **options)
        for row, prompt in enumerate(rows):
            options["seed"] = torch.tensor([row])
            alone = dk.generate(model, prompt, constraint=Balanced(len(prompt)), **options)
            assert torch.equal(alone.generated[0], out.generated[row])
            assert alone.num_forwards[0] == out.num_forwards[row]

    @pytest.mark.parametrize("more", [
        {"cache": "dual"}, {"cache": "delayed"}, {"cache": "block", "attention": "block"}, {"cfg_scale": 0.5},
        {"cache": "block", "attention": "causal-context", "seeded": True},
    ], ids=str)  # fmt: skip
    def test_caches_and_guidance(self, model, more):
        out = dk.generate(model, prompts(3, 7), rule=dk.Threshold(0.3), constraint=Balanced(7), **SHORT | more)
        assert out.complete.all() and all(Balanced.can_close(text) for text in out.generated.tolist())

    def test_infill(self, model):
        """Given tokens count; a bracket that stands open behind the masks must be closed before."""
        tokens = torch.full((1, 10), MASK)
        tokens[0, 0], tokens[0, 6:] = 6, torch.tensor([7, 7, 7, 7])  # "(", four ")": three more "(" in five masks
        out = dk.infill(model, tokens, constraint=Balanced(0), rule=dk.Threshold(0.2), eos_policy="none")
        assert out.complete.all() and Balanced.can_close(out.sequences[0].tolist())

    def test_nothing_accepted(self, model):
        """Another request's tokens do not suffer, and the loop ends."""

        class NoneOfRow1(dk.Constraint):
            attempts = 5

            def __init__(self):
                self.calls = 0

            def accepts(self, tokens, proposed):
                self.calls += 1
                accepted = torch.ones_like(proposed, dtype=torch.bool)
                accepted[1:] = False
                return accepted

        ids = prompts(2, 5)
        free = dk.generate(model, ids, rule=dk.Threshold(0.3), **SHORT)
        constraint = NoneOfRow1()
        with pytest.warns(RuntimeWarning, match=r"masks are left in rows \[1\]: the constraint refused"):
            out = dk.generate(model, ids, rule=dk.Threshold(0.3), constraint=constraint, **SHORT)
        assert torch.equal(out.sequences[0], free.sequences[0]) and (out.generated[1] == MASK).all()
        assert out.num_forwards[0] == free.num_forwards[0]
        # of each block one forward, and one for its best position
        assert out.num_forwards[1] == 4 and constraint.calls <= 5 * 4 + int(out.num_forwards[0])

    @pytest.mark.filterwarnings("ignore:masks are left:RuntimeWarning")
    @pytest.mark.parametrize("attempts", [1, 2])
    def test_few_attempts(self, model, attempts):
        """What is refused in the last attempt stays open for the next forward, and what is accepted is written."""
        constraint = Balanced(7)
        constraint.attempts = attempts
        out = dk.generate(model, prompts(3, 7), rule=dk.Threshold(0.1), constraint=constraint, **SHORT)
        many = dk.generate(model, prompts(3, 7), rule=dk.Threshold(0.1), constraint=Balanced(7), **SHORT)
        assert all(Balanced.can_close(text) for text in out.generated.tolist())  # masks among them
        assert (out.generated != MASK).any(1).all()
        assert (out.num_forwards >= many.num_forwards).all() and (out.num_forwards > many.num_forwards).any()

    def test_memory_of_a_rule_counts_steps_and_not_attempts(self, model):
        class Counting(dk.Rule):
            needs = frozenset()
            seen: list = []

            def select(self, step):
                step.keep("calls", step.recall("calls") + 1)
                self.seen.append((int(step.index.max()), step.recall("calls")[step.eligible].max().item()))
                return step.select("none", fill=2)

        constraint = Balanced(5)
        dk.generate(model, prompts(2, 5), rule=Counting(), constraint=constraint, **SHORT)
        assert len(Counting.seen) > 6 and all(calls == index + 1 for index, calls in Counting.seen)

    @pytest.mark.parametrize("steps", [None, 4])
    def test_left_to_right(self, model, steps):
        """A grammar that knows only what may come next: one token a forward, however many the rule asks for."""
        automaton = Automaton(2)
        free = dk.generate(model, prompts(3, 6), steps=steps, **SHORT)
        assert not all(automaton.matches(text) for text in free.generated.tolist())
        out = dk.generate(model, prompts(3, 6), constraint=LeftToRight(automaton, 6), steps=steps, **SHORT)
        assert out.complete.all() and all(automaton.matches(text) for text in out.generated.tolist())
        assert (out.commit_step[:, 6:].diff(dim=1) > 0).all()

    def test_a_short_gap_in_a_long_block_costs_no_idle_forwards(self, model):
        """LLaDA's schedule has come to its end after two forwards; the position that was kept open is not forgotten."""

        class NotAtFirst(dk.Constraint):
            attempts, calls = 1, 0

            def accepts(self, tokens, proposed):
                self.calls += 1
                return torch.full_like(proposed, self.calls > 1, dtype=torch.bool)

        tokens = prompts(1, 40)
        tokens[0, 10:12] = MASK
        free = dk.infill(model, tokens, score="position", rule=dk.Quota())
        assert free.commit_step[0, 10:12].tolist() == [0, 1]
        out = dk.infill(model, tokens, score="position", rule=dk.Quota(), constraint=NotAtFirst())
        assert out.commit_step[0, 10:12].tolist() == [1, 2] and out.num_forwards[0] == 3

    def test_draws_follow_the_renormalised_distribution(self):
        """One random position at a time, pairs of tokens refused: each draw from what its conditional leaves."""
        vocab, rows = 3, 6000
        joint = Joint(vocab, 2, peak=1.2)
        refused = {(0, 1), (1, 1), (2, 0), (1, 2)}

        class Pairs(dk.Constraint):
            def accepts(self, tokens, proposed):
                after = torch.where(proposed >= 0, proposed, tokens)[:, 1:]
                bad = torch.zeros(len(after), dtype=torch.bool)
                for pair in refused:
                    bad |= (after == torch.tensor(pair)).all(1)
                return (~bad)[:, None].expand(-1, tokens.shape[1]).clone()

        out = dk.generate(
            joint, torch.zeros(rows, 1, dtype=torch.int64), max_new_tokens=2, mask_token_id=vocab, eos_policy="none",
            seed=torch.arange(rows), config=dk.preset("bd3-lm", cache="none", constraint=Pairs()),
        )  # fmt: skip
        table = joint.table.detach()
        expected = torch.zeros(vocab, vocab, dtype=torch.float64)
        for a, b in itertools.product(range(vocab), repeat=2):
            if (a, b) not in refused:
                second = table[a].clone()
                second[[v for v in range(vocab) if (a, v) in refused]] = 0
                expected[a, b] += 0.5 * table.sum(1)[a] * second[b] / second.sum()
                first = table[:, b].clone()
                first[[v for v in range(vocab) if (v, b) in refused]] = 0
                expected[a, b] += 0.5 * table.sum(0)[b] * first[a] / first.sum()
        counts = joint.number(out.generated).bincount(minlength=vocab**2)
        numerics.assert_distribution("constrained pairs", counts, expected.flatten())


class Sudoku(dk.Constraint):
    """Digits 1 to 9, no two alike in a row, a column or a box; of two proposals that clash the first stands."""

    def __init__(self, tokenizer, vocab):
        digits = torch.zeros(vocab, dtype=torch.bool)
        digits[tokenizer("123456789").input_ids] = True
        self.digits = pack(digits)
        r, c = torch.arange(81) // 9, torch.arange(81) % 9
        parts = (r, c, 3 * (r // 3) + c // 3)
        self.sees = sum((part[:, None] == part).int() for part in parts) > 0
        self.sees &= ~torch.eye(81, dtype=torch.bool)

    def allowed(self, tokens, positions):
        return self.digits

    def accepts(self, tokens, proposed):
        after = torch.where(proposed >= 0, proposed, tokens)[:, 1:]
        alike = (after[:, :, None] == after[:, None, :]) & self.sees & (after != MASK_ID)[..., None]
        is_given, is_before = proposed[:, 1:] < 0, torch.ones(81, 81, dtype=torch.bool).tril(-1)
        clashes = (alike & (is_given[:, None, :] | is_before)).any(2)
        return torch.nn.functional.pad(~clashes, (1, 0), value=True)


def test_sudoku_by_its_rules():
    """A trained model in few forwards: what is completed under the rules is solved, and more of it than without."""
    shipped, tokenizer = demo.load()
    problems = TASKS["sudoku"].make(12, seed=1, difficulty=32)
    ids = torch.stack([torch.from_numpy(p.ids) for p in problems])

    def solved(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # dead ends
            out = dk.infill(shipped, ids, steps=8, **options)
        texts = tokenizer.batch_decode(out.sequences)
        return out, [TASKS["sudoku"].check(p, text) for p, text in zip(problems, texts)]

    _, freely = solved()
    out, by_rule = solved(constraint=Sudoku(tokenizer, shipped.config.vocab_size))
    assert out.complete.tolist() == by_rule
    assert sum(by_rule) > sum(freely)
    assert (out.num_forwards <= 20).all()  # dead ends are noticed


class TestGiven:
    def test_generate_keeps_what_is_given(self, model):
        """A template in the answer: as `infill` of the same canvas, and with guidance, caches and batches."""
        ids = prompts(2, 6)
        given = torch.full((2, NEW), -1)
        given[0, 3:5], given[1, 0], given[1, 11] = torch.tensor([20, EOS]), 30, 31
        out = dk.generate(model, ids, given=given, rule=dk.Threshold(0.3), max_new_tokens=NEW, eos_policy="none")
        assert torch.equal(out.generated[given >= 0], given[given >= 0]) and out.complete.all()
        assert torch.equal(out.commit_step[:, 6:] >= 0, given < 0)
        canvas = torch.cat((ids, given.masked_fill(given < 0, MASK)), 1)
        filled = dk.infill(model, canvas, rule=dk.Threshold(0.3), eos_policy="none")
        assert torch.equal(out.sequences, filled.sequences)

    @pytest.mark.parametrize("rule", [*MASKED_RULES, *UNIFORM_RULES], ids=str)
    def test_every_rule(self, model, rule):
        given = torch.full((NEW,), -1)
        given[2:4], given[9] = torch.tensor([20, 21]), 22
        out = dk.generate(model, prompts(2, 6), given=given, **options_for(rule))
        assert (out.generated[:, given >= 0] == given[given >= 0]).all() and out.complete.all()
        assert (out.commit_step[:, 6:][:, given >= 0] == -1).all()

    def test_lists(self, model):
        given = [20, 21] + [-1] * (NEW - 2)
        want = dk.generate(model, prompts(2, 6), given=torch.tensor(given), **SHORT)
        for form in (given, [given, given], np.array(given)):
            assert torch.equal(dk.generate(model, prompts(2, 6), given=form, **SHORT).sequences, want.sequences)

    @pytest.mark.parametrize("given,match", [
        ("1", r"given must be token ids, in a list or an int64 tensor; got '1': pass tokenizer"),
        ([[1] * NEW, [2]], r"given must have the same number of ids in each row; got \[12, 1\]"),
        ([1, 2], r"given must be int64 of shape \[1, 12\].*int64 of shape \[2\]"),
        (torch.zeros(1, NEW), r"given must be int64.*float32 of shape \[1, 12\]"),
        (torch.zeros(2, NEW, dtype=torch.int64), r"given must be int64 of shape \[1, 12\].*\[2, 12\]"),
        (torch.full((NEW,), 97), r"given must hold ids from 0 to 96, or -1; got ids from 97 to 97"),
        (torch.full((NEW,), -2), r"given must hold ids.*got ids from -2"),
        (torch.zeros(NEW, dtype=torch.int64, device="meta"), r"given must be on the model's device cpu; got meta"),
    ], ids=str)  # fmt: skip
    def test_errors(self, model, given, match):
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(1, 6), given=given, **SHORT)


class TestErrors:
    @pytest.mark.parametrize("constraint,match", [
        (torch.ones(VOCAB), r"constraint must be an int32 bitmask or bool, on cpu; got torch.float32"),
        (torch.ones(3, 4, dtype=torch.int32), r"constraint must have shape \[n\], \[12, n\] or \[2, 12, n\].*\[1, 3, 4\]"),
        (torch.ones(3, NEW, 4, dtype=torch.int32), r"constraint must have shape.*\[3, 12, 4\]"),
        (torch.ones(1, 1, 1, 4, dtype=torch.int32), r"constraint must have shape.*\[1, 1, 1, 4\]"),
        (torch.ones(5, dtype=torch.int32), "the bitmask has 5 words of 32 tokens, more than the 4 for 97 logits"),
        (torch.ones(4, dtype=torch.int32, device="meta"), r"constraint must be an int32 bitmask or bool, on cpu; got.*meta"),
    ], ids=str)  # fmt: skip
    def test_bitmasks(self, model, constraint, match):
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(2, 5), constraint=constraint, **SHORT)

    @pytest.mark.parametrize("what,match", [
        (lambda t, p: torch.ones(2, 3, dtype=torch.int32), r"constraint: the bitmask must have shape \[n\] or \[2, 6, n\]"),
        (lambda t, p: torch.ones(2, 6, 4), r"allowed tokens must be an int32 bitmask; got torch.float32 of shape \[2, 6, 4\]"),
        (lambda t, p: [1, 2], r"allowed tokens must be an int32 bitmask; got list"),
        (lambda t, p: torch.tensor(3, dtype=torch.int32), r"allowed tokens must be an int32 bitmask"),
    ])  # fmt: skip
    def test_allowed(self, model, what, match):
        constraint = type("Odd", (dk.Constraint,), {"allowed": lambda self, t, p: what(t, p)})()
        with pytest.raises(ValueError, match=match):
            dk.generate(model, prompts(2, 5), constraint=constraint, **SHORT)

    @pytest.mark.parametrize("answer", [True, torch.ones(2, 17), torch.ones(2, 5, dtype=torch.bool)], ids=str)
    def test_accepts(self, model, answer):
        constraint = type("Odd", (dk.Constraint,), {"accepts": lambda self, t, p: answer})()
        with pytest.raises(ValueError, match=r"Odd.accepts must return bool \[2, 17\] on the CPU; got"):
            dk.generate(model, prompts(2, 5), constraint=constraint, **SHORT)

    def test_kind_and_attempts(self, model):
        with pytest.raises(TypeError, match=r"constraint must be a Constraint or a tensor; got 'digits'"):
            dk.generate(model, prompts(2, 5), constraint="digits")
        constraint = Balanced(5)
        constraint.attempts = 0
        with pytest.raises(ValueError, match="attempts must be an integer of at least 1; got 0"):
            dk.generate(model, prompts(2, 5), constraint=constraint)

    @pytest.mark.parametrize(
        "rule",
        [
            dk.Strided(),
            dk.SelfSpeculative(),
            dk.Reordered(),
            dk.Pipeline(),
            dk.EntropyPipeline(),
            dk.Lengthening(),
            dk.SplitEditing(split_token_id=90, delete_token_id=91),
        ],
        ids=str,
    )
    def test_given_tokens_with_loops_of_their_own(self, rule):
        with pytest.raises(ValueError, match=f"given cannot be used with rule {type(rule).__name__}"):
            dk.generate(build(), prompts(2, 5), rule=rule, max_new_tokens=NEW, given=torch.full((NEW,), -1))

    @pytest.mark.parametrize("rule", [
        dk.Lengthening(), dk.SplitEditing(split_token_id=90, delete_token_id=91),
    ], ids=str)  # fmt: skip
    def test_rules_that_move_tokens(self, rule):
        with pytest.raises(ValueError, match=f"constraint cannot be used with rule {type(rule).__name__}, which moves"):
            dk.generate(build(), prompts(2, 5), rule=rule, max_new_tokens=NEW, constraint=Balanced(5), eos_token_id=EOS)

    @pytest.mark.parametrize("rule", UNIFORM_RULES, ids=str)
    def test_checkers_need_masks(self, model, rule):
        with pytest.raises(ValueError, match=r"Balanced.accepts cannot be used with rule .*; override `allowed`"):
            dk.generate(model, prompts(2, 5), constraint=Balanced(5), **options_for(rule))


def test_one_that_overrides_nothing():
    class Misspelled(dk.Constraint):
        def accept(self, tokens, proposed):
            return proposed < 50

    with pytest.raises(ValueError, match="constraint has no effect: Misspelled overrides neither allowed nor accepts"):
        dk.generate(build(), prompts(1, 4), max_new_tokens=4, constraint=Misspelled())


@pytest.mark.parametrize(("value", "hint"), [
    ("[0-9]+", r"got '\[0-9\]\+': for a regular expression, pass dlmkernels.regex\('\[0-9\]\+', tokenizer\)"),
    (NoRepeats, r"pass an instance, NoRepeats\(…\)"),
    (3, "got 3$"),
])  # fmt: skip
def test_what_is_no_constraint(value, hint):
    with pytest.raises(TypeError, match="constraint must be a Constraint or a tensor; " + ".*" + hint):
        dk.DecodingConfig(constraint=value)
