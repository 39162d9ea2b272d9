// SPDX-License-Identifier: Apache-2.0
// The library's kernel, and versions of it with one fault each.
#pragma once
#include "cpu/block_attention.h"

namespace amx {

enum class KernelFault { kNone, kTailNotPadded, kInfiniteTimesZero };

dlm::cpu::BlockAttentionKernels kernels(KernelFault fault = KernelFault::kNone);

}  // namespace amx
