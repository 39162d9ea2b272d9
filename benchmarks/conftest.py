# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import torch

from dlmkernels import _C, info
from harness import Harness


def pytest_addoption(parser):
    shapes = parser.getgroup("shapes").addoption
    shapes("--full", action="store_true", help="also run the large shapes (takes minutes)")
    shapes("--smallest", action="store_true", help="one small shape per benchmark, to test that everything runs")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="device to run on (default cpu)")
    parser.addoption("--seconds", type=float, default=0.7, help="time for each comparison (default 0.7)")
    parser.addoption("--comparisons", type=Path, help="file to which each comparison is appended as a line of JSON")


def pytest_configure(config):
    option = config.getoption
    config.harness = Harness(option("--seconds"), option("--device"), option("--comparisons"))
    if option("--device") != "cpu":  # device of the inputs; the harness resets it before timing anything
        torch.set_default_device(option("--device"))


@pytest.fixture
def harness(request):
    return request.config.harness


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """Run a benchmark with an argument `case` for the cases in QUICK and, with --full, in FULL of its module.

    With --smallest, the cases are SMALLEST or, if there is no such list, the first of QUICK.
    """
    if "case" in metafunc.fixturenames:
        module, option = metafunc.module, metafunc.config.getoption
        cases = [*module.QUICK, *(module.FULL if option("--full") else [])]
        if option("--smallest"):
            cases = getattr(module, "SMALLEST", module.QUICK[:1])
        metafunc.parametrize("case", cases, ids=str)


def pytest_collection_modifyitems(config, items):
    """With --smallest, deselect benchmarks without a choice of shapes, because these are large."""
    if config.getoption("--smallest"):
        items[:] = [item for item in items if "case" in item.fixturenames]


def machine(harness):
    """Yield one or two lines that describe the machine, without which times mean nothing."""
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
        yield "other programs were running: only compare rows within a group, and do not trust single times"


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
