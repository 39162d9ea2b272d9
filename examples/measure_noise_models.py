# SPDX-License-Identifier: Apache-2.0
"""Held-out perplexity and solved problems of the demonstration's three models.

    python examples/measure_noise_models.py --problems 64

Perplexity is ``exp(-ln p(answer | question) / tokens)`` by the bound of each model: of the masked model that of LLaDA,
of the others that which they were trained with. What it is at best is 1: an answer follows from its question.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import dlmkernels as dk
from dlmkernels.demo import LANGFLOW_DIR, MDLM_DIR, MODEL_DIR
from dlmkernels.demo.tasks import TASKS, decode
from dlmkernels.info import processor

SETS = ("addition", "running-sum")
# name, folder, samplers: name and options of `generate`
MODELS = {
    "masked": (MODEL_DIR, {"Threshold(0.95)": {}}),
    "mdlm": (
        MDLM_DIR,
        {
            "Threshold(0.95)": {"rule": dk.Threshold(0.95)},
            "its sampler, 64 forwards": {"config": "mdlm", "steps": 64},
            "its sampler, 16 forwards": {"config": "mdlm", "steps": 16},
        },
    ),
    "langflow": (LANGFLOW_DIR, {f"its sampler, {n} forwards": {"steps": n} for n in (8, 32, 128)}),
}


def read(task: str, count: int, seed: int) -> tuple[list, Tensor, Tensor]:
    """Held-out problems, their questions int64 `[n, P]`, and their answers int64 `[n, L]`."""
    problems = TASKS[task].make(count, seed=seed)
    ids = torch.stack([torch.from_numpy(p.ids) for p in problems])
    start = problems[0].prompt_length
    return problems, ids[:, :start], torch.stack([solution(task, p) for p in problems])


def solution(task: str, problem) -> Tensor:
    """The right answer of a question, as ids."""
    from dlmkernels.demo.tasks import encode

    question = problem.prompt[1:-1]
    if task == "addition":
        a, b = question.split("+")
        text = str(int(a) + int(b)).zfill(len(problem.answer))
    else:
        digits = [int(c) for c in question]
        text = "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))
    assert TASKS[task].check(problem, problem.prompt + text)
    return torch.from_numpy(encode(text))


def solved(model, task: str, problems: list, questions: Tensor, seed: int, options: dict) -> float:
    """Share of problems whose whole answer is right."""
    length, seeds = len(problems[0].answer), torch.arange(len(problems)) + seed
    out = dk.generate(model, questions, max_new_tokens=length, seed=seeds, **options)
    texts = [decode(row) for row in out.sequences.tolist()]
    return sum(TASKS[task].check(p, text) for p, text in zip(problems, texts)) / len(problems)


def measure(name: str, args: argparse.Namespace) -> None:
    folder, samplers = MODELS[name]
    model = dk.load(folder, dtype=torch.float32)
    samples = {"masked": args.samples, "mdlm": args.samples, "langflow": 1}[name]
    for task in SETS:
        problems, questions, answers = read(task, args.problems, args.seed)
        out = dk.log_likelihood(
            model, questions, answers, seed=torch.arange(len(problems)), num_samples=samples, batch_size=256,
            **({"ode_steps": args.ode_steps} if name == "langflow" else {}),
        )  # fmt: skip
        nats = -out.total / answers.shape[1]
        mean, error = nats.mean().item(), nats.std().item() / math.sqrt(len(nats))
        print(f"{name}, {task}: {mean:.4f} ± {error:.4f} nats a token, perplexity {math.exp(mean):.3f}", flush=True)
        for sampler, options in samplers.items():
            share = solved(model, task, problems, questions, args.seed, options)
            print(f"{name}, {task}, {sampler}: {share:.1%} of {len(problems)} solved", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="of the masked models' bounds, for each answer")
    parser.add_argument("--ode-steps", type=int, default=64, help="of the continuous model's bound")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    print(f"{processor()}, CPU kernels {dk._C.cpu_isa()}")
    for name in args.models.split(","):
        measure(name, args)


if __name__ == "__main__":
    main()
