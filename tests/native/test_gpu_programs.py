# SPDX-License-Identifier: Apache-2.0
"""The program that holds the native tests on a GPU: without one it is built, and says what it needs."""

import subprocess

import pytest

from simt_programs import FILES, OF_THE_MACHINE, build, configure, list_files, needs_nvcc


@pytest.mark.slow
def test_gpu_program_builds_and_starts_without_a_gpu(monkeypatch):
    needs_nvcc()
    configure("-DGPU_ARCH=sm_80")
    program = build("gpu_tests")
    of_an_op = [file for file in FILES if file.startswith("test_") and file != OF_THE_MACHINE]
    assert sorted(list_files(program)) == of_an_op
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (77, "no CUDA device: these tests need a GPU\n")
