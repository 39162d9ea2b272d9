# SPDX-License-Identifier: Apache-2.0
import os

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


def pytest_collection_modifyitems(items):
    """The native tests, which take longest, first: with a worker for a file, each gets one."""
    items.sort(key=lambda item: item.path.name not in ("test_simt.py", "test_translated_ptx.py"))


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
