# SPDX-License-Identifier: Apache-2.0
"""The shipped model, its tasks, and what the demonstration makes of them."""

import io
import re

import pytest
import torch

import dlmkernels as dk
from dlmkernels.demo import MODEL_DIR, board, run, tasks
from dlmkernels.demo.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def shipped():
    """Model and tokenizer."""
    threads = torch.get_num_threads()
    model, tokenizer = run.load()
    run.choose_threads(model)
    yield model, tokenizer
    torch.set_num_threads(threads)


def solve(shipped, task, n, difficulty=None, seed=1, **options):
    problems = TASKS[task].make(n, seed=seed, difficulty=difficulty)
    return run.measure(*shipped, task, problems, run.Case("test", options))


# --- the tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_problem_format(name, shipped):
    """A canvas begins with the task's letter, keeps its length, and has blanks only behind the prompt."""
    task, (_, tokenizer) = TASKS[name], shipped
    for problem in task.make(4):
        assert problem.canvas[0] == task.letter and len(problem.canvas) == task.length
        assert problem.prompt + problem.answer == problem.canvas
        assert "_" not in problem.prompt and "_" in problem.answer
        assert tokenizer(problem.canvas).input_ids == problem.ids.tolist()
        assert tokenizer.decode(problem.ids) == problem.canvas == tasks.decode(problem.ids)


def test_difficulty():
    assert all(p.canvas.count("_") == 81 - 32 for p in TASKS["sudoku"].make(3, difficulty=32))
    assert all(p.canvas.count("_") == 5 for p in TASKS["running-sum"].make(3, difficulty=5))
    for problem in TASKS["addition"].make(3, difficulty=12):
        a, b = problem.prompt[1:-1].split("+")
        assert sum(int(x) + int(y) == 9 for x, y in zip(a, b)) == 12
    for name, wrong in (("sudoku", 82), ("addition", 17), ("running-sum", 0)):
        with pytest.raises(ValueError, match="difficulty"):
            TASKS[name].make(1, difficulty=wrong)


def test_problems_depend_on_the_seed_alone():
    for task in TASKS.values():
        assert task.make(3, seed=5) == task.make(3, seed=5) != task.make(3, seed=6)


SOLVED = {
    "sudoku": "S" + "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9)),
    "addition": "A9999999999999999+0000000000000001=10000000000000000",
    "running-sum": "R" + "3" * 32 + "=" + "".join(str(3 * i % 10) for i in range(1, 33)),
}


