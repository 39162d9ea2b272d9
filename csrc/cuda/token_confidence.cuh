// SPDX-License-Identifier: Apache-2.0
// Token, probability and statistics of each row of logits. A scan describes a row chunk by chunk
// (token_confidence_scan.cuh); where rows are filtered, a search finds their floors
// (token_confidence_filter.cuh), and where the statistics are about what is kept, chunks that reach
// the floor are scanned again; a block then finishes each row (token_confidence_finish.cuh). A
// chunk is described by itself, so a row's bits do not depend on the batch. Other rows than filtered
// ones are read once: V elements. Needs sm_80.
#pragma once
#include "cuda/token_confidence.h"
#include "cuda/token_confidence_filter.cuh"
#include "cuda/token_confidence_finish.cuh"
#include "cuda/token_confidence_scan.cuh"

namespace dlm::cuda {

inline bool is_adjusted(const TokenConfidenceParams& p) { return p.uncond_logits || p.bias; }
inline bool may_filter(const TokenConfidenceParams& p) {
  return (p.top_k || p.top_p) && (p.temperature || p.distribution == Distribution::kFiltered);
}
inline int64_t chunks_of(const TokenConfidenceParams& p) {
  return (p.V + kRaceChunk - 1) / kRaceChunk;
}
// Searches first: they are aligned to 16 bytes.
inline int64_t searches_of(const TokenConfidenceParams& p) { return may_filter(p) ? p.N : 0; }
inline int64_t workspace_of(const TokenConfidenceParams& p) {
  return searches_of(p) * int64_t(sizeof(FloorSearch)) +
         p.N * 4 * chunks_of(p) * int64_t(sizeof(float));
}
inline const char* why_not_token_confidence(const TokenConfidenceParams& p) {
  // Ids and blocks are counted in 32 bits, and a chunk may reach beyond the last id.
  if (p.V > 0x7fff0000) return "logits must have fewer than 2^31 - 2^16 columns";
  if (p.N * (chunks_of(p) / kScanChunks + 1) > 0x7fffffff) return "logits must have fewer rows";
  return nullptr;
}

template <class T, bool adjusted>
cudaError_t start_scan(const ConfidenceLaunch& job, cudaStream_t stream) {
  const uint32_t blocks = (job.chunks + kScanChunks - 1) / kScanChunks;
  return launch(scan_chunks_kernel<T, adjusted>, dim3(uint32_t(job.p.N) * blocks),
                dim3(kScanThreads), 0, stream, job);
}

template <class T>
cudaError_t start_rows(ConfidenceLaunch job, cudaStream_t stream) {
  const auto scan = [&] {
    return is_adjusted(job.p) ? start_scan<T, true>(job, stream)
                              : start_scan<T, false>(job, stream);
  };
  cudaError_t error = scan();
  if (may_filter(job.p)) {
    if (error == cudaSuccess) error = start_floor_searches<T>(job, stream);
    job.refining = job.p.distribution == Distribution::kFiltered;
    if (error == cudaSuccess && job.refining) error = scan();
  }
  if (error != cudaSuccess) return error;
  return launch(finish_rows_kernel<T>, dim3(uint32_t(job.p.N)), dim3(kFinishThreads),
                RowFinish<T>::smem().bytes, stream, job);
}

#ifndef DLM_SIMT
// In files of their own, for the sake of parallel builds.
extern template cudaError_t start_rows<float>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<BFloat16>(ConfidenceLaunch, cudaStream_t);
extern template cudaError_t start_rows<Float16>(ConfidenceLaunch, cudaStream_t);
#endif

// `workspace` has workspace_of(p) bytes, aligned to 16.
inline cudaError_t start_token_confidence(const TokenConfidenceParams& p, void* workspace,
                                          cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  FloorSearch* searches = static_cast<FloorSearch*>(workspace);
  float* sums = reinterpret_cast<float*>(searches + searches_of(p));
  const ConfidenceLaunch job{p,     sums, searches, uint32_t(chunks_of(p)), false, Filter::kCount, 0};
  if (p.dtype == DType::kFloat32) return start_rows<float>(job, stream);
  if (p.dtype == DType::kFloat16) return start_rows<Float16>(job, stream);
  return start_rows<BFloat16>(job, stream);
}

}  // namespace dlm::cuda
