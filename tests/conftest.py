# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import on_device


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
