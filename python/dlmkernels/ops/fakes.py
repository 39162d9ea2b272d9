# SPDX-License-Identifier: Apache-2.0
"""Checks of the ops' fakes, which stand in for the kernels while torch.compile traces: what kernels refuse, they do."""

import torch


def check_devices(op, needed, optional):
    """Refuse tensors on several devices: with one of them on "meta" no kernel, and so none of its checks, would run.

    The first of those that are needed is the one on whose device all others must be.
    """
    for name, value in needed.items():
        if value is None:
            raise RuntimeError(f"{op}: {name} must be a tensor; got None")
    anchor_name, anchor = next(iter(needed.items()))
    for name, value in (needed | optional).items():
        if isinstance(value, torch.Tensor) and value.device != anchor.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {anchor_name}; got {value.device}")


def check_gradients(op, **arguments):
    """Refuse what a gradient is asked for: a compiled graph runs the kernels, and their checks, without gradients."""
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"{op}: the op is not differentiable, but {name} requires a gradient; call it under torch.no_grad() or "
                f"pass {name}.detach()"
            )
