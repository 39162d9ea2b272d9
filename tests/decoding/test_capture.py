# SPDX-License-Identifier: Apache-2.0
"""The steps of a form are the same calls on the same memory, so that they can be captured and replayed.

A program decodes requests; then, with the steps' calls recorded, others; then others again, by nothing but the recorded
calls. These are compared with what `generate` makes of them.
"""

import pytest
import torch

import dlmkernels as dk
import drafter_checkpoints
import research
from decodings import ragged
from dlmkernels.decoding.arguments import check_tokens
from dlmkernels.decoding.programs import Task, program_of
from dlmkernels.decoding.resolve import prepare
from dlmkernels.decoding.schedule import Grid
from dlmkernels.decoding.state import State
from recorder import Player, Recorder
from small_models import MASK, build

NEW = 24
BLOCKS = {"cache": "block", "attention": "block"}
CAUSAL = {"attention": "causal", "logit_alignment": "shift", "cache": "block"}
CASES = {
    # every cache
    "none": {"rule": dk.Threshold(0.3)},
    "prefix": {"rule": dk.Threshold(0.3), "cache": "prefix"},
    "prefix, refreshed": {"rule": dk.Threshold(0.3), "cache": "prefix", "warmup": 2, "refresh_interval": 3},
    "dual": {"rule": dk.Threshold(0.3), "cache": "dual"},
    "dual, vicinity": {"rule": dk.Threshold(0.3), "cache": "dual", "vicinity": (2, 3), "logit_alignment": "shift"},
    "delayed": {"rule": dk.Threshold(0.3), "cache": "delayed"},
    "block": {"rule": dk.Threshold(0.3), **BLOCKS},
    "block, shifted": {"rule": dk.Threshold(0.3), **BLOCKS, "logit_alignment": "shift"},
    "block, apart": {"rule": dk.Threshold(0.3), **BLOCKS, "fuse_commit": False},
    "block, seeded": {"rule": dk.Threshold(0.3), "seeded": True, **CAUSAL},
    "parts": {"rule": dk.Threshold(0.3), **BLOCKS, "sub_block_length": 4},
    "parts alone": {"rule": dk.Threshold(0.3), **BLOCKS, "sub_block_length": 4, "sub_block_cache": True},
    "guided": {"rule": dk.Threshold(0.3), "cache": "dual", "cfg_scale": 0.5},
    "features": {"rule": dk.Threshold(0.3), "cache": dk.DLLMCache(5, 3, 0.25)},
    "focus": {"rule": dk.Threshold(0.3), "cache": "focus", "attention": "block"},
    "focus, guided": {"rule": dk.Quota(), "cache": "focus", "attention": "block", "cfg_scale": 0.5},
    "active": {"rule": dk.Quota(), "cache": dk.D2Cache(0.1, 6), "block_length": NEW},
    "evicted": {"rule": dk.Threshold(0.3), "cache": "sparse-dllm"},
    "features, guided": {"rule": dk.Quota(), "cache": dk.DLLMCache(3, 2, 0.5), "cfg_scale": 0.5},
    "to the end token": {"rule": dk.Threshold(0.3), "eos_policy": "fill", "eos_token_id": tuple(range(20, 40))},
    "fused head": {"rule": dk.WideInNarrowOut(0.3, 0.4), "lm_head": "fused"},
    "logits in slices": {"rule": dk.WideInNarrowOut(0.3, 0.4), "lm_head": "logits", "logits_budget": 4000},
    "allowed tokens": {"rule": dk.Threshold(0.3), "constraint": torch.arange(97) % 3 > 0},
    # every rule that goes block after block
    **{type(rule).__name__: {"rule": rule} for rule in (
        dk.Quota(), dk.TimeQuota(), dk.DynamicThreshold(0.3), dk.Factor(), dk.Frechet(), dk.ReasonFirst(6, dk.Threshold(0.3)),
        dk.EntropyBound(1.0), dk.EntropySum(2.0),
        dk.HierarchicalThreshold(0.5, 0.2), dk.LocalThreshold(0.5, 0.2, 2), dk.DilatedSchedule(2),
        dk.StableThreshold(0.2, 0.5, 1), dk.CreditThreshold(0.3), dk.SmoothedThreshold(0.4),
        dk.EarlyAnswer((2.5, 2.0, 1.5)), dk.TokenEditing(0.3, 0.2, 4), dk.RunEditing(0.3, 0.4), dk.Backtracking(2),
        dk.WideInNarrowOut(0.3, 0.4), dk.PathPlanning(), dk.SplitEditing(0.3, 0.2, 3, 90, 91),
    )},
    "Quota by a table": {"rule": dk.Quota(schedule="cosine"), "steps": 12},
    **{type(rule).__name__: {"rule": rule, "temperature": 1.0, "seed": 5, "steps": 12} for rule in (
        dk.Ancestral(), dk.ScoreAncestral(), dk.AncestralRemask(eta=0.3), dk.UniformState(), dk.PredictorCorrector(),
    )},
    "RenoisedEntropyBound": {"rule": dk.RenoisedEntropyBound(steps=6), "seed": 5},
    "sampled": {"rule": dk.Threshold(0.3), "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5, "cache": "dual"},
    # every other program
    "Strided": {"rule": dk.Strided(3), **CAUSAL},
    "Strided, by ratio": {"rule": dk.Strided(3, 1.0), **CAUSAL, "temperature": 1.0, "seed": 5},
    "SelfSpeculative": {"rule": dk.SelfSpeculative(), "attention": "causal-context", "seeded": True, "cache": "block"},
    "S2D2": {"rule": dk.S2D2(), **BLOCKS},
    "Reordered": {"rule": dk.Reordered(4), "attention": "reordered", "cache": "block"},
    "Pipeline": {"rule": dk.Pipeline(0.3, 0.3, 0.5), **BLOCKS, "logit_alignment": "shift"},
    "Pipeline, buffer": {"rule": dk.Pipeline(0.3, 0.3, 0.5, buffer=2), **BLOCKS, "logit_alignment": "shift"},
    "Pipeline, no cache": {"rule": dk.Pipeline(0.3, 0.3, 0.5), "attention": "block"},
    "EntropyPipeline": {"rule": dk.EntropyPipeline(1.0)},
    "EntropyPipeline, prefix": {"rule": dk.EntropyPipeline(1.0), "cache": "prefix", "refresh_interval": 3},
    "Lengthening": {"rule": dk.Lengthening(0.3, first_length=8, growth=4, end_window=4), "eos_policy": "fill",
                    "eos_token_id": tuple(range(20, 40))},
}  # fmt: skip
OWN_LENGTH = (dk.Strided, dk.Reordered)


@pytest.fixture(scope="module")
def model():
    return build(seed=3, sharpness=3.0)


def options_of(name):
    options = {"max_new_tokens": NEW, "eos_policy": "none"} | CASES[name]
    if not isinstance(options["rule"], OWN_LENGTH):
        options.setdefault("block_length", 8)
    return options


def batch_of(seed):
    """Three requests of other lengths in every batch, padded on the left to 8 tokens; which tokens are not padding."""
    _, ids, valid = ragged([3 + (seed + k) % 3 for k in (0, 1)] + [8], seed=seed)
    return ids, valid


def program_for(model, ids, valid, options):
    """The program that `generate` runs, and a function that gives its state other requests."""
    config, more = (None, options) if isinstance(options, dict) else (options, {})
    adapted, config, special = prepare(model, config, more, "continuations")
    _, origin = check_tokens("ids", adapted, ids, valid, special)
    start = ids.shape[1]
    grid = Grid.of(config, origin, start, start + NEW, config.block_grid == "absolute" or adapted.family.whole_blocks)
    state = State.empty(len(ids), grid.width, ids.device)
    mask = max(special.mask, 0)

    def admit(ids, valid):
        _, origin = check_tokens("ids", adapted, ids, valid, special)
        whole = torch.cat((ids, ids.new_full((len(ids), grid.width - start), mask)), 1)
        columns = torch.arange(grid.width)
        is_open = (columns >= start) & (columns < grid.ends[:, None])
        seed = None if config.seed is None else torch.full((len(ids),), config.seed)
        state.admit(torch.arange(len(ids)), whole, is_open, origin, grid.ends, seed)

    admit(ids, valid)
    return program_of(config.rule)(Task(adapted, state, config, special, grid, start, start + NEW)), admit


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_recorded_calls_decode(model, name):
    options = options_of(name)
    first, *others, last = (batch_of(seed) for seed in range(5))
    program, admit = program_for(model, *first, options)
    player = Player(program)
    player.run("as it is")  # what is made at the first steps is there from now on
    for batch in others:
        admit(*batch)
        player.run("recorded")
    admit(*last)
    steps = player.run("replayed")
    want, out = dk.generate(model, *last, **options), program.output()
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(out.commit_step, want.commit_step) and torch.equal(out.num_forwards, want.num_forwards)
    assert out.complete.all() and steps > 2 and player.replays > steps / 2


CAUSAL_OPTIONS = {"dflash": {"tree": 8}, "dflash2": {"width": "auto"}}


@pytest.mark.parametrize("form", [None, "dflash", "dflash2", "dspark-rnn"])
@torch.no_grad()
def test_recorded_calls_of_causal_decodings(form, tmp_path):
    """The same of one token a forward, and with drafters."""
    model = build(seed=3, sharpness=3.0)
    rule = dk.NextToken()
    if form is not None:
        path, _, _ = drafter_checkpoints.write(tmp_path, form, taps=(0,), target_layers=2)
        rule = dk.Drafted(dk.load_drafter(path, model), **CAUSAL_OPTIONS.get(form, {}))
    options = {"max_new_tokens": NEW, "eos_policy": "none", "rule": rule, "temperature": 1.0, "seed": 5}
    first, *others, last = (batch_of(seed) for seed in range(3))
    program, admit = program_for(model, *first, options)
    player = Player(program)
    player.run("as it is")
    for batch in others:
        admit(*batch)
        player.run("recorded")
    admit(*last)
    steps = player.run("replayed")
    want, out = dk.generate(model, *last, **options), program.output()
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.num_forwards, want.num_forwards)
    assert steps > 2 and player.replays > steps / 2


