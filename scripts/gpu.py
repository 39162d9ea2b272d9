# SPDX-License-Identifier: Apache-2.0
"""Build for the GPU of this machine, test and benchmark the kernels on it, and save the results.

    python scripts/gpu.py [--quick] [--only STEP ...] [--out FOLDER] [--budget SECONDS] [--dry-run]

Uses the installed torch, nvcc and packages, and no network. Before each step, its tools are looked for. A step that
lacks a tool, fails or hangs does not stop steps that do not depend on it. All steps together take less than ten minutes
on 16 cores: each may use the remaining time, minus the time reserved for later steps. Logs go to build/gpu/. Results go
to benchmarks/results/<gpu>/ as soon as they are available: environment.json, steps.json, benchmarks.json and table.md.
Golden outputs of the instruction wrappers, against which the native tests check their models on any machine, go to
tests/cpp/golden/. The exit status is 1 if anything failed or could not run.

--dry-run needs no GPU: every step is replaced by its closest equivalent on the CPU, at the smallest shapes, and all
files go to build/gpu/dry-run/. It tests the script, not the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from steps import Run, Step, missing  # noqa: E402

BUDGET = 570.0  # seconds
DECODING = ("tests/test_cuda.py", "tests/decoding/test_graphs.py")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
# gpu_tests rounds like the host; gpu_tests_shipped is compiled like the library.
NATIVE_PROGRAMS = {"native": "gpu_tests", "native-shipped": "gpu_tests_shipped"}  # step -> program
# Tests at small shapes; the file of every op has one with the first name.
SANITIZED = ("under_every_schedule", "test_ptx", "test_row_reduce", "test_tile_product")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
ON_HOST, ON_CARD = ("cmake", "ninja", "c++"), ("cmake", "ninja", "c++", "nvcc")  # programs that a native build needs
OF_MODELS, OF_BENCHMARKS = ("pytest", "transformers"), ("pytest", "transformers", "pytest_benchmark")


def op_tests() -> list[str]:
    """Return the test file of every op in the schemas."""
    schemas = (ROOT / "csrc" / "torch" / "ops.cpp").read_text(encoding="utf-8")
    return [f"tests/ops/test_{op.rstrip('_')}.py" for op in re.findall(r'DLM_DEF\(\s*m,\s*"(\w+)\(', schemas)]


def plan(about: dict, logs: Path, quick: bool) -> list[list[Step]]:
    """Return groups of parallel steps, most important first. The groups' time limits add up to less than `BUDGET`."""
    native = logs / "native"
    programs = {step: native / name for step, name in NATIVE_PROGRAMS.items()}
    for program in programs.values():  # so that an existing program is a freshly built one
        program.unlink(missing_ok=True)
    make = ["ninja", "-C", str(native), "-k", "0", *(f"{name}_program" for name in NATIVE_PROGRAMS.values())]
    golden = {"native": ["--dump-golden", str(logs / "golden"), about["gpu"]]}
    several = [] if "xdist" in about["missing"] else ["-n", "4", "--dist", "loadfile"]
    ops = [*PYTEST, *op_tests(), "--device", "cuda", "--maxfail=20", *several]
    size = ["--seconds", "0.2"] if quick else ["--full", "--seconds", "0.4"]
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        [configure(native, "sm_" + re.sub(r"\D", "", about["capability"]))],
        [Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, programs=("cmake", "c++", "nvcc")),
         Step("build-native", make, 150, "configure-native", ON_CARD)],
        [Step("ops", ops, 140, "build", packages=("pytest",)),
         Step("decoding", [*PYTEST, *DECODING], 140, "build", packages=OF_MODELS),
         *(Step(step, [str(program), *golden.get(step, [])], 140, "configure-native")
           for step, program in programs.items())],
        [benchmarks(logs, ["--device", "cuda", *size])],
        [Step(f"sanitizer-{tool}", [*sanitize, tool, str(programs["native"]), *SANITIZED], 90, "configure-native",
              ("compute-sanitizer",), skipped="no sanitizers with --quick" if quick else "")
         for tool in SANITIZERS],
    ]  # fmt: skip


def plan_on_cpu(logs: Path) -> list[list[Step]]:
    """Return the same groups with the closest equivalents on a CPU: the existing build, and the smallest shapes."""
    program = ROOT / "build" / "cpp" / "simt_plain"  # the kernels' source, compiled for the host
    make = (
        f"import sys; sys.path.insert(0, 'tests/support'); import simt_programs; simt_programs.build('{program.name}')"
    )
    ops = [*PYTEST, *op_tests(), "--device", "cpu", "-k", "test_opcheck and not generic"]
    decoding = [*PYTEST, "tests/test_cuda.py", "-k", "graph or stream or wait"]
    return [
        [configure(logs / "native", "sm_90")],
        [Step("build", [sys.executable, "-c", "import dlmkernels; print(dlmkernels._C.build_info())"], 60),
         Step("build-native", [sys.executable, "-c", make], 200, "configure-native", ON_HOST)],
        [Step("ops", ops, 100, "build", packages=("pytest",)),
         Step("decoding", decoding, 100, "build", packages=OF_MODELS),
         Step("native", [str(program), "test_row_reduce"], 100, "build-native"), without_card("native-shipped")],
        [benchmarks(logs, ["--smallest", "--seconds", "0.01", "-k", "not greedy"])],
        [without_card(f"sanitizer-{tool}") for tool in SANITIZERS],
    ]  # fmt: skip


def without_card(name: str) -> Step:
    return Step(name, [], 0, skipped="needs a GPU")


