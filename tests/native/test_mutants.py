# SPDX-License-Identifier: Apache-2.0
"""The lists of faults that are planted in copies of the CUDA kernels: tests/cpp/must_fail/*.mutants."""

import importlib.util

import pytest

from simt_programs import ROOT, SOURCE

FOLDER = SOURCE / "must_fail"
LISTS = sorted(FOLDER.glob("*.mutants"))


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", FOLDER / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_each_can_be_planted(mutants, path):
    copies, listed = mutants.parse(path.read_text())
    text = mutants.header(copies, listed, ROOT / "csrc")
    assert len(listed) >= 5 and all(f"namespace dlm::cuda::mutants::{name} {{" in text for name, *_ in listed)
    assert (FOLDER / f"{path.stem}.cpp").exists()


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_kernels_with_a_list_hold_none(mutants, path):
    copies, _ = mutants.parse(path.read_text())
    for file in copies:
        assert "ault::k" not in (ROOT / "csrc" / file).read_text(), (
            f"{file} has a planted fault; list it in {path.name}"
        )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sort.cuh").write_text(
        "#pragma once\n#include <cmath>\nnamespace dlm::cuda {\nint a = 1;\nint b = 1;\n}\n"
    )
    (tmp_path / "op.cuh").write_text('#include "sort.cuh"\nnamespace dlm::cuda {\nint c =\n    a;\n}\n')
    return tmp_path


COPIES = "copies sort.cuh op.cuh\n"


def test_what_is_made(mutants, folder):
    text = mutants.header(
        *mutants.parse(COPIES + "mutant x: value asan race\n@@ op.cuh\n-int c = a;\n+int c = b;\n"), folder
    )
    assert text.count("int c =\n    a;") == text.count("int c = b;") == 1 and text.count("int a = 1;") == 2
    assert text.count("#include") == 1 and 'ROW(none, "-", "-", "-") ROW(x, "value", "asan", "race")' in text


def test_a_sanitizer_gets_what_it_notices_otherwise(mutants):
    text = COPIES + "".join(
        f"mutant {name}: {kinds}\n@@ op.cuh\n-a\n"
        for name, kinds in [("x", "value value race"), ("y", "value asan value"), ("z", "? ? race"), ("w", "? ? ?")]
    )
    _, listed = mutants.parse(text)
    got = {flavour: [m.name for m in mutants.told_apart_by(flavour, listed)] for flavour in ("plain", "asan", "tsan")}
    assert got == {"plain": ["x", "y", "z", "w"], "asan": ["y"], "tsan": ["x", "z"]}


@pytest.mark.parametrize(
    ("hunk", "says"),
    [
        ("@@ op.cuh\n-int d = a;\n", "mutant x: 0 places in op.cuh"),
        ("@@ sort.cuh\n-= 1;\n+= 2;\n", "mutant x: 2 places in sort.cuh"),
        ("@@ sort.cuh\n int a = 1;\n", "mutant x changes nothing"),
        ("", "mutant x changes nothing"),
        ("@@ block.cuh\n-a\n", "mutant x: block.cuh is not among the copies"),
        ("@@ op.cuh\n+int d;\n", "mutant x: 0 places"),
        ("mutant x: value value\n", "line 3 is neither"),
        ("@@ op.cuh\n-a;\nmutant x: value value value\n@@ op.cuh\n-a;\n", "two mutants have one name"),
    ],
)
def test_what_cannot_be_planted_is_refused(mutants, folder, hunk, says):
    with pytest.raises(ValueError, match=says):
        mutants.header(*mutants.parse(f"{COPIES}mutant x: value value value\n{hunk}"), folder)
