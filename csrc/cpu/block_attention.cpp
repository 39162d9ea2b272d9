// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention.h"

#include "cpu/isa.h"

namespace dlm::cpu {

void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  generic::scatter_new_rows(params, begin, end);  // a copy: no instruction set does better
}

const BlockAttentionKernels& block_attention_kernels() {
  static const BlockAttentionKernels kernels[] = {
      {generic::block_attention_work, generic::block_attention, generic::merge_block_attention},
      {avx512::block_attention_work, avx512::block_attention, avx512::merge_block_attention},
  };
  return kernels[int(isa())];
}

}  // namespace dlm::cpu
