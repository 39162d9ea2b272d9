# SPDX-License-Identifier: Apache-2.0
"""Every CUDA source compiles for every architecture, without spills or local memory.

It is looked up where the library has been built with CUDA from these very sources; else nvcc is needed.
"""

import re
import shutil
import subprocess

import pytest

from simt_programs import ROOT, needs_nvcc

# The kernels of the native tests are compiled too, so there is always something to compile.
SOURCES = [*sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), ROOT / "tests" / "cpp" / "kernels" / "instantiate.cu"]
ARCHITECTURES = ["80", "90", "100", "120"]  # those of cmake/cuda.cmake
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]


def reports():
    """What ptxas said when the library was built from these sources, by source: `cmake/ptxas_report.py`."""
    sources = [path for folder in ("csrc", "cmake") for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"]
    newest = max(path.stat().st_mtime for path in sources)
    found = (ROOT / "build").glob("*/CMakeFiles/dlm_cuda.dir/csrc/cuda/instantiations/*.cu.o.ptxas")
    return {path.name.split(".")[0]: path.read_text() for path in found if path.stat().st_mtime >= newest}


def log_of(source, arch, folder):
    """What ptxas says of a source for an architecture: when the library was built, or now."""
    report = reports().get(source.stem, "")
    parts = re.split(r"(?=ptxas info +: Compiling entry function)", report)
    if kept := "".join(part for part in parts if f" for 'sm_{arch}'" in part):
        return kept
    needs_nvcc()
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(folder / "kernels.cubin")]
    done = subprocess.run(["nvcc", *FLAGS, *target, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stderr


def ptxas_table(log):
    """Rows (kernel, registers, stack, spill stores, spill loads, static shared memory) from `ptxas -v`."""
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+).*?, (\d+)", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append(
            (
                name,
                int(re.search(r"Used (\d+) registers", part)[1]),
                stack,
                stores,
                loads,
                int(shared[1]) if shared else 0,
            )
        )
    return rows


def readable(names):
    if not shutil.which("c++filt"):
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    return [re.sub(r"\([^()]*Params\)$|^void |dlm::cuda::", "", line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch, tmp_path):
    rows = ptxas_table(log_of(source, arch, tmp_path))
    assert rows, f"{source.name} contains no kernel"
    bad = []
    print(f"\nsm_{arch} {source.name}: registers, stack, spill stores, spill loads, static shared memory")
    for name, row in zip(readable([row[0] for row in rows]), rows):
        print(f"{row[1]:5d} {row[2]:5d} {row[3]:5d} {row[4]:5d} {row[5]:6d}  {name}")
        if any(row[2:5]):
            bad.append(f"{name}: {row[2]} bytes of local memory, spills {row[3]} / {row[4]}")
        if row[5]:
            bad.append(f"{name}: {row[5]} bytes of static shared memory; take it from a SmemCarver")
    assert not bad, "\n".join(bad)


def test_the_architectures_are_those_of_the_build():
    wanted = re.findall(r"set\(wanted ([^)]*)\)", (ROOT / "cmake" / "cuda.cmake").read_text())
    assert [re.sub(r"\D", "", item) for item in wanted[-1].split()] == ARCHITECTURES


def test_the_table_is_read_right():
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem, 384 bytes cmem[0]
"""
    assert ptxas_table(log) == [("_Z1kv", 40, 16, 8, 4, 512)]
