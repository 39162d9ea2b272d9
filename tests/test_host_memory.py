# SPDX-License-Identifier: Apache-2.0
"""Memory that a forward has given back is kept for the next one, where that is asked for."""

import os
import platform
import subprocess
import sys

import pytest

from dlmkernels import host_memory

LOAD = """
import resource, sys
import torch
from dlmkernels import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep()

def work():
    parts = [torch.ones(n << 18) for n in (1, 2, 3, 2, 1)]  # 1 to 3 MB each
    del parts

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
is_glibc = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not is_glibc, reason="the C library is not glibc")


def page_faults(how):
    environment = {name: value for name, value in os.environ.items() if name not in host_memory.VARIABLES}
    out = subprocess.run(
        [sys.executable, "-c", LOAD, how], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return int(out.stdout)


@needs_glibc
def test_what_is_free_is_used_again():
    """Ten times nine megabytes, of pages of at most 64 kilobytes.

    Left to itself the C library sometimes keeps them, too: where something small lies behind them by chance.
    """
    assert page_faults("keep") < 50
    assert any(page_faults("leave") > 50 for _ in range(8))


@pytest.mark.parametrize(("words", "chosen", "is_kept"), [
    (["python", "/bin/dlmkernels", "demo"], {}, True), (["python", "-m", "dlmkernels", "demo"], {}, True),
    (["python", "train.py"], {}, False), (["python", "-m", "dlmkernels"], {"GLIBC_TUNABLES": "x"}, False),
    (["python", "-m", "dlmkernels"], {"MALLOC_TRIM_THRESHOLD_": "1"}, False),
], ids=["script", "module", "other", "tunables", "variable"])  # fmt: skip
def test_in_a_process_of_our_own_alone(monkeypatch, words, chosen, is_kept):
    calls = []
    monkeypatch.setattr(host_memory, "keep", lambda: calls.append(1))
    monkeypatch.setattr(sys, "orig_argv", words)
    for name in host_memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    host_memory.choose()
    assert bool(calls) == is_kept


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert host_memory.keep() is False
