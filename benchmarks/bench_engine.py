# SPDX-License-Identifier: Apache-2.0
"""Benchmark the engine against static batches of `generate`, and against a reimplementation of I-DLM's scheduler.

The model is the demo's, and answers are compared before anything is timed. There are two loads:

- mixed: additions (17 tokens), running sums (32) and Sudokus (49 blanks of 81), all submitted at once.
- closed: C clients, each of which sends its next request after the answer to its last one; blocks of four tokens.
"""

import functools
import random
from dataclasses import dataclass

import torch

import dlmkernels as dk
from dlmkernels.decoding.resolve import prepare
from dlmkernels.demo import MODEL_DIR
from dlmkernels.demo.tasks import MASK_ID, TASKS
from dlmkernels.window import AttentionWindow

THRESHOLD = 0.95
LENGTH = 82  # columns of the longest task


@dataclass(frozen=True)
class Case:
    load: str
    requests: int
    slots: int

    def __str__(self):
        clients = "all at once" if self.load == "mixed" else f"{self.slots} clients"
        return f"{self.load}: {self.requests} requests, {clients}, {self.slots} slots"


QUICK = [Case("mixed", 48, 16), Case("closed", 24, 8)]
SMALLEST = [Case("mixed", 6, 4), Case("closed", 4, 2)]
FULL = [Case("mixed", 200, 16), *(Case("closed", max(24, 4 * c), c) for c in (1, 8, 32))]


@functools.cache
def model():
    with torch.device("cpu"):
        loaded = dk.load(MODEL_DIR, dtype=torch.float32)
    return dk.adapt(loaded.to(torch.get_default_device()))


def tensor(values):
    return torch.tensor(values, device=model().device)


@functools.cache
def requests(count):
    """Return pairs of prompts and answers; an answer has its given tokens, and -1 where a token is to be decoded."""
    kinds = (("addition", None), ("running-sum", None), ("sudoku", 32))
    problems = [p for name, hard in kinds for p in TASKS[name].make(count // 3 + 1, seed=5, difficulty=hard)]
    random.Random(0).shuffle(problems)
    found = []
    for problem in problems[:count]:
        ids = problem.ids.tolist()
        answer = [i if i != MASK_ID else -1 for i in ids[problem.prompt_length :]]
        found.append((ids[: problem.prompt_length], answer))
    return found


def options(case):
    return {"rule": dk.Threshold(THRESHOLD), "eos_policy": "none", "block_length": 4 if case.load == "closed" else None}


def by_engine(case):
    """Decode with the engine. Returns the answers, the number of forwarded batch rows, and the engine's metrics."""
    engine = dk.Engine(model(), slots=case.slots, max_length=LENGTH, **options(case))
    queue = list(enumerate(requests(case.requests)))
    names, answers = {}, {}
    at_once = len(queue) if case.load == "mixed" else case.slots

    def send():
        number, (prompt, answer) = queue.pop(0)
        names[engine.add_request(prompt, given=answer)] = number

    for _ in range(min(at_once, len(queue))):
        send()
    for output in engine:
        answers[names[output.request_id]] = output.generated_tokens
        if queue:
            send()
    metrics = engine.metrics()
    return [answers[k] for k in range(case.requests)], metrics.rows, metrics


def by_batches(case, by_length=False):
    """Decode in static batches of `generate`, in order of arrival or of length.

    Returns the answers and the number of forwarded batch rows.
    """
    asked = requests(case.requests)
    order = sorted(range(len(asked)), key=lambda k: len(asked[k][1])) if by_length else list(range(len(asked)))
    answers, rows = {}, 0
    for begin in range(0, len(order), case.slots):
        part = order[begin : begin + case.slots]
        lengths = [len(asked[k][1]) for k in part]
        given = tensor([asked[k][1] + [-1] * (max(lengths) - len(asked[k][1])) for k in part])
        out = dk.generate(
            model(), [asked[k][0] for k in part], max_new_tokens=tuple(lengths), given=given, **options(case)
        )  # fmt: skip
        rows += int(out.num_forwards.max()) * len(part)
        answers |= {k: out.generated[row, : len(asked[k][1])].tolist() for row, k in enumerate(part)}
    return [answers[k] for k in range(len(asked))], rows


class StationaryBatch:
    """I-DLM's scheduler as in its published code: one persistent batch (thuEcstasy/I-DLM, scheduler.py).

    A round admits new requests, forwards all rows, and drops the rows that are done. The first forward of a new row
    only processes its prompt and decides nothing. After each forward, the host reads the results of each row's block
    and decides which tokens to commit.
    """

    def __init__(self, case):
        self.case, self.config = case, options(case)
        _, _, special = prepare(model(), None, self.config, "continuations")
        self.banned = tensor(special.banned)
        self.queue, self.running = list(enumerate(requests(case.requests))), []
        self.answers, self.rows, self.idle = {}, 0, 0

    def absorb(self):
        most = self.case.slots if self.case.load == "closed" else len(self.queue)
        while self.queue and len(self.running) < min(most, self.case.slots):
            number, (prompt, answer) = self.queue.pop(0)
            tokens = tensor(prompt + answer)
            self.running.append({
                "number": number, "start": len(prompt), "block": len(prompt), "end": len(tokens), "is_new": True,
                "open": tokens < 0, "tokens": tokens.masked_fill(tokens < 0, MASK_ID),
            })  # fmt: skip

    @torch.no_grad()
    def round(self):
        self.absorb()
        rows = self.running
        width = max(row["end"] for row in rows)
        tokens = torch.stack([torch.nn.functional.pad(row["tokens"], (0, width - row["end"])) for row in rows])
        ends = tensor([row["end"] for row in rows]).int()
        window = AttentionWindow(kv_range=torch.stack((torch.zeros_like(ends), ends), 1))
        hidden = model().hidden(tokens, tensor(range(width)).expand(len(rows), -1), window)
        size = self.config["block_length"] or width
        place = tensor([[row["block"] + k for k in range(size)] for row in rows]).clamp(max=width - 1)
        logits = model().logits(hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2])).flatten(0, 1))
        p, token = logits.float().softmax(-1).index_fill(1, self.banned, 0.0).max(-1)
        p, token = p.view(len(rows), size).tolist(), token.view(len(rows), size).tolist()
        self.rows += len(rows)
        for row, chances, proposed in zip(rows, p, token):
            if row["is_new"]:
                row["is_new"], self.idle = False, self.idle + 1
                continue
            self.decide(row, chances, proposed, size)
        self.running = [row for row in rows if not self.finish(row)]

    def decide(self, row, chances, proposed, size):
        """Commit the confident tokens, at least the best one, and go to the next block when this one is full."""
        here = range(row["block"], min(row["block"] + size, row["end"]))
        is_open = [k for k in here if row["open"][k]]
        if is_open:
            best = max(is_open, key=lambda k: (chances[k - row["block"]], -k))
            for k in is_open:
                if k == best or chances[k - row["block"]] >= THRESHOLD:
                    row["tokens"][k], row["open"][k] = proposed[k - row["block"]], False
        while row["block"] < row["end"] and not row["open"][row["block"] : row["block"] + size].any():
            row["block"] += size

    def finish(self, row):
        is_done = row["block"] >= row["end"]
        if is_done:
            self.answers[row["number"]] = row["tokens"][row["start"] :].tolist()
        return is_done

    def run(self):
        while self.queue or self.running:
            self.round()
        return [self.answers[k] for k in range(self.case.requests)], self.rows


