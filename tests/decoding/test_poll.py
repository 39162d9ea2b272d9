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
    """Of several records the last one counts."""

    records = done = 0

    def record(self, stream):
        self.records += 1
        self.stream, number = stream, self.records
        stream.put(lambda: setattr(self, "done", number))

    def query(self):
        return self.done == self.records

    def synchronize(self):
        while not self.query():
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
        self.streams, self.buffers = [Stream(is_fast), Stream(is_fast)], []
        self.cuda = types.SimpleNamespace(Event=Event, current_stream=self.current_stream)

    def current_stream(self, device):
        return self.streams[device.index]

    def empty(self, shape, *, dtype, device, pin_memory):
        assert device == "cpu" and pin_memory and tuple(shape) == Counts.shape
        self.buffers.append(Pinned())
        return self.buffers[-1]


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
    counts = Counts(gpu, 1, (4, 4))
    ring = poll.Ring(counts, 2)
    ring.put(1, counts)
    ring._events[1].record(gpu.streams[0])
    assert ring.read(1) == (-1, -1)


@pytest.mark.parametrize("is_fast", [False, True])
def test_any_number_of_steps_between_two_looks(is_fast, monkeypatch):
    """What is read is always the report before the newest, through the same two buffers."""
    gpu = Gpus(is_fast)
    monkeypatch.setattr(poll, "torch", gpu)
    counts, step = OpenCount(99, 99), 0
    for made in (1, 3, 1, 7, 2, 2):
        before = (counts.known, counts.behind)
        for k in range(made):
            step += 1
            counts.submit(Counts(gpu, 0, (step, -step)))
            assert (counts.known, counts.behind) == (before[0], before[1] + k + 1)
        expected = (step - 1, 1 - step) if step > 1 else (99, 99)
        assert counts.latest() == expected == counts.known and counts.behind == 1
    assert len(gpu.buffers) == 2


def test_buffers_are_allocated_once():
    class Late(OpenCount):
        lag_on = {"cpu": 3}

    counts, report = Late(0, 0), torch.ones(2, dtype=torch.int32)
    counts.submit(report)
    places = {buffer.data_ptr() for buffer in counts._ring._buffers}
    for step in range(2, 20):
        counts.submit(report.fill_(step))
        assert counts.latest() == ((step - 3,) * 2 if step > 3 else (0, 0)) and counts.behind == min(step, 3)
    assert {buffer.data_ptr() for buffer in counts._ring._buffers} == places and len(places) == 4
