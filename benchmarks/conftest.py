# SPDX-License-Identifier: Apache-2.0
import os
import platform

import pytest
import torch

from dlmkernels import _C
from harness import Harness


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the large shapes as well (minutes)")
    parser.addoption("--seconds", type=float, default=0.7, help="time for each comparison (default 0.7)")


def pytest_configure(config):
    config.harness = Harness(config.getoption("--seconds"))


@pytest.fixture
def harness(request):
    return request.config.harness


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """A benchmark with an argument `case` takes its cases from QUICK and, with --full, FULL of its module."""
    if "case" in metafunc.fixturenames:
        module = metafunc.module
        cases = [*module.QUICK, *(module.FULL if metafunc.config.getoption("--full") else [])]
        metafunc.parametrize("case", cases, ids=str)


def pytest_terminal_summary(terminalreporter, config):
    if not config.harness.comparisons:
        return
    terminalreporter.section("against the baselines")
    load = os.getloadavg()[0]
    terminalreporter.write_line(
        f"{platform.machine()}, kernels: {_C.cpu_isa()}; torch {torch.__version__}, {torch.get_num_threads()} threads "
        f"on {os.cpu_count()} processors, load {load:.1f}"
    )
    if load > torch.get_num_threads() + 1:
        terminalreporter.write_line("other programs were running: compare the rows of a group, trust no single time")
    for line in config.harness.table():
        terminalreporter.write_line(line)
