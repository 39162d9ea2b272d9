// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_attention.cuh"

namespace dlm::cuda {

const char* unsupported_block_attention(const BlockAttentionParams& p) { return why_not_attend(p); }

int64_t block_attention_workspace(const BlockAttentionParams& p) { return attend_workspace(p); }

int run_block_attention(const BlockAttentionParams& p, float* workspace, void* stream) {
  return start_block_attention(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
