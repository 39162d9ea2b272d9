# SPDX-License-Identifier: Apache-2.0
"""Measure perplexity and solved boards of the demo's three diffusion models on held-out Sudokus.

    python examples/measure_noise_models.py --problems 64

Perplexity is ``exp(-ln p(board) / 81)`` per cell, for boards without given cells. It uses the bound of each model:
LLaDA's for the masked model, and the training objective for the others. There are 6,670,903,752,021,072,936,960 boards
(Felgenhauer and Jarvis, "Mathematics of Sudoku I", 2006). If all are equally likely, no model can be below 1.860. A
model that only knows that there are nine digits has a perplexity of 9.
"""

from __future__ import annotations

import argparse
import math

import torch

import dlmkernels as dk
from dlmkernels.demo import LANGFLOW_DIR, MDLM_DIR, MODEL_DIR
from dlmkernels.demo.tasks import MASK_ID, TASKS, decode
from dlmkernels.info import processor

SUDOKU = TASKS["sudoku"]
CLUES = (40, 60, 70, 76)
CONFIDENCE = {"rule": dk.Threshold(0.95)}
# name -> folder, and samplers by name, as options of `generate`
MODELS = {
    "masked": (MODEL_DIR, {"Threshold(0.95)": CONFIDENCE}),
    "mdlm": (
        MDLM_DIR,
        {"Threshold(0.95)": CONFIDENCE, "its sampler, 64 forwards": {"config": "mdlm", "steps": 64}},
    ),
    "langflow": (LANGFLOW_DIR, {f"its sampler, {n} forwards": {"steps": n} for n in (8, 24, 128)}),
}


def solved(model, clues: int, count: int, seed: int, options: dict) -> tuple[float, float]:
    """Decode boards with `clues` given cells. Returns the shares of valid boards and of cells like the original's."""
    problems, whole = (SUDOKU.make(count, seed=seed, difficulty=n) for n in (clues, 81))
    ids, boards = (torch.stack([torch.from_numpy(p.ids) for p in some]) for some in (problems, whole))
    is_open = ids == MASK_ID
    assert torch.equal(ids[~is_open], boards[~is_open])
    seeds = torch.arange(count) + seed
    out = dk.generate(
        model, ids[:, :1], given=ids.masked_fill(is_open, -1)[:, 1:], max_new_tokens=81, seed=seeds, **options
    )
    right = (out.sequences == boards)[is_open].float().mean().item()
    return sum(SUDOKU.check(p, decode(row)) for p, row in zip(problems, out.sequences.tolist())) / count, right


def perplexity(model, args: argparse.Namespace) -> str:
    boards = SUDOKU.make(args.problems, seed=args.seed, difficulty=81)
    ids = torch.stack([torch.from_numpy(p.ids) for p in boards])
    is_flow = model.config.dlm_family == "langflow" if hasattr(model.config, "dlm_family") else False
    out = dk.log_likelihood(
        model, ids[:, :1], ids[:, 1:], seed=torch.arange(len(ids)), num_samples=1 if is_flow else args.samples,
        batch_size=256, **({"ode_steps": args.ode_steps} if is_flow else {}),
    )  # fmt: skip
    nats = -out.total / 81
    mean, error = nats.mean().item(), nats.std().item() / math.sqrt(len(nats))
    return f"{mean:.4f} ± {error:.4f} nats per cell, perplexity {math.exp(mean):.3f}"


def measure(name: str, args: argparse.Namespace) -> None:
    folder, samplers = MODELS[name]
    model = dk.load(folder, dtype=torch.float32)
    print(f"{name}: {perplexity(model, args)}", flush=True)
    for sampler, options in samplers.items():
        for clues in CLUES:
            share, right = solved(model, clues, args.problems, args.seed, options)
            print(f"{name}, {sampler}, {clues} clues: {share:.0%} solved, {right:.0%} of cells correct", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="samples per board for the masked models' bounds")
    parser.add_argument("--ode-steps", type=int, default=64, help="ODE steps for the continuous model's bound")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    print(f"{processor()}, CPU kernels {dk._C.cpu_isa()}")
    for name in args.models.split(","):
        measure(name, args)


if __name__ == "__main__":
    main()
