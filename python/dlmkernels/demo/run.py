# SPDX-License-Identifier: Apache-2.0
"""The program behind `dlmkernels demo`: show two decodings, then compare unmasking rules on held-out problems."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dlmkernels as dk

from ..info import processor
from . import MODEL_DIR, board, continuous, drafted
from .tasks import TASKS, Problem

BATCH = 16  # canvases (prompt plus answer) decoded together


@dataclass(frozen=True)
class Case:
    """One row of the comparison: a name, decoding options, and whether `--quick` keeps it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def continues(self) -> bool:
        """Whether the rule can only continue a prompt, not fill blanks elsewhere."""
        config = self.options.get("config", dk.DecodingConfig())
        return self.options.get("rule", config.rule).decodes == "continuations"


MARKERS = "o^vsDphX*P<"
CONFIDENCE, RANDOM = "one per forward, by confidence", "one per forward, random order"
CASES = (
    Case(CONFIDENCE, {"rule": dk.Quota()}, quick=True),
    Case(RANDOM, {"rule": dk.Quota(), "score": "random"}, quick=True),
    Case("one per forward, left to right", {"rule": dk.Quota(), "score": "position"}),
    Case("Threshold(0.99)", {"rule": dk.Threshold(0.99)}),
    Case("Threshold(0.95)", {"rule": dk.Threshold(0.95)}),
    Case("Threshold(0.9)", {"rule": dk.Threshold(0.9)}, quick=True),
    Case("EntropyBound(0.01)", {"rule": dk.EntropyBound(0.01)}),
    Case("EntropyBound(0.1)", {"rule": dk.EntropyBound(0.1)}, quick=True),
    Case("Factor(0.5)", {"rule": dk.Factor(0.5)}),
    Case("Frechet(0.25)", {"rule": dk.Frechet(0.25)}),
    Case("ReasonFirst(9)", {"rule": dk.ReasonFirst(9)}),
    Case("8 forwards", {"steps": 8}),
    Case("4 forwards", {"steps": 4}, quick=True),
)


def for_full_attention(config: dk.DecodingConfig) -> dk.DecodingConfig:
    """Adapt a published decoder to the shipped model, which has no block attention and whose logits are not shifted."""
    if config.cache == "block":
        config = config.replace(cache="none", block_length=16)
    return config.replace(logit_alignment="same")


def reason_against(config: dk.DecodingConfig) -> str | None:
    """Return why the shipped model cannot run a published decoder, or None if it can."""
    if config.rule.noise == "continuous":
        return "needs a model trained with noise on embedding vectors; this one was trained with mask tokens"
    if config.rule.noise != "mask":
        return "needs a model trained with random tokens as noise; this one was trained with mask tokens"
    if isinstance(config.rule, dk.ScoreAncestral):
        return "needs a model whose logits are log probability ratios; this one's are log probabilities"
    if isinstance(config.rule, (dk.Strided, dk.SelfSpeculative, dk.Reordered)):
        return "needs causal attention; this model attends in both directions"
    if config.rule.token_ids:
        return "needs special tokens that insert or delete; this model has none"
    return None


# Every preset that runs on the shipped model. Some were published for models trained to edit their tokens; they show
# what happens with a model that was not.
PUBLISHED = tuple(
    Case(name, {"config": for_full_attention(config)})
    for name, config in dk.PRESETS.items()
    if reason_against(config) is None
)
NOT_RUN = {name: reason for name, config in dk.PRESETS.items() if (reason := reason_against(config))}
# title, task, difficulty
SETS: tuple[tuple[str, str, int | None], ...] = (
    ("Sudoku, 40 clues", "sudoku", 40),
    ("Sudoku, 32 clues", "sudoku", 32),
    ("16-digit addition", "addition", None),
    ("running sum of 32 digits", "running-sum", None),
)


