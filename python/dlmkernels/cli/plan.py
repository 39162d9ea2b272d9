# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels plan`."""

import argparse

from .options import DTYPES, require


def add(commands) -> None:
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
