# SPDX-License-Identifier: Apache-2.0
"""The one place that knows the namespace of the ops in C++.

Several builds can live in one process if each registers its ops under another name; such a build replaces this module
(`hub/`). The two names in it are those that Hub kernels have in theirs.
"""

import torch

ops = torch.ops.dlmkernels


def add_op_namespace_prefix(name: str) -> str:
    """The name of an op as `torch.library` takes it."""
    return f"dlmkernels::{name}"
