# SPDX-License-Identifier: Apache-2.0
"""Native tests of what nvcc makes of the CUDA kernels, run on the host: see tests/cpp/README.md."""

import subprocess
import sys

import pytest

from simt_programs import SOURCE, TRANSLATED, build, call, needs_nvcc, needs_sanitizer, run_file


# The two architectures' PTX differs in a few instructions: the sanitizers look at one of them.
@pytest.mark.slow
@pytest.mark.parametrize("file", TRANSLATED)
@pytest.mark.parametrize(("arch", "flavour"), [("90", "plain"), ("80", "asan"), ("80", "tsan")])
def test_translated_ptx(arch, flavour, file):
    """The PTX that nvcc makes of the kernels, inline assembly included, translated to C++."""
    needs_nvcc()
    needs_sanitizer(flavour)
    run_file(build(f"ptx{arch}_{flavour}"), file)


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