WRITE = {"plaid": research.write_plaid, "ssd-lm": research.write_ssd_lm}
TIMED = {
    "mdlm": {"steps": 12}, "sedd": {"steps": 12}, "duo": {"steps": 12}, "bd3-lm": {"steps": None},
    "langflow": {"steps": 7}, "plaid": {"steps": 7}, "diffusion-lm": {"steps": 7}, "ssd-lm": {"steps": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", TIMED)
@torch.no_grad()
def test_recorded_calls_of_models_that_take_time(name, tmp_path):
    """The same of time-conditioned and continuous models, with the sampler of each."""
    if name == "diffusion-lm":
        research.write_diffusion_lm(tmp_path / "ema.pt")
        path, how = tmp_path / "ema.pt", {"family": name, "num_attention_heads": research.HEADS, "noise_steps": 40}
    else:
        WRITE.get(name, lambda folder: research.write(name, folder))(tmp_path)
        path, how = tmp_path, {}
    model = dk.load(path, allow_pickle=True, **how)
    options = {"config": name, "max_new_tokens": NEW, "eos_policy": "none", "seed": 5} | TIMED[name]
    batches = [(ids % (research.VOCAB - 1), valid) for ids, valid in (batch_of(seed) for seed in range(4))]
    config = options.pop("config")
    program, admit = program_for(model, *batches[0], dk.preset(config).replace(**options))
    player = Player(program)
    player.run("as it is")
    for batch in batches[1:-1]:
        admit(*batch)
        player.run("recorded")
    admit(*batches[-1])
    assert player.run("replayed") > 1
    want, out = dk.generate(model, *batches[-1], config=config, **options), program.output()
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)


@torch.no_grad()
def test_recorded_calls_fill_in(model):
    """Masks that become several tokens, or none."""
    rule, most, length = dk.Expanding(90, 91), 9, 12
    options = {"rule": rule, "max_new_tokens": most, "eos_policy": "none"}

    def canvas_of(seed):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 90, (3, length), generator=g)
        for row in tokens:
            row[torch.randperm(length, generator=g)[:4]] = MASK
        return tokens

    def admit(tokens):
        canvas = torch.nn.functional.pad(tokens, (0, most - 4), value=special.pad)
        ends = torch.full((3,), length, dtype=torch.int32)
        state.admit(torch.arange(3), canvas, canvas == MASK, torch.zeros_like(ends), ends)

    adapted, config, special = prepare(model, None, options, "infillings")
    state = State.empty(3, length + most - 4, torch.device("cpu"))
    admit(canvas_of(0))
    grid = Grid.of(config, state.origin, 0, length + most - 4, grows=False)
    program = program_of(rule)(Task(adapted, state, config, special, grid, 0, length))
    player = Player(program)
    player.run("as it is")
    for seed in (1, 2, 3):
        admit(canvas_of(seed))
        player.run("recorded")
    admit(canvas_of(4))
    assert player.run("replayed") > 2 and player.replays > 2
    want, out = dk.infill(model, canvas_of(4), **options), program.output()
    assert torch.equal(out.sequences, want.sequences) and torch.equal(out.commit_step, want.commit_step)
    assert torch.equal(out.length, want.length) and torch.equal(out.num_forwards, want.num_forwards)


