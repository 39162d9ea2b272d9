// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention_avx512.h"

namespace dlm::cpu::avx512 {

BlockAttentionKernels block_attention(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernels_of<FloatWords<BFloat16>>();
    case DType::kFloat16:
      return kernels_of<FloatWords<Float16>>();
    default:
      return kernels_of<FloatWords<float>>();
  }
}

}  // namespace dlm::cpu::avx512
