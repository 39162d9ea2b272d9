# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the native test programs of tests/cpp; see its README."""

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE, BUILD = ROOT / "tests" / "cpp", ROOT / "build" / "cpp"
FLAG = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
# The files of a program, by the names it knows them by: an op's tests, the faults planted in its kernels.
FILES = sorted(path.stem for path in (*SOURCE.glob("test_*.cpp"), *SOURCE.glob("must_fail/*.cpp")))
FILES.remove("test_amx")  # a program of its own
OF_THE_MACHINE = "test_simt"  # its kernels have no translation, no more than copies with planted faults have
TRANSLATED = [file for file in FILES if file != OF_THE_MACHINE and not (SOURCE / f"must_fail/{file}.mutants").exists()]


def call(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return done.stdout


@functools.cache
def lacks_sanitizer(flavour):
    """Can the compiler not build, or the machine not run, a program with the flavour's sanitizer?"""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text("int main() {}\n")
        command = [os.environ.get("CXX", "g++"), FLAG[flavour], str(source), "-o", str(program)]
        return any(subprocess.run(c, capture_output=True).returncode != 0 for c in (command, [str(program)]))


def needs_sanitizer(flavour):
    """Skip where the flavour's programs cannot be built or run."""
    if flavour != "plain" and lacks_sanitizer(flavour):
        pytest.skip(f"the compiler or the machine lacks {FLAG[flavour]}")


def needs_nvcc():
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")


@contextlib.contextmanager
def locked():
    """One process at a time configures and builds."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def configure(*options):
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not on PATH")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    with locked():
        if options or not (BUILD / "build.ninja").exists():
            call(["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja", *options])


@functools.cache
def build(target):
    """Path of a program; tests that need it at the same time wait for one build."""
    configure()
    with locked():
        call(["ninja", "-C", BUILD, "-j2", target])
    return BUILD / target


def list_files(program):
    return list(dict.fromkeys(line.split()[0] for line in call([program, "--list"]).splitlines()))


def run_file(program, file):
    """Run a file's tests; each prints a line `PASS file.test: n checks, t s`.

    A process a file: what ThreadSanitizer maps for fibers it never gives back, and Linux maps no more than 65,530.
    """
    done = subprocess.run([str(program), file], capture_output=True, text=True)
    print(done.stdout)
    results = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASS ", "FAIL "))]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert results and all(int(r[2]) > 0 for r in results), f"{file}: no kernel was run"
