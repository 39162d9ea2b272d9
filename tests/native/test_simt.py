# SPDX-License-Identifier: Apache-2.0
"""Native tests of the CUDA kernels, and of the CPU's AMX kernels, run on the host: see tests/cpp/README.md.

No GPU, no AMX and no torch are needed.
"""

import os
import subprocess
from pathlib import Path

import pytest

from simt_programs import BUILD, FILES, build, call, configure, list_files, needs_sanitizer, run_file

slow = pytest.mark.slow
FLAVOURS = ["plain", pytest.param("asan", marks=slow), pytest.param("tsan", marks=slow)]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_source(flavour, file):
    """The kernels' source, compiled by the host compiler."""
    needs_sanitizer(flavour)
    run_file(build(f"simt_{flavour}"), file)


def test_every_file_is_run():
    assert sorted(list_files(build("simt_plain"))) == FILES


@pytest.mark.parametrize("file", ["test_amx", "test_amx_head"])
@pytest.mark.parametrize("flavour", FLAVOURS[:2])
def test_amx(flavour, file):
    """The AMX kernels as the library has them; a model does what their tile instructions say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text():
        pytest.skip("the rest of the kernel needs AVX512_BF16")
    needs_sanitizer(flavour)
    configure()
    if f"amx_{flavour}:" not in (BUILD / "build.ninja").read_text():
        pytest.skip("the compiler does not know AMX")
    run_file(build(f"amx_{flavour}"), file)


@pytest.mark.slow
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
