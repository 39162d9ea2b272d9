# SPDX-License-Identifier: Apache-2.0
"""`dlmkernels bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

from .options import require


def add(commands) -> None:
    bench = commands.add_parser(
        "bench", help="time the kernels beside their baselines (in a source tree)",
        description="Time every kernel and the decoding loop beside named baselines: `pytest benchmarks "
        "--benchmark-only` in the source tree. Further arguments go to pytest, such as --full or -k attention.",
    )  # fmt: skip
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    root = Path(__file__).parents[3]
    if not (root / "benchmarks" / "pytest.ini").is_file():
        raise ValueError("bench runs the benchmarks of a source tree, which are not part of an installed package: "
                         "get the sources and run `make bench` there")  # fmt: skip
    require("pytest", "pytest_benchmark", wanted_for="bench")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *args.rest]
    return subprocess.run(command, cwd=root).returncode
