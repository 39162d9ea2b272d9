// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention.h"

#include "cpu/isa.h"

namespace dlm::cpu {

void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  generic::scatter_new_rows(params, begin, end);  // a copy: no instruction set does better
}

BlockAttentionKernels block_attention(DType dtype) {
  switch (isa()) {
#ifdef DLM_AMX
    case Isa::kAmx:
      return amx::block_attention(dtype);
#endif
#ifdef DLM_X86
    case Isa::kAvx512Bf16:
      return avx512bf16::block_attention(dtype);
    case Isa::kAvx512:
      return avx512::block_attention(dtype);
    case Isa::kAvx2:
      return avx2::block_attention(dtype);
#endif
    default:
      return generic::block_attention(dtype);
  }
}

}  // namespace dlm::cpu
