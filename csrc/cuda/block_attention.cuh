// SPDX-License-Identifier: Apache-2.0
// Which arguments block attention accepts, and which kernel it uses: see
// block_attention_launch.cuh.
#pragma once
#include "cuda/block_attention.h"
#include "cuda/block_attention_launch.cuh"

namespace dlm::cuda {

inline const char* why_not_attend(const BlockAttentionParams& p) {
  const int64_t in_16_bytes = p.dtype == DType::kFloat32 ? 4 : 8;
  if (p.D % in_16_bytes != 0 || p.D > 512) {
    return "q must have a head dimension that is at most 512 and a multiple of 8 (4 in float32)";
  }
  if (p.S > INT32_MAX - 4096) return "k_cache must have fewer than 2^31 - 4096 slots";
  if (p.Q * p.H > INT32_MAX / 2) return "q must have fewer than 2^30 rows of heads per batch row";
  const AttendParams attend = attend_params(p, nullptr);
  if (p.B * p.G * attend.row_tiles * (attend.spread ? attend.splits : 1) > INT32_MAX / 2) {
    return "q must have a smaller batch: the grid would exceed 2^30 blocks";
  }
  const auto aligned = [&](const void* data, const int64_t* stride, int64_t B, int64_t rows,
                           int64_t heads) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           (B == 1 || stride[0] % in_16_bytes == 0) &&
           (rows == 1 || stride[1] % in_16_bytes == 0) &&
           (heads == 1 || stride[2] % in_16_bytes == 0);
  };
  if (!aligned(p.q, p.q_stride, p.B, p.Q, p.H)) {
    return "q must start every row at a multiple of 16 bytes";
  }
  if (p.k_new && !aligned(p.k_new, p.k_new_stride, p.B, p.K, p.G)) {
    return "k_new must start every row at a multiple of 16 bytes";
  }
  if (p.v_new && !aligned(p.v_new, p.v_new_stride, p.B, p.K, p.G)) {
    return "v_new must start every row at a multiple of 16 bytes";
  }
  if (!aligned(p.k_cache, p.k_cache_stride, p.C, p.S, p.G)) {
    return "k_cache must start every row at a multiple of 16 bytes";
  }
  if (!aligned(p.v_cache, p.v_cache_stride, p.C, p.S, p.G)) {
    return "v_cache must start every row at a multiple of 16 bytes";
  }
  return nullptr;
}

#ifndef DLM_SIMT
extern template cudaError_t start_attend<float, 32>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<float, 512>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<BFloat16, 512>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 64>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 128>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 256>(const AttendParams&, cudaStream_t);
extern template cudaError_t start_attend<Float16, 512>(const AttendParams&, cudaStream_t);
#endif

template <class T>
cudaError_t start_by_head_dim(const AttendParams& p, cudaStream_t stream) {
  switch (padded_head_dim(p.op)) {
    case 32:
      if constexpr (std::is_same_v<T, float>) return start_attend<T, 32>(p, stream);
      return cudaErrorInvalidValue;
    case 64:
      return start_attend<T, 64>(p, stream);
    case 128:
      return start_attend<T, 128>(p, stream);
    case 256:
      return start_attend<T, 256>(p, stream);
    default:
      return start_attend<T, 512>(p, stream);
  }
}

inline cudaError_t start_block_attention(const AttendParams& p, float* workspace,
                                         cudaStream_t stream) {
  const cudaError_t error = start_scatter(p, workspace, stream);
  if (error != cudaSuccess || p.op.Q == 0) return error;
  switch (p.op.dtype) {
    case DType::kFloat32:
      return start_by_head_dim<float>(p, stream);
    case DType::kBFloat16:
      return start_by_head_dim<BFloat16>(p, stream);
    default:
      return start_by_head_dim<Float16>(p, stream);
  }
}
inline cudaError_t start_block_attention(const BlockAttentionParams& op, float* workspace,
                                         cudaStream_t stream) {
  return start_block_attention(attend_params(op, workspace), workspace, stream);
}

}  // namespace dlm::cuda
