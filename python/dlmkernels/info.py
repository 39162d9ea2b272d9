# SPDX-License-Identifier: Apache-2.0
"""Report what this installation contains, what it uses, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

# package -> what needs it; none of them is imported here
OPTIONAL = {
    "transformers": "models: generate, infill, load, the demo",
    "safetensors": "loading checkpoints",
    "matplotlib": "plots: Trace.plot, the demo's plot",
    "fastapi": "`dlmkernels serve`",
    "interegular": "constrained answers: json_schema, json_object, regex",
    "lm_eval": "`python -m dlmkernels.evaluation`",
    "pytest_benchmark": "`dlmkernels bench`",
}


def collect() -> dict[str, Any]:
    """Collect versions, build options, the kernels in use, and what is missing.

    Returns
    -------
    dict
        Can be serialized as JSON. `versions`: package -> version or None. `build`: compiler, the torch version it was
        built with, CUDA architectures, and the reason if there are none. `torch_cuda`: torch's CUDA version or None.
        `cuda_devices`: names of the devices that torch sees. `cpu`: name, instruction set in use, the reason why not a
        better one, threads, processors. `missing`: a list of {what, needed_for, how}.
    """
    import numpy
    import torch

    from . import _C, __version__
    from .demo import MODEL_DIR

    build = _C.build_info()
    architectures = [a for a in build["cuda_architectures"].replace(";", ",").split(",") if a]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {
        "dlmkernels": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    } | {name: _version(name) for name in OPTIONAL}
    missing = [
        {"what": name, "needed_for": OPTIONAL[name], "how": f"pip install {name.replace('_', '-')}"}
        for name in OPTIONAL
        if versions[name] is None
    ]
    if devices and not architectures:
        missing.append({
            "what": "CUDA kernels", "needed_for": "models on the GPU",
            "how": f"not in this build: {build['cuda_state']}",
        })  # fmt: skip
    if architectures and not devices:
        missing.append({
            "what": "CUDA device", "needed_for": "the CUDA kernels; the CPU kernels do not need it",
            "how": "torch finds no driver or no GPU" if torch.version.cuda else "this is a CPU-only build of torch",
        })  # fmt: skip
    if not (MODEL_DIR / "model.safetensors").is_file():
        missing.append({
            "what": "demo model", "needed_for": "`dlmkernels demo`", "how": f"not found in {MODEL_DIR}",
        })  # fmt: skip
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "build": {
            "compiler": build["compiler"],
            "torch": build["torch_headers"],
            "cuda_architectures": architectures,
            "cuda_state": build["cuda_state"],
        },
        "torch_cuda": torch.version.cuda,
        "cuda_devices": devices,
        "cpu": {
            "name": processor(),
            "instruction_set": _C.cpu_isa(),
            "why_not_better": _C.cpu_isa_reason(),
            "threads": torch.get_num_threads(),
            "processors": usable_processors(),
        },
        "missing": missing,
    }


def processor(cpuinfo: str | None = None) -> str:
    """Return the name of this machine's processor, from the text of /proc/cpuinfo or from the platform module."""
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text(errors="replace") if file.exists() else ""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.M)
    return " ".join(name[1].split()) if name else platform.processor() or platform.machine()


def usable_processors() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text(info: dict[str, Any]) -> str:
    """Format the result of `collect` for people."""
    build, cpu = info["build"], info["cpu"]
    rows: list[tuple[str, str]] = [
        (name, version or "not installed") for name, version in info["versions"].items()
    ]  # fmt: skip
    rows += [
        ("platform", info["platform"]),
        ("processor", cpu["name"]),
        ("", ""),
        ("compiler", build["compiler"]),
        ("built with torch", build["torch"]),
        ("CPU kernels", _with_reason(cpu["instruction_set"], cpu["why_not_better"])),
        ("CPU threads", f"{cpu['threads']} of {cpu['processors']} processors"),
        ("CUDA kernels", build["cuda_state"] if build["cuda_architectures"] else f"none ({build['cuda_state']})"),
        ("CUDA of torch", info["torch_cuda"] or "none (CPU-only torch)"),
        ("CUDA devices", ", ".join(info["cuda_devices"]) or "none visible to torch"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    if info["missing"]:
        lines += ["", "not available"]
        width = max(len(m["what"]) for m in info["missing"])
        lines += [f"  {m['what']:<{width}}  {m['how']} (needed for {m['needed_for']})" for m in info["missing"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the result of `collect`, as text or, with `--json`, as JSON."""
    parser = argparse.ArgumentParser(prog="dlmkernels info", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else text(info))
    return 0


def _version(package: str) -> str | None:
    """Return the version of an installed package without importing it."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _with_reason(value: str, reason: str) -> str:
    return f"{value} ({reason})" if reason else value


if __name__ == "__main__":
    sys.exit(main())
