# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import torch

from dlmkernels import _C, info
from harness import Harness


def pytest_addoption(parser):
    shapes = parser.getgroup("shapes").addoption
    shapes("--full", action="store_true", help="the large shapes as well (minutes)")
    shapes("--smallest", action="store_true", help="one shape a benchmark: whether everything runs, not how fast")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.addoption("--seconds", type=float, default=0.7, help="time for each comparison (default 0.7)")
    parser.addoption("--comparisons", type=Path, help="append each comparison as a line of JSON when it ends")


def pytest_configure(config):
    option = config.getoption
    config.harness = Harness(option("--seconds"), option("--device"), option("--comparisons"))
    if option("--device") != "cpu":  # where the inputs are made; the harness takes it away before it times anything
        torch.set_default_device(option("--device"))


@pytest.fixture
def harness(request):
    return request.config.harness


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """A benchmark with an argument `case` takes its cases from QUICK and, with --full, FULL of its module.

    With --smallest it takes SMALLEST, or where there is none the first of QUICK.
    """
    if "case" in metafunc.fixturenames:
        module, option = metafunc.module, metafunc.config.getoption
        cases = [*module.QUICK, *(module.FULL if option("--full") else [])]
        if option("--smallest"):
            cases = getattr(module, "SMALLEST", module.QUICK[:1])
        metafunc.parametrize("case", cases, ids=str)


def pytest_collection_modifyitems(config, items):
    """--smallest leaves out what has no choice of shapes: those are large."""
    if config.getoption("--smallest"):
        items[:] = [item for item in items if "case" in item.fixturenames]


def machine(harness):
    """What ran the benchmarks, since a time means nothing without its processor: one or two lines."""
    if (floors := harness.floors) is not None:
        yield (
            f"{torch.cuda.get_device_name()}; torch {torch.__version__}; floors: "
            f"{floors.bytes_a_second() / 1e9:,.0f} GB/s, bf16 product {floors.flops_a_second / 1e12:,.0f} TFLOP/s"
        )
        return
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    yield (
        f"{info.processor()}, kernels: {_C.cpu_isa()}; torch {torch.__version__}, {threads} threads "
        f"on {os.cpu_count()} processors, load {load:.1f}"
    )
    if load > threads + 1:
        yield "other programs were running: compare the rows of a group, trust no single time"


def pytest_terminal_summary(terminalreporter, config):
    if not config.harness.comparisons:
        return
    terminalreporter.section("against the baselines")
    for line in (*machine(config.harness), *config.harness.table()):
        terminalreporter.write_line(line)
    for line in config.harness.passed_limits():
        terminalreporter.write_line(line, red=True)


def pytest_sessionfinish(session):
    if session.exitstatus == 0 and session.config.harness.passed_limits():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
