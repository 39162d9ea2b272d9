// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx512.h"
#define DLM_NAMESPACE avx512
#include "cpu/lm_head_confidence_vectors.h"

namespace dlm::cpu::avx512bf16 {

LmHeadKernels lm_head_confidence(DType dtype) {
  return dtype == DType::kBFloat16 ? avx512::kernels_of<avx512::PairProducts>()
                                   : avx512::lm_head_confidence(dtype);
}

}  // namespace dlm::cpu::avx512bf16
