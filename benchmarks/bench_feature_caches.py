# SPDX-License-Identifier: Apache-2.0
"""Benchmark caches on a long prompt, where they matter most; run as a program, also on the demo's tasks, which show
their effect on quality.

All decodings commit one token per forward, so they take the same number of forwards regardless of the weights. `rows`
counts the inputs of all feed-forward layers: positions times layers, in thousands. The program's rates are based on
processor time, so run it with one thread; other programs then have little influence.
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch

import dlmkernels as dk
from bench_decode import build
from dlmkernels.demo import run
from dlmkernels.demo.tasks import TASKS

CACHES = {
    "none": {}, "prefix": {"cache": "prefix"}, "dual": {"cache": "dual"}, "delayed": {"cache": "delayed"},
    "dllm-cache": {"cache": "dllm-cache"}, "sparse-dllm": {"cache": "sparse-dllm"},
    "d2cache": {"cache": "d2cache", "block_length": None, "score": dk.scores.DensityWeighted()},
}  # fmt: skip
#: Caches for models with block attention, in which each block attends to the blocks before it.
OF_BLOCKS = {
    name: {"cache": name, "attention": "block", "logit_alignment": "same"} for name in ("none", "block", "focus")
}


@dataclass(frozen=True)
class Case:
    size: str
    prompt: int
    new: int
    block: int = 8
    batch: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return (f"{self.size}, {str(self.dtype)[6:]}, batch {self.batch}, prompt {self.prompt}, {self.new} new tokens, "
                f"one a forward, in blocks of {self.block}")  # fmt: skip


SMALLEST = [Case("vocabulary 4096", 64, 16)]
QUICK = [Case("small", 256, 32)]
FULL = [
    Case("LLaDA's proportions", 1024, 64), Case("LLaDA's proportions", 1024, 64, dtype=torch.bfloat16),
    Case("LLaDA's proportions", 1024, 256, dtype=torch.bfloat16),
]  # fmt: skip


class Rows:
    """Context manager that counts the rows processed by a model's feed-forward layers."""

    def __init__(self, model):
        self._layers, self.count = model.model.layers, 0

    def __enter__(self):
        def count(module, inputs):
            self.count += inputs[0].numel() // inputs[0].shape[-1]

        # decoding uses a copy of the model that shares its hooks
        self._hooks = [layer.mlp.register_forward_pre_hook(count) for layer in self._layers]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def decode(model, ids, case, options):
    mask = model.config.vocab_size - 1
    return dk.generate(
        model,
        ids,
        config="llada",
        mask_token_id=mask,
        max_new_tokens=case.new,
        **{"block_length": case.block} | options,
    )


def test_long_prompt(benchmark, harness, case):
    model = build(case.size, case.dtype)
    ids = torch.randint(4, model.config.vocab_size - 1, (case.batch, case.prompt))
    with Rows(model) as without:
        decode(model, ids, case, {})
    with Rows(model) as rows:
        out = decode(model, ids, case, CACHES["dllm-cache"])
    assert int(out.num_forwards[0]) == case.new and rows.count < without.count
    others = {
        f"cache {name}": lambda options=options: decode(model, ids, case, options) for name, options in CACHES.items()
    }
    del others["cache dllm-cache"]
    harness.compare(
        benchmark, f"cache dllm-cache: {case}", lambda: decode(model, ids, case, CACHES["dllm-cache"]), others,
        work=case.batch * case.new, unit="tokens/s",
    )  # fmt: skip


def main(problems: int) -> None:
    """Print the tables: every cache on the demo's tasks (unless `problems` is 0), and on a long prompt."""
    torch.manual_seed(0)
    if problems:
        print_tasks(problems)
    case = Case("LLaDA's proportions", 1024, 64, block=32, dtype=torch.bfloat16)
    print_long_prompt(case, CACHES)
    for batch in (1, 8):
        print_long_prompt(replace(case, batch=batch, dtype=torch.float32), OF_BLOCKS)


def print_tasks(problems: int) -> None:
    model, tokenizer = run.load()
    print("| solved · forwards · rows · tokens/s |", " | ".join(title for title, *_ in run.SETS), "|")
    print("|---" * (1 + len(run.SETS)), "|", sep="")
    for name, options in CACHES.items():
        options = {"rule": dk.Quota(), "block_length": 16, "eos_policy": "none"} | options
        cells = []
        for title, task, difficulty in run.SETS:
            tasks = TASKS[task].make(problems, seed=1, difficulty=difficulty)
            start = time.process_time()
            with Rows(model) as rows:
                r = run.measure(model, tokenizer, title, tasks, run.Case(name, options))
            rate = r.tokens_per_forward * r.forwards * problems / (time.process_time() - start)
            thousands = rows.count / problems / 1000
            cells.append(f"{r.solved:.0%} · {r.forwards:.1f} · {thousands:.1f} · {rate:.0f}")
        print(f"| `{name}` |", " | ".join(cells), "|", flush=True)


def print_long_prompt(case: Case, caches: dict[str, dict], rounds: int = 1) -> None:
    model = build(case.size, case.dtype)
    ids = torch.randint(4, model.config.vocab_size - 1, (case.batch, case.prompt))
    print(f"\n{case}:\n\n| cache | rows | tokens/s | × none |\n|---|---|---|---|")
    times, counts = {name: [] for name in caches}, {}
    decode(model, ids[:, :64], replace(case, new=4), {})
    for _ in range(rounds):
        for name in caches:
            start = time.process_time()
            with Rows(model) as rows:
                decode(model, ids, case, caches[name])
            times[name].append(time.process_time() - start)
            counts[name] = rows.count
    for name in caches:
        ratio = statistics.median(a / b for a, b in zip(times["none"], times[name]))
        rate = case.batch * case.new / statistics.median(times[name])
        print(f"| `{name}` | {counts[name] / 1000:.0f} | {rate:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
