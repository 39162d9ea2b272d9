# SPDX-License-Identifier: Apache-2.0
"""The shipped models that are told the noise level: what they know of Sudoku, and how the demonstration shows it."""

import io
import math
import re

import pytest
import torch

import dlmkernels as dk
from dlmkernels.demo import LANGFLOW_DIR, MDLM_DIR, continuous
from dlmkernels.demo.tasks import MASK_ID, TASKS, decode

SUDOKU = TASKS["sudoku"]
#: Nats a cell of a model that knows no more than that there are nine digits.
CHANCE = math.log(9)


@pytest.fixture(scope="module")
def models():
    return {name: dk.load(folder, dtype=torch.float32) for name, folder in FOLDERS.items()}


FOLDERS = {"mdlm": MDLM_DIR, "langflow": LANGFLOW_DIR}


@pytest.mark.parametrize("name", FOLDERS)
def test_loads(name, models):
    model = models[name]
    assert dk.adapt(model).family.name == name and model.config.vocab_size == 18
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert all(p.isfinite().all() for p in model.parameters())
    size = sum(file.stat().st_size for file in FOLDERS[name].iterdir())
    assert size < 760_000


def nats(model, boards, **how):
    ids = torch.stack([torch.from_numpy(p.ids) for p in SUDOKU.make(boards, seed=11, difficulty=81)])
    out = dk.log_likelihood(model, ids[:, :1], ids[:, 1:], seed=torch.arange(boards), **how)
    return -out.total.mean().item() / 81


def test_perplexity_of_mdlm(models):
    """Between what all boards alike would take and what is lost by knowing digits alone."""
    assert math.log(1.86) < nats(models["mdlm"], 8, num_samples=16, batch_size=64) < MOST["mdlm"] < CHANCE


def test_perplexity_of_langflow(models):
    assert nats(models["langflow"], 8, ode_steps=24) < MOST["langflow"] < CHANCE


#: Nats a cell that the models may lose at most: some more than were measured of them.
MOST = {"mdlm": 1.5, "langflow": 1.5}


@pytest.mark.parametrize("name", FOLDERS)
def test_never_says_what_is_no_answer(name, models):
    ids = torch.tensor(SUDOKU.make(1)[0].ids[:1])
    options = {"steps": 8} if name == "langflow" else {"config": "mdlm", "steps": 8}
    out = dk.generate(models[name], ids.expand(4, -1), max_new_tokens=81, seed=torch.arange(4), **options)
    assert all(re.fullmatch("[1-9]{81}", decode(row)) for row in out.generated.tolist())


@pytest.fixture(scope="module")
def film(models):
    return continuous.film(models["langflow"], SUDOKU.make(1, seed=1, difficulty=continuous.CLUES)[0])


def test_film(film):
    """Clues stand in all boards, and digits change on the way."""
    assert len(film.boards) == continuous.STEPS
    for board in film.boards:
        assert len(board) == 82 and all(c in ("_", d) for c, d in zip(film.problem.canvas, board))
    assert film.boards[0] != film.boards[-1]
    assert film.solved == SUDOKU.check(film.problem, film.boards[-1])


def test_frames(film):
    lines = continuous.frames(film).splitlines()
    assert len(lines) == 12 and lines[0].startswith("forward 1:")
    blank = film.problem.canvas.count("_")
    assert f"forward {continuous.STEPS}: {blank} of {blank} final" in lines[0]
    last = [line[-21:] for line in lines[1:]]
    assert last == [line.ljust(21) for line in SUDOKU.render(film.boards[-1]).splitlines()]


@pytest.mark.parametrize("colour", [True, False])
def test_play(film, colour):
    out = io.StringIO()
    continuous.play(film, out, frames_per_second=1e6, colour=colour)
    text = out.getvalue()
    assert text.count("\033[12A") == continuous.STEPS - 1 and ("\033[7m" in text) == colour
    plain = re.sub(r"\033\[[0-9;]*[a-zA-Z]|\r", "", text).splitlines()
    assert plain[-11:] == SUDOKU.render(film.boards[-1]).splitlines()


def test_show(models, monkeypatch, tmp_path):
    monkeypatch.setattr(continuous, "load", lambda: models["langflow"])
    out = io.StringIO()
    shown = continuous.show(seed=2, out=out)
    verdict = "solved" if shown.solved else "not solved"
    assert out.getvalue().splitlines()[-1] == f"Sudoku with {continuous.CLUES} clues: 24 forwards, {verdict}"
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"continuous model is not in .*: reinstall the package"):
        continuous.load(tmp_path)


@pytest.mark.parametrize("name,least_right,least_solved", [("mdlm", 0.8, 0.4), ("langflow", 0.95, 0.8)])
def test_solves(name, least_right, least_solved, models):
    """Of boards of 70 clues most cells are filled in as they were; by chance one in nine would be, and no board."""
    problems = SUDOKU.make(24, seed=5, difficulty=70)
    whole = torch.stack([torch.from_numpy(p.ids) for p in SUDOKU.make(24, seed=5, difficulty=81)])
    ids = torch.stack([torch.from_numpy(p.ids) for p in problems])
    is_open = ids == MASK_ID
    assert torch.equal(ids[~is_open], whole[~is_open])
    given = ids[:, 1:].masked_fill(is_open[:, 1:], -1)
    options = {"steps": 16} if name == "langflow" else {"rule": dk.Quota()}
    out = dk.generate(models[name], ids[:, :1], given=given, max_new_tokens=81, seed=1, **options)
    assert (out.sequences == whole)[is_open].float().mean() > least_right
    solved = [SUDOKU.check(p, decode(row)) for p, row in zip(problems, out.sequences.tolist())]
    assert sum(solved) / len(solved) >= least_solved