@dataclass(frozen=True)
class Result:
    """One row of the table: means over the problems of a set.

    Attributes
    ----------
    solved : float
        Fraction of problems whose whole answer is right.
    forwards : float
        Forwards per problem.
    tokens_per_forward, tokens_per_second : float
        Decoded tokens per forward, and per second of wall-clock time with up to `BATCH` problems at a time.
    """

    set: str
    rule: str
    problems: int
    solved: float
    forwards: float
    tokens_per_forward: float
    tokens_per_second: float


def run(
    problems: int | None = None, quick: bool = False, out: str = "demo-out", json_file: str | None = None,
    seed: int = 1, rules: str = "few",
) -> list[Result]:  # fmt: skip
    """Run the whole demo, printing results as they arrive.

    Parameters
    ----------
    problems : int, optional
        Problems per set. Defaults to 48, or to 8 with `quick`.
    quick : bool
        Whether to run fewer rules.
    out : str
        Folder for the two pictures and the Markdown table. Created if it does not exist.
    json_file : str, optional
        File for the results, the seed and the environment as JSON.
    seed : int
        Selects the held-out problems.
    rules : {"few", "all"}
        "few" runs `CASES` (with `quick`, those marked `quick`); "all" runs `PUBLISHED`.

    Returns
    -------
    list of Result
        The rows of the comparison of rules.
    """
    start = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # a bad path should fail before the work, not after it
    model, tokenizer = load()
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {model.config.model_type}; "
        f"CPU kernels: {dk._C.cpu_isa()}; threads: {choose_threads(model)}\n")  # fmt: skip

    trace = show_sudoku(model, seed)
    board.plot(trace, folder / "dlmkernels-sudoku.png")
    say("")
    continuous.show(seed)

    count = problems or (8 if quick else 48)
    say(f"\n{count} held-out problems per task, decoded {min(BATCH, count)} at a time; forwards: mean per problem\n")
    cases = list(PUBLISHED) if rules == "all" else [c for c in CASES if c.quick or not quick]
    results = compare(model, tokenizer, count, cases, seed)
    (plot_grid if rules == "all" else plot)(results, folder / "dlmkernels-demo.png")
    beside: list[drafted.Row] = []
    if rules != "all":
        say("\nThe same tasks with a causal model, which decodes from left to right, and with diffusion:\n")
        beside = drafted.compare(model, count, seed, say)
    notes = [f"`{name}`: {reason}" for name, reason in NOT_RUN.items()] if rules == "all" else []
    notes.append(f"Times: {processor()}, CPU kernels {dk._C.cpu_isa()}, threads {torch.get_num_threads()}")
    table = markdown(results, notes) + ("\n" + drafted.markdown(beside) if beside else "")
    (folder / "dlmkernels-demo.md").write_text(table, encoding="utf-8")
    say(f"\npictures: {folder / 'dlmkernels-demo.png'}, {folder / 'dlmkernels-sudoku.png'}")
    say(f"table: {folder / 'dlmkernels-demo.md'}")
    if json_file:
        from ..info import collect

        Path(json_file).write_text(
            json.dumps(
                {
                    "environment": collect(),
                    "seed": seed,
                    "batch": BATCH,
                    "results": [asdict(r) for r in results],
                    "drafted": [asdict(row) for row in beside],
                },
                indent=2,
            )
            + "\n",
            encoding="utf-8",
        )
        say(f"data: {json_file}")
    say(f"\n{time.perf_counter() - start:.0f} s.")
    if rules == "all":
        return results
    say("One cell per forward, most confident first, compared with random order:")
    for title in (SETS[0][0], SETS[1][0]):
        solved = {r.rule: r.solved for r in results if r.set == title}
        say(f"{title}: {solved[CONFIDENCE]:.1%} solved by confidence, {solved[RANDOM]:.1%} in random order.")
    return results


