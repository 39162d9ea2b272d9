# SPDX-License-Identifier: Apache-2.0
"""Records what a loop reads on the host."""

from torch.utils._python_dispatch import TorchDispatchMode

from dlmkernels.decoding.programs import base


class HostReads(TorchDispatchMode):
    """Records every operation that hands a tensor's value to the host."""

    READS = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def reads_between_polls(monkeypatch, what=1):
    """What the loop reads between a count that it takes and the next that it hands over; and the counts.

    The loop goes on as long as the count's number `what` is above 0. The counts travel by themselves on a GPU.
    """
    reads, counts = HostReads(), []

    class Counts(base.OpenCount):
        def latest(self):
            counts.append(super().latest())
            if counts[-1][what] > 0:
                reads.__enter__()
            return counts[-1]

        def submit(self, values):
            if counts:
                reads.__exit__(None, None, None)
            super().submit(values)

    monkeypatch.setattr(base, "OpenCount", Counts)
    return reads, counts
