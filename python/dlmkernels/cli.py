# SPDX-License-Identifier: Apache-2.0
"""The command line: `dlmkernels demo | generate | plan | bench | info`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import info
from .decoding.config import CACHES, SCORES, DecodingConfig
from .decoding.features import FEATURE_CACHES
from .decoding.presets import PRESETS, default_config, preset
from .decoding.rules import (
    CreditThreshold,
    DynamicThreshold,
    EntropyBound,
    EntropySum,
    Factor,
    HierarchicalThreshold,
    LocalThreshold,
    Quota,
    Rule,
    StableThreshold,
    Threshold,
    TimeQuota,
)
from .decoding.scores import score_named
from .demo import PROMPT
from .terminal import make_printable

# name on the command line -> constructor, taking the number after the colon where there is one
RULES: dict[str, Callable[..., Rule]] = {
    "quota": Quota,
    "time-quota": TimeQuota,
    "threshold": Threshold,
    "factor": Factor,
    "entropy-bound": EntropyBound,
    "entropy-sum": EntropySum,
    "dynamic-threshold": DynamicThreshold,
    "hierarchical-threshold": HierarchicalThreshold,
    "local-threshold": LocalThreshold,
    "stable-threshold": StableThreshold,
    "credit-threshold": CreditThreshold,
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


#: What a decoding raises when it cannot do what it is asked; anything else is a fault of ours and shows its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, LookupError, MemoryError)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after an error of the user's, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        make_printable(stream)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has seen enough; nothing can be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"dlmkernels: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def parse_rule(text: str) -> Rule:
    """A rule from its name on the command line: `quota`, `threshold:0.9`, `factor:1.0`, `entropy-bound:0.1`, …"""
    name, colon, number = text.partition(":")
    if name not in RULES:
        raise ValueError(f"unknown rule '{name}'; known: {', '.join(RULES)}, with a number after a colon, as in "
                         "threshold:0.9")  # fmt: skip
    if not colon:
        return RULES[name]()
    if name == "quota":
        raise ValueError("rule quota takes no number: --steps says how many forwards")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"rule {name} takes a number after the colon; got '{number}'") from None
    return RULES[name](value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlmkernels", description="Decode diffusion language models in parallel.",
        epilog="dlmkernels COMMAND --help lists the options of a command.",
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="decode the model shipped with the package and compare unmasking rules",
        description="Solve a Sudoku before your eyes, then compare unmasking rules on held-out problems of three "
        "tasks. Writes pictures and the table as Markdown.",
    )  # fmt: skip
    demo.add_argument("--problems", type=_positive, metavar="N", help="problems for each task (default 48)")
    demo.add_argument("--quick", action="store_true", help="8 problems for each task and few rules: some seconds")
    demo.add_argument(
        "--rules", choices=("few", "all"), default="few", help="all: every published decoder there is a preset of"
    )
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for the pictures and the table (default demo-out)"
    )
    demo.add_argument("--json", metavar="FILE", help="write the table as JSON as well")
    demo.add_argument("--seed", type=int, default=1, help="which held-out problems (default 1)")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate", help="decode the answer to a prompt",
        description="Decode the answer to a prompt with a model in Hugging Face format. Prints the text; statistics "
        "go to stderr. Options left out are those of the preset, or else what suits the model's family: "
        "all tokens a forward is sure of. An option that would have no effect is an error.",
        epilog=f"To try it: dlmkernels generate --model demo, which is the same as --model demo --prompt '{PROMPT}'.",
    )  # fmt: skip
    add = generate.add_argument
    add("--model", required=True, metavar="PATH", help="local folder or hub id; 'demo' is the model of the demo")
    add("--prompt", metavar="TEXT", help="'-' reads it from standard input; '--model demo' has one of its own")
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    add("--infill", action="store_true", help="decode the mask tokens in the prompt instead of what comes after it")
    add("--preset", metavar="NAME", help=f"published decoder: {', '.join(PRESETS)}")
    add("--rule", metavar="RULE", help="quota, threshold:0.9, factor:1.0, entropy-bound:0.1, …")
    add("--max-new-tokens", type=int, metavar="N", help="length of the answer (default 128)")
    add("--block-length", type=int, metavar="N", help="decode in blocks of N, left to right (default: one block)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="forwards in all, by a fixed schedule (--rule quota, or another of these)",
    )
    add("--score", choices=SCORES, help="what orders the positions")
    add("--cache", choices=(*CACHES, *FEATURE_CACHES), help="reuse of keys and values")
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--cfg-scale", type=float, metavar="S", help="classifier-free guidance")
    add("--seed", type=_seed, help="of the random draws (default: a fresh one, which the statistics name)")
    add("--mask-token-id", type=int, metavar="ID", help="if the model's configuration does not name it")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--draft", action="store_true", help="show the canvas while it is decoded (in a terminal)")
    add("--trace", metavar="FILE", help="write a page on which the decoding can be watched (HTML)")
    generate.set_defaults(run=_generate)

    plan = commands.add_parser(
        "plan", help="how much memory a model takes, before it is loaded",
        description="Tell what a decoding needs: weights, keys and values, a forward, logits. Of the model its "
        "configuration alone is read.",
        epilog="Example: dlmkernels plan --model GSAI-ML/LLaDA-8B-Instruct --batch 8 --length 4096 --memory 80G",
    )  # fmt: skip
    add = plan.add_argument
    add("--model", required=True, metavar="PATH", help="local folder or hub id; 'demo' is the model of the demo")
    add("--batch", type=int, default=1, metavar="N", help="requests decoded at a time (default 1)")
    add("--length", type=int, metavar="N", help="tokens of each, its prompt included (default: 2048, or what it can)")
    add("--block-length", type=int, metavar="N", help="positions that a step decides among (default: all)")
    add("--no-cache", action="store_true", help="without reuse of keys and values")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    add("--memory", metavar="BYTES", help="say which length fits into so much, such as 24G")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser(
        "bench", help="time the kernels beside their baselines (in a source tree)",
        description="Time every kernel and the decoding loop beside named baselines: `pytest benchmarks "
        "--benchmark-only` in the source tree. Further arguments go to pytest, such as --full or -k attention.",
    )  # fmt: skip
    bench.set_defaults(run=_bench)

    about = commands.add_parser("info", help="versions, kernels in use, what is missing", description=info.__doc__)
    info.add_arguments(about)
    about.set_defaults(run=info.run)
    return parser


class _Version(argparse.Action):
    """Prints the version and stops."""

    def __call__(self, parser, namespace, values, option_string=None):
        from . import __version__

        print(f"dlmkernels {__version__}")
        parser.exit()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer of 64 bits; got {value}")
    return value


# --- demo ------------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    _require("transformers", "safetensors", "matplotlib", wanted_for="the demo")
    from .demo.run import run

    run(args.problems, args.quick, args.out, args.json, args.seed, args.rules)
    return 0


def _require(*packages: str, wanted_for: str) -> None:
    from importlib.util import find_spec

    if absent := [name for name in packages if find_spec(name) is None]:
        names = " ".join(name.replace("_", "-") for name in absent)
        raise ImportError(f"{wanted_for} needs {names}: pip install {names}")


# --- generate --------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    _require("transformers", "safetensors", wanted_for="generate")
    import torch

    changes = decoding_options(args)
    named = preset(args.preset) if args.preset else None
    (named or DecodingConfig()).replace(**changes)  # before anything is loaded: mistakes should show at once
    device = _device(args.device)
    prompt = _prompt(args)
    model, tokenizer = _load(args.model, args.dtype, device)

    from .decoding.generate import generate, infill
    from .decoding.inputs import read_prompts
    from .models.adapt import adapt

    model = adapt(model)
    ids = read_prompts("--prompt", prompt, None, tokenizer, device, 0).tokens
    mask = changes.get("mask_token_id", getattr(model.config, "mask_token_id", None))
    mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
    if mask is not None and bool((ids == mask).any()) != args.infill:
        raise ValueError("--infill: the prompt holds no mask token" if args.infill else
                         "--prompt holds mask tokens: --infill decodes them")  # fmt: skip
    if not args.infill and args.model == "demo" and "max_new_tokens" not in changes:
        changes["max_new_tokens"] = _demo_answer_length(prompt)
    draws = is_random((named or default_config(model.family.preset)).replace(**changes))
    if draws and "seed" not in changes:
        import secrets

        changes["seed"] = secrets.randbits(31)
    streamer = None
    if args.draft and sys.stdout.isatty():
        from transformers import TextDiffusionStreamer

        streamer = TextDiffusionStreamer(tokenizer, skip_prompt=not args.infill)
    elif args.draft:
        print("dlmkernels: --draft shows nothing, as the output is not a terminal", file=sys.stderr)
    start = time.perf_counter()
    with torch.inference_mode():
        decode = infill if args.infill else generate
        out = decode(
            model, ids, config=named, streamer=streamer, tokenizer=tokenizer, trace=bool(args.trace), **changes
        )
        forwards, decoded = int(out.num_forwards[0]), int((out.commit_step[0] >= 0).sum())
    seconds = time.perf_counter() - start
    if streamer is None:
        print(out.text()[0], flush=True)
    statistics = (
        f"{_count(decoded, 'token')}, {_count(forwards, 'forward')}, {decoded / max(forwards, 1):.2f} tokens per "
        f"forward, {decoded / seconds:.1f} tokens/s ({seconds:.2f} s)"
    )
    if draws:
        statistics += f", seed {changes['seed']}"
    elif "seed" in changes:
        statistics += " (nothing was drawn: --seed made no difference)"
    print(statistics, file=sys.stderr)
    if args.trace:
        out.trace.html(args.trace, title=f"{args.model}: {decoded} tokens in {_count(forwards, 'forward')}")
        print(f"open {args.trace} in a browser to watch it", file=sys.stderr)
    return 0


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `DecodingConfig` that options were given for."""
    names = (
        "max_new_tokens", "block_length", "steps", "score", "cache", "temperature", "top_k", "top_p", "cfg_scale",
        "seed", "mask_token_id",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.rule:
        options["rule"] = parse_rule(args.rule)
    return options


def _prompt(args: argparse.Namespace) -> str | list[dict[str, str]]:
    """The text of the prompt; with --chat, a chat of one message."""
    if args.prompt is None and (args.model != "demo" or args.infill):
        raise ValueError("--prompt is needed" + (": with mask tokens ('_') in it" if args.model == "demo" else ""))
    prompt = PROMPT if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt:
        raise ValueError("--prompt is empty")
    if args.model == "demo":
        from .demo.tasks import check_text

        check_text("--prompt", prompt)
    return [{"role": "user", "content": prompt}] if args.chat else prompt


def _demo_answer_length(prompt) -> int:
    """How many tokens the demo model's answer to a prompt has."""
    from .demo.tasks import answer_length

    return answer_length(prompt) if isinstance(prompt, str) else 1


def is_random(config: DecodingConfig) -> bool:
    """Whether the result depends on the seed."""
    drawn_order = max(config.order_temperature, score_named(config.score).order_temperature)
    return config.samples or drawn_order > 0 or config.rule.draws


def _load(path: str, dtype: str, device):
    """Model on its device, and tokenizer."""
    import transformers

    from .models.checkpoint import locate
    from .models.load import load

    path, _ = locate(path, {})
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model = load(path, dtype=dtype).to(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: no readable tokenizer at '{path}': {error}") from error
    return model, tokenizer


def _device(name: str):
    import torch

    from . import _C

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda; got '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got '{name}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if device.type == "cuda" and not _C.build_info()["cuda_architectures"]:
        raise ValueError(f"--device cuda: this build has no CUDA kernels ({_C.build_info()['cuda_state']})")
    return device


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


# --- plan ------------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    _require("transformers", "safetensors", wanted_for="plan")
    from .planning import plan

    dtype = None if args.dtype == "auto" else args.dtype
    how = {"block_length": args.block_length, "cache": not args.no_cache, "dtype": dtype}
    needed = plan(args.model, args.batch, args.length, **how)
    print(needed)
    if args.memory:
        print(f"{args.memory} suffice for {needed.longest(args.memory)} tokens each at this batch")
    return 0


# --- bench -----------------------------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "pytest.ini").is_file():
        raise ValueError("bench runs the benchmarks of a source tree, which are not part of an installed package: "
                         "get the sources and run `make bench` there")  # fmt: skip
    _require("pytest", "pytest_benchmark", wanted_for="bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *args.rest]
    return subprocess.run(command, cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main())
