# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

from .options import require


def add(commands) -> None:
    bench = commands.add_parser(
        "bench", help="benchmark the kernels against baselines (needs a source checkout)",
        description="Benchmark every kernel and the decoding loop against named baselines, by running `pytest "
        "benchmarks --benchmark-only` in the source checkout. All arguments are passed on to pytest: --full measures "
        "every shape, -k attention only the benchmarks with that word in their name.",
        usage="dlmkernels bench [-h] [PYTEST_ARGUMENT ...]",
    )  # fmt: skip
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    root = Path(__file__).parents[3]
    if not (root / "benchmarks" / "pytest.ini").is_file():
        raise ValueError("bench needs a source tree, because the installed package does not contain the benchmarks: "
                         "check out the sources and run `make bench` there")  # fmt: skip
    require("pytest", "pytest_benchmark", wanted_for="bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *args.rest]
    return subprocess.run(command, cwd=root).returncode
