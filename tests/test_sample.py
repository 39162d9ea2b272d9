# SPDX-License-Identifier: Apache-2.0
"""`pytest --sample N`, which `make check` uses."""

from pathlib import Path
from typing import NamedTuple

from conftest import sampled


class Item(NamedTuple):
    nodeid: str
    path: Path


def cases(file, test, n):
    return [Item(f"{file}::{test}[{i}]", Path(file)) for i in range(n)]


def test_some_cases_of_every_test():
    many, few, native = cases("test_a.py", "t", 9), cases("test_a.py", "T::t", 2), cases("test_simt.py", "t", 4)
    alone = [Item("test_a.py::u", Path("test_a.py"))]
    kept = sampled([*many, *alone, *few, *native], 3)
    assert kept == {many[0], many[3], many[6], *alone, *few, *native}
