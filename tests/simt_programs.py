# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the native test programs of tests/cpp; see its README."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE, BUILD = ROOT / "tests" / "cpp", ROOT / "build" / "cpp"
FLAG = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}


def call(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return done.stdout


def needs_sanitizer(flavour, tmp_path):
    """Skip unless the compiler can build and the machine can run a program with the flavour's sanitizer."""
    if flavour == "plain":
        return
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() {}\n")
    compiler = os.environ.get("CXX", "g++")
    built = subprocess.run([compiler, FLAG[flavour], str(source), "-o", str(program)], capture_output=True)
    if built.returncode != 0 or subprocess.run([str(program)], capture_output=True).returncode != 0:
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")


@contextlib.contextmanager
def locked():
    """One process at a time configures and builds."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def configure():
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not on PATH")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    with locked():
        if not (BUILD / "build.ninja").exists():
            call(["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja"])


def build(target):
    configure()
    with locked():
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