@pytest.mark.parametrize("name", TASKS)
def test_checker_accepts_right_and_rejects_wrong_answers(name):
    task, text = TASKS[name], SOLVED[name]
    start = task.prompt_length
    problem = tasks.Problem(name, text[:start] + "_" * (task.length - start), start)
    assert task.check(problem, text)
    for i in range(start, task.length, 7):
        assert not task.check(problem, text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    assert not task.check(problem, text[:-1]) and not task.check(problem, text + "0")
    assert not task.check(problem, problem.canvas)
    assert not task.check(problem, text[:-1] + "=")


def test_checker_wants_the_clues_kept():
    """A valid grid that overwrites a clue is no solution."""
    task, text = TASKS["sudoku"], SOLVED["sudoku"]
    other = text.translate(str.maketrans("123456789", "234567891"))
    problem = tasks.Problem("sudoku", text[:41] + "_" * 41, 1)
    assert task.check(problem, text) and not task.check(problem, other)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_confidence_order_solves_and_random_order_does_not(shipped):
    """Few clues, where order matters most; most confident first in as many tokens a forward as are nearly certain."""
    by_confidence = solve(shipped, "sudoku", 12, 32, rule=dk.EntropyBound(0.001))
    in_random_order = solve(shipped, "sudoku", 12, 32, rule=dk.Quota(), score="random")
    assert by_confidence.solved >= 0.9 and in_random_order.solved <= 0.6


def test_forty_clues(shipped):
    assert solve(shipped, "sudoku", 48, 40, rule=dk.EntropyBound(0.001)).solved >= 0.99


@pytest.mark.slow
def test_one_token_a_forward(shipped):
    by_confidence = solve(shipped, "sudoku", 24, 40, rule=dk.Quota())
    in_random_order = solve(shipped, "sudoku", 24, 40, rule=dk.Quota(), score="random")
    assert by_confidence.solved >= 0.99 and by_confidence.forwards == 41
    assert in_random_order.solved <= by_confidence.solved - 0.1


def test_addition(shipped):
    result = solve(shipped, "addition", 16, rule=dk.Threshold(0.9))
    assert result.solved == 1 and result.tokens_per_forward > 4


def test_running_sum(shipped):
    result = solve(shipped, "running-sum", 16, rule=dk.Threshold(0.99))
    assert result.solved >= 0.9
    guessed = solve(shipped, "running-sum", 16, steps=1)
    assert guessed.solved <= 0.2


# --- the demonstration -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(shipped):
    problem = TASKS["sudoku"].make(1, seed=1, difficulty=40)[0]
    return dk.infill(shipped[0], torch.from_numpy(problem.ids), rule=dk.Threshold(0.9)).trace


def test_frames_show_start_middle_and_end(trace):
    text = board.frames(trace)
    assert text.startswith("start: 41 open") and "\033" not in text
    assert len(text.splitlines()) == 12 and ": 0 open" in text


@pytest.mark.parametrize("colour", [True, False])
def test_play_redraws_in_place(trace, colour):
    out = io.StringIO()
    board.play(trace, frames_per_second=1e6, colour=colour, out=out)
    text = out.getvalue()
    frames = text.count("open\033[K")
    assert frames == int(trace.commit_step.max()) + 3
    assert text.count("\033[12A") == frames - 1
    assert ("\033[38;5;" in text) == colour
    last = re.sub(r"\033\[[0-9;]*[a-zA-Z]|\r", "", text).splitlines()[-12:-1]
    assert last == TASKS["sudoku"].render(tasks.decode(trace.tokens[0].tolist())).splitlines()


def test_left_to_right(shipped):
    problem = TASKS["addition"].make(1)[0]
    out = run.decode(*shipped, [problem], torch.tensor([0]), {"rule": dk.Quota(), "score": "position"})
    assert out.trace.order() == [[i] for i in range(problem.prompt_length, TASKS["addition"].length)]


@pytest.mark.parametrize("cases", [run.CASES, run.PUBLISHED])
def test_pictures(trace, tmp_path, cases):
    board.plot(trace, tmp_path / "board.png")
    trace.plot(tmp_path / "trace.png")
    results = [
        run.Result(title, case.name, 8, 0.5, 4.0 + i, 2.0, 100.0)
        for title, *_ in run.SETS
        for i, case in enumerate(cases)
    ]
    (run.plot_grid if cases is run.PUBLISHED else run.plot)(results, tmp_path / "results.png")
    for name in ("board", "trace", "results"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_table():
    first = run.Result("A", "quick", 32, 0.5, 4.25, 2.0, 1234.4)
    results = [
        first,
        run.Result("A", "slow", 32, 1.0, 17.0, 1.0, 99.6),
        run.Result("B", "slow", 32, 0.0, 1.0, 1.0, 2.0),
    ]
    assert run.markdown(results, ["`other`: no"]).splitlines() == [
        "| solved, of 32 · forwards · tokens/s | A | B |",
        "|---|---|---|",
        "| `quick` | 50% · 4.2 · 1234 | – |",
        "| `slow` | 100% · 17.0 · 100 | 0% · 1.0 · 2 |",
        "",
        "- `other`: no",
    ]


def test_every_preset_is_run_or_listed():
    assert {case.name for case in run.PUBLISHED} | run.NOT_RUN.keys() == dk.PRESETS.keys()
    assert {"duo", "sedd", "i-dlm", "dreamon"} <= run.NOT_RUN.keys() and all(run.NOT_RUN.values())


def test_rules_that_only_continue_are_left_out_between_clues(shipped, capsys, tmp_path):
    """Of the sets whose blanks are not all at the end; the picture then has fewer points in these."""
    cases = [case for case in run.PUBLISHED if case.name in ("fast-dllm", "d2f", "daedal")]
    assert [case.continues for case in cases] == [False, True, True]
    results = run.compare(*shipped, 2, cases, seed=1)
    names = {title: [r.rule for r in results if r.set == title] for title, *_ in run.SETS}
    assert names == {title: [c.name for c in cases[: 1 if task == "sudoku" else 3]] for title, task, _ in run.SETS}
    run.plot(results, tmp_path / "results.png")
    assert "daedal" in capsys.readouterr().out and (tmp_path / "results.png").stat().st_size > 5000


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "MODEL_DIR", tmp_path)
    with pytest.raises(ValueError, match="reinstall"):
        run.load()
    assert (MODEL_DIR / "model.safetensors").is_file()


def test_every_problem_of_a_batch_has_a_seed_of_its_own(shipped):
    """The same problem three times: draws differ, and are those of the problem alone with its seed."""
    problem, options = TASKS["running-sum"].make(1)[0], {"rule": dk.Quota(), "temperature": 50.0, "steps": 4}
    seeds = torch.tensor([5, 9, 6])
    out = run.decode(*shipped, [problem] * 3, seeds, options)
    for row, seed in enumerate(seeds):
        alone = run.decode(*shipped, [problem], seed[None], options)
        assert torch.equal(alone.sequences[0], out.sequences[row])
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3


def test_measure_numbers_problems_across_batches(shipped, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "BATCH", 2)
    real = run.decode
    monkeypatch.setattr(run, "decode", lambda m, t, p, seeds, o: seen.append(seeds.tolist()) or real(m, t, p, seeds, o))
    solve(shipped, "addition", 5)
    assert seen == [[0, 1], [2, 3], [4]]


def test_the_default_decodes_in_parallel_and_well(shipped):
    result = solve(shipped, "addition", 8)
    assert result.solved == 1 and result.tokens_per_forward == 17
    result = solve(shipped, "running-sum", 8)
    assert result.solved == 1 and result.tokens_per_forward > 2.5