def configure(native: Path, architecture: str) -> Step:
    options = ["-DFLAVOURS=plain", f"-DGPU_ARCH={architecture}"]
    command = ["cmake", "-S", "tests/cpp", "-B", str(native), "-G", "Ninja", *options]
    return Step("configure-native", command, 30, programs=ON_HOST)


def benchmarks(logs: Path, options: list[str], folder: Path = ROOT / "benchmarks") -> Step:
    """Return the step that runs the benchmarks.

    Each comparison is appended to comparisons.jsonl as soon as it ends; pytest-benchmark writes its file at the end.
    """
    comparisons, whole = logs / "comparisons.jsonl", logs / "pytest-benchmark.json"
    for file in (comparisons, whole):
        file.unlink(missing_ok=True)
    files = ["--comparisons", str(comparisons), "--benchmark-json", str(whole)]
    command = [*PYTEST, str(folder), "--benchmark-only", *files, *options]
    return Step("benchmarks", command, 150, "build", packages=OF_BENCHMARKS)


def write_comparisons(logs: Path, results: Path, about: dict) -> None:
    """Write benchmarks.json and table.md from the comparisons that have ended."""
    file = logs / "comparisons.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return
    comparisons = {entry["group"]: entry["comparison"] for entry in map(json.loads, lines)}
    whole = {"environment": about, "comparisons": comparisons}
    (results / "benchmarks.json").write_text(json.dumps(whole, indent=1) + "\n")
    (results / "table.md").write_text(table(comparisons, about))


def table(comparisons: dict[str, list[dict]], about: dict) -> str:
    """Return a Markdown table of our times, their floors and all baselines."""
    lines = [
        f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, {about['nvcc']}, {about['date']}, commit "
        f"{about['commit']}. Times are medians per call. Floor: a lower bound; on a GPU the larger of bytes over "
        "measured bandwidth and flops over the measured rate of a bf16 matrix product.",
        "",
        "| benchmark | floor | dlmkernels | floor / time | baselines |",
        "|---|---|---|---|---|",
    ]
    for group, rows in comparisons.items():
        ours = next(r for r in rows if r["name"] == "dlmkernels")
        floors = [r["seconds"] for r in rows if r["ratio"] is None and r is not ours]
        others = "; ".join(
            f"{r['name']} {microseconds(r['seconds'])} ({r['ratio']:.2g}×)" for r in rows if r["ratio"] is not None
        )
        share = f"{ours['share']:.0%}" if ours["share"] else ""
        cells = [group, microseconds(max(floors)) if floors else "", microseconds(ours["seconds"]), share, others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def search_path() -> str:
    """Return PATH extended by this Python's programs (ninja in a virtual environment) and the CUDA toolkit's."""
    toolkit = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda") / "bin"
    before = [str(Path(sys.executable).parent)]
    if shutil.which("nvcc") is None and toolkit.is_dir():
        before.append(str(toolkit))
    return os.pathsep.join([*before, os.environ.get("PATH", os.defpath)])


def environment(on_cpu: bool) -> dict:
    """Return GPU, driver, toolkit, torch, commit, and the missing tools. Exits if there is no CUDA device."""
    import torch

    card: dict
    if on_cpu:
        sys.path.insert(0, str(ROOT / "python"))
        from dlmkernels.info import processor  # already built

        card = {"gpu": processor(), "capability": ""}
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    else:
        sys.exit(
            f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) of {sys.executable} finds none; "
            "use another Python with PYTHON=..., or --dry-run, which needs no device"
        )
    name = re.sub(r"\W+", "-", card["gpu"].removeprefix("NVIDIA ")).strip("-").lower()
    return card | {
        "results": f"benchmarks/results/{name}",
        "driver": output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "nvcc": output(["nvcc", "--version"]),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "processors": os.cpu_count(),
        "commit": output(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "date": time.strftime("%Y-%m-%d"),
        "missing": missing((*ON_CARD, "compute-sanitizer", "nvidia-smi"), (*OF_BENCHMARKS, "xdist")),
    }


def output(command: list[str]) -> str:
    """Return the last line that a program prints, or "unknown" if it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip().splitlines()[-1]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="skip the sanitizers, and use small benchmarks")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run only these steps")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                        help="time for all steps (default %(default)s)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="test the script itself, on the CPU")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a clean exit, which also ends running steps
    os.environ["PATH"] = search_path()
    about = environment(options.dry_run)
    print(json.dumps(about, indent=2))
    logs = (ROOT / "build" / "gpu" / ("dry-run" if options.dry_run else "")).resolve()
    results = (options.out or (logs if options.dry_run else ROOT / about["results"])).resolve()
    for folder in (logs / "golden", results):
        folder.mkdir(parents=True, exist_ok=True)
    (results / "environment.json").write_text(json.dumps(about, indent=1) + "\n")

    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if not options.dry_run:
        variables |= {"DLMKERNELS_CUDA": "1"}
        variables.setdefault("TORCH_CUDA_ARCH_LIST", about["capability"])
    run = Run(results, logs, ROOT, variables, options.budget, options.only)
    groups = plan_on_cpu(logs) if options.dry_run else plan(about, logs, options.quick)
    run.all(groups, lambda: write_comparisons(logs, results, about))
    if not options.dry_run and any(outcome.name == "native" and not outcome.is_fault for outcome in run.outcomes):
        shutil.copytree(logs / "golden", ROOT / "tests" / "cpp" / "golden", dirs_exist_ok=True)
    if (logs / "comparisons.jsonl").exists():
        print((results / "table.md").read_text())
    print(run.table())
    return int(any(outcome.is_fault for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