def test_engine(benchmark, harness, case):
    answers, rows, metrics = by_engine(case)
    alone = [
        dk.generate(model(), [prompt], max_new_tokens=len(answer), given=tensor(answer), **options(case))
        for prompt, answer in requests(case.requests)
    ]
    assert answers == [out.generated[0].tolist() for out in alone]
    theirs = StationaryBatch(case)
    loop_answers, loop_rows = theirs.run()
    same = sum(a == b for a, b in zip(answers, loop_answers))
    assert same >= 0.95 * case.requests  # a softmax over all logits breaks near ties differently
    batch_answers, batch_rows = by_batches(case)
    assert batch_answers == answers
    tokens = sum(answer.count(-1) for _, answer in requests(case.requests))
    counts = {"engine": rows, "I-DLM's loop": loop_rows, "static batches": batch_rows}
    benchmark.extra_info["tokens per forward of a row"] = {name: tokens / n for name, n in counts.items()}
    benchmark.extra_info["idle share of rows"] = {
        "engine": metrics.idle_row_share, "I-DLM's loop": theirs.idle / loop_rows,
        "static batches": 1 - sum(int(out.num_forwards[0]) for out in alone) / batch_rows,
    }  # fmt: skip
    benchmark.extra_info["host microseconds a step"] = metrics.host_microseconds
    print(f"\n{case}: {benchmark.extra_info}")
    harness.compare(
        benchmark, f"engine, {case}", lambda: by_engine(case),
        {
            "static batches of generate": lambda: by_batches(case),
            "static batches, sorted by length": lambda: by_batches(case, by_length=True),
            "stationary batch (I-DLM)": lambda: StationaryBatch(case).run(),
        },
        work=tokens, unit="tokens/s",
    )  # fmt: skip
