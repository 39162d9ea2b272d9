// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx2.h"
#define DLM_NAMESPACE avx2
#include "cpu/block_attention_vectors.h"

namespace dlm::cpu::avx2 {

BlockAttentionKernels block_attention(DType dtype) { return kernels_for(dtype); }

}  // namespace dlm::cpu::avx2
