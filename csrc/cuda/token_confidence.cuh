// SPDX-License-Identifier: Apache-2.0
// Token, probability and statistics of each row of logits: see token_confidence_launch.cuh.
#pragma once
#include "cuda/token_confidence.h"
#include "cuda/token_confidence_launch.cuh"

namespace dlm::cuda {

inline const char* why_not_token_confidence(const TokenConfidenceParams& p) {
  // Ids and blocks are counted in 32 bits, and a chunk may extend beyond the last id.
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  if (p.N * (chunks_of(p) / kScanChunks + 1) > 0x7fffffff) return "logits must have fewer rows";
  return nullptr;
}

#ifndef DLM_SIMT
// Instantiated in separate files, for parallel builds.
extern template cudaError_t start_rows<float>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<BFloat16>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<Float16>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_scan<float, false>(const ConfidenceLaunch&, cudaStream_t);
extern template cudaError_t start_scan<BFloat16, false>(const ConfidenceLaunch&, cudaStream_t);
extern template cudaError_t start_scan<Float16, false>(const ConfidenceLaunch&, cudaStream_t);
#endif

// `workspace` has workspace_of(p) bytes, aligned to 16.
inline cudaError_t start_token_confidence(const TokenConfidenceParams& p, void* workspace,
                                          cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  if (p.dtype == DType::kFloat32) return start_as<float>(p, workspace, stream);
  if (p.dtype == DType::kFloat16) return start_as<Float16>(p, workspace, stream);
  return start_as<BFloat16>(p, workspace, stream);
}

}  // namespace dlm::cuda