def load():
    """Load the shipped model, in float32 so that results are the same on every processor, and its tokenizer."""
    import transformers

    if not (MODEL_DIR / "model.safetensors").is_file():
        raise ValueError(f"the demo model is not in {MODEL_DIR}: reinstall the package")
    transformers.utils.logging.disable_progress_bar()
    model = dk.load(MODEL_DIR, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


def choose_threads(model) -> int:
    """Switch torch to one thread if that is faster, as it is when other programs keep the processors busy.

    Returns the number of threads in use.
    """
    most = torch.get_num_threads()
    tokens = torch.full((4, 82), model.config.mask_token_id, device=model.device)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        dk.infill(model, tokens, steps=2)
        return time.perf_counter() - start

    if most > 1:
        dk.infill(model, tokens, steps=1)
        times: dict[int, list[float]] = {threads: [] for threads in (1, most)}
        for _ in range(3):
            for threads, measured in times.items():
                measured.append(seconds(threads))
        torch.set_num_threads(min(times, key=lambda threads: sorted(times[threads])[1]))
    return torch.get_num_threads()


def show_sudoku(model, seed: int) -> dk.Trace:
    """Decode one Sudoku with a parallel rule and show how the board fills up."""
    task = TASKS["sudoku"]
    problem = task.make(1, seed=seed, difficulty=32)[0]
    out = dk.infill(model, torch.from_numpy(problem.ids).to(model.device), rule=dk.EntropyBound(0.1))
    trace = out.trace
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        board.play(trace, colour="NO_COLOR" not in os.environ)
    else:
        say(board.frames(trace))
    solved = task.check(problem, board._text(trace, int(trace.commit_step.max())))
    say(f"Sudoku with 32 clues, EntropyBound(0.1): {len(problem.blanks)} cells in {int(out.num_forwards[0])} forwards, "
        f"{'solved' if solved else 'not solved'}")  # fmt: skip
    return trace


def compare(model, tokenizer, count: int, cases: list[Case], seed: int) -> list[Result]:
    """Decode every set of problems with every rule, and print the table row by row."""
    width = max(len(title) for title, *_ in SETS), max(len(case.name) for case in cases)
    say(f"{'task':<{width[0]}}  {'rule':<{width[1]}}   solved  forwards  tokens/forward  tokens/s")
    results = []
    for title, name, difficulty in SETS:
        problems = TASKS[name].make(count, seed=seed, difficulty=difficulty)
        between = any(len(p.blanks) < len(p.answer) for p in problems)
        for i, case in enumerate(case for case in cases if not (between and case.continues)):
            progress = Progress(f"{title}: {case.name}", count)
            r = measure(model, tokenizer, title, problems, case, progress)
            progress.clear()
            say(f"{title if i == 0 else '':<{width[0]}}  {r.rule:<{width[1]}}  {r.solved:6.1%}  {r.forwards:8.1f}  "
                f"{r.tokens_per_forward:14.2f}  {r.tokens_per_second:8.0f}")  # fmt: skip
            results.append(r)
    return results


def measure(
    model, tokenizer, title: str, problems: list[Problem], case: Case, progress: Callable[[int], None] = lambda n: None
) -> Result:
    """Decode problems of one task, `BATCH` at a time, and check the answers against the rules of the task."""
    solved, forwards, tokens, seconds = 0, 0, 0, 0.0
    for first in range(0, len(problems), BATCH):
        part = problems[first : first + BATCH]
        start = time.perf_counter()
        out = decode(model, tokenizer, part, torch.arange(first, first + len(part), device=model.device), case.options)
        forwards += int(out.num_forwards.sum())
        tokens += int((out.commit_step >= 0).sum())
        seconds += time.perf_counter() - start
        texts = tokenizer.batch_decode(out.sequences)
        solved += sum(TASKS[p.task].check(p, text) for p, text in zip(part, texts))
        progress(first + len(part))
    n = len(problems)
    return Result(title, case.name, n, solved / n, forwards / n, tokens / forwards, tokens / seconds)


def decode(model, tokenizer, problems: list[Problem], seeds: Tensor, options: dict[str, Any]) -> dk.DecodingOutput:
    """Fill in canvases of one task: continue the prompt if all that follows is blank, else fill the blanks in place."""
    if all(len(p.blanks) == len(p.answer) for p in problems):
        prompts = tokenizer([p.prompt for p in problems], return_tensors="pt")
        return dk.generate(model, prompts.input_ids, max_new_tokens=len(problems[0].answer), seed=seeds, **options)
    canvases = tokenizer([p.canvas for p in problems], return_tensors="pt")
    return dk.infill(model, canvases.input_ids, seed=seeds, **options)


def markdown(results: list[Result], notes: list[str]) -> str:
    """Format the results as a Markdown table, one row per rule and one column per set, followed by a list of notes."""
    titles, rules = (list(dict.fromkeys(getattr(r, name) for r in results)) for name in ("set", "rule"))
    cell = {(r.rule, r.set): f"{r.solved:.0%} · {r.forwards:.1f} · {r.tokens_per_second:.0f}" for r in results}
    head = f"solved, of {results[0].problems} · forwards · tokens/s"
    lines = [f"| {head} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| `{rule}` | {' | '.join(cell.get((rule, title), '–') for title in titles)} |" for rule in rules]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes), ""])


