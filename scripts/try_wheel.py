# SPDX-License-Identifier: Apache-2.0
"""Install a wheel as a user would, and use it without a compiler or anything else on PATH.

    python scripts/try_wheel.py dist/dlmkernels-*.whl                      # torch from the package index
    python scripts/try_wheel.py WHEEL --torch torch==2.13.0                # any requirement that pip accepts
    python scripts/try_wheel.py WHEEL --site FOLDER                        # torch and its dependencies from a folder

Creates a virtual environment with only the wheel and torch. Then imports the package, runs an op on the CPU and runs
`dlmkernels info`, without environment variables (no PATH, no CUDA_HOME) and with no GPU visible.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CODE = """
import shutil, sys, torch
import dlmkernels as dk
assert not any(shutil.which(name) for name in ("c++", "g++", "cc", "nvcc", "ninja", "cmake")), "a compiler is on PATH"
assert "transformers" not in sys.modules
logits = torch.zeros(2, 5).index_fill_(1, torch.tensor([3]), 4.0)
out = dk.ops.token_confidence(logits)
assert out.token.tolist() == [3, 3] and torch.allclose(out.confidence, torch.softmax(logits, -1)[:, 3])
assert dk.ops.select_tokens(out.confidence[None], torch.ones(1, 2, dtype=torch.bool), "all").count.tolist() == [2]
print(dk.__file__)
"""


def run(*command: object, **options: object) -> str:
    """Run a command and return what it prints. Exits with its output if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} …: {done.stdout}{done.stderr}")
    return done.stdout


def try_wheel(wheel: Path, torch: str, site: Path | None) -> str:
    """Install and use a wheel. Returns the output of `dlmkernels info`."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where pip would find packages
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=site is None)
        python = Path(folder, "bin", "python")
        if site is None:
            run(python, "-m", "pip", "install", "-q", torch, wheel, env=own)
        else:
            run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, env=own)
            (found,) = Path(folder, "lib").glob("python*/site-packages")
            (found / "site.pth").write_text(f"{site}\n")
        bare = {"HOME": folder, "PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
        where = run(python, "-c", CODE, env=bare, cwd=folder).strip()
        if not where.startswith(folder):
            sys.exit(f"imported dlmkernels from {where}, not from the virtual environment in {folder}")
        return run(Path(folder, "bin", "dlmkernels"), "info", env=bare, cwd=folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch>=2.11", help="requirement for pip (default: %(default)s)")
    parser.add_argument("--site", type=Path, help="folder with torch and its dependencies, to avoid any download")
    args = parser.parse_args(argv)
    print(try_wheel(args.wheel.resolve(), args.torch, args.site))
    return 0


if __name__ == "__main__":
    sys.exit(main())
