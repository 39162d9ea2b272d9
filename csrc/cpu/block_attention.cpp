// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"

namespace dlm::cpu {

void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  generic::scatter_new_rows(params, begin, end);  // a copy: no instruction set is faster
}

namespace {

using Kernels = BlockAttentionKernels (*)(DType);
constexpr ForIsa<Kernels> kTable[] = {
    {Isa::kGeneric, generic::block_attention},
#ifdef DLM_X86
    {Isa::kAvx2, avx2::block_attention},
    {Isa::kAvx512, avx512::block_attention},
    {Isa::kAvx512Bf16, avx512bf16::block_attention},
#endif
#ifdef DLM_AMX
    {Isa::kAmx, amx::block_attention},
#endif
};

// The instructions that multiply pairs of bf16 treat subnormal numbers as zeros, also in products
// and sums. A scale above this bound would make these significant, so the AVX-512 float kernels are
// used instead.
constexpr float kLargestScaleOfPairs = 0x1p64f;

}  // namespace

BlockAttentionKernels block_attention(const BlockAttentionParams& p) {
  const bool pairs = p.dtype == DType::kBFloat16 && std::abs(p.scale) <= kLargestScaleOfPairs;
  const Isa best = pairs ? isa() : std::min(isa(), Isa::kAvx512);
  return best_for(best, kTable).kernels(p.dtype);
}
Isa block_attention_isa(Isa isa) { return best_for(isa, kTable).isa; }

}  // namespace dlm::cpu
