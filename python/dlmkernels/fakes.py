# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of every op's outputs, for torch.compile and fake tensors; same order as csrc/torch/ops.cpp."""

import torch
