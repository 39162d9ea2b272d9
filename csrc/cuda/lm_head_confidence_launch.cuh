// SPDX-License-Identifier: Apache-2.0
// The scan of some rows, in the smallest sufficient tiles: see lm_head_confidence.cuh.
#pragma once
#include "cuda/lm_head_confidence_scan.cuh"

namespace dlm::cuda {

// Number of output rows in a tile of `rows` rows.
inline int64_t head_rows_of(const LmHeadConfidenceParams& p, int64_t rows) {
  return p.uncond_hidden ? rows / 2 : rows;
}
// Number of rows of the largest tile.
template <class T>
constexpr int kMostHeadRows = std::is_same_v<T, float> ? 32 : 128;

template <class T, int kRows>
cudaError_t start_head_tiles(HeadLaunch job, cudaStream_t stream) {
  const int64_t rows = job.end - job.first, of_tile = head_rows_of(job.p, kRows);
  job.tiles = uint32_t((rows + of_tile - 1) / of_tile);
  return launch(scan_head_kernel<T, kRows>, dim3(job.chunks * job.tiles), dim3(kHeadThreads),
                HeadScan<T, kRows>::smem().bytes, stream, job);
}

template <class T>
cudaError_t start_head_scan(const HeadLaunch& job, cudaStream_t stream) {
  const int64_t rows = job.end - job.first;
  if (rows <= head_rows_of(job.p, 16)) return start_head_tiles<T, 16>(job, stream);
  if constexpr (kMostHeadRows<T> > 32) {
    if (rows > head_rows_of(job.p, 64)) return start_head_tiles<T, 128>(job, stream);
    if (rows > head_rows_of(job.p, 32)) return start_head_tiles<T, 64>(job, stream);
  }
  return start_head_tiles<T, 32>(job, stream);
}

}  // namespace dlm::cuda
