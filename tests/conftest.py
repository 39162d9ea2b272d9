# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest
import torch

import on_device

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the tests that need it are skipped
    pass
else:
    # fixtures that are the same for every example
    quiet = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
    settings.register_profile("ci", derandomize=True, database=None, max_examples=12, **quiet)
    settings.register_profile("long", max_examples=2000, print_blob=True, **quiet)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--device", help="run the ops there: cuda, or cpu to test the way there and back")
    parser.addoption("--sample", type=int, metavar="N", help="of each test's cases run N at most, spread over all")


# Each of their tests runs a program or a compiler: they share nothing within Python.
NATIVE = ("test_simt.py", "test_translated_ptx.py", "test_gpu_programs.py", "test_nvcc.py")


def pytest_collection_modifyitems(config, items):
    """The native tests, which take longest, first."""
    items.sort(key=lambda item: item.path.name not in NATIVE)
    if sample := config.getoption("--sample"):
        kept = sampled(items, sample)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def sampled(items, most):
    """The items, but of those that differ in their parameters alone no more than `most`; native tests all the same."""
    cases = {}
    for item in items:
        test = item.nodeid if item.path.name in NATIVE else item.nodeid.partition("[")[0]
        cases.setdefault(test, []).append(item)
    kept = set()
    for tests in cases.values():
        step = max(1, len(tests) / most)
        kept.update(tests[int(step * i)] for i in range(min(most, len(tests))))
    return kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, a file at a time to a worker, since its tests share models; native tests one by one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).name in NATIVE else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device(request, monkeypatch):
    device = request.config.getoption("--device")
    if device and not request.node.get_closest_marker("on_cpu"):
        on_device.install(monkeypatch, device)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(name, make)`: the checkpoint of a family and the model loaded from it, once."""
    import checkpoints
    import dlmkernels as dk

    done = {}

    def get(name, make):
        if name not in done:
            checkpoint = make()
            folder = checkpoint.write(tmp_path_factory.mktemp(name))
            done[name] = checkpoint, dk.load(folder, family=checkpoints.UNNAMED.get(name))
        return done[name]

    return get