def plot(results: list[Result], path: Path) -> None:
    """Save a PNG that plots the share of solved problems against forwards, with one panel per set of problems."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    titles, rules = (list(dict.fromkeys(getattr(r, name) for r in results)) for name in ("set", "rule"))
    most = max(r.forwards for r in results)
    figure = Figure(figsize=(11, 8 + 0.06 * len(rules)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, title in zip(figure.subplots(2, 2).flat, titles):
        axes.set_xscale("log", base=2)
        axes.set(
            xlim=(0.8, max(64, 1.2 * most)),
            ylim=(-0.05, 1.07),
            title=title,
            xlabel="forwards per problem",
            ylabel="solved",
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        for i, rule in enumerate(rules):
            r = next((r for r in results if (r.set, r.rule) == (title, rule)), None)
            if r is None:  # a rule that only continues prompts, and a set with blanks between clues
                continue
            # hollow markers of different sizes and shapes stay visible where points coincide
            style = {"color": f"C{(i + i // 10) % 10}", "mfc": "none", "ms": max(13 - i * 0.7, 6), "mew": 1.8}
            axes.plot(r.forwards, r.solved, MARKERS[i % len(MARKERS)], label=rule, ls="none", clip_on=False, zorder=3,
                      **style)  # fmt: skip
    handles = {rule: handle for axes in figure.axes for handle, rule in zip(*axes.get_legend_handles_labels())}
    figure.legend([handles[rule] for rule in rules], rules, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def plot_grid(results: list[Result], path: Path) -> None:
    """Save a PNG for many rules, one row each: cells show forwards, and are colored by the share of solved problems."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    titles, rules = (list(dict.fromkeys(getattr(r, name) for r in results)) for name in ("set", "rule"))
    cell = {(r.rule, r.set): r for r in results}
    solved = [[cell[rule, t].solved if (rule, t) in cell else float("nan") for t in titles] for rule in rules]
    figure = Figure(figsize=(7.6, 1.2 + 0.21 * len(rules)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(solved, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    for row, rule in enumerate(rules):
        for column, title in enumerate(titles):
            r = cell.get((rule, title))
            text, dark = (f"{r.forwards:.1f}", r.solved > 0.6) if r else ("–", False)
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    axes.set_yticks(range(len(rules)), rules, fontsize=8)
    axes.set_title("Color: solved. Number: forwards per problem", fontsize=10)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, format=PercentFormatter(1), shrink=0.4)
    figure.savefig(path, dpi=90)


class Progress:
    """A progress counter on stderr, shown only in a terminal."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.shown = what, total, sys.stderr.isatty()
        self(0)

    def __call__(self, done: int) -> None:
        if self.shown:
            print(f"\r{self.what}  {done}/{self.total}\033[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, flush=True)
