# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels generate --input`: decode a file of prompts."""

from __future__ import annotations

import argparse
import os
import sys

from ..decoding.config import DecodingConfig
from ..decoding.presets import preset
from .options import count, decoding_options, device_named, load, positive, require

#: Options of `generate` that only make sense for a single prompt.
OF_ONE = ("prompt", "infill", "draft", "trace")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a batch job."""
    add = parser.add_argument_group("many prompts").add_argument
    add("--input", metavar="FILE", help='JSON Lines file; each line has "prompt", "messages" or "token_ids"')
    add("--output", metavar="FILE", help="file for the answers, in input order; an unfinished job is resumed")
    add("--slots", type=positive, metavar="N", help="number of answers decoded at once (default 16)")
    add("--max-length", type=positive, metavar="N",
        help="maximum tokens of prompt plus answer (default: 2048, or the model's limit if lower)")  # fmt: skip
    add("--skip-errors", action="store_true", help="record invalid input lines as errors in the output")
    add("--restart", action="store_true", help="overwrite an existing output and start over")
    add("--token-ids", action="store_true", help="also write the token ids of the answers")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError if an option has no effect in combination with the others."""
    if args.input is None:
        for name in ("output", "slots", "max_length", "skip_errors", "restart", "token_ids"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --input")
        return
    if args.output is None:
        raise ValueError("--input needs --output, the file for the answers")
    for name in OF_ONE:
        if getattr(args, name):
            raise ValueError(f"--{name} cannot be used with --input")


def run(args: argparse.Namespace) -> int:
    """Decode a file of prompts, or this process's share of it. Returns the exit code."""
    require("transformers", "safetensors", wanted_for="generate")
    from ..engine.engine import Engine
    from ..jobs import Job

    changes = decoding_options(args)
    seed = changes.pop("seed", 0)
    named = preset(args.preset) if args.preset else None
    (named or DecodingConfig()).replace(**changes)
    description = {
        "model": args.model, "dtype": args.dtype, "preset": args.preset,
        "options": {name: str(value) for name, value in sorted(changes.items())},
    }  # fmt: skip
    job = Job(
        args.input, args.output, description, seed=seed, skip_errors=args.skip_errors, restart=args.restart,
        token_ids=args.token_ids, chat=args.chat,
    )  # fmt: skip
    device = device_named(_own_device(args.device))

    def make_engine() -> Engine:
        model, tokenizer = load(args.model, args.dtype, device)
        slots = args.slots or 16
        return Engine(
            model, slots=slots, max_length=args.max_length, config=named, tokenizer=tokenizer, **changes
        )  # fmt: skip

    try:
        answered = job.run(make_engine)
    except KeyboardInterrupt:
        print("\ndlmkernels: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    total = job.share.lines_of(job.input.lines)
    rest = f", {job.errors} recorded as errors" if job.errors else ""
    rest += "" if answered == total else f", {total - answered} already answered by an earlier run"
    print(f"{count(answered - job.errors, 'line')} answered{rest}", file=sys.stderr)
    return 0


def _own_device(name: str) -> str:
    """Return the device of this process: with several processes on a machine, LOCAL_RANK selects its GPU."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None and local.isdigit() else name
