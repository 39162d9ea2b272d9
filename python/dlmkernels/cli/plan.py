# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels plan`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import DTYPES, require

if TYPE_CHECKING:
    from ..planning import MemoryPlan


def add(commands) -> None:
    plan = commands.add_parser(
        "plan", help="estimate the memory that a model needs, without loading it",
        description="Estimate how much memory decoding needs: weights, KV cache, activations of a forward pass, "
        "logits. Only the model's configuration is read.",
        epilog="Example: dlmkernels plan --model GSAI-ML/LLaDA-8B-Instruct --batch 8 --length 4096 --memory 80G",
    )  # fmt: skip
    add = plan.add_argument
    add("--model", required=True, metavar="PATH", help="folder or Hub id; 'demo' is the small model in the package")
    add("--batch", type=int, default=1, metavar="N", help="number of requests decoded together (default 1)")
    add("--length", type=int, metavar="N",
        help="tokens per request, prompt plus answer (default: 2048, or the model's limit if lower)")  # fmt: skip
    add("--block-length", type=int, metavar="N", help="block length in tokens (default: all tokens of the request)")
    add("--no-cache", action="store_true", help="plan for decoding without a KV cache")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as stored)")
    add("--memory", metavar="BYTES", help="also print the longest request that fits in this much memory, such as 24G")
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("transformers", "safetensors", wanted_for="plan")
    from ..planning import plan, read_bytes

    dtype = None if args.dtype == "auto" else args.dtype
    how = {"block_length": args.block_length, "cache": not args.no_cache, "dtype": dtype}
    memory = None if args.memory is None else read_bytes("--memory", args.memory)
    needed = plan(args.model, args.batch, args.length, **how)
    print(needed)
    if memory is not None:
        print(f"{args.memory} is {_enough(needed, memory)}")
    return 0


def _enough(needed: MemoryPlan, memory: int) -> str:
    """Describe what an amount of memory is enough for."""
    longest = needed.longest(memory)
    if longest == 0:
        return f"too little: the weights and logits alone need {(needed.weights + needed.logits) / 2**20:,.1f} MiB"
    limit = needed.max_length
    if limit is not None and longest >= limit:
        return f"enough for {limit} tokens per request, the model's maximum, at this batch size"
    return f"enough for {longest} tokens per request at this batch size"
