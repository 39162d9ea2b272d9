# SPDX-License-Identifier: Apache-2.0
"""What the host learns while the step loop runs does not depend on when it arrives.

Of a GPU there is a model: streams of work that is done late, events that say how far a stream has come.
"""

import types

import pytest
import torch

from dlmkernels.decoding import poll
from dlmkernels.decoding.poll import OpenCount


class Stream:
    """Work in order; done at once, or when something waits for it."""

    def __init__(self, is_fast):
        self.is_fast, self.waiting = is_fast, []

    def put(self, work):
        self.waiting.append(work)
        if self.is_fast:
            self.finish(len(self.waiting))

    def finish(self, count):
        for work in self.waiting[:count]:
            work()
        del self.waiting[:count]


class Event:
    def record(self, stream):
        self.stream, self.done = stream, False
        stream.put(self.mark)

    def mark(self):
        self.done = True

    def query(self):
        return self.done

    def synchronize(self):
        while not self.done:
            self.stream.finish(1)


class Counts:
    """A tensor on a device of the model: its values are there when its stream has come so far."""

    shape, dtype = (2,), torch.int64

    def __init__(self, gpu, index, values):
        self.gpu, self.device, self.values = gpu, torch.device("cuda", index), values


class Pinned:
    """Memory of the host that a device writes to."""

    values = (-1, -1)  # what was there before

    def copy_(self, counts, non_blocking):
        assert non_blocking
        counts.gpu.streams[counts.device.index].put(lambda: setattr(self, "values", counts.values))

    def tolist(self):
        return list(self.values)


class Gpus:
    """As much of `torch` as a count's way to the host needs, for two devices of which the first is current."""

    def __init__(self, is_fast):
        self.streams = [Stream(is_fast), Stream(is_fast)]
        self.cuda = types.SimpleNamespace(Event=Event, current_stream=self.current_stream)

    def current_stream(self, device):
        return self.streams[device.index]

    def empty(self, shape, *, dtype, device, pin_memory):
        assert device == "cpu" and pin_memory and tuple(shape) == Counts.shape
        return Pinned()


def widths(monkeypatch, is_fast, index=1, steps=6):
    """What a loop is told before each step, and how many counts behind that is."""
    gpu = Gpus(is_fast)
    monkeypatch.setattr(poll, "torch", gpu)
    counts = OpenCount(32, 64)
    told = []
    for step in range(steps):
        counts.submit(Counts(gpu, index, (30 - step, 60 - step)))
        told.append((*counts.latest(), counts.behind))
    return told


@pytest.mark.parametrize("index", [0, 1])
def test_the_count_of_a_fixed_number_of_steps_ago(index, monkeypatch):
    """However fast the device is; and waited for on the device that makes it, not on the current one."""
    expected = [(32, 64, 1), *((30 - step, 60 - step, 1) for step in range(5))]
    assert widths(monkeypatch, True, index) == expected
    assert widths(monkeypatch, False, index) == expected


def test_a_device_stays_busy_while_the_host_waits(monkeypatch):
    gpu = Gpus(is_fast=False)
    monkeypatch.setattr(poll, "torch", gpu)
    counts = OpenCount(8, 8)
    for step in range(4):
        counts.submit(Counts(gpu, 0, (step, step)))
        counts.latest()
        assert len(gpu.streams[0].waiting) == 2  # the newest count's copy and its event


def test_on_the_cpu_the_newest(monkeypatch):
    counts = OpenCount(8, 9)
    assert counts.latest() == (8, 9) and counts.behind == 0
    values = torch.tensor([5, 6])
    counts.submit(values)
    values.zero_()
    assert counts.latest() == (5, 6) and counts.behind == 0
    counts.submit(torch.tensor([3, 4]))
    counts.submit(torch.tensor([1, 2]))
    assert counts.behind == 2 and counts.latest() == (1, 2) and counts.latest() == (1, 2)


def test_an_event_on_another_stream_is_noticed(monkeypatch):
    """The model tells a count that was waited for from one that was not."""
    gpu = Gpus(is_fast=False)
    monkeypatch.setattr(poll, "torch", gpu)
    landing = poll.Landing(Counts(gpu, 1, (4, 4)))
    landing._event.record(gpu.streams[0])
    assert landing.read() == (-1, -1)
