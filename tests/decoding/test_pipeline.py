# SPDX-License-Identifier: Apache-2.0
"""Several blocks at once: the pipelines of D2F and d3LLM against their restatements, request by request."""

from functools import partial
from itertools import pairwise

import pytest
import torch

import checkpoints
import dlmkernels as dk
import numerics
import published
from checkpoints import MASK, PAD
from decodings import LateCount, assert_rows_same, assert_same, ragged
from host_reads import reads_between_polls
from small_models import build, prompts

D2F = {"d2f-llada": checkpoints.llada, "d2f-dream": checkpoints.dream}
FULL = {"llada": checkpoints.llada, "dream": checkpoints.dream}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(family)`: a checkpoint of the family, and the model loaded from it."""
    done = {}

    def get(name):
        if name not in done:
            checkpoint = (D2F | FULL)[name]()
            folder = checkpoint.write(tmp_path_factory.mktemp(name))
            done[name] = checkpoint, dk.load(folder, family=name)
        return done[name]

    return get


def restated(decoder, checkpoint, family, new_tokens, **options):
    options |= {"shift": "dream" in family, "pad": PAD}
    return lambda canvas, start, **more: decoder(checkpoint.plain, canvas[:start], new_tokens, MASK, **options | more)


def overlaps(out, start, block):
    """Whether some block has been begun before the one on its left was finished."""
    steps = [s for s in out.commit_step[:, start:].split(block, 1) if s.shape[1]]
    return any((right.min(1).values < left.max(1).values).any() for left, right in pairwise(steps))


# block, threshold, share at which a block is opened, at which the next is active, new tokens
PIPELINES = [
    (8, 0.3, 0.1, 0.95, 29), (8, 0.6, 0.5, 0.5, 24), (4, 0.5, 0.25, 0.75, 18), (5, 0.4, 0.0, 1.0, 21),
    (8, 0.9, 0.1, 0.1, 20), (16, 0.2, 0.1, 0.9, 40), (32, 0.5, 0.1, 0.95, 24), (1, 0.5, 0.5, 0.9, 9),
]  # fmt: skip


@pytest.mark.parametrize("block,threshold,add,decoded,new_tokens", PIPELINES)
@pytest.mark.parametrize("family", D2F)
def test_d2f(family, block, threshold, add, decoded, new_tokens, loaded):
    checkpoint, model = loaded(family)
    decoder = restated(
        published.discrete_forcing, checkpoint, family, new_tokens, block=block, threshold=threshold, add=add,
        decoded=decoded,
    )  # fmt: skip
    for cache in ("block", "none"):
        assert_rows_same(
            model, decoder, new_tokens, seed=2, rule=dk.Pipeline(threshold, add, decoded), block_length=block,
            cache=cache,
        )  # fmt: skip


@pytest.mark.parametrize("buffer", [1, 2])
@pytest.mark.parametrize("block,threshold,add,decoded,new_tokens", [PIPELINES[2], PIPELINES[3], PIPELINES[5]])
def test_buffer(block, threshold, add, decoded, new_tokens, buffer, loaded):
    """No more blocks are open at once than the buffer holds."""
    checkpoint, model = loaded("d2f-llada")
    options = {"block": block, "threshold": threshold, "add": add, "decoded": decoded}
    decoder = restated(published.discrete_forcing, checkpoint, "d2f-llada", new_tokens, buffer=buffer, **options)
    for cache in ("block", "none"):
        assert_rows_same(
            model, decoder, new_tokens, seed=2, rule=dk.Pipeline(threshold, add, decoded, buffer=buffer), block_length=block,
            cache=cache,
        )  # fmt: skip
    ids = prompts(2, 6)
    out = dk.generate(model, ids, max_new_tokens=new_tokens, block_length=block, cache="block", eos_policy="none",
                      rule=dk.Pipeline(threshold, add, decoded, buffer=buffer))  # fmt: skip
    assert buffer > 1 or not overlaps(out, 6, block)


@pytest.mark.parametrize("block,threshold,add,decoded,new_tokens", PIPELINES)
@pytest.mark.parametrize("best_of_all", [True, False])
@pytest.mark.parametrize("family", FULL)
def test_d3llm(family, best_of_all, block, threshold, add, decoded, new_tokens, loaded):
    checkpoint, model = loaded(family)
    threshold, add = 4 * (1 - threshold), max(add, 0.05)
    decoder = restated(
        published.multi_block, checkpoint, family, new_tokens, block=block, threshold=threshold, add=add,
        decoded=decoded, best_of_all=best_of_all,
    )  # fmt: skip
    assert_rows_same(
        model, decoder, new_tokens, seed=3, config=dk.DecodingConfig(), block_length=block,
        rule=dk.EntropyPipeline(threshold, add, decoded, best_of_all=best_of_all),
    )  # fmt: skip


def test_best_of_all(loaded):
    """Where the entropies are large it is one position more in many forwards."""
    _, model = loaded("dream")
    options = {"config": dk.DecodingConfig(), "max_new_tokens": 48, "block_length": 8, "eos_policy": "none"}
    rules = [dk.EntropyPipeline(0.05, 0.1, 1.0, best_of_all=best) for best in (True, False)]
    best, first = (dk.generate(model, prompts(3, 6, seed=5), rule=rule, **options) for rule in rules)
    assert best.complete.all() and first.complete.all() and (best.num_forwards < first.num_forwards).all()


@pytest.mark.parametrize("block,threshold,add,decoded,new_tokens", PIPELINES)
@pytest.mark.parametrize("delay,interval", [(1, None), (2, 3), (3, 2), (1, 4), (50, None), (2, None)])
def test_d3llm_prefix(delay, interval, block, threshold, add, decoded, new_tokens, loaded):
    """Its cache, in rows that renew it and append to it in different forwards."""
    checkpoint, model = loaded("llada")
    threshold, add = 4 * (1 - threshold), max(add, 0.05)
    decoder = restated(
        published.multi_block, checkpoint, "llada", new_tokens, block=block, threshold=threshold, add=add,
        decoded=decoded, delay=delay, interval=interval,
    )  # fmt: skip
    assert_rows_same(
        model, decoder, new_tokens, seed=3, config=dk.DecodingConfig(cache="prefix"), block_length=block,
        rule=dk.EntropyPipeline(threshold, add, decoded, delay), refresh_interval=interval,
    )  # fmt: skip


@pytest.mark.parametrize("family", [*D2F, *FULL])
def test_blocks_overlap(family, loaded):
    """The cases above are pipelines: a block is begun before the one on its left is finished, and not with shares of 1."""
    _, model = loaded(family)
    rule = dk.Pipeline if family in D2F else partial(dk.EntropyPipeline, 1.0)
    options = {"config": dk.DecodingConfig(cache="block" if family in D2F else "none"), "eos_policy": "none"}
    options |= {"max_new_tokens": 32, "block_length": 8}
    ids = prompts(3, 6, seed=5)
    assert overlaps(dk.generate(model, ids, rule=rule(open_at=0.1), **options), 6, 8)
    one_by_one = dk.generate(model, ids, rule=rule(open_at=1.0, activate_at=1.0), **options)
    assert not overlaps(one_by_one, 6, 8)


@pytest.mark.parametrize("family,cache", [
    ("d2f-llada", "block"), ("d2f-dream", "block"), ("llada", "none"), ("dream", "none"), ("llada", "prefix"),
])  # fmt: skip
def test_end_tokens(family, cache, loaded):
    """No block is opened after an end token; what stands before it is finished, and behind it is padding."""
    checkpoint, model = loaded(family)
    rule, decoder = dk.Pipeline(0.5, 0.1, 0.9), published.discrete_forcing
    if family in FULL:
        rule, decoder = dk.EntropyPipeline(2.0, 0.1, 0.9), published.multi_block
    options = {"config": dk.DecodingConfig(cache=cache), "rule": rule, "max_new_tokens": 36, "block_length": 8}
    kept = {"delay": 2, "interval": 3} if cache == "prefix" else {}
    options |= {"refresh_interval": 3} if cache == "prefix" else {}
    rows, ids, valid = ragged(seed=4)
    whole = dk.generate(model, ids, valid, eos_policy="none", **options)
    begin, early, shorter = ids.shape[1], 0, 0
    for eos in whole.generated.unique().tolist()[::3]:
        out = dk.generate(model, ids, valid, eos_token_id=eos, pad_token_id=PAD, **options)
        restate = restated(
            decoder, checkpoint, family, 36, block=8, threshold=rule.threshold, add=0.1, decoded=0.9, eos=eos, **kept
        )  # fmt: skip
        for row, prompt in enumerate(rows):
            request = restate(prompt, len(prompt))
            ends = (request.tokens[len(prompt) :] == eos).nonzero().flatten() + len(prompt)
            if len(ends):
                request.commit_step[ends[0] + 1 :] = -1  # overwritten, whatever was committed there
                request.confidence[ends[0] + 1 :] = 0
            assert_same(out, row, request)
            text = out.sequences[row].tolist()
            if eos in text[begin:]:
                at = text.index(eos, begin)
                assert text[at + 1 :] == [PAD] * (len(text) - at - 1)
                decided = out.commit_step[row]
                early += bool((decided[begin:at] > decided[at]).any())
                shorter += bool(out.num_forwards[row] < whole.num_forwards[row])
        assert torch.equal(
            dk.generate(model, rows[1], eos_token_id=eos, pad_token_id=PAD, **options).generated[0], out.generated[1]
        )
    assert early > 1 and shorter > 1  # end tokens that were decided before what stands left of them, among others


def test_end_token_overwrites_at_once(loaded):
    """d3LLM's masks see end tokens behind the first one, D2F's what was there."""
    _, model = loaded("llada")
    ids = prompts(4, 7, seed=9)
    options = {"config": dk.DecodingConfig(), "max_new_tokens": 32, "block_length": 8}
    rule = dk.EntropyPipeline(2.0, 0.1, 0.9)
    whole = dk.generate(model, ids, rule=rule, eos_policy="none", **options).generated
    differs = 0
    for eos in whole.unique().tolist():
        out = dk.generate(model, ids, rule=rule, eos_token_id=eos, pad_token_id=PAD, **options).generated
        for ours, without in zip(out.tolist(), whole.tolist()):
            if eos in ours:
                at = ours.index(eos)
                differs += ours[:at] != without[:at]
    assert differs


class Uniform(torch.nn.Module):
    """Every mask gets the same logits, so that all decisions between positions are ties."""

    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(97).index_fill(0, torch.tensor(7), 5.0))

    def forward(self, tokens, attention_mask=None):
        return type("Output", (), {"logits": self.logit.expand(*tokens.shape, -1)})()


@pytest.mark.filterwarnings("ignore:dlmkernels does not know")
@pytest.mark.parametrize("rule,expected", [
    # p is 0.61: above the threshold everything goes, below it one of each active block, the first
    (dk.Pipeline(0.6, 0.1, 0.5), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
    (dk.Pipeline(0.7, 0.25, 0.5), [0, 1, 2, 3, 2, 3, 4, 5, 4, 5]),
    (dk.Pipeline(0.7, 0.5, 0.75), [0, 1, 2, 3, 3, 4, 5, 6, 6, 7]),
    (dk.Pipeline(0.7, 1.0, 1.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (dk.EntropyPipeline(9.0, 0.1, 0.5), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
    (dk.EntropyPipeline(0.1, 0.25, 0.5), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
], ids=str)  # fmt: skip
def test_ties(rule, expected):
    """In blocks of four: ties go to the lowest position."""
    out = dk.generate(
        Uniform().eval(), prompts(2, 5), config=dk.DecodingConfig(), mask_token_id=MASK, max_new_tokens=10, block_length=4,
        rule=rule, eos_policy="none",
    )  # fmt: skip
    assert out.commit_step[:, 5:].tolist() == [expected] * 2 and (out.generated == 7).all()


@pytest.mark.parametrize("family", D2F)
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_shares_of_one_are_one_block_after_another(family, threshold, loaded):
    _, model = loaded(family)
    options = {"max_new_tokens": 29, "block_length": 8, "cache": "block", "eos_policy": "none"}
    _, ids, valid = ragged(seed=1)
    ours = dk.generate(model, ids, valid, rule=dk.Pipeline(threshold, 1.0, 1.0), **options)
    plain = dk.generate(model, ids, valid, rule=dk.Threshold(threshold, strict=True), **options)
    for name in ("sequences", "commit_step", "num_forwards"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    numerics.assert_same_probabilities(ours.confidence, plain.confidence)


@pytest.mark.parametrize("grid", ["absolute", "both-ways"])
def test_other_grids(grid, loaded):
    """Blocks that begin within the prompt, in every row elsewhere: the same with a cache and without."""
    _, model = loaded("d2f-llada")
    rows, ids, valid = ragged(seed=6)
    options = {"rule": dk.Pipeline(0.4, 0.1, 0.9), "block_grid": grid, "block_length": 8, "max_new_tokens": 27}
    options |= {"eos_policy": "none"}
    out = dk.generate(model, ids, valid, cache="block", **options)
    for other, these in (
        (dk.generate(model, ids, valid, cache="none", **options), slice(None)),
        *((dk.generate(model, r, cache="block", **options), slice(i, i + 1)) for i, r in enumerate(rows)),
    ):
        assert torch.equal(other.generated, out.generated[these])
        assert torch.equal(other.num_forwards, out.num_forwards[these])
    assert out.complete.all() and overlaps(out, ids.shape[1] - min(map(len, rows)), 8)


@pytest.mark.parametrize("options", [
    {"temperature": 0.8, "top_k": 20}, {"score": "margin", "temperature": 0.5},
    {"order_temperature": 0.3, "defer_token_ids": (5, 50)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family,cache", [
    ("d2f-llada", "block"), ("d2f-dream", "block"), ("llada", "none"), ("llada", "prefix"),
])  # fmt: skip
def test_a_request_does_not_depend_on_its_batch(family, cache, options, loaded):
    _, model = loaded(family)
    rule = dk.Pipeline(0.4, 0.1, 0.9) if family in D2F else dk.EntropyPipeline(1.5, 0.1, 0.9)
    options = {name: value for name, value in options.items() if name not in rule.ignores}
    interval = 3 if cache == "prefix" else None
    options = options | {"config": dk.DecodingConfig(cache=cache, refresh_interval=interval), "rule": rule}
    options |= {"max_new_tokens": 27, "block_length": 8, "eos_token_id": 50, "pad_token_id": PAD}
    rows, ids, valid = ragged(seed=3)
    seeds = torch.tensor([4, 5, 6])
    out = dk.generate(model, ids, valid, seed=seeds, **options)
    for i, row in enumerate(rows):
        got, drafts = [], []
        streamer = type("S", (), {
            "put": lambda self, t: got.extend(t.tolist()), "end": lambda self: None,  # noqa: B023
            "put_draft": lambda self, t: drafts.append(t.tolist()),  # noqa: B023
        })()  # fmt: skip
        alone = dk.generate(model, row, seed=seeds[i : i + 1], streamer=streamer, **options)
        assert torch.equal(alone.generated[0], out.generated[i]) and alone.num_forwards[0] == out.num_forwards[i]
        assert got == alone.sequences[0].tolist() and drafts[-1] == alone.generated[0].tolist()
        assert len(drafts) == alone.num_forwards[0]


@pytest.mark.parametrize("family", ["d2f-dream", "llada"])
def test_loop_reads_nothing_on_the_host(family, loaded, monkeypatch):
    """But the counts, which on a GPU travel by themselves."""
    reads, steps = reads_between_polls(monkeypatch)
    _, model = loaded(family)
    config = dk.preset("d2f" if family in D2F else "d3llm")
    out = dk.generate(model, prompts(2, 6), config=config, max_new_tokens=20, block_length=8)
    assert out.complete.all() and len(steps) > 2 and reads.seen == []
    with reads:
        torch.tensor(3).item()
    assert reads.seen  # the recorder does see reads


@pytest.mark.parametrize("family,options", [
    ("d2f-llada", {"rule": dk.Pipeline(0.5, 0.25, 0.75), "cache": "block"}),
    ("d2f-dream", {"rule": dk.Pipeline(0.3, 0.25, 0.75), "cache": "block"}),
    ("llada", {"rule": dk.EntropyPipeline(0.8, 0.5, 0.75, 1), "cache": "prefix"}),
    ("llada", {"rule": dk.EntropyPipeline(0.8, 0.5, 0.75, 2), "cache": "prefix", "refresh_interval": 4}),
], ids=str)  # fmt: skip
def test_late_counts_in_short_blocks(family, options, loaded, monkeypatch):
    """What a late host may not know is made room for: new blocks, and prefixes that are renewed."""
    _, model = loaded(family)
    options = options | {"config": dk.DecodingConfig(), "max_new_tokens": 48, "block_length": 4, "eos_token_id": 50}
    _, ids, valid = ragged(seed=8)
    at_once = dk.generate(model, ids, valid, **options)
    monkeypatch.setattr("dlmkernels.decoding.programs.base.OpenCount", LateCount)
    late = dk.generate(model, ids, valid, **options)
    for name in ("sequences", "commit_step", "num_forwards"):
        assert torch.equal(getattr(at_once, name), getattr(late, name)), name
    assert late.complete.all()


def test_finished_blocks_are_not_forwarded_again(loaded, monkeypatch):
    """A forward takes, of each request, at most what was not in the cache and finished before."""
    from dlmkernels.models.adapt import DiffusionModel

    checkpoint, model = loaded("d2f-llada")
    taken, hidden = [], DiffusionModel.hidden

    def record(self, tokens, positions, window, *more):
        taken.append([p[s >= 0].tolist() for p, s in zip(positions, window.slots)])
        return hidden(self, tokens, positions, window, *more)

    monkeypatch.setattr(DiffusionModel, "hidden", record)
    rule = dk.Pipeline(0.5, 0.1, 0.9)
    out = dk.generate(
        model, prompts(2, 6), rule=rule, cache="block", max_new_tokens=32, block_length=8, eos_policy="none"
    )
    for row in range(2):
        done, final = 0, 0
        for step, rows in enumerate(taken[: out.num_forwards[row]]):
            blocks = out.commit_step[row, 6:].view(4, 8)
            finished = (blocks.amax(1) < step).int().cumprod(0).sum().item()
            assert rows[row] == list(range(final, rows[row][-1] + 1))
            assert (rows[row][-1] + 1 - 6) % 8 == 0
            final, done = 6 + 8 * finished, max(done, rows[row][-1])
        assert done == 6 + 32 - 1
        assert all(not rows[row] for rows in taken[out.num_forwards[row] :])


def test_prefixes_are_kept(loaded, monkeypatch):
    """With d3LLM's cache: the whole canvas until the prompt and then each block has settled, less between."""
    from dlmkernels.models.adapt import DiffusionModel

    _, model = loaded("llada")
    taken, hidden = [], DiffusionModel.hidden

    def record(self, tokens, positions, window, *more):
        taken.append(window.slots[0][window.slots[0] >= 0].tolist())
        return hidden(self, tokens, positions, window, *more)

    monkeypatch.setattr(DiffusionModel, "hidden", record)
    out = dk.generate(
        model, prompts(1, 6), config=dk.DecodingConfig(cache="prefix"), max_new_tokens=24, block_length=8,
        rule=dk.EntropyPipeline(0.4, 0.5, 0.9, delay=2), eos_policy="none",
    )  # fmt: skip
    assert all(rows == list(range(rows[0], 30)) for rows in taken)
    first = [rows[0] for rows in taken]
    assert first[:4] == [0, 0, 6, 6]  # the prompt is kept by the second forward, for those after it
    second = first.index(14)  # the first block too
    found = out.commit_step[0, 6:14].max() + 1  # the forward, from 0, that finds the block finished
    assert found + 2 < second and first[found:second] == [0, 0, 6]


def test_presets(loaded):
    """By name, and by default where it is the family's."""
    checkpoint, model = loaded("d2f-llada")
    d2f = restated(
        published.discrete_forcing, checkpoint, "d2f-llada", 48, block=32, threshold=0.9, add=0.1, decoded=0.95
    )
    assert_rows_same(model, d2f, 48, seed=1)
    assert_rows_same(model, d2f, 48, seed=1, config=dk.preset("d2f"))
    checkpoint, model = loaded("llada")
    d3llm = restated(published.multi_block, checkpoint, "llada", 48, block=32, threshold=0.5, add=0.1, decoded=0.95)
    assert_rows_same(model, d3llm, 48, seed=1, config=dk.preset("d3llm"))
    assert_rows_same(model, partial(d3llm, delay=2, interval=3), 48, seed=1, config=dk.preset("d3llm-prefix"))


def test_positions_without_a_usable_logit():
    """They stay masks, with a warning, and the loop ends; other requests are not affected."""
    model = build()
    options = {"rule": dk.Pipeline(0.5), "attention": "block", "cache": "block", "block_length": 4}
    options |= {"max_new_tokens": 10, "eos_policy": "none"}
    whole = dk.generate(model, prompts(1, 5), **options)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="masks are left in rows"):
        out = dk.generate(model, prompts(1, 5), **options)
    assert whole.complete.all() and not out.complete.any() and (out.generated == MASK).all()


@pytest.mark.parametrize("options,match", [
    ({"cache": "dual", "attention": "full"}, r"rule Pipeline needs .*got attention='full', cache='dual' and "),
    ({"cache": "prefix", "attention": "full"}, r"rule Pipeline needs .*got attention='full', cache='prefix' and "),
    ({"cache": "none", "attention": "causal"}, r"rule Pipeline needs .*got attention='causal', cache='none' and "),
    ({"cfg_scale": 1.0}, r"cfg_scale cannot be used with rule Pipeline; got 1.0"),
    ({"seeded": True}, r"seeded cannot be used with rule Pipeline; got True"),
    ({"sub_block_length": 4}, r"sub_block_length cannot be used with rule Pipeline; got 4"),
], ids=str)  # fmt: skip
def test_refused(options, match, loaded):
    _, model = loaded("d2f-llada")
    with pytest.raises(ValueError, match=match):
        dk.generate(model, prompts(1, 4), max_new_tokens=4, **options)


def test_arguments_are_checked(loaded):
    _, model = loaded("d2f-llada")
    with pytest.raises(ValueError, match="rule Pipeline continues a prompt: use generate"):
        dk.infill(model, torch.tensor([[5, MASK]]))
    with pytest.raises(ValueError, match=r"open_at must be a number from 0 to 1; got 1\.5"):
        dk.Pipeline(open_at=1.5)
    with pytest.raises(ValueError, match="activate_at must be a number from 0 to 1; got -1"):
        dk.EntropyPipeline(activate_at=-1)
    with pytest.raises(ValueError, match="delay must be an integer of at least 1; got 0"):
        dk.EntropyPipeline(delay=0)
    with pytest.raises(
        ValueError, match=r"\(or cache='prefix' for EntropyPipeline with logit_alignment='same'\); got .*'shift'"
    ):
        dk.generate(loaded("dream")[1], prompts(1, 4), config=dk.preset("d3llm-prefix"), max_new_tokens=4)
    with pytest.raises(ValueError, match="threshold must be a number; got None"):
        dk.Pipeline(None)
