# SPDX-License-Identifier: Apache-2.0
import os
import platform

import pytest
import torch

from dlmkernels import _C
from harness import Harness


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the large shapes as well (minutes)")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.addoption("--seconds", type=float, default=0.7, help="time for each comparison (default 0.7)")


def pytest_configure(config):
    config.harness = Harness(config.getoption("--seconds"), config.getoption("--device"))
    if config.getoption("--device") != "cpu":  # a default device costs every call of torch some microseconds
        torch.set_default_device(config.getoption("--device"))


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


def machine(harness):
    """What ran the benchmarks, in one or two lines."""
    if (floors := harness.floors) is not None:
        yield (
            f"{torch.cuda.get_device_name()}; torch {torch.__version__}; floors: copy "
            f"{floors.bytes_a_second / 1e9:,.0f} GB/s, bf16 product {floors.flops_a_second / 1e12:,.0f} TFLOP/s"
        )
        return
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    yield (
        f"{platform.machine()}, kernels: {_C.cpu_isa()}; torch {torch.__version__}, {threads} threads "
        f"on {os.cpu_count()} processors, load {load:.1f}"
    )
    if load > threads + 1:
        yield "other programs were running: compare the rows of a group, trust no single time"


def pytest_terminal_summary(terminalreporter, config):
    if not config.harness.comparisons:
        return
    terminalreporter.section("against the baselines")
    for line in machine(config.harness):
        terminalreporter.write_line(line)
    for line in config.harness.table():
        terminalreporter.write_line(line)
