# SPDX-License-Identifier: Apache-2.0
"""The demonstration's causal model and its drafter: a trained pair, whose acceptance tells whether all is read right."""

import json
import shutil

import pytest
import torch

import dlmkernels as dk
import numerics
from dlmkernels.demo import CAUSAL_DIR, DRAFTER_DIR, MODEL_DIR, drafted, run
from dlmkernels.demo.tasks import TASKS


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair():
    return drafted.load()


def questions(count, tasks=tuple(TASKS), seed=3):
    """Questions of different lengths, and how many tokens their answers have."""
    out = []
    for i in range(count):
        name = tasks[i % len(tasks)]
        problem = TASKS[name].make(i // len(tasks) + 1, seed=seed, difficulty=60 if name == "sudoku" else None)[-1]
        out.append((drafted.question(problem).tolist(), len(problem.answer) + 1))
    return [ids for ids, _ in out], [n for _, n in out]


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_same_tokens_in_every_way(batch, temperature, pair):
    """Requests of all tasks in one batch: ragged, with end tokens, and with acceptance of their own."""
    model, drafter = pair
    ids, lengths = questions(batch)
    options = {"max_new_tokens": lengths, "temperature": temperature, "seed": 5}
    plain = dk.generate(model, ids, rule=dk.NextToken(), **options)
    for name, how in drafted.ways(drafter).items():
        if temperature > 0 and name == drafted.BY_ITSELF:
            continue  # its noise depends on the step
        out = dk.generate(model, ids, **how, **options)
        assert torch.equal(out.sequences, plain.sequences), name
        if name == drafted.DRAFTED:
            assert out.num_forwards.sum() < (0.4 if temperature == 0 else 0.9) * plain.num_forwards.sum()
            assert batch == 1 or len(set(out.num_forwards.tolist())) > 1
            for row in range(min(batch, 3)):
                alone = dk.generate(
                    model, ids[row], max_new_tokens=lengths[row], temperature=temperature, seed=5, **how
                )
                assert torch.equal(alone.generated[0], out.generated[row, : lengths[row]])
                assert alone.num_forwards[0] == out.num_forwards[row]


def forwards(model, drafter, name):
    ids, lengths = questions(12, (name,))
    return dk.generate(model, ids, drafter=drafter, max_new_tokens=lengths).num_forwards.float().mean().item()


@pytest.mark.parametrize("name", TASKS)
def test_acceptance_tells_what_is_read_wrongly(name, pair):
    """Nothing breaks with the layers or the mask of another drafter: the drafts are bad.

    A Sudoku's clues are copied, for which any layers do.
    """
    model, drafter = pair
    right = forwards(model, drafter, name)
    assert right < {"sudoku": 12, "addition": 4, "running-sum": 12}[name]
    layers = [{"taps": taps} for taps in ((0, 1, 2), (2, 3, 4), (3, 2, 1))] if name == "addition" else []
    for change in (*layers, {"mask_token_id": 20}, {"mask_token_id": 5}):
        wrong = drafter.changed(**change)
        assert forwards(model, wrong, name) > 1.8 * right, change


def test_layers_are_counted_as_each_form_does(pair, tmp_path):
    """The same drafter in the form of the speculators library, which counts the embeddings as the first."""
    model, drafter = pair
    config = json.loads((DRAFTER_DIR / "config.json").read_text())
    own = config.pop("dflash_config")
    assert own["target_layer_ids"] == [1, 2, 3] == list(drafter.form.taps)
    theirs = {
        "speculators_model_type": "dflash", "transformer_layer_config": config, "block_size": own["block_size"],
        "mask_token_id": own["mask_token_id"], "draft_vocab_size": config["vocab_size"],
        "aux_hidden_state_layer_ids": [2, 3, 4],
    }  # fmt: skip
    shutil.copy(DRAFTER_DIR / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    same = dk.load_drafter(tmp_path, model)
    assert same.form.taps == (1, 2, 3)
    assert forwards(model, same, "addition") == forwards(model, drafter, "addition")


def test_drawn_text_is_the_models(pair):
    """The first two tokens of many requests against the product of the model's distributions."""
    model, drafter = pair
    draws, temperature, few = 1200, 6.0, 4
    ids = drafted.question(TASKS["addition"].make(1, seed=1)[0])
    out = dk.generate(
        model, ids.expand(draws, -1), drafter=drafter, max_new_tokens=2, eos_policy="none",
        temperature=temperature, top_k=few, seed=torch.arange(draws),
    )  # fmt: skip
    accepted = (out.num_forwards == 2).float().mean()
    assert (out.num_forwards <= 2).all() and accepted > 0.5

    def following(text):
        z = model(text[None]).logits[0, -1].double() / temperature
        return torch.softmax(z.masked_fill(z < z.topk(few).values[-1], -torch.inf), -1)

    first = following(ids)
    expected, counts = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, 32)
    for token in first.nonzero()[:, 0]:
        expected[token] = first[token] * following(torch.cat((ids, token[None])))
    for a, b in out.generated.tolist():
        counts[a, b] += 1
    # what is expected fewer than ten times counts as one outcome
    often = expected * draws >= 10
    assert often.sum() > 5
    counts, expected = (torch.cat((x[often], x[~often].sum()[None])) for x in (counts.double(), expected))
    if expected[-1] * draws < 5:
        counts, expected = (torch.cat((x[:-2], x[-2:].sum()[None])) for x in (counts, expected))
    numerics.assert_distribution("two tokens", counts.long(), expected)


def test_first_drafts_are_drawn_like_the_model_draws(pair):
    """With the noise shared, a draft is the model's token far more often than two draws of one distribution agree."""
    model, drafter = pair
    ids = drafted.question(TASKS["addition"].make(1, seed=1)[0]).expand(200, -1)
    options = {"max_new_tokens": 3, "eos_policy": "none", "temperature": 6.0, "seed": torch.arange(200)}
    out = dk.generate(model, ids, drafter=drafter, **options)
    plain = dk.generate(model, ids, rule=dk.NextToken(), **options)
    assert torch.equal(out.sequences, plain.sequences)
    agree = (out.num_forwards == 2).float().mean().item()
    # of independent draws, from what was seen at that place
    share = torch.bincount(out.generated[:, 1], minlength=32).double() / 200
    assert agree > 1.5 * float(share.square().sum())


def test_the_table(pair):
    masked, _ = run.load()
    said = []
    rows = drafted.compare(masked, 4, 1, said.append)
    assert len(rows) == 12 and len(said) == 13
    by = {(row.set, row.how): row for row in rows}
    for title, *_ in drafted.SETS:
        one, other = by[title, drafted.ONE], by[title, drafted.DRAFTED]
        assert one.solved == other.solved == by[title, drafted.BY_ITSELF].solved
        assert other.forwards < one.forwards
    assert by["16-digit addition", drafted.ONE].solved == 1
    assert drafted.markdown(rows).count("|") == 6 * 5


def test_weights_are_small():
    total = sum(path.stat().st_size for folder in (MODEL_DIR, CAUSAL_DIR, DRAFTER_DIR) for path in folder.iterdir())
    assert total < 8_000_000
    assert sum(path.stat().st_size for folder in (CAUSAL_DIR, DRAFTER_DIR) for path in folder.iterdir()) < 2_500_000
