// SPDX-License-Identifier: Apache-2.0
#include "cpu/block_attention.h"

namespace dlm::cpu {

void scatter_new_rows(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  generic::scatter_new_rows(params, begin, end);  // a copy: no instruction set does better
}

int64_t block_attention_items(const BlockAttentionParams& params) {
  return generic::block_attention_items(params);
}

void block_attention(const BlockAttentionParams& params, int64_t begin, int64_t end) {
  generic::block_attention(params, begin, end);
}

}  // namespace dlm::cpu
