# SPDX-License-Identifier: Apache-2.0
"""Native tests of the CUDA kernels, run on the host: see tests/cpp/README.md. No GPU and no torch are needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE, BUILD = ROOT / "tests" / "cpp", ROOT / "build" / "cpp"
FLAVOURS = ["plain", pytest.param("asan", marks=pytest.mark.slow), pytest.param("tsan", marks=pytest.mark.slow)]
FLAG = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}


def call(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return done.stdout


def has_sanitizer(flavour, tmp_path):
    """Whether the compiler can build and the machine can run a program with the flavour's sanitizer."""
    if flavour == "plain":
        return True
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() {}\n")
    compiler = os.environ.get("CXX", "g++")
    built = subprocess.run([compiler, FLAG[flavour], str(source), "-o", str(program)], capture_output=True)
    return built.returncode == 0 and subprocess.run([str(program)], capture_output=True).returncode == 0


def build(target):
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not on PATH")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    if not (BUILD / "build.ninja").exists():
        call(["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja"])
    call(["ninja", "-C", BUILD, "-j2", target])
    return BUILD / target


def run_native(program):
    """Run all tests of a program; each prints a line `PASS file.test: n checks, t s`."""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    print(done.stdout)
    results = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASS ", "FAIL "))]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert results and all(int(r[2]) > 0 for r in results), "no kernel was run"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_source(flavour, tmp_path):
    """The kernels' source, compiled by the host compiler."""
    if not has_sanitizer(flavour, tmp_path):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")
    run_native(build(f"simt_{flavour}"))


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_translated_ptx(arch, flavour, tmp_path):
    """The PTX that nvcc makes of the kernels, inline assembly included, translated to C++."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH: the PTX cannot be made")
    if not has_sanitizer(flavour, tmp_path):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")
    run_native(build(f"ptx{arch}_{flavour}"))
