# SPDX-License-Identifier: Apache-2.0
"""Checks shared by the ops' fake implementations, which replace the kernels while torch.compile traces.

They reject what the kernels would reject.
"""

import torch


def check_devices(op, needed, optional):
    """Raise unless all tensors are on the device of the first required one, and those with rows have a dimension.

    With one tensor on the "meta" device no kernel would run, and so none of the kernel's own checks.
    """
    for name, value in needed.items():
        if value is None:
            raise RuntimeError(f"{op}: {name} must be a tensor; got None")
    for name, value in (needed | {"row_map": optional.get("row_map")}).items():
        if value is not None and value.dim() == 0:
            raise RuntimeError(f"{op}: {name} must have at least one dimension; got a tensor of shape []")
    anchor_name, anchor = next(iter(needed.items()))
    for name, value in (needed | optional).items():
        if isinstance(value, torch.Tensor) and value.device != anchor.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {anchor_name}; got {value.device}")


def check_gradients(op, **arguments):
    """Raise if a gradient is requested for one of the arguments.

    A compiled graph runs the kernels, and their checks, with gradients disabled, so the check has to be made here.
    """
    if not torch.is_grad_enabled():
        return
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"{op}: the op is not differentiable, but {name} requires a gradient; call it under torch.no_grad() or "
                f"pass {name}.detach()"
            )
