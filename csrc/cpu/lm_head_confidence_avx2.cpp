// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx2.h"
#define DLM_NAMESPACE avx2
#include "cpu/lm_head_confidence_vectors.h"

namespace dlm::cpu::avx2 {

LmHeadKernels lm_head_confidence(DType dtype) { return kernels_for(dtype); }

}  // namespace dlm::cpu::avx2
