# SPDX-License-Identifier: Apache-2.0
"""Native tests of the CUDA kernels, and of the CPU's AMX kernel, run on the host: see tests/cpp/README.md.

No GPU, no AMX and no torch are needed.
"""

import os
import shutil
import subprocess
import sys
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


def configure():
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not on PATH")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    if not (BUILD / "build.ninja").exists():
        call(["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja"])


def build(target):
    configure()
    call(["ninja", "-C", BUILD, "-j2", target])
    return BUILD / target


def run_native(program):
    """Run all tests of a program; each prints a line `PASS file.test: n checks, t s`."""
    tests = call([program, "--list"]).splitlines()
    # A process a file: what ThreadSanitizer maps for fibers it never gives back, and Linux maps no more than 65,530.
    for file in dict.fromkeys(line.split()[0] for line in tests):
        done = subprocess.run([str(program), file], capture_output=True, text=True)
        print(done.stdout)
        results = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASS ", "FAIL "))]
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
        assert results and all(int(r[2]) > 0 for r in results), f"{file}: no kernel was run"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_source(flavour, tmp_path):
    """The kernels' source, compiled by the host compiler."""
    if not has_sanitizer(flavour, tmp_path):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")
    run_native(build(f"simt_{flavour}"))


@pytest.mark.parametrize("flavour", ["plain", pytest.param("asan", marks=pytest.mark.slow)])
def test_amx(flavour, tmp_path):
    """The AMX kernel as the library has it; a model does what its tile instructions say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text():
        pytest.skip("the rest of the kernel needs AVX512_BF16")
    if not has_sanitizer(flavour, tmp_path):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")
    configure()
    if f"amx_{flavour}:" not in (BUILD / "build.ninja").read_text():
        pytest.skip("the compiler does not know AMX")
    run_native(build(f"amx_{flavour}"))


# The two architectures' PTX differs in a few instructions: the sanitizers look at one of them.
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "flavour"), [("80", "plain"), ("90a", "plain"), ("80", "asan"), ("80", "tsan")])
def test_translated_ptx(arch, flavour, tmp_path):
    """The PTX that nvcc makes of the kernels, inline assembly included, translated to C++."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH: the PTX cannot be made")
    if not has_sanitizer(flavour, tmp_path):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")
    run_native(build(f"ptx{arch}_{flavour}"))


def test_golden_data_is_compared(tmp_path):
    """Golden data passes where it agrees (here the model's own) and fails where a word or the inputs differ."""
    program = build("simt_plain")
    call([program, "--dump-golden", tmp_path, "the model", "test_ptx"])
    assert len(list(tmp_path.glob("*.bin"))) == len(list(tmp_path.glob("*.json"))) >= 15
    environment = {**os.environ, "DLM_GOLDEN": str(tmp_path)}
    out = call([program, "test_ptx"], env=environment)
    assert "no golden data" not in out
    words = bytearray((tmp_path / "mma_bf16.bin").read_bytes())
    words[3] ^= 1  # an exponent bit
    (tmp_path / "mma_bf16.bin").write_bytes(words)
    about = tmp_path / "cp_async.json"
    about.write_text(about.read_text().replace('"inputs": "', '"inputs": "not '))
    done = subprocess.run([str(program), "test_ptx"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "mma_bf16: 1 of 128 words differ" in done.stdout
    assert "cp_async: golden data of other inputs" in done.stdout


def test_unknown_instructions_stop_the_translation(tmp_path):
    ptx = tmp_path / "k.ptx"
    translator = [sys.executable, SOURCE / "ptx" / "ptx2cpp.py", ptx, tmp_path / "k.cpp"]
    kernel = ".visible .entry k(\n\t.param .u64 k_param_0\n)\n{{\n\t.reg .b32 \t%r<3>;\n\t{}\n\tret;\n}}\n"
    ptx.write_text(kernel.format("add.s32 \t%r1, %r2, 7;"))
    call(translator)
    for text in ("frobnicate.u32 %r1, %r2;", "add.sat.s32 %r1, %r2, 7;", "membar.gl;", "add.s32 %r1, %clock, 7;"):
        ptx.write_text(kernel.format(text))
        done = subprocess.run(translator, capture_output=True, text=True)
        assert done.returncode == 1
        assert "kernel k" in done.stderr and "not translated" in done.stderr, done.stderr
