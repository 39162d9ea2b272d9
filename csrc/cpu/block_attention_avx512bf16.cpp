// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention_avx512.h"

namespace dlm::cpu::avx512bf16 {

BlockAttentionKernels block_attention(DType dtype) {
  return dtype == DType::kBFloat16 ? avx512::kernels_of<avx512::PairWords>()
                                   : avx512::block_attention(dtype);
}

}  // namespace dlm::cpu::avx512bf16
