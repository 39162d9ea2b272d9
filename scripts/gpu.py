# SPDX-License-Identifier: Apache-2.0
"""Build for the GPU of this machine, prove the kernels on it, measure them, and write the results down.

    python scripts/gpu.py [--quick] [--only STEP ...]

Uses the torch, nvcc and packages that are there, and no network. Each step has its time limit and its log in
build/gpu/; a step that fails does not stop the ones that do not need it. Results go to benchmarks/results/<gpu>/:
environment.json, steps.json, benchmarks.json and table.md; golden outputs of the instruction wrappers, which the
native tests compare with their models everywhere, to tests/cpp/golden/. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
NATIVE = ROOT / "build" / "cpp_gpu"
PYTEST = [sys.executable, "-m", "pytest"]
OPS = [f"tests/test_{op}.py" for op in ("block_attention", "token_confidence", "select_tokens", "remask")]
# Tests of small shapes; the first is the name of one in every op's file.
SANITIZED = ("under_every_schedule", "test_ptx", "test_row_reduce", "test_tile_product")
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass
class Step:
    """What one step did: `status` is passed, failed, timed out, or the reason why it did not run."""

    name: str
    status: str
    seconds: float
    last_line: str


class Run:
    """The steps so far, and how to make another."""

    def __init__(self, only: list[str]):
        self.only = only
        self.steps: list[Step] = []
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1"}

    def step(self, name: str, command: list[str], limit: float, needs: str | None = None) -> bool:
        """Run `command` for at most `limit` seconds, its output to a log; whether it passed."""
        if self.only and name not in self.only and name.split("-")[0] not in self.only:
            return False
        missing = next((s.name for s in self.steps if s.name == needs and s.status != "passed"), None)
        start = time.perf_counter()
        log = LOGS / f"{name}.log"
        if missing:
            status, lines = f"needs {missing}", [""]
        else:
            print(f"== {name}", flush=True)
            with log.open("w") as out:
                try:
                    done = subprocess.run(
                        command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT, timeout=limit
                    )
                    status = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
                except subprocess.TimeoutExpired:
                    status = f"timed out after {limit:.0f} s"
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
        step = Step(name, status, round(time.perf_counter() - start, 1), lines[-1].strip()[:200])
        self.steps.append(step)
        if status != "passed":
            print("\n".join(lines[-25:]))
        print(f"   {step.status}, {step.seconds:.0f} s: {step.last_line}", flush=True)
        return status == "passed"


def environment() -> dict:
    """Card, driver, toolkit, torch, commit."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none")
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    if not Path(nvcc).exists():
        sys.exit("no nvcc: put it on PATH, or set CUDA_HOME")
    os.environ["PATH"] = f"{Path(nvcc).parent}:{os.environ['PATH']}"
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": output([nvcc, "--version"]).splitlines()[-1],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "processors": os.cpu_count(),
        "commit": output(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": time.strftime("%Y-%m-%d"),
    }


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(comparisons: list[tuple[str, list[dict]]], about: dict) -> str:
    """Markdown: ours beside its floor and every baseline."""
    lines = [
        f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, {about['nvcc']}, {about['date']}, commit "
        f"{about['commit']}. Device time of one call, median; floor: the larger of bytes over measured copy bandwidth "
        "and flops over the measured rate of a bf16 product.",
        "",
        "| what | floor | dlmkernels | of the floor | baselines |",
        "|---|---|---|---|---|",
    ]
    for group, rows in comparisons:
        ours = next(r for r in rows if r["name"] == "dlmkernels")
        floor = next((r for r in rows if r["ratio"] is None and r is not ours), None)
        others = "; ".join(
            f"{r['name']} {microseconds(r['seconds'])} ({r['ratio']:.2g}×)" for r in rows if r["ratio"] is not None
        )
        share = f"{ours['share']:.0%}" if ours["share"] else ""
        cells = [group, microseconds(floor["seconds"]) if floor else "", microseconds(ours["seconds"]), share, others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no sanitizers, small benchmarks")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone")
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    about = environment()
    print(json.dumps(about, indent=2))
    results = ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", about["gpu"].removeprefix("NVIDIA ")).lower()
    results.mkdir(parents=True, exist_ok=True)

    run = Run(arguments.only)
    run.environment |= {"PATH": os.environ["PATH"], "DLMKERNELS_CUDA": "1"}
    run.environment.setdefault("TORCH_CUDA_ARCH_LIST", about["capability"])
    architecture = "sm_" + re.sub(r"\D", "", about["capability"])

    run.step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240)
    run.step("configure-native", ["cmake", "-S", "tests/cpp", "-B", str(NATIVE), "-G", "Ninja", "-DFLAVOURS=plain",
                                  f"-DGPU_ARCH={architecture}"], 30)  # fmt: skip
    run.step("build-native", ["ninja", "-C", str(NATIVE), "gpu_tests_program"], 240, needs="configure-native")
    native = str(NATIVE / "gpu_tests")
    golden = LOGS / "golden"
    golden.mkdir(exist_ok=True)
    if run.step("native", [native, "--dump-golden", str(golden), about["gpu"]], 120, needs="build-native"):
        shutil.copytree(golden, ROOT / "tests" / "cpp" / "golden", dirs_exist_ok=True)
    run.step("ops", [*PYTEST, *OPS, "--device", "cuda", "--maxfail=20", "-p", "no:cacheprovider"], 240, "build")
    run.step("decoding", [*PYTEST, "tests/test_cuda.py", "-p", "no:cacheprovider"], 120, "build")
    if not arguments.quick:
        for tool in SANITIZERS:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", native, *SANITIZED]
            run.step(f"sanitizer-{tool}", command, 120, "build-native")
    raw = LOGS / "benchmarks.json"
    options = ["--device", "cuda", "--benchmark-only", "--benchmark-json", str(raw)]
    size = ["--seconds", "0.2"] if arguments.quick else ["--full", "--seconds", "0.4"]
    if run.step("benchmarks", [*PYTEST, "benchmarks", *options, *size, "-p", "no:cacheprovider"], 240, "build"):
        measured = json.loads(raw.read_text())["benchmarks"]
        comparisons = [(b["extra_info"]["group"], b["extra_info"]["comparison"]) for b in measured]
        (results / "benchmarks.json").write_text(
            json.dumps({"environment": about, "comparisons": dict(comparisons)}, indent=1) + "\n"
        )
        (results / "table.md").write_text(table(comparisons, about))
        print(table(comparisons, about))
    (results / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    (results / "steps.json").write_text(json.dumps([asdict(s) for s in run.steps], indent=1) + "\n")
    print("\n".join(f"{s.name:<22} {s.status:<12} {s.seconds:6.1f} s  {s.last_line}" for s in run.steps))
    return int(any(s.status != "passed" for s in run.steps))


if __name__ == "__main__":
    sys.exit(main())
