// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention_avx512.h"

namespace dlm::cpu::avx512 {

BlockAttentionKernels block_attention(DType dtype) { return kernels_for(dtype); }

}  // namespace dlm::cpu::avx512