class TestRecorder:
    """It sees what cannot be captured."""

    @staticmethod
    def record(step, times=2):
        class Program:
            begin = staticmethod(lambda: torch.ones(1))
            widest = staticmethod(lambda form: form)
            taken = 0

            def form(self, report, behind):
                self.taken += 1
                return "step" if self.taken <= times else None

            def step(self, form):
                return step(self.taken)

        Player(Program()).run("recorded")

    def test_the_same_calls(self):
        kept = torch.zeros(3)
        self.record(lambda number: kept.add_(1).sum(0, keepdim=True))

    def test_a_host_read(self):
        with pytest.raises(AssertionError, match="reads a value on the host"):
            self.record(lambda number: torch.ones(1) * torch.ones(1).item())

    def test_a_shape_made_of_values(self):
        with pytest.raises(AssertionError, match="makes a shape of one"):
            self.record(lambda number: torch.ones(3).nonzero().sum(0))

    def test_values_from_the_host(self):
        with pytest.raises(AssertionError, match="new values from the host"):
            self.record(lambda number: torch.tensor([number]))

    def test_another_shape(self):
        with pytest.raises(AssertionError, match="another call"):
            self.record(lambda number: torch.ones(number).sum(0, keepdim=True))

    def test_another_number(self):
        with pytest.raises(AssertionError, match="another call"):
            self.record(lambda number: torch.ones(1) + number)

    def test_a_branch(self):
        with pytest.raises(AssertionError, match="calls"):
            self.record(lambda number: torch.ones(1) if number > 1 else torch.ones(1) + 1)

    def test_another_storage(self):
        kept = [torch.zeros(1)]

        def step(number):
            kept.append(kept[-1] + 1)
            return kept[-1]

        with pytest.raises(AssertionError, match="another call"):
            self.record(step)

    def test_replaying(self):
        """A step without the write into memory that is kept decodes nothing when replayed."""
        recorder, kept = Recorder(), torch.zeros(2)
        with recorder:
            out = kept.add_(1) * 2
        recorder.replay()
        recorder.replay()
        assert kept.tolist() == [3, 3] and out.tolist() == [6, 6]
