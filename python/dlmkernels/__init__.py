# SPDX-License-Identifier: Apache-2.0
"""Fused kernels and parallel decoding loops for diffusion language models."""

import torch  # noqa: F401  (its library must be loaded before ours)

from . import _C  # registers torch.ops.dlmkernels
from . import fakes as _fakes  # noqa: F401

__version__ = _C.build_info()["version"]
