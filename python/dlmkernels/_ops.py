# SPDX-License-Identifier: Apache-2.0
"""The only module that names the C++ namespace of the ops.

Several builds can coexist in one process if each registers its ops under a different name; such a build replaces this
module (`hub/`). Its two names are the ones that Hub kernels use for this purpose.
"""

import torch

ops = torch.ops.dlmkernels


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an op, as `torch.library` takes it."""
    return f"dlmkernels::{name}"
