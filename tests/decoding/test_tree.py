# SPDX-License-Identifier: Apache-2.0
"""Trees of drafts: the best paths, and the tokens of one a forward."""

import itertools

import pytest
import torch

import dlmkernels as dk
import drafter_checkpoints
from dlmkernels.decoding.programs.tree import best_first, followed
from dlmkernels.demo import drafted
from dlmkernels.demo.tasks import TASKS
from small_models import build, prompts


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("nodes", [2, 7, 20])
def test_best_first_finds_the_likeliest_paths(nodes):
    """Against all paths there are, sorted."""
    depth, width = 4, 3
    z = torch.randn(5, depth, 6, generator=torch.Generator().manual_seed(nodes))
    likely = torch.log_softmax(z, -1).topk(width, -1).values
    tree = best_first(likely, nodes)
    for b in range(5):
        every = [
            (float(sum(likely[b, i, r] for i, r in enumerate(path))), path)
            for n in range(1, depth + 1)
            for path in itertools.product(range(width), repeat=n)
        ]
        every.sort(key=lambda x: -x[0])
        paths = [()]
        for n in range(nodes):
            place, at = divmod(int(tree.place[b, n]), width + 1)
            parent = paths[int(tree.parent[b, n])]
            assert len(parent) == place == int(tree.depth[b, n]) - 1 and at < width
            paths.append((*parent, at))
            ancestors = [m for m, path in enumerate(paths) if paths[n + 1][: len(path)] == path]
            assert tree.sees[b, n + 1].nonzero().flatten().tolist() == ancestors
        assert set(paths[1:]) == {path for _, path in every[:nodes]} and tree.is_there[b].all()


def test_a_small_lattice_has_no_more_nodes():
    tree = best_first(torch.log_softmax(torch.randn(1, 1, 3), -1).sort(-1, descending=True).values, 5)
    assert tree.is_there.tolist() == [[True, True, True, False, False]]


def test_followed():
    # root -> 5, 6; 5 -> 7; 7 -> 9
    parent, token = torch.tensor([[0, 0, 1, 3]]), torch.tensor([[5, 6, 7, 9]])
    assert followed(parent, token, torch.tensor([[5, 7, 0, 9, 1]]), 4).tolist() == [[0, 1, 3, 4, -1]]
    assert followed(parent, token, torch.tensor([[6, 7, 7, 9, 1]]), 4).tolist() == [[0, 2, -1, -1, -1]]
    assert followed(parent, token, torch.tensor([[4, 7, 7, 9, 1]]), 4).tolist() == [[0, -1, -1, -1, -1]]


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.2, "top_k": 6, "seed": 4}, {"constraint": torch.arange(97) % 3 > 0},
    {"eos_policy": "fill", "eos_token_id": tuple(range(20, 32))},
], ids=["greedy", "drawn", "constraint", "end tokens"])  # fmt: skip
def test_same_tokens_as_one_a_forward(options, tmp_path):
    model = build(seed=3, sharpness=3.0)
    path, _, _ = drafter_checkpoints.write(tmp_path, "dflash", taps=(0,), target_layers=2)
    drafter = dk.load_drafter(path, model)
    rows = [prompts(1, 3 + i, seed=i)[0].tolist() for i in range(4)]
    options = {"max_new_tokens": 20, "eos_policy": "none"} | options
    plain = dk.generate(model, rows, rule=dk.NextToken(), **options)
    for rule in (dk.Drafted(drafter, tree=12), dk.Drafted(drafter, 2, tree=40)):
        assert torch.equal(dk.generate(model, rows, rule=rule, **options).sequences, plain.sequences)


def test_a_trained_pair():
    """A tree that holds the chain needs no more forwards, where there is doubt fewer; rows do not depend on others."""
    model, drafter = drafted.load()
    ids = [drafted.question(p).tolist() for p in TASKS["running-sum"].make(6, seed=2)]
    options = {"max_new_tokens": 33}
    plain, chain, tree = (
        dk.generate(model, ids, rule=rule, **options)
        for rule in (dk.NextToken(), dk.Drafted(drafter, 8), dk.Drafted(drafter, 8, tree=48))
    )
    assert torch.equal(tree.sequences, plain.sequences)
    assert tree.num_forwards.sum() < 0.9 * chain.num_forwards.sum()
    alone = dk.generate(model, ids[2], rule=dk.Drafted(drafter, 8, tree=48), **options)
    assert torch.equal(alone.generated[0], tree.generated[2]) and alone.num_forwards[0] == tree.num_forwards[2]


def test_refusals(tmp_path):
    model = build(seed=3)
    one, other = (
        dk.load_drafter(drafter_checkpoints.write(tmp_path / form, form, taps=(0,), target_layers=2)[0], model)
        for form in ("dflash2", "dflash")
    )
    with pytest.raises(ValueError, match="tree needs a drafter whose drafts are independent"):
        dk.generate(model, prompts(1, 4), rule=dk.Drafted(one, tree=8))
    with pytest.raises(ValueError, match="width='auto' cannot be used with tree"):
        dk.Drafted(other, "auto", tree=8)
    with pytest.raises(ValueError, match="tree must be None or an integer of at least 2"):
        dk.Drafted(other, tree=1)
