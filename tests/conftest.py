# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import on_device


def pytest_addoption(parser):
    parser.addoption("--device", help="run the ops there: cuda, or cpu to test the way there and back")


def pytest_collection_modifyitems(items):
    """The longest tests first; they share a build folder, so that one worker runs them all, beside the others."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device(request, monkeypatch):
    device = request.config.getoption("--device")
    if device and not request.node.get_closest_marker("on_cpu"):
        on_device.install(monkeypatch, device)
