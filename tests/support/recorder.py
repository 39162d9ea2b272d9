# SPDX-License-Identifier: Apache-2.0
"""Records the calls of a step with the memory they work on, and replays them: what a CUDA graph does, without a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

#: operations that hand a value to the host, or make a shape of one
READS = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class Recorder(TorchDispatchMode):
    """The calls made while it is entered."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS:
            raise AssertionError(f"{name} reads a value on the host, or makes a shape of one")
        if name == "lift_fresh" or (name == "_to_copy" and args[0].device != torch.empty(0).device):
            raise AssertionError(f"{name} brings new values from the host")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Make the same calls; what they return goes where it went when they were recorded."""
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for was, now in zip(tensors_of(out), tensors_of(new), strict=True):
                if was.data_ptr() != now.data_ptr():
                    assert was.shape == now.shape and was.dtype == now.dtype, f"{func} has another result"
                    was.copy_(now)

    def description(self):
        """What has to be the same every time: functions, numbers, shapes, and the memory that was there before."""
        made, lines = {}, []
        for number, (func, args, kwargs, out) in enumerate(self.calls):
            lines.append((str(func), *(describe(x, made) for x in tree_flatten((args, kwargs))[0])))
            for k, x in enumerate(tensors_of(out)):
                made.setdefault(x.untyped_storage().data_ptr(), (number, k))
        return lines


def tensors_of(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def describe(x, made):
    if not isinstance(x, torch.Tensor):
        return x
    storage = x.untyped_storage().data_ptr()
    return tuple(x.shape), x.stride(), x.storage_offset(), x.dtype, made.get(storage, storage)


class Player:
    """Runs a program: as it is, with the calls of each step recorded and compared, or by replaying those.

    Of each form there is one record; all later steps of this form have to be the same.
    """

    def __init__(self, program):
        self.program, self.records, self.replays = program, {}, 0

    def run(self, how):
        """Decode what the program's state holds; how many steps it took."""
        program, steps = self.program, 0
        step = {"as it is": program.step, "recorded": self.recorded, "replayed": self.replayed}[how]
        report = tuple(program.begin().tolist())
        while (form := program.form(report, 0)) is not None:
            report = tuple(step(program.widest(form)).tolist())
            steps += 1
        return steps

    def recorded(self, form):
        recorder = Recorder()
        with recorder:
            report = self.program.step(form)
        if form not in self.records:
            self.records[form] = recorder, report
            return report
        before, now = self.records[form][0].description(), recorder.description()
        for a, b in zip(before, now):
            assert a == b, f"another call in a step of form {form}:\n{a}\n{b}"
        assert len(before) == len(now), f"more or fewer calls in a step of form {form}"
        return report

    def replayed(self, form):
        if form not in self.records:  # of a number of rows that has not been there before
            return self.recorded(form)
        self.replays += 1
        recorder, report = self.records[form]
        recorder.replay()
        return report


class Replays:
    """Takes the place of `capture.CudaRecorder`: a recording is a list of calls, made again one by one.

    Recording a step runs it, which capturing a graph does not.
    """

    def __init__(self):
        self.recordings = []

    def record(self, step):
        recorder = Recorder()
        with recorder:
            report = step()
        recorder.report = report
        self.recordings.append(recorder)
        return recorder, True
