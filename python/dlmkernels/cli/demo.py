# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels demo`."""

import argparse

from .options import positive, require


def add(commands) -> None:
    demo = commands.add_parser(
        "demo", help="decode with the small model in the package and compare unmasking rules",
        description="Show how the small model in the package solves a Sudoku, then compare unmasking rules on held-out "
        "problems of three tasks. Writes two pictures and a Markdown table.",
    )  # fmt: skip
    demo.add_argument("--problems", type=positive, metavar="N", help="problems per task (default 48)")
    demo.add_argument("--quick", action="store_true", help="8 problems per task and fewer rules, for a quick look")
    demo.add_argument(
        "--rules", choices=("few", "all"), default="few",
        help="few: a selection of rules (default); all: every published decoder that this model can run",
    )  # fmt: skip
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for the pictures and the table (default demo-out)"
    )
    demo.add_argument("--json", metavar="FILE", help="also write the results to FILE as JSON")
    demo.add_argument("--seed", type=int, default=1, help="seed that selects the held-out problems (default 1)")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("transformers", "safetensors", "matplotlib", wanted_for="the demo")
    from ..demo import run as demonstration

    demonstration.run(args.problems, args.quick, args.out, args.json, args.seed, args.rules)
    return 0
