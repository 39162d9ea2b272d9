# SPDX-License-Identifier: Apache-2.0
"""The command line: `dlmkernels demo | generate | bench | info`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import info
from .decoding.config import CACHES, SCORES, DecodingConfig
from .decoding.presets import PRESETS, preset
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

if TYPE_CHECKING:
    from torch import Tensor

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


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after an error of the user's, 130 when interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
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
        "go to stderr. Options left out are those of the preset, or the library's defaults.",
    )  # fmt: skip
    add = generate.add_argument
    add("--model", required=True, metavar="PATH", help="local folder or hub id; 'demo' is the model of the demo")
    add("--prompt", required=True, metavar="TEXT", help="'-' reads it from standard input")
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    add("--infill", action="store_true", help="decode the mask tokens in the prompt instead of what comes after it")
    add("--preset", metavar="NAME", help=f"published decoder: {', '.join(PRESETS)}")
    add("--rule", metavar="RULE", help="quota, threshold:0.9, factor:1.0, entropy-bound:0.1, …")
    add("--max-new-tokens", type=int, metavar="N", help="length of the answer (default 128)")
    add("--block-length", type=int, metavar="N", help="decode in blocks of N, left to right (default: one block)")
    add("--steps", type=int, metavar="N", help="forwards in all, for rules with a fixed schedule")
    add("--score", choices=SCORES, help="what orders the positions")
    add("--cache", choices=CACHES, help="reuse of keys and values")
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--cfg-scale", type=float, metavar="S", help="classifier-free guidance")
    add("--seed", type=int, help="of the random draws (default: a fresh one, which the statistics name)")
    add("--mask-token-id", type=int, metavar="ID", help="if the model's configuration does not name it")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as stored)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--draft", action="store_true", help="show the canvas while it is decoded (in a terminal)")
    generate.set_defaults(run=_generate)

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

    config = decoding_config(args)  # before anything is loaded: mistakes should show at once
    device = _device(args.device)
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    model, tokenizer = _load(args.model, args.dtype, device)
    ids = encode_prompt(tokenizer, prompt, chat=args.chat).to(device)
    if config.mask_token_id is None and getattr(model.config, "mask_token_id", None) is None:
        config = config.replace(mask_token_id=tokenizer.mask_token_id)

    mask = config.mask_token_id if config.mask_token_id is not None else getattr(model.config, "mask_token_id", None)
    if (mask is not None and bool((ids == mask).any())) != args.infill:
        raise ValueError("--infill: the prompt holds no mask token" if args.infill else
                         "--prompt holds mask tokens: --infill decodes them")  # fmt: skip

    from .decoding.generate import generate, infill

    streamer = None
    if args.draft and sys.stdout.isatty():
        from transformers import TextDiffusionStreamer

        streamer = TextDiffusionStreamer(tokenizer, skip_prompt=not args.infill)
    elif args.draft:
        print("dlmkernels: --draft shows nothing, as the output is not a terminal", file=sys.stderr)
    start = time.perf_counter()
    with torch.inference_mode():
        out = (infill if args.infill else generate)(model, ids, config=config, streamer=streamer)
        forwards, decoded = int(out.num_forwards[0]), int((out.commit_step[0] >= 0).sum())
    seconds = time.perf_counter() - start
    if streamer is None:
        print(tokenizer.decode(out.generated[0], skip_special_tokens=True), flush=True)
    statistics = (
        f"{_count(decoded, 'token')}, {_count(forwards, 'forward')}, {decoded / max(forwards, 1):.2f} tokens per "
        f"forward, {decoded / seconds:.1f} tokens/s ({seconds:.2f} s)"
    )
    if is_random(config):
        statistics += f", seed {config.seed}"
    print(statistics, file=sys.stderr)
    return 0


def decoding_config(args: argparse.Namespace) -> DecodingConfig:
    """The configuration that the options describe: the preset's, with what was given put over it."""
    config = preset(args.preset) if args.preset else DecodingConfig()
    names = (
        "max_new_tokens", "block_length", "steps", "score", "cache", "temperature", "top_k", "top_p", "cfg_scale",
        "seed", "mask_token_id",
    )  # fmt: skip
    changes: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.rule:
        changes["rule"] = parse_rule(args.rule)
    config = config.replace(**changes)
    if config.seed is None and is_random(config):
        import secrets

        config = config.replace(seed=secrets.randbits(31))
    return config


def is_random(config: DecodingConfig) -> bool:
    """Whether the result depends on the seed."""
    drawn_order = max(config.order_temperature, score_named(config.score).order_temperature)
    return config.temperature > 0 or drawn_order > 0 or config.rule.draws


def encode_prompt(tokenizer, prompt: str, chat: bool = False) -> Tensor:
    """Token ids of a prompt, int64 `[1, P]`; `chat` wraps it as a user's message."""
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat: this tokenizer has no chat template")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids.long()
    if ids.shape[1] == 0:
        raise ValueError("--prompt holds no token")
    return ids


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
