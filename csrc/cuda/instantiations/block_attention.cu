// SPDX-License-Identifier: Apache-2.0
#include "cuda/block_attention.cuh"

namespace dlm::cuda {

extern template cudaError_t start_attend<float, 32>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 256>(const AttendParams&, cudaStream_t);

const char* unsupported_block_attention(const BlockAttentionParams& p) { return why_not_attend(p); }

int64_t block_attention_workspace(const BlockAttentionParams& p) { return attend_workspace(p); }

int run_block_attention(const BlockAttentionParams& p, float* workspace, void* stream) {
  return start_block_attention(p, workspace, static_cast<cudaStream_t>(stream));
}

}  // namespace dlm::cuda
