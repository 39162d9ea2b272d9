// SPDX-License-Identifier: Apache-2.0
// Block attention on the CPU: call scatter_new_rows on all its items, then the kernels' `attend` on
// the items of the returned work, then `merge` on its merge items.
#pragma once
#include <cstdint>

#include "common/params.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// Largest head dimension of the kernels, whose scratch is on the stack.
constexpr int64_t kMaxHeadDim = 512;

// Writes k_new and v_new into the cache. Items: B * G.
void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end);

// How a call is divided, determined only by its shape.
struct BlockAttentionWork {
  int64_t items, merge_items;
  int64_t workspace;  // size of BlockAttentionParams::workspace, in floats
};

struct BlockAttentionKernels {
  BlockAttentionWork (*work)(const BlockAttentionParams&);
  void (*attend)(const BlockAttentionParams&, int64_t begin, int64_t end);
  void (*merge)(const BlockAttentionParams&, int64_t begin, int64_t end);
  // Number of (query element, slot) pairs (B Q H D S) that a thread processes in about 50
  // microseconds: fewer do not justify a second thread.
  int64_t grain = int64_t(1) << 17;
};
// Kernels of the instruction set in use, or of a lower one if the scale requires its arithmetic.
BlockAttentionKernels block_attention(const BlockAttentionParams& params);
// The instruction set whose kernels are used when `isa` is in use.
Isa block_attention_isa(Isa isa);

namespace generic {
void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end);
BlockAttentionKernels block_attention(DType dtype);
}  // namespace generic
namespace avx2 {
BlockAttentionKernels block_attention(DType dtype);
}  // namespace avx2
namespace avx512 {
BlockAttentionKernels block_attention(DType dtype);
}  // namespace avx512
namespace avx512bf16 {
BlockAttentionKernels block_attention(DType dtype);
}  // namespace avx512bf16
namespace amx {
BlockAttentionKernels block_attention(DType dtype);
}  // namespace amx

}  // namespace dlm::cpu
