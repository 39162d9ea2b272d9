// SPDX-License-Identifier: Apache-2.0
// The launches of token_confidence. A scan summarizes a row chunk by chunk
// (token_confidence_scan.cuh). If rows are filtered, a search finds their floors
// (token_confidence_filter.cuh); if moreover the statistics describe what is kept, the chunks that
// reach the floor are scanned again. A block then finishes each row (token_confidence_finish.cuh).
// Chunks are summarized independently, so a row's bits do not depend on the batch. Rows that are
// not filtered are read once: V elements. Needs sm_80.
#pragma once
#include "cuda/token_confidence_filter.cuh"
#include "cuda/token_confidence_finish.cuh"
#include "cuda/token_confidence_scan.cuh"
#include "cuda/token_confidence_shard.cuh"

namespace dlm::cuda {

inline bool is_adjusted(const TokenConfidenceParams& p) { return p.uncond_logits || p.bias; }
inline bool may_filter(const TokenConfidenceParams& p) {
  return (p.top_k || p.top_p) && (p.temperature || p.distribution == Distribution::kFiltered);
}
inline int64_t chunks_of(const TokenConfidenceParams& p) {
  return (p.columns() + kRaceChunk - 1) / kRaceChunk;
}
// Searches come first, because they are aligned to 16 bytes.
inline int64_t searches_of(const TokenConfidenceParams& p) { return may_filter(p) ? p.N : 0; }
inline int64_t workspace_of(const TokenConfidenceParams& p) {
  return searches_of(p) * int64_t(sizeof(FloorSearch)) +
         p.N * 4 * chunks_of(p) * int64_t(sizeof(float));
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
  if (job.p.partial) {
    return launch(finish_shard_kernel<T>, dim3(uint32_t(job.p.N)), dim3(kFinishThreads),
                  ShardFinish<T>::smem().bytes, stream, job);
  }
  return launch(finish_rows_kernel<T>, dim3(uint32_t(job.p.N)), dim3(kFinishThreads),
                RowFinish<T>::smem().bytes, stream, job);
}

// `workspace` has workspace_of(p) bytes, aligned to 16.
template <class T>
cudaError_t start_as(const TokenConfidenceParams& p, void* workspace, cudaStream_t stream) {
  FloorSearch* searches = static_cast<FloorSearch*>(workspace);
  float* sums = reinterpret_cast<float*>(searches + searches_of(p));
  return start_rows<T>({p, sums, searches, uint32_t(chunks_of(p)), false, Filter::kCount, 0, 0,
                        uint32_t(p.first) / kRaceChunk},
                       stream);
}

}  // namespace dlm::cuda
