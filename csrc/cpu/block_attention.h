// SPDX-License-Identifier: Apache-2.0
// Block attention on the CPU: run scatter_new_rows over all its items, then the kernels' attend
// over the items that their work names, then merge over its merge items.
#pragma once
#include <cstdint>

#include "common/params.h"

namespace dlm::cpu {

enum class Isa : int;  // cpu/isa.h

// Longest head dimension of the kernels: their scratch lies on the stack.
constexpr int64_t kMaxHeadDim = 512;

// Writes k_new and v_new into the cache. Items: B * G.
void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end);

// How a call is divided, by its shape alone.
struct BlockAttentionWork {
  int64_t items, merge_items;
  int64_t workspace;  // floats that BlockAttentionParams::workspace must have room for
};

struct BlockAttentionKernels {
  BlockAttentionWork (*work)(const BlockAttentionParams&);
  void (*attend)(const BlockAttentionParams&, int64_t begin, int64_t end);
  void (*merge)(const BlockAttentionParams&, int64_t begin, int64_t end);
  // Elements of queries times slots (B Q H D S) that a thread does in some 50 microseconds: fewer
  // are not worth a second one.
  int64_t grain = int64_t(1) << 17;
};
// Of the instruction set in use, or of a lower one whose arithmetic the scale needs.
BlockAttentionKernels block_attention(const BlockAttentionParams& params);
// Whose kernels are used where `isa` is in use.
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
