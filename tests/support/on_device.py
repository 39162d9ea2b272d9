# SPDX-License-Identifier: Apache-2.0
"""Runs an op on another device than its arguments': `pytest tests --device cuda` turns the tests of the ops on it.

The arguments travel with their whole storage, so that strides, offsets, aliases and what lies between rows are the
same there; everything the op may have written comes back. References and comparisons stay on the CPU.
"""

import functools

import torch

from dlmkernels import ops

# Every op there is, by its schema.
NAMES = sorted(
    {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlmkernels::")}
)


class Journey:
    """Moves tensors to a device and home again, each storage once."""

    def __init__(self, device):
        self.device = device
        self.storages = {}

    def there(self, value):
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return type(value)(self.there(v) for v in value)
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        at_home = value.untyped_storage()
        _, away = self.storages.setdefault(at_home.data_ptr(), (at_home, self._copy(at_home)))
        moved = torch.empty(0, dtype=value.dtype, device=self.device)
        return moved.set_(away, value.storage_offset(), value.size(), value.stride())

    def _copy(self, storage):
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage)
        return bytes_.to(self.device, copy=True).untyped_storage()

    def back(self):
        for at_home, away in self.storages.values():
            at_home.copy_(away)


def home(t):
    return t if t.is_meta else t.cpu()


def on(device, function):
    """`function`, run on `device`: arguments in CPU memory in, results in CPU memory out."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        journey = Journey(device)
        args = [journey.there(v) for v in args]
        kwargs = {name: journey.there(v) for name, v in kwargs.items()}
        out = function(*args, **kwargs)
        journey.back()
        return type(out)(*map(home, out)) if isinstance(out, tuple) else home(out)

    return run


def install(monkeypatch, device):
    for name in NAMES:
        monkeypatch.setattr(ops, name, on(device, getattr(ops, name)))
