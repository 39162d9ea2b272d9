# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels plan`."""

import argparse

from .options import DTYPES, require


def add(commands) -> None:
    plan = commands.add_parser(
        "plan", help="how much memory a model takes, before it is loaded",
        description="Tell how much memory a decoding needs: weights, keys and values, a forward, logits. Only the "
        "configuration of the model is read.",
        epilog="Example: dlmkernels plan --model GSAI-ML/LLaDA-8B-Instruct --batch 8 --length 4096 --memory 80G",
    )  # fmt: skip
    add = plan.add_argument
    add("--model", required=True, metavar="PATH", help="folder or hub id; 'demo' is the model in the package")
    add("--batch", type=int, default=1, metavar="N", help="requests decoded at a time (default 1)")
    add("--length", type=int, metavar="N", help="tokens of each, prompt included (default: at most 2048)")
    add("--block-length", type=int, metavar="N", help="length of a block (default: the whole canvas)")
    add("--no-cache", action="store_true", help="do not reuse keys and values")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    add("--memory", metavar="BYTES", help="also tell which length fits into this much memory, such as 24G")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("transformers", "safetensors", wanted_for="plan")
    from ..planning import plan

    dtype = None if args.dtype == "auto" else args.dtype
    how = {"block_length": args.block_length, "cache": not args.no_cache, "dtype": dtype}
    needed = plan(args.model, args.batch, args.length, **how)
    print(needed)
    if args.memory:
        print(f"{args.memory} suffice for {needed.longest(args.memory)} tokens each at this batch")
    return 0
