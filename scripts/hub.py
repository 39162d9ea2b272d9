# SPDX-License-Identifier: Apache-2.0
"""The ops as a kernel of the Hugging Face Hub, from the sources of this repository.

    python scripts/hub.py --write-list       # after a file came to csrc or left it: hub/build.toml
    python scripts/hub.py FOLDER             # the layout that `kernel-builder build` takes, in a new folder

The layout (https://huggingface.co/docs/kernels/builder/writing-kernels, edition 5) wants every source under one
root, so it is put together when it is needed: `hub/` holds what is different, the rest is copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB, CSRC, PYTHON = ROOT / "hub", ROOT / "csrc", ROOT / "python" / "dlmkernels"
# What tells a Python extension of itself; kernel-builder brings its own module.
NOT_IN_IT = {"csrc/torch/module.cpp", "csrc/torch/diagnostics.cpp", "csrc/torch/diagnostics.h"}
# As in CMakeLists.txt, which tests/test_hub.py compares them with.
COMMON = ["-ffp-contract=off", "-DDLM_X86", "-DDLM_AMX"]
VECTORS = ["-O3", "-fno-trapping-math"]
AVX512 = [*VECTORS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {
    "plain": [],
    "generic": VECTORS,
    "avx2": [*VECTORS, "-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
FILTERS = {"csrc/cpu/token_confidence.cpp", "csrc/cpu/lm_head_confidence.cpp"}  # loops in files without a suffix

HEAD = """# SPDX-License-Identifier: Apache-2.0
# Written by scripts/hub.py --write-list: the files of csrc, with the flags that CMakeLists.txt gives them.
[general]
name = "dlmkernels"
version = 0
edition = 5
license = "apache-2.0"
backends = ["cpu", "cuda"]

[torch.stable-abi]
cpu = "2.11"
cuda = "2.11"
"""


def group_of(source: str) -> str:
    """The flags of a C++ source of the CPU, by its name."""
    if source in FILTERS:
        return "generic"
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if source.startswith("csrc/cpu/") and suffix in FLAGS else "plain"


def sources() -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Headers of C++; C++ sources by their flags; files of CUDA: relative to the repository."""
    files = sorted(
        path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    )
    files = [file for file in files if file not in NOT_IN_IT]
    cuda = [file for file in files if file.endswith((".cu", ".cuh"))]
    by_flags: dict[str, list[str]] = {name: [] for name in FLAGS}
    for file in files:
        if file.endswith(".cpp"):
            by_flags[group_of(file)].append(file)
    return [file for file in files if file.endswith(".h")], by_flags, cuda


def strings(name: str, values: list[str]) -> str:
    lines = "".join(f'  "{value}",\n' for value in values)
    return f"{name} = [\n{lines}]\n"


def build_toml() -> str:
    """The text of hub/build.toml."""
    headers, by_flags, cuda = sources()
    text = HEAD + '\n[torch]\ninclude = ["csrc"]\n' + strings("src", ["torch-ext/torch_binding.cpp", *headers])
    for backend in ("cpu", "cuda"):
        more = ["-DDLM_WITH_CUDA"] if backend == "cuda" else []
        for name, files in by_flags.items():
            text += f'\n[kernel.{name}_{backend}]\nbackend = "{backend}"\ndepends = ["torch"]\ninclude = ["csrc"]\n'
            text += strings("cxx-flags", [*COMMON, *more, *FLAGS[name]]) + strings("src", files)
    text += '\n[kernel.kernels_cuda]\nbackend = "cuda"\ndepends = ["torch"]\ninclude = ["csrc"]\n'
    text += 'cuda-capabilities = ["8.0", "9.0", "10.0", "12.0"]\n' + strings("src", cuda)
    # A table of a section must come after the section's own keys.
    stable = text[text.index("[torch.stable-abi]") : text.index("[torch]\n")]
    text = text.replace(stable, "")
    first = text.index("\n[kernel.")
    return f"{text[:first]}\n{stable.rstrip()}\n{text[first:]}"


def lay_out(folder: Path) -> None:
    """Put the layout into a folder that is not there yet."""
    shutil.copytree(HUB, folder)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("*.md", *(Path(f).name for f in NOT_IN_IT)))
    package = folder / "torch-ext" / "dlmkernels"
    shutil.copytree(PYTHON / "ops", package / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PYTHON / "arguments.py", package)
    shutil.copy(ROOT / "LICENSE", folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write-list", action="store_true", help="write hub/build.toml")
    what.add_argument("folder", nargs="?", type=Path, help="where to put the layout; must not exist")
    args = parser.parse_args(argv)
    if args.write_list:
        (HUB / "build.toml").write_text(build_toml(), encoding="utf-8")
    elif args.folder.exists():
        parser.error(f"{args.folder} exists")
    else:
        lay_out(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
